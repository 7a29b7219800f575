"""The data group: every format, conversion, mixture, split and limit; every bad input's message; rows as token ids."""

import gzip
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import LlamaForSequenceClassification
from trl import GRPOTrainer, extract_prompt

from rlhf_trl import data
from rlhf_trl.data.build import build_dataset
from rlhf_trl.data.file_rows import resolve_paths
from rlhf_trl.data.row_types import shared_prompt
from rlhf_trl.data.sources.mixture import mixture_counts
from rlhf_trl.data.splits import prompt_keys
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.reward_modeling.config import RewardConfig
from rlhf_trl.reward_modeling.trainer import RewardTrainer
from tests.helpers.chat_tokenizers import CHATML, chatml_tokenizer
from tests.helpers.data import assistant, load, tiny_model, user, write
from tests.helpers.tiny import make_tokenizer

CONF = Path(__file__).parents[3] / "conf" / "data"
PAIRS = [{"prompt": f"q{i % 20}", "chosen": f" good {i}", "rejected": f" bad {i}", "id": i} for i in range(60)]


def error(path, dataset_type="preference", kind=DataError, **options) -> str:
    with pytest.raises(kind) as caught:
        load(path, dataset_type, **options)
    return str(caught.value)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "lines.json"])
def test_every_file_format_gives_the_same_rows(tmp_path, ending):
    path = tmp_path / f"pairs.{ending}"
    rows = [{"prompt": f"q{i}", "chosen": 'yes,\n"indeed"', "rejected": "é"} for i in range(3)]
    if ending == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif ending == "csv":
        Dataset.from_list(rows).to_csv(path)
    elif ending == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif ending == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        write(path, rows)
    assert load(path)["train"].to_list() == rows


def test_several_files_and_globs(tmp_path, monkeypatch):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "x"}])
    monkeypatch.chdir(tmp_path)  # relative paths mean where the user stands
    rows = data.load_files("prompt", 0, ["c.jsonl", "*.jsonl"])["train"]
    assert rows["prompt"][:] == ["c", "a", "b"]  # a file that is named twice counts once


def test_own_evaluation_files(tmp_path, capsys):
    train, held_out = write(tmp_path / "train.jsonl", PAIRS[:10]), write(tmp_path / "eval.jsonl", PAIRS[8:14])
    loaded = load(train, eval_paths=held_out, eval_size=0.5)
    assert (len(loaded["train"]), len(loaded["eval"])) == (8, 6)
    assert "train: 2 rows dropped whose prompts are held out" in capsys.readouterr().out
    loaded = load(train, eval_paths=held_out, split_by="row")
    assert (len(loaded["train"]), len(loaded["eval"])) == (10, 6)
    assert "note: 2 of 6 eval rows have a prompt that train has too" in capsys.readouterr().out
    message = error(held_out, eval_paths=held_out)
    assert "every row of train has a prompt that is held out. Set `data.split_by=row`" in message


def test_paths_that_name_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        resolve_paths(["no.jsonl", "folder", "notes.txt"])
    message = str(caught.value)
    assert "`data.paths`: `no.jsonl` names no file" in message and str(tmp_path) in message
    assert "`folder` is a folder. Name its files: `data.paths='folder/*.jsonl'`" in message
    assert "`notes.txt` has an ending that isn't known. Give it one of .jsonl, .json, .csv, .tsv, .parquet." in message


def test_a_preference_file_serves_every_form(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", PAIRS[:2])
    assert load(path)["train"][0] == {"prompt": "q0", "chosen": " good 0", "rejected": " bad 0"}
    assert "columns dropped: id" in capsys.readouterr().out
    assert load(path, "prompt_completion")["train"][0] == {"prompt": "q0", "completion": " good 0"}
    assert "preference -> prompt_completion: `chosen` is the completion" in capsys.readouterr().out
    assert load(path, "unpaired")["train"].to_list()[:2] == [
        {"prompt": "q0", "completion": " good 0", "label": True},
        {"prompt": "q0", "completion": " bad 0", "label": False},
    ]
    assert load(path, "prompt")["train"][1] == {"prompt": "q1", "id": 1}  # further columns are for reward functions


def test_prompt_keeps_columns_for_rewards_but_none_that_trl_would_take_for_the_format(tmp_path):
    rows = [{"prompt": [user("2+2")], "completion": "4", "messages": "m", "label": 4, "answer": 4.0, "tags": ["x"]}]
    loaded = load(write(tmp_path / "a.jsonl", rows), "prompt", row_type="prompt")["train"]
    assert loaded.to_list() == [{"prompt": [user("2+2")], "label": 4, "answer": 4.0, "tags": ["x"]}]


def test_implicit_prompt_of_a_chat(tmp_path, capsys):
    turns = [user("hi"), assistant("hello"), user("how?")]
    row = {"chosen": [*turns, assistant("well")], "rejected": [*turns, assistant("badly")]}
    loaded = load(write(tmp_path / "a.jsonl", [row]))["train"][0]
    assert loaded == {"prompt": turns, "chosen": [assistant("well")], "rejected": [assistant("badly")]}
    assert loaded == extract_prompt(row)
    assert "the prompt is the turns that `chosen` and `rejected` begin with (1 rows)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is red.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # not "The sky is bl"
        ("Human: hi\nAssistant:Yes", "Human: hi\nAssistant:No", "Human: hi\nAssistant:"),
        ("The sky is", "The sky is blue", "The sky"),  # nothing is left empty
    ],
)
def test_implicit_prompt_of_text_ends_at_a_word(chosen, rejected, prompt):
    length = shared_prompt(chosen, rejected)
    assert chosen[:length] == rejected[:length] == prompt


def test_implicit_prompt_of_text_is_trls_where_words_part_at_once():
    row = {"chosen": "The sky is blue.", "rejected": "The sky is red."}
    length = shared_prompt(**row)
    assert extract_prompt(row)["prompt"] == row["chosen"][:length]


def test_a_text_prompt_beside_whole_conversations(tmp_path):
    # as in trl-lib/ultrafeedback_binarized: the prompt as text, and once more in both conversations
    row = {"prompt": "hi", "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}
    row["messages"] = row["chosen"]
    path = write(tmp_path / "a.jsonl", [row])
    assert load(path)["train"][0] == {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert load(path, "prompt")["train"][0] == {"prompt": [user("hi")]}


def test_a_chat_prompt_repeated_in_the_answers(tmp_path):
    turns = [user("a"), assistant("b"), user("c")]
    row = {"prompt": turns[:1], "chosen": [*turns, assistant("x")], "rejected": [*turns, assistant("y")]}
    loaded = load(write(tmp_path / "a.jsonl", [row]))["train"][0]
    assert loaded["prompt"] == turns[:1] and loaded["chosen"] == [*turns[1:], assistant("x")]
    row = {"prompt": turns, "completion": [*turns, assistant("x")]}
    loaded = load(write(tmp_path / "b.jsonl", [row]), "prompt_completion")["train"][0]
    assert loaded == {"prompt": turns, "completion": [assistant("x")]}


def test_text_and_chat_in_one_row_become_chat(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"prompt": "hi", "completion": [assistant("a")]}])
    assert load(path, "prompt_completion")["train"][0] == {"prompt": [user("hi")], "completion": [assistant("a")]}
    assert "text prompts became user turns (1 rows)" in capsys.readouterr().out
    path = write(tmp_path / "b.jsonl", [{"prompt": [user("hi")], "completion": "a"}])
    assert load(path, "prompt_completion")["train"][0] == {"prompt": [user("hi")], "completion": [assistant("a")]}


def test_messages(tmp_path):
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}])
    split = {"prompt": turns[:3], "completion": turns[3:]}
    assert load(path, "prompt_completion")["train"][0] == split
    assert load(path, "prompt_completion", messages="whole")["train"][0] == {"messages": turns}
    assert load(path, "prompt")["train"][0] == {"prompt": turns[:3]}
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in turns]
    path = write(tmp_path / "b.jsonl", [{"conversations": sharegpt}])
    assert load(path, "prompt_completion")["train"][0] == split


def test_plain_text_and_unpaired(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "Once"}, {"text": "upon"}])
    assert load(path, "prompt_completion")["train"].to_list() == [{"text": "Once"}, {"text": "upon"}]
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, 0, "true", "False", 1)]
    (tmp_path / "b.csv").write_text("prompt,completion,label\n" + "".join(f"q,a,{r['label']}\n" for r in rows))
    assert load(tmp_path / "b.csv", "unpaired")["train"]["label"][:] == [True, False, True, False, True]
    assert len(load(tmp_path / "b.csv", "prompt_completion")["train"]) == 3
    assert "2 rows labelled false dropped" in capsys.readouterr().out


def test_columns_format_to_chat_and_system_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "better": "a", "worse": "b", "margin": 1}])
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse", "label": None}
    loaded = load(path, columns=columns, to_chat=True, system_prompt="Be brief.", row_type="preference")["train"][0]
    system = {"role": "system", "content": "Be brief."}
    assert loaded["prompt"] == [system, user("q")]
    assert (loaded["chosen"], loaded["rejected"], loaded["margin"]) == ([assistant("a")], [assistant("b")], 1.0)
    own = write(tmp_path / "b.jsonl", [{"messages": [{"role": "system", "content": "x"}, user("a"), assistant("b")]}])
    assert load(own, "prompt", system_prompt="Be brief.")["train"][0]["prompt"][0]["content"] == "x"


def test_split_without_leakage(tmp_path):
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    loaded = load(path, "unpaired", eval_size=4)
    train, held_out = (set(prompt_keys(loaded[side])) for side in ("train", "eval"))
    assert not train & held_out and len(train | held_out) == 20
    assert len(loaded["eval"]) == 24 and len(loaded["train"]) == 96
    assert load(path, "unpaired", eval_size=4)["eval"].to_list() == loaded["eval"].to_list()
    other = data.load_files("unpaired", 1, path, eval_size=4)  # stages may have other seeds
    assert other["eval"].to_list() == loaded["eval"].to_list()
    assert len(load(path, eval_size=7, split_by="row")["eval"]) == 7
    assert "eval" not in load(path, eval_size=None)


def test_a_split_that_can_not_be(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**row, "prompt": "Review:"} for row in PAIRS])
    message = error(path, eval_size=0.1)
    assert "the rows have 1 distinct prompt, and `data.eval_size=0.1`" in message
    assert "`data.split_by=row`" in message and "`data.eval_size=null`" in message
    assert len(load(path, eval_size=6, split_by="row")["eval"]) == 6


def test_limits_are_said_and_deterministic(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    options = {"eval_size": 4, "max_samples": 5, "max_eval_samples": 3}
    loaded = load(path, "prompt", **options)
    out = capsys.readouterr().out
    assert "`max_samples=5`: 5 of 48 rows kept" in out and "`max_eval_samples=3`: 3 of 12 rows kept" in out
    ids = loaded["train"]["id"][:]
    assert len(ids) == 5 and ids == sorted(ids) and ids != list(range(5))
    assert load(path, "prompt", **options)["train"]["id"][:] == ids


def test_only_the_first_rank_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load(write(tmp_path / "pairs.jsonl", PAIRS))
    assert capsys.readouterr().out == ""


def test_summary_is_one_short_block(tmp_path, capsys):
    for i in range(12):
        write(tmp_path / f"{i:02}.jsonl", PAIRS[5 * i : 5 * i + 5])
    load(tmp_path / "*.jsonl", eval_size=4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data: preference, text: train 48 rows (16 prompts), eval 12 rows (4 prompts)"
    assert lines[1] == f"  {tmp_path}/00.jsonl and 11 more: 60 rows of preference"
    assert len(lines) == 4


def test_malformed_rows_are_one_error(tmp_path):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [
        good,
        '{"prompt": "q", "chosen": ',
        "",
        {"prompt": "q", "chosen": "a"},
        {**good, "prompt": None},
        {**good, "chosen": 3},
        {**good, "rejected": "  "},
        {**good, "rejected": "a"},
        "[1]",
    ]
    path = write(tmp_path / "a.jsonl", rows)
    assert error(path).splitlines() == [
        "7 malformed rows:",
        f"  {path}, line 2 isn't valid JSON (Expecting value, column 26)",
        f"  {path}, line 4: `rejected` is missing",
        f"  {path}, line 5: `prompt` is null",
        f"  {path}, line 6: `chosen` is a number (3), where text or a list of messages should be",
        f"  {path}, line 7: `rejected` is empty",
        "  ... and 2 more",
        "Fix them, or set `data.bad_rows=drop` to drop and count them.",
    ]


def test_malformed_rows_of_evaluation_are_in_the_same_error(tmp_path):
    train = write(tmp_path / "a.jsonl", [PAIRS[0], {"prompt": "q"}])
    held_out = write(tmp_path / "b.jsonl", [PAIRS[0], "{"])
    message = error(train, eval_paths=held_out)
    assert (
        "2 malformed rows" in message and "a.jsonl, line 2: `chosen`" in message and "b.jsonl, line 2 isn't" in message
    )


def test_bad_rows_drop_is_counted(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [PAIRS[0], "{", {"prompt": "q"}])
    assert len(load(path, bad_rows="drop")["train"]) == 1
    out = capsys.readouterr().out
    assert "2 malformed rows dropped (`bad_rows=drop`)" in out and "line 2 isn't valid JSON" in out


@pytest.mark.parametrize(
    ("dataset_type", "row", "message"),
    [
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "`rejected` is the same as `chosen`"),
        ("preference", {"chosen": "abc", "rejected": "xyz"}, "`rejected` shares no prompt with `chosen`"),
        ("preference", {**PAIRS[0], "margin": "wide"}, "`margin` is 'wide', where a number should be"),
        ("preference", {**PAIRS[0], "margin": float("nan")}, "`margin` is nan, where a finite number should be"),
        ("unpaired", {"prompt": "q", "completion": "a", "label": 2}, "`label` is 2, where true or false should be"),
        ("unpaired", {"prompt": "q", "completion": "a", "label": None}, "`label` is None, where true or false"),
        ("prompt", {"prompt": []}, "`prompt` is an empty list"),
        ("prompt", {"prompt": [{"role": "usr", "content": "x"}]}, "`prompt[0].role` is `usr`, not one of system,"),
        ("prompt", {"prompt": [{"content": "x"}]}, "`prompt[0].role` is missing, it should be one of system,"),
        ("prompt", {"prompt": [{"role": "user", "content": None}]}, "`prompt[0].content` is missing or null"),
        (
            "prompt",
            {"prompt": [{"role": "user", "content": [1]}]},
            "`prompt[0].content[0]` is a number (1), where a part of the type `text` or `image` should",
        ),
        ("prompt", {"prompt": [user(" ")]}, "`prompt[0].content` is empty"),
        ("prompt", {"prompt": ["hi"]}, "`prompt[0]` is text, where a message with `role` and `content` should be"),
        ("prompt", {"prompt": [user("a"), assistant("b")]}, "`prompt` ends with a turn of `assistant`"),
        ("prompt_completion", {"messages": [user("a")]}, "`messages` ends with a turn of `user`"),
        ("prompt_completion", {"messages": [assistant("a")]}, "`messages` holds no turn before the assistant's"),
        ("prompt_completion", {"messages": "a"}, "`messages` is text, where a list of messages should be"),
        ("prompt_completion", {"text": ""}, "`text` is empty"),
        (
            "preference",
            {"prompt": "other", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "`prompt` isn't a turn of the conversation in `chosen`",
        ),
    ],
)
def test_every_bad_row_is_named(tmp_path, dataset_type, row, message):
    assert f"a.jsonl, line 1: {message}" in error(write(tmp_path / "a.jsonl", [row]), dataset_type)


def test_bad_rows_are_named_by_the_files_own_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "q", "a": [{"role": "bot", "content": "x"}]}])
    message = error(path, "prompt_completion", columns={"prompt": "q", "completion": "a"})
    assert "`a[0].role` is `bot`" in message
    path = write(tmp_path / "b.jsonl", [{"conversations": [{"from": "martian", "value": "x"}]}])
    assert "`conversations[0].role` is `martian`" in error(path, "prompt_completion")


def test_a_row_of_another_kind_than_the_first(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "text"}, {"prompt": [user("chat")]}])
    message = error(path, "prompt")
    assert "line 2 holds chat prompts, but text prompts at" in message and "`data.to_chat=true`" in message
    assert len(load(path, "prompt", to_chat=True)["train"]) == 2
    path = write(tmp_path / "c.jsonl", [{**PAIRS[0], "margin": 1}, PAIRS[1]])
    assert "line 2: `margin` is None, where a number should be" in error(path)
    without = write(tmp_path / "d.jsonl", PAIRS[:1])
    assert "d.jsonl, line 1 holds text prompts, but text prompts with a margin at" in error(
        write(tmp_path / "e.jsonl", [{**PAIRS[0], "margin": 1}]), eval_paths=without
    )
    path = write(tmp_path / "b.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "one"}])
    assert "line 2: `answer` is text, of another type than at" in error(path, "prompt")


def test_missing_columns_say_what_to_type(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "better": "a", "worse": "b"}])
    message = error(path)
    assert "can't give rows of the dataset type `preference`: `chosen`, `rejected` missing" in message
    assert "It has the columns `prompt`, `better`, `worse`, so it holds `prompt` rows" in message
    assert "Set `data.columns.chosen=NAME data.columns.rejected=NAME`" in message
    message = error(path, columns={"chosen": "beter"})
    assert "has no column `beter`" in message and "Did you mean `better`?" in message
    assert "Did you mean `chosen`?" in error(path, columns={"choosen": "better"})
    assert "`data.row_type=text` can't give this stage" in error(path, row_type="text")
    assert "`completion`, `label` missing" in error(path, "unpaired", row_type="unpaired")


def test_options_that_do_not_fit(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIRS)
    message = error(path, kind=ConfigError, row_type="preferences", bad_rows="skip", max_samples=0, eval_size=1.5)
    assert message.startswith("4 problems:") and "Did you mean `preference`?" in message
    assert "`data.max_samples=0` keeps no rows" in message and "`data.eval_size=1.5` isn't a size" in message
    assert "Set `data.to_chat=true`" in error(path, system_prompt="Be brief.")
    text = write(tmp_path / "b.jsonl", [{"text": "x"}])
    assert "which has no turns" in error(text, "prompt_completion", to_chat=True)


def test_options_of_another_type_are_all_named(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIRS)
    assert error(path, kind=ConfigError, columns={"prompt": 5}, system_prompt=5).splitlines() == [
        "2 problems:",
        "  1. `data.columns.prompt` is 5 and must be text in quotes or a list or null.",
        "  2. `data.system_prompt` is 5 and must be text in quotes or null.",
    ]
    with pytest.raises(ConfigError, match="`data.name` is 2024 and must be text in quotes or null"):
        data.load_hub("preference", 0, "user/name", name=2024)
    with pytest.raises(ConfigError, match="`data.weights.a` is 'x' and must be a number"):
        data.mix("preference", 0, {}, weights={"a": "x"})
    with pytest.raises(ConfigError, match="`data.split_by=promt` isn't known"):
        data.mix("preference", 0, {}, split_by="promt")


def test_rows_that_are_of_no_use_say_why(tmp_path):
    rows = [{"prompt": "q", "completion": "a", "label": False}] * 3
    message = error(write(tmp_path / "a.jsonl", rows), "prompt_completion")
    assert "no rows are left for `train`:" in message and "3 rows labelled false dropped" in message


def test_files_that_can_not_be_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no rows" in error(tmp_path / "empty.jsonl")
    (tmp_path / "broken.json").write_text('[\n{"prompt": "a"},\n{"prompt" "b"}\n]')
    assert "broken.json, line 3 isn't valid JSON (Expecting ':' delimiter" in error(tmp_path / "broken.json", "prompt")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    assert "latin.jsonl, line 2 isn't UTF-8 text (byte 13)" in error(tmp_path / "latin.jsonl", "prompt")
    (tmp_path / "short.csv").write_text('prompt,completion\n"two\nlines",a\nq\nr,b\n')
    assert "short.csv, line 4 has 1 values where the header names 2" in error(tmp_path / "short.csv", "prompt")
    (tmp_path / "quote.csv").write_text('prompt\na\n"b" c\nd\n')
    message = error(tmp_path / "quote.csv", "prompt", bad_rows="drop")  # dropping it would drop the rest, uncounted
    assert "quote.csv, line 3 can't be read as CSV" in message and "the rest of the file can't be read" in message
    write(tmp_path / "half.jsonl", [{"prompt": "a"}, '{"prompt": "\\ud800"}'])
    assert "half.jsonl, line 2: `prompt` holds half of a surrogate pair" in error(tmp_path / "half.jsonl", "prompt")
    (tmp_path / "fake.parquet").write_text("no")
    assert "fake.parquet can't be read as parquet" in error(tmp_path / "fake.parquet", "prompt")


def test_a_folder_of_save_to_disk(tmp_path):
    rows = Dataset.from_list(PAIRS)
    DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(tmp_path / "both")
    loaded = data.load_hub("preference", 0, str(tmp_path / "both"), eval_split="test")
    assert (len(loaded["train"]), len(loaded["eval"])) == (45, 5)  # five prompts, of three rows each, are test's
    rows.save_to_disk(tmp_path / "one")
    assert len(data.load_hub("prompt", 0, str(tmp_path / "one"), eval_size=4)["eval"]) == 12
    with pytest.raises(DataError, match=r"has the splits `train`, `test`\. Did you mean `test`\?"):
        data.load_hub("prompt", 0, str(tmp_path / "both"), eval_split="tests")


def test_a_hub_dataset_goes_through_load_dataset(monkeypatch):
    def load_dataset(path, name, split, revision):
        assert (path, name, revision) == ("user/name", "small", "v1")
        if split == "none":
            raise ValueError('Unknown split "none". Should be one of ["train"].')
        return Dataset.from_list([*PAIRS, {"prompt": "q", "chosen": None, "rejected": "b", "id": 1}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    options = {"path": "user/name", "name": "small", "revision": "v1"}
    with pytest.raises(DataError, match=r"user/name \(train\), row 61: `chosen` is null"):
        data.load_hub("preference", 0, **options)
    assert len(data.load_hub("preference", 0, bad_rows="drop", **options)["train"]) == 60
    with pytest.raises(DataError, match=r"\(split `none`\) can't be loaded: Unknown split .*`data=files data\.paths="):
        data.load_hub("preference", 0, split="none", **options)


def test_folders_that_hold_no_whole_dataset(tmp_path):
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"no")
    with pytest.raises(DataError, match="saved` is incomplete: .* Save it again."):
        data.load_hub("preference", 0, str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="saved` is incomplete: .*_data_files"):
        data.load_hub("preference", 0, str(tmp_path / "saved"))
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("")
    with pytest.raises(DataError, match="can't be loaded: Dataset scripts are no longer supported"):
        data.load_hub("preference", 0, str(tmp_path / "script"))


def test_a_dataset_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="`data.path=no/such` .* can't be loaded"):
        data.load_hub("preference", 0, "./no/such".removeprefix("./"))


def source(name, size, **options):
    rows = [
        (f"{name}, row {i}", {"prompt": f"{name}{i}", "chosen": "a", "rejected": "b", "from": name})
        for i in range(size)
    ]
    return lambda dataset_type, seed: build_dataset(dataset_type, seed, [(name, rows)], **options)


@pytest.mark.parametrize(
    ("weights", "repeat", "counts"),
    [
        (None, False, {"a": 100, "b": 30}),
        ({"a": 1, "b": 1}, False, {"a": 30, "b": 30}),
        ({"a": 3, "b": 1}, False, {"a": 90, "b": 30}),
        ({"a": 0.9, "b": 0.1}, False, {"a": 100, "b": 11}),
        ({"a": 1, "b": 1}, True, {"a": 100, "b": 100}),
    ],
)
def test_mixture_counts(weights, repeat, counts):
    assert mixture_counts({"a": 100, "b": 30}, weights, repeat) == counts


def test_mix_by_weight(capsys):
    sources = {"a": source("a", 100), "b": source("b", 30)}
    mixed = data.mix("prompt", 0, sources, {"a": 3, "b": 1})["train"]
    assert len(mixed) == 120 and sorted(mixed["from"][:]).count("b") == 30 and len(set(mixed["prompt"][:])) == 120
    out = capsys.readouterr().out
    assert "a: 90 of 100 rows (75.0% of the mixture)" in out and "b: 30 of 30 rows (25.0% of the mixture)" in out
    assert data.mix("prompt", 0, sources, {"a": 3, "b": 1})["train"].to_list() == mixed.to_list()
    repeated = data.mix("prompt", 0, sources, {"a": 1, "b": 1}, repeat=True, max_samples=150)["train"]
    assert len(repeated) == 150
    assert set(data.mix("prompt", 0, sources, {"a": 1, "b": 1}, repeat=True)["train"]["prompt"][:]) == {
        *(f"a{i}" for i in range(100)),
        *(f"b{i}" for i in range(30)),
    }


def test_mix_does_not_leak(capsys):
    sources = {"a": source("a", 50, eval_size=10), "again": source("a", 50)}
    mixed = data.mix("preference", 0, sources)
    assert len(mixed["eval"]) == 10 and not set(mixed["eval"]["prompt"][:]) & set(mixed["train"]["prompt"][:])
    assert "again: 10 rows dropped whose prompts are held out" in capsys.readouterr().out
    assert len(data.mix("preference", 0, sources, split_by="row")["train"]) == 90


def test_a_mixture_holds_out_what_files_to_come_will(capsys):
    """The labels of a later round are split by the same hash, so that nothing they hold out was trained on before."""
    earlier = data.mix("preference", 0, {"a": source("a", 200)}, hold_out=0.25)
    assert set(earlier) == {"train"} and "rows dropped whose prompts are held out" in capsys.readouterr().out
    later = source("a", 100, eval_size=0.25)(dataset_type="preference", seed=1)
    held_out, trained = set(later["eval"]["prompt"][:]), set(earlier["train"]["prompt"][:])
    assert len(held_out) > 10 and not held_out & trained and set(later["train"]["prompt"][:]) <= trained
    again = data.mix(
        "preference", 0, {"first": source("a", 200), "later": source("a", 100, eval_size=0.25)}, hold_out=0.25
    )
    assert set(again["eval"]["prompt"][:]) == held_out and set(again["train"]["prompt"][:]) == trained
    with pytest.raises(ConfigError, match="`data.hold_out=1.0` is no share"):
        data.mix("preference", 0, {"a": source("a", 9)}, hold_out=1.0)
    with pytest.raises(ConfigError, match="`data.split_by=row` splits by rows"):
        data.mix("preference", 0, {"a": source("a", 9)}, hold_out=0.25, split_by="row")


def test_mixtures_that_can_not_be():
    with pytest.raises(ConfigError) as caught:
        data.mix("prompt", 0, {"own": source("a", 3), "hub": source("b", 3)}, {"owm": 1, "hub": 0})
    message = str(caught.value)
    assert "`data.weights.owm` names no source. Did you mean `own`?" in message
    assert "`own` has no weight" in message and "`data.weights.hub=0` is no share" in message
    with pytest.raises(DataError, match="several kinds .*`data.sources.NAME.to_chat=true`"):
        data.mix("prompt", 0, {"a": source("a", 3), "b": source("b", 3, to_chat=True)})
    with pytest.raises(DataError, match="in the source `a` .*has no column `no`"):
        data.mix("prompt", 0, {"a": source("a", 3, columns={"prompt": "no"})})


@pytest.mark.parametrize(
    ("name", "functions"),
    [("files", ("load_files", "LoadOptions")), ("hub", ("load_hub", "LoadOptions")), ("mix", ("mix",))],
)
def test_configs_declare_what_the_functions_take(name, functions):
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    keys = set(config) - {"defaults"} | {"feedback" for default in config.get("defaults", []) if "feedback" in default}
    taken = {key for function in functions for key in inspect.signature(getattr(data, function)).parameters}
    hidden = {"dataset_type", "seed", "options", "train", "held_out"}
    assert keys - {"_target_", "_partial_", "_convert_"} == taken - hidden


def test_configs_load_data(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": f"q{i}", "better": "a", "worse": "b"} for i in range(20)])
    with initialize_config_dir(str(CONF.parent), version_base="1.3"):
        columns = ["data.columns.prompt=question", "data.columns.chosen=better", "data.columns.rejected=worse"]
        cfg = compose("train", ["stage=dpo", "data=files", f"data.paths={path}", *columns])
        loaded = instantiate(cfg.data)(dataset_type="preference", seed=cfg.seed)
        assert {side: len(rows) for side, rows in loaded.items()} == {"train": 18, "eval": 2}  # a tenth, about


def test_the_head_of_mix_is_a_working_experiment(tmp_path):
    lines = (CONF / "mix.yaml").read_text().splitlines()[1:]
    head = "\n".join(line[4:] for line in lines if line.startswith("#  "))
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{head}\n")
    own, saved = write(tmp_path / "own.jsonl", PAIRS), str(tmp_path / "saved")
    Dataset.from_list([{**row, "prompt": f"other {i}"} for i, row in enumerate(PAIRS)]).save_to_disk(saved)
    overrides = [f"hydra.searchpath=[file://{tmp_path}]", "stage=dpo", "experiment=mine"]
    with initialize_config_dir(str(CONF.parent), version_base="1.3"):
        cfg = compose("train", [*overrides, f"data.sources.own.paths={own}", f"data.sources.hub.path={saved}"])
    mixed = instantiate(cfg.data)(dataset_type="preference", seed=cfg.seed)
    own, hub = (sum(row["prompt"].startswith(kind) for row in mixed["train"]) for kind in ("q", "other"))
    assert (own, hub) == (54, 18)  # three shares, and one


CHATS = [
    [user("Hi 12?")],
    [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("\n c ")],
]


def test_prompt_ids_are_those_that_trl_generates_from():
    tokenizer = chatml_tokenizer()
    # the method reads these attributes alone: a trainer with a model is not needed
    trainer = SimpleNamespace(
        processing_class=tokenizer,
        _is_vlm=False,
        environment_factories=None,
        tools=[],
        chat_template=None,
        chat_template_kwargs={},
    )
    for prompts in (CHATS, ["The sky is", " 12"]):
        assert GRPOTrainer._tokenize_prompts(trainer, prompts)[0] == [data.prompt_ids(tokenizer, p) for p in prompts]


@pytest.mark.parametrize("prompt", CHATS)
def test_row_ids_of_a_chat_end_at_eos(prompt):
    tokenizer = chatml_tokenizer()
    ids = data.row_ids(tokenizer, prompt, [assistant("Hello.")])
    generated = tokenizer("Hello.")["input_ids"] + [tokenizer.eos_token_id]  # no newline after it
    assert ids == data.prompt_ids(tokenizer, prompt) + generated
    assert data.row_ids(tokenizer, prompt, [assistant("Hello.")], eos=False) == ids[:-1]


def test_row_ids_of_text():
    tokenizer = chatml_tokenizer()
    expected = tokenizer("The sky is")["input_ids"] + tokenizer(" blue")["input_ids"] + [tokenizer.eos_token_id]
    assert data.row_ids(tokenizer, "The sky is", " blue") == expected
    assert data.row_ids(tokenizer, "The sky is", " blue<|im_end|>") == expected  # not twice
    assert data.row_ids(tokenizer, "The sky is", " blue", eos=False) == expected[:-1]


def test_row_ids_where_tokens_merge_across_the_border():
    tokenizer = chatml_tokenizer(merges=[("Ċ", "Ċ")])  # two newlines are one token
    prompt = data.prompt_ids(tokenizer, CHATS[0])
    ids = data.row_ids(tokenizer, CHATS[0], [assistant("\nHi")])
    assert ids == prompt + tokenizer("\nHi")["input_ids"] + [tokenizer.eos_token_id]


def test_row_ids_where_the_generation_prompt_holds_more():
    thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n{% endif %}")
    tokenizer = chatml_tokenizer(template=thinking)
    ids = data.row_ids(tokenizer, CHATS[0], [assistant("Hi")])
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\nHi<|im_end|>")


def test_row_ids_of_several_turns_keep_them_all():
    tokenizer = chatml_tokenizer()
    ids = data.row_ids(tokenizer, CHATS[0], [assistant("x"), user("y"), assistant("z")])
    assert tokenizer.decode(ids).endswith(
        "x<|im_end|>\n<|im_start|>user\ny<|im_end|>\n<|im_start|>assistant\nz<|im_end|>"
    )


def test_tokenizers_that_lack_something():
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template. Set `model.chat_template="):
        data.prompt_ids(tokenizer, CHATS[0])
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no EOS token"):
        data.row_ids(tokenizer, "a", "b")


def preferences(count=4):
    rows = [
        {"prompt": CHATS[0], "chosen": [assistant("x" * (i + 1))], "rejected": [assistant("y")]} for i in range(count)
    ]
    return Dataset.from_list(rows)


def test_long_completions_are_left_out_with_their_comparisons_and_counted(capsys):
    tokenizer = chatml_tokenizer()
    length = len(data.row_ids(tokenizer, CHATS[0], [assistant("xx")]))
    rows = data.tokenize_comparisons(DatasetDict(train=preferences()), tokenizer, length)["train"]
    assert [len(ids[0]) for ids in rows["completion_ids"]] == [length - 1, length]
    assert rows[0]["completion_ids"][1] == data.row_ids(tokenizer, CHATS[0], [assistant("y")])
    said = capsys.readouterr().out
    assert f"2 of 8 train completions dropped, longer than `max_length={length}` tokens" in said
    assert "with them 2 comparisons; 2 of 4 rows say nothing more and are dropped" in said
    assert len(data.tokenize_comparisons(preferences(), tokenizer, None)) == 4
    with pytest.raises(DataError, match=r"no row is left: .*`max_length=5`.* Set `stage.args.max_length="):
        data.tokenize_comparisons(preferences(), tokenizer, 5)
    # Of three completions one is too long: the comparison of the other two stays, under its new indices
    three = {"prompt": CHATS[0], "completions": [[assistant(text)] for text in ("xxxx", "x", "xx")]}
    row = {**three, "better": [0, 1], "worse": [1, 2], "margin": [1.0, 2.0]}
    kept = data.tokenize_comparisons(Dataset.from_list([row]), tokenizer, length)[0]
    assert (kept["better"], kept["worse"], kept["margin"], len(kept["completion_ids"])) == ([0], [1], [2.0], 2)


def test_reward_trainer_takes_the_ids_as_they_are(tmp_path):
    tokenizer = chatml_tokenizer()
    rows = data.tokenize_comparisons(preferences(), tokenizer, 512)
    args = RewardConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=512)
    model = tiny_model(tokenizer, LlamaForSequenceClassification)
    trainer = RewardTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train_dataset["completion_ids"][:] == rows["completion_ids"][:]
    batch = next(iter(trainer.get_train_dataloader()))
    # pad equals EOS: each row's EOS must be attended to all the same
    assert sorted(batch["attention_mask"].sum(1).tolist()) == sorted(
        len(ids) for row in rows["completion_ids"] for ids in row
    )


def test_filter_prompts(capsys):
    tokenizer = chatml_tokenizer()
    rows = Dataset.from_dict({"prompt": ["a" * i for i in range(1, 11)]})
    assert len(data.filter_prompts(rows, tokenizer, 7)) == 7
    assert (
        "3 of 10 prompts dropped, longer than `max_prompt_length=7` tokens (the longest: 10)"
        in capsys.readouterr().out
    )
    with pytest.raises(DataError, match="the shortest has 1 tokens"):
        data.filter_prompts(rows, tokenizer, 0)


def test_render_batch_marks_each_run_of_trained_tokens():
    tokenizer = make_tokenizer()
    ids = torch.tensor(
        [tokenizer("a b c d e <pad>")["input_ids"], tokenizer("f g <pad> <pad> <pad> <pad>")["input_ids"]]
    )
    real = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    labels = torch.where(torch.tensor([[0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0]]) == 1, ids, -100)
    batch = {"input_ids": ids, "attention_mask": real, "labels": labels}
    assert data.render_batch(tokenizer, batch) == "a[[b c]]d[[e]]\n(3 of 5 tokens trained on)"
    assert data.count_trained(batch) == (4, 7)
    pair = {"input_ids": ids, "attention_mask": real, "completion_mask": labels != -100}
    shown = "chosen:\na[[b c]]d[[e]]\n(3 of 5 tokens trained on)\nrejected:\nf[[g]]\n(1 of 2 tokens trained on)"
    assert data.render_batch(tokenizer, pair) == shown
    judged = data.render_batch(tokenizer, {**pair, "label": torch.tensor([False, True])})
    assert judged == "label: False\na[[b c]]d[[e]]\n(3 of 5 tokens trained on)"


def test_render_sample_of_prompts_and_comparisons():
    tokenizer = chatml_tokenizer()
    assert data.render_sample(tokenizer, {"prompt": "Hi"}).startswith("Hi\n(")
    assert "<|im_start|>assistant\n\n(" in data.render_sample(tokenizer, {"prompt": CHATS[0]})
    row = data.tokenize_comparisons(preferences(1), tokenizer)[0]
    shown = data.render_sample(tokenizer, row)
    assert shown.count("[[") == 0 and "completion 1: better than 2\n" in shown
    assert "x<|im_end|>\ncompletion 2\n" in shown


def test_rows_that_a_trainer_will_cut_are_counted(capsys):
    tokenizer = make_tokenizer()
    rows = {"prompt": ["a b c", "a", "a b c d e f"], "completion": ["d e f g", "b", "c"]}
    dataset = DatasetDict(train=Dataset.from_dict(rows))
    assert data.report_cut_rows(dataset, tokenizer, None) is dataset
    assert capsys.readouterr().out == ""
    assert data.report_cut_rows(dataset, tokenizer, 6) is dataset
    out = capsys.readouterr().out
    assert "2 of 3 train rows are cut after `max_length=6` tokens (the longest: 8); 1 lose the whole completion" in out
    with pytest.raises(DataError, match="all 3 train rows have prompts of `max_length=1` tokens or more"):
        data.report_cut_rows(dataset, tokenizer, 1)


@pytest.mark.parametrize("label", [True, False])
def test_one_label_alone_teaches_nothing(label):
    rows = [{"prompt": f"q{i}", "completion": "a", "label": label} for i in range(3)]
    tokenizer = make_tokenizer()
    one = build_dataset("unpaired", 0, [("one", [(f"row {i}", row) for i, row in enumerate(rows)])])
    with pytest.raises(DataError, match=f"all 3 training rows are labelled {str(label).lower()}.* Give data that has"):
        data.report_cut_rows(one, tokenizer)
    sources = {
        str(kind): lambda dataset_type, seed, kind=kind: build_dataset(
            dataset_type, seed, [("x", [("row", {**rows[0], "label": kind})])]
        )
        for kind in (True, False)
    }
    both = data.mix("unpaired", 0, sources)  # a source with one label has its place beside another one
    assert data.report_cut_rows(both, tokenizer) is both
