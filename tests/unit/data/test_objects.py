"""Objects of any fields (tool calls, tools, template arguments): each keeps its own, and gets no nulls from others."""

import json
from functools import partial

import pytest
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from rlhf_trl import data
from tests.helpers.chat_tokenizers import CHATML, chatml_tokenizer
from tests.helpers.data import assistant, load, tiny_model, user, write


def calls(arguments) -> dict:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


# 55.290184: pandas' JSON reads it as 55.290183999999996
ARGUMENTS = [{"city": "Rome", "at": 55.290184}, {"zone": None}, {"deep": {"list": [{"a": 1}, {"b": None}]}}, {}]


def rows_with_tools() -> list[dict]:
    rows = [
        {"prompt": [user(f"q{i}")], "chosen": [calls(arguments)], "rejected": [assistant("no")], "tools": [arguments]}
        for i, arguments in enumerate(ARGUMENTS)
    ]
    rows[1]["chat_template_kwargs"] = {"thinking": None}
    rows[3]["chat_template_kwargs"] = {"style": "short"}
    return rows


@pytest.mark.parametrize(
    "dataset_type", ["prompt_completion", "preference", "unpaired", "comparisons", "annotated", "prompt"]
)
@pytest.mark.parametrize("mixed", [False, True])
def test_objects_keep_their_own_fields_and_nulls(tmp_path, dataset_type, mixed):
    path = write(tmp_path / "tools.jsonl", rows_with_tools())
    if mixed:
        plain = {"prompt": [user("plain")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
        plain = write(tmp_path / "plain.jsonl", [plain])
        sources = {name: partial(data.load_files, paths=name, eval_size=None) for name in (plain, path)}
        loaded = list(data.mix(dataset_type, 0, sources)["train"])
        (other,) = [row for row in loaded if row["prompt"][0]["content"] == "plain"][:1]
        assert (other["tools"], other["chat_template_kwargs"]) == (None, {})
        loaded = sorted((row for row in loaded if row["prompt"][0]["content"] != "plain"), key=str)
        loaded.sort(key=lambda row: (row["prompt"][0]["content"], not row.get("label", True)))
    else:
        loaded = list(load(path, dataset_type)["train"])
    loaded = loaded[::2] if dataset_type == "unpaired" else loaded
    answer = {"prompt_completion": "completion", "preference": "chosen", "unpaired": "completion"}.get(dataset_type)
    for row, given in zip(loaded, rows_with_tools(), strict=True):
        assert row["prompt"] == given["prompt"] and row["tools"] == given["tools"]
        assert row["chat_template_kwargs"] == given.get("chat_template_kwargs", {})  # TRL passes it on with **
        if dataset_type in ("comparisons", "annotated"):
            assert row["completions"] == [given["chosen"], given["rejected"]]
        elif answer:
            assert row[answer] == given["chosen"]


def test_objects_in_feedback_and_in_columns_for_rewards_keep_their_own_fields(tmp_path):
    answers = [[calls(arguments)] for arguments in ARGUMENTS]
    rows = [{"prompt": "q", "completions": answers, "ranks": [1, 2, 3, 4]}]
    path = write(tmp_path / "ranks.jsonl", rows)
    made = list(load(path, "comparisons", feedback=data.Rankings(shuffle=False))["train"])
    assert made[0]["completions"] == answers
    rows = [{"prompt": f"q{i}", "check": arguments, "n": i} for i, arguments in enumerate(ARGUMENTS)]
    assert list(load(write(tmp_path / "checks.jsonl", rows), "prompt")["train"]) == rows


@pytest.mark.parametrize("source", ["parquet", "disk"])
def test_nulls_of_typed_columns_stand_for_absent_fields_in_what_templates_read(tmp_path, source):
    rows = [{**row, "check": {"a": 1}} for row in rows_with_tools()[:2]]
    rows[0]["check"] = {"b": 2}
    typed = Dataset.from_list(rows)
    assert typed[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"] == {**ARGUMENTS[0], "zone": None}
    if source == "parquet":
        typed.to_parquet(tmp_path / "a.parquet")
        loaded = load(tmp_path / "a.parquet", "preference")["train"]
        prompts = load(tmp_path / "a.parquet", "prompt")["train"]
    else:
        typed.save_to_disk(tmp_path / "a")
        loaded = data.load_hub("preference", 0, str(tmp_path / "a"))["train"]
        prompts = data.load_hub("prompt", 0, str(tmp_path / "a"))["train"]
    assert loaded["chosen"][:] == [[calls(ARGUMENTS[0])], [calls({})]]
    assert loaded["tools"][:] == [[ARGUMENTS[0]], [{}]]
    assert prompts["check"][:] == [{"b": 2, "a": None}, {"a": 1, "b": None}]  # what a reward reads stays as it is


def test_columns_of_json_in_typed_files_keep_their_nulls(tmp_path):
    path = write(tmp_path / "a.jsonl", rows_with_tools())
    saved = load(path, "preference")["train"]
    saved.to_parquet(tmp_path / "a.parquet")
    saved.save_to_disk(tmp_path / "a")
    for loaded in (load(tmp_path / "a.parquet"), data.load_hub("preference", 0, str(tmp_path / "a"))):
        assert list(loaded["train"]) == list(saved)
        assert loaded["train"][1]["chosen"] == [calls({"zone": None})]


def test_no_null_is_trained_on_that_the_file_does_not_hold(tmp_path):
    tokenizer = chatml_tokenizer(
        template=CHATML.replace(
            "{{ message['content'] }}",
            "{{ message['content'] }}{% for call in message.tool_calls or [] %}"
            "{{ call.function.arguments | tojson }}{% endfor %}",
        )
    )
    path = write(tmp_path / "a.jsonl", rows_with_tools())
    texts = [json.dumps(arguments) + "<|im_end|>" for arguments in ARGUMENTS]
    model, reference = (tiny_model(tokenizer, LlamaForCausalLM) for _ in range(2))

    def trained(dataset_type, trainer, config, column, **more):
        args = config(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=None)
        made = trainer(
            model=model, args=args, train_dataset=load(path, dataset_type)["train"], processing_class=tokenizer, **more
        )
        return [tokenizer.decode(row[column]) for row in made.train_dataset]

    whole = trained("prompt_completion", SFTTrainer, SFTConfig, "input_ids")
    chosen = trained("preference", DPOTrainer, DPOConfig, "chosen_ids", ref_model=reference)
    odds = trained("preference", ORPOTrainer, ORPOConfig, "chosen_input_ids")
    labelled = trained("unpaired", KTOTrainer, KTOConfig, "completion_ids", ref_model=reference)[::2]
    compared = data.tokenize_comparisons(load(path, "comparisons")["train"], tokenizer)
    judged = [tokenizer.decode(ids[0]) for ids in compared["completion_ids"]]
    for decoded in (whole, chosen, odds, labelled, judged):
        assert [text in row for row, text in zip(decoded, texts, strict=True)] == [True] * 4
