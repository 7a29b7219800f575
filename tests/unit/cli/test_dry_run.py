"""The plan of a dry run, against what the run then does."""

import json
import re
import shutil

import pytest
import torch
import transformers
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file

from rlhf_trl.cli.dry_run import show_plan
from rlhf_trl.errors import ConfigError
from tests.helpers.tiny import CHAT_TEMPLATE, make_tokenizer, save_gpt2, save_model

GENERATION_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message['content'] }} <eos>", "{% generation %}{{ message['content'] }} <eos>{% endgeneration %}"
)


def write_rows(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat_rows(count: int) -> list[dict]:
    words = "a b c d e f g h".split()
    turns = [("user", words), ("assistant", words[:3]), ("user", words[:2]), ("assistant", words[:5])]
    return [
        {
            "messages": [
                {"role": role, "content": " ".join(text[: 1 + (i + j) % 8])} for j, (role, text) in enumerate(turns)
            ]
        }
        for i in range(count)
    ]


@pytest.fixture
def first_inputs(monkeypatch):
    """Return the inputs of the first training step of the trainers that are made from here on."""
    seen = []
    step = transformers.Trainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", watched)
    return seen


def trained_tokens(inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Tokens with a loss, and all of them, counted by the names that each trainer gives its tensors."""
    if "chosen_labels" in inputs:
        sides = ("chosen", "rejected")
        trained = sum(int((inputs[f"{side}_labels"] != -100).sum()) for side in sides)
        return trained, sum(int(inputs[f"{side}_attention_mask"].sum()) for side in sides)
    total = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
    if "labels" in inputs:
        return int((inputs["labels"] != -100).sum()), total
    return (int(inputs["completion_mask"].sum()) if "completion_mask" in inputs else total), total


def plan_and_run(cfg, capsys) -> str:
    show_plan(cfg)
    shown = capsys.readouterr().out
    instantiate(cfg.stage.run)(cfg)
    return shown


SMALL = ("stage.args.per_device_train_batch_size=8", "stage.args.max_steps=1", "stage.args.eval_on_start=false")


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("sft", []),
        ("sft", ["+stage.args.completion_only_loss=false"]),
        ("sft", ["stage.args.max_length=20"]),
        ("sft", ["+stage.args.packing=true", "stage.args.max_length=64"]),
        ("dpo", ["stage.args.max_length=24"]),
        ("dpo", ["adapter=lora"]),
        ("orpo", []),
        ("kto", []),
        ("reward", []),
    ],
)
def test_the_plans_batch_is_the_trainers(compose, tmp_path, capsys, first_inputs, stage, overrides):
    few = ("data.max_samples=64", "data.max_eval_samples=8")
    cfg = compose(f"stage={stage}", f"runs_dir={tmp_path}", *few, *SMALL, *overrides)
    shown = plan_and_run(cfg, capsys)
    trained, tokens = trained_tokens(first_inputs[0])
    assert f"first batch    {trained:,} of {tokens:,} tokens are trained on" in shown
    assert 0 < trained <= tokens


@pytest.mark.parametrize("save", [save_model, save_gpt2])
@pytest.mark.parametrize(
    ("overrides", "share"), [([], 1.0), (["+stage.args.assistant_only_loss=true"], 0.5)], ids=["whole", "assistant"]
)
def test_the_plans_mask_of_whole_chats_is_the_trainers(
    compose, tmp_path, capsys, first_inputs, save, overrides, share
):
    template = tmp_path / "generation.jinja"
    template.write_text(GENERATION_TEMPLATE)
    rows = write_rows(tmp_path / "chats.jsonl", chat_rows(40))
    model = [f"model.path={save(tmp_path / 'model')}", f"model.chat_template={template}"]
    data = ["data=files", f"data.paths={rows}", "data.messages=whole"]
    length = "stage.args.max_length=64"
    cfg = compose("stage=sft", "model=hf", f"runs_dir={tmp_path}", *model, *data, length, *SMALL, *overrides)
    shown = plan_and_run(cfg, capsys)
    inputs = first_inputs[0]
    trained, tokens = trained_tokens(inputs)
    assert f"first batch    {trained:,} of {tokens:,} tokens are trained on" in shown
    assert trained == tokens if share == 1.0 else trained < 0.7 * tokens
    ids, labels = inputs["input_ids"][0][inputs["attention_mask"][0] == 1], inputs["labels"][0]
    first, row = int((labels != -100).sum()), make_tokenizer().decode(ids)
    text = re.search(r"First row\n  (.*)\n  \((\d+) of (\d+) tokens trained on\)", shown)
    assert (int(text[2]), int(text[3])) == (first, len(ids))
    assert text[1].replace("[[", " ").replace("]]", " ").split() == row.split()
    assert text[1].count("[[") == (1 if share == 1.0 else 2)  # two turns of the assistant's


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rloo"])
def test_the_plans_prompt_is_the_policys_prompt(compose, tmp_path, capsys, monkeypatch, stage):
    given = []
    generate = transformers.LlamaForCausalLM.generate

    def watched(self, input_ids=None, attention_mask=None, **kwargs):
        given.extend(row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True))
        return generate(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", watched)
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": "a b c d"}]}] * 8)
    data = ["data=files", f"data.paths={rows}", "data.eval_size=null", "data.split_by=row"]
    model = ["model=hf", f"model.path={save_model(tmp_path / 'model')}"]
    group = [] if stage == "ppo" else ["stage.args.num_generations=2"]
    reward = ["reward=length", "reward.length.kwargs.max_length=5", "stage.args.max_completion_length=4"]
    cfg = compose(
        f"stage={stage}",
        f"runs_dir={tmp_path}",
        *model,
        *data,
        *SMALL,
        *group,
        *reward,
        "stage.args.steps_per_generation=1",
        "stage.args.gradient_accumulation_steps=1",
    )
    shown = plan_and_run(cfg, capsys)
    assert re.search(r"First row\n  <user> a b c d <assistant>\s*\n", shown)
    assert "(6 tokens, which the policy continues)" in shown
    assert given and all(len(ids) == 6 for ids in given)


def test_what_trl_refuses_is_the_dry_runs_error(compose, tmp_path):
    rows = write_rows(tmp_path / "chats.jsonl", chat_rows(20))
    model = ["model=hf", f"model.path={save_model(tmp_path / 'model')}"]
    data = ["data=files", f"data.paths={rows}", "data.messages=whole", "+stage.args.assistant_only_loss=true"]
    cfg = compose("stage=sft", f"runs_dir={tmp_path}", *model, *data)
    for run in (show_plan, instantiate(cfg.stage.run)):
        with pytest.raises(ValueError, match="SFTTrainer` refuses the run: .*chat template") as raised:
            run(cfg)
        assert type(raised.value).__name__ == "ConfigError"


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rloo"])
def test_fewer_prompts_than_a_rollout_is_an_error_before_anything_starts(compose, tmp_path, stage):
    rows = [{"prompt": f"{i}"} for i in range(3)]
    data = ["data=files", f"data.paths={write_rows(tmp_path / 'a.jsonl', rows)}", "data.to_chat=true"]
    cfg = compose(f"stage={stage}", f"runs_dir={tmp_path}", *data, "data.eval_size=null", "+stage.args.use_cpu=true")
    for run in (show_plan, instantiate(cfg.stage.run)):
        with pytest.raises(ConfigError, match="There are 3 prompts, fewer than the .* one rollout. Lower `stage.args"):
            run(cfg)
    assert not list(tmp_path.glob("default/**/run.json"))


def copy_of(folder, place, change) -> str:
    """Return a copy of a saved model whose weights are changed by `change`, a function on a dict of tensors."""
    shutil.copytree(folder, place)
    weights = load_file(f"{folder}/model.safetensors")
    change(weights)
    save_file(weights, f"{place}/model.safetensors", metadata={"format": "pt"})
    return str(place)


def test_weights_that_lack_something_are_seen_in_the_files(compose, tmp_path):
    whole = save_model(tmp_path / "whole")
    config = transformers.LlamaConfig.from_pretrained(whole)
    config.num_labels = 1
    torch.manual_seed(0)
    reward = str(tmp_path / "reward")
    transformers.LlamaForSequenceClassification(config).save_pretrained(reward)
    make_tokenizer().save_pretrained(reward)
    headless = copy_of(reward, tmp_path / "headless", lambda weights: weights.pop("score.weight"))
    gap = copy_of(whole, tmp_path / "gap", lambda weights: weights.pop("model.layers.0.self_attn.q_proj.weight"))
    cut = copy_of(whole, tmp_path / "cut", lambda weights: None)
    content = (tmp_path / "cut/model.safetensors").read_bytes()
    (tmp_path / "cut/model.safetensors").write_bytes(content[:-64])
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a b c"}] * 8)
    data = ["data=files", f"data.paths={rows}", "data.eval_size=null", "data.split_by=row", f"runs_dir={tmp_path}"]
    sizes = ["stage.args.per_device_train_batch_size=8", "stage.args.steps_per_generation=1"]
    sizes += ["stage.args.gradient_accumulation_steps=1"]

    def plan(model: str, scored_by: str):
        given = ["reward=model", "reward.model.run=null", f"reward.model.path={scored_by}"]
        show_plan(compose("stage=ppo", "model=hf", f"model.path={model}", *data, *sizes, *given))

    plan(whole, reward)
    for model, scored_by, said in (
        (whole, headless, "lacks 1 weight of LlamaForSequenceClassification: `score.weight`"),
        (gap, reward, "lacks 1 weight of LlamaForCausalLM: `model.layers.0.self_attn.q_proj.weight`"),
        (cut, reward, "can't be read"),
    ):
        with pytest.raises(ConfigError, match=said):
            plan(model, scored_by)
    for stage in ("generate", "chat"):  # which train nothing
        with pytest.raises(ConfigError, match="lacks 1 weight"):
            show_plan(compose(f"stage={stage}", "model=hf", f"model.path={gap}", f"runs_dir={tmp_path}"))


def test_a_stage_without_training_is_planned_by_what_it_reads(compose, tmp_path, capsys):
    model, rows = save_gpt2(tmp_path / "model"), [{"prompt": " ".join("abcdefgh")}] * 3
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    words = [
        "model=hf",
        f"model.path={model}",
        f"stage.prompts={file}",
        "reward=length",
        "reward.length.kwargs.max_length=5",
    ]

    def plan(*more: str) -> str:
        show_plan(compose("stage=generate", f"runs_dir={tmp_path / 'runs'}", *words, *more))
        return capsys.readouterr().out

    length = "stage.max_completion_length"
    shown = plan(f"{length}=48")  # 8 words and their template, of 64 positions
    assert re.search(r"prompts +3\n", shown) and re.search(rf"model +{model}\n", shown) and "length x 1.0" in shown
    with pytest.raises(ConfigError, match="has 64 positions, and a row has 10 tokens and up to 55 generated"):
        plan(f"{length}=55")
    plan(f"{length}=54")
    with pytest.raises(ConfigError, match="(?s)2 problems.*holds no prompt|2 problems.*which exists"):
        (tmp_path / "empty.jsonl").write_text("")
        plan(f"stage.prompts={tmp_path / 'empty.jsonl'}", f"{length}=9", f"stage.output={file}")
    assert not (tmp_path / "runs").exists()


def test_an_unreachable_server_is_reported(compose, tmp_path):
    words = ["reward=http", "reward.http.url=http://127.0.0.1:9/score"]
    with pytest.raises(
        ConfigError, match="The server of the reward `http` at http://127.0.0.1:9/score can't be reached"
    ):
        show_plan(compose("stage=generate", "stage.max_prompts=2", f"runs_dir={tmp_path}", *words))


def test_a_full_disk_is_reported(compose, tmp_path, monkeypatch, capsys):
    free = 10**9
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    few = ("data.max_samples=8", "data.max_eval_samples=2", "stage.args.per_device_train_batch_size=8")
    cfg = compose("stage=sft", f"runs_dir={tmp_path}", *few)
    show_plan(cfg)
    assert "disk           1.0 GB free; the weights need 0.9 MB" in capsys.readouterr().out
    free = 10**5
    with pytest.raises(ConfigError, match="The trained model needs 0.9 MB, and the disk of .* has 0.1 MB free"):
        show_plan(cfg)
