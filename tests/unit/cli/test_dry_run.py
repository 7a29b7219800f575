"""The plan of a dry run, against what the run then does."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from rlhf_trl.build import models_of, training_arguments
from rlhf_trl.checks.disk import Weights, disk_need
from rlhf_trl.checks.reward_calls import Scale
from rlhf_trl.cli.dry_run import show_plan
from rlhf_trl.cli.plan import constraints_text, sampler_text, weights_of
from rlhf_trl.cli.probes import scale_warning
from rlhf_trl.config.values import as_dict
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.calibration import Moments
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.runs.paths import resolve_path
from tests.helpers.architectures import make_architecture
from tests.helpers.tiny import CHAT_TEMPLATE, WORDS, make_tokenizer, save_gpt2, save_model

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
    rows = [{"prompt": f"What color is a {animal}?"} for animal in ("bear", "bee", "cow")]
    data = ["data=files", f"data.paths={write_rows(tmp_path / 'a.jsonl', rows)}", "reward=eos"]
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


def test_the_plan_of_an_evaluation_of_rewards_calls_them_on_annotated_completions(compose, tmp_path, capsys):
    words = ("stage=evaluate_reward", "reward=[demo,length]", "reward.length.kwargs.max_length=5")
    show_plan(compose(*words, f"runs_dir={tmp_path}"))
    shown = capsys.readouterr().out
    assert re.search(r"rewards +gold x 1.0 \(mean .*: 4 rows of the data\), length x 1.0 \(mean", shown)
    assert "max_completion_length" not in shown and not re.search(r"^  (lengths|temperature) ", shown, re.M)
    with pytest.raises(ConfigError, match="compare nothing"):
        rows = rows_file(tmp_path, [{"prompt": "a b", "completion": "c", "ratings": [3.0]}])
        show_plan(compose(*words, f"runs_dir={tmp_path}", *rows, "data/feedback=ratings"))


def test_the_models_of_a_config_are_planned_with_its_options(compose, tmp_path):
    model = save_gpt2(tmp_path / "model")
    words = ["model=hf", f"model.path={model}", "model.chat_template=chatml", "model.trust_remote_code=true"]
    (policy,) = models_of(as_dict(compose("stage=generate", *words)))
    assert "<|im_start|>" in policy.load_tokenizer().chat_template
    critic = ["critic=model", f"critic.path={model}"]
    assert all(each.trust_remote_code for each in models_of(as_dict(compose("stage=ppo", *words, *critic))))


def test_an_unreachable_server_is_reported(compose, tmp_path):
    words = ["reward=http", "reward.http.url=http://127.0.0.1:9/score"]
    with pytest.raises(
        ConfigError, match="The server of the reward `http` at http://127.0.0.1:9/score can't be reached"
    ):
        show_plan(compose("stage=generate", "stage.max_prompts=2", f"runs_dir={tmp_path}", *words))


def test_a_full_disk_is_reported(compose, tmp_path, monkeypatch, capsys):
    free = 10**9
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    few = ("data.max_samples=32", "data.max_eval_samples=2", "stage.args.per_device_train_batch_size=8")

    def disk(*more: str) -> str:
        show_plan(compose("stage=sft", f"runs_dir={tmp_path}", *few, *more))
        return re.search(r"disk +(.*)", capsys.readouterr().out)[1]

    shown = disk("stage.args.save_steps=1", "stage.args.num_train_epochs=2")
    assert shown == "about 9.2 MB needed (3 checkpoint(s) of 2.8 MB and 0.9 MB of trained weights), 1.0 GB free"
    assert "0.9 MB needed (0 checkpoint(s)" in disk("stage.args.save_strategy=no")
    assert "(1 checkpoint(s) of 0.9 MB" in disk("+stage.args.save_only_model=true")
    free = 10**5
    with pytest.raises(ConfigError, match="run needs about 3.7 MB .*, and the disk of .* has 0.1 MB free.*save_only"):
        disk()


@pytest.mark.parametrize(("stage", "checkpoints"), [("ppo", 1), ("grpo", 2)])
def test_save_steps_of_ppo_alone_count_rollouts(compose, tmp_path, stage, checkpoints):
    args = [f"stage.args.{name}" for name in ("num_iterations=2", "save_steps=1", "max_steps=2")]
    cfg = compose(f"stage={stage}", f"runs_dir={tmp_path}", *args, "stage.args.steps_per_generation=1")
    need = disk_need(training_arguments(cfg.stage.args), Weights(100, 100, 4), critic=0, steps=2)
    assert need.checkpoints == checkpoints


def test_the_disk_of_a_plan_is_that_of_the_run(compose, tmp_path, capsys):
    few = ("data.max_samples=32", "data.max_eval_samples=2", "stage.args.max_steps=2")
    base = transformers.LlamaForCausalLM.from_pretrained(
        resolve_path("demo:base", None, tmp_path), dtype=torch.bfloat16
    )
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(resolve_path("demo:base", None, tmp_path)).save_pretrained(tmp_path / "base")
    half = ["adapter=lora", "merge=true", "model=hf", f"model.path={tmp_path / 'base'}"]
    for more in ([], ["adapter=lora"], half):
        cfg = compose("stage=sft", f"runs_dir={tmp_path}", f"run_name=run{len(more)}", *few, *more)
        needed = float(re.search(r"disk +about ([\d.]+) MB needed", plan_and_run(cfg, capsys))[1]) * 1e6
        files = [file for file in Path(cfg.run_dir).rglob("*") if file.suffix in (".safetensors", ".pt")]
        assert needed == pytest.approx(sum(file.stat().st_size for file in files), rel=0.1)


def rows_file(tmp_path, rows: list[dict], name: str = "rows.jsonl") -> list[str]:
    return ["data=files", f"data.paths={write_rows(tmp_path / name, rows)}", "data.eval_size=null"]


ROLLOUT = ["stage.args.gradient_accumulation_steps=1", "stage.args.steps_per_generation=1"]
SMALL_ROLLOUT = ["stage.args.per_device_train_batch_size=8", *ROLLOUT]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt"])
def test_the_plans_weights_are_those_that_are_trained(name):
    model = make_architecture(name)
    total = sum(parameter.numel() for parameter in model.parameters())
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(model.config)
    assert weights_of(empty, None) == (total, total, 4)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="pissa")
    planned = weights_of(empty, config)
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())
    trained, _ = get_peft_model(model, replace(config, init_lora_weights=True)).get_nb_trainable_parameters()
    assert planned == (total, trained, 4)


def test_the_plan_of_ppo_says_what_is_set(compose, tmp_path, capsys):
    model = save_gpt2(tmp_path / "model")
    data = rows_file(tmp_path, [{"prompt": f"a b {word}"} for word in "c d e f g h i j".split()])
    words = ["stage=ppo", "model=hf", f"model.path={model}", "adapter=lora", *data, f"runs_dir={tmp_path}"]
    words += [*SMALL_ROLLOUT, "reward=[length,eos]", "reward.length.kwargs.max_length=5", "reward.eos.weight=0.5"]
    args = ["learning_rate=2e-5", "critic_learning_rate=3e-4", "temperature=0.7"]
    args += ["max_completion_length=9", "warmup_steps=0.1", "lr_scheduler_type=cosine"]
    words += [f"stage.args.{word}" for word in args]
    show_plan(compose(*words, "adapter.quantization={_target_: transformers.BitsAndBytesConfig, load_in_4bit: true}"))
    shown = capsys.readouterr().out
    for line in (
        r"adapter +LoRA \(r=16, lora_alpha=32, target_modules=all-linear\): [\d.]+ k weights are trained, \d+ % of",
        r"quantization +4 bits \(fp4\), computed in float32",
        r"precision +trained weights in float32, frozen ones in float32",
        r"learning rate +policy 2e-05, critic 0.0003, cosine, 10% of the steps of warmup",
        r"lengths +prompts of 5 tokens \(median; the longest 5\); completions of up to 9; the model reads 64",
        r"temperature +0.7",
        r"sampled by +transformers\n",
        r"rollout +8 completions of 8 prompts \(1 each\)",
        r"rewards +length x 1.0, eos x 0.5\n",
        r"critic +head: a head on the policy, 17 weights",
        r"disk +about [\d.]+ MB needed \(1 checkpoint",
    ):
        assert re.search(f"\n  {line}", shown), line
    assert "Warnings" not in shown


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["stage=grpo"], "transformers"),
        (
            ["stage=rloo", "rollout=continuous", "model=hf"],
            "transformers with continuous batching, max_memory_percent=0.3",
        ),
        (
            ["stage=ppo", "rollout=vllm_colocate", "stage.args.vllm_enable_sleep_mode=true"],
            "vLLM in this process, a copy per rank: 30% of the GPU's memory, freed in updates, its probabilities "
            "corrected by sequence_mask (0 to 3)",
        ),
        (
            ["stage=rloo", "rollout=vllm_colocate", "stage.args.vllm_tensor_parallel_size=4"],
            "vLLM in this process, a copy per 4 ranks: 30% of the GPU's memory, its probabilities not corrected",
        ),
        (
            ["stage=grpo", "rollout=vllm_server", "stage.args.vllm_importance_sampling_clip_min=0.5"],
            "a vLLM server at 0.0.0.0:8000, its probabilities corrected by sequence_mask (0.5 to 3)",
        ),
    ],
)
def test_the_plan_says_what_makes_the_completions(compose, words, text):
    assert sampler_text(training_arguments(compose(*words).stage.args)) == text


def test_the_plan_warns_of_what_is_to_be_expected(compose, tmp_path, capsys):
    model = save_gpt2(tmp_path / "model")
    rows = [{"prompt": f"a b {w}", "completion": f" {w} " * (4 + 8 * i)} for i, w in enumerate("c d e f".split())]
    words = ["stage=ppo", "model=hf", f"model.path={model}", *rows_file(tmp_path, rows), f"runs_dir={tmp_path}"]
    words += ["critic=model", "stage.args.per_device_train_batch_size=4", *ROLLOUT]
    words += ["reward=[length,repetition]", "reward.length.kwargs.max_length=8", "reward.length.kwargs.margin=9"]
    words += ["stage.args.learning_rate=1", "stage.args.critic_learning_rate=2", "reward.repetition.weight=0.01"]

    def warnings(*more: str) -> str:
        show_plan(compose(*words, *more))
        return capsys.readouterr().out.partition("\nWarnings\n")[2].partition("\nFirst row")[0]

    shown = warnings("stage.args.max_completion_length=16")
    assert "- `stage.args.learning_rate=1` is above what full tuning of" in shown
    assert "- `stage.args.critic_learning_rate=2` is above what full tuning of" in shown
    assert "- 50% of the completions in the data are longer than `stage.args.max_completion_length=16` tokens" in shown
    assert "`stage.args.max_completion_length=29` holds 95 % of them" in shown
    assert "- `reward.repetition` varies by" in shown
    good = ["stage.args.learning_rate=1e-5", "stage.args.critic_learning_rate=1e-5", "reward_norm=running"]
    assert warnings("stage.args.max_completion_length=32", *good) == ""
    rounded = warnings("stage.args.max_completion_length=32", *good, "model.dtype=bfloat16")
    assert "- weights are trained in bfloat16, which rounds away every update below 0.2 % of a weight" in rounded
    assert "an adapter needs about ten times that" in warnings(
        "stage.args.max_completion_length=32", *good, "adapter=lora", "critic=head", "stage.args.learning_rate=1e-8"
    )


@pytest.mark.parametrize(("combine", "found"), [("weighted_sum", True), ("minimum", False), ("product", False)])
def test_scales_count_where_rewards_are_summed(combine, found):
    """In a stage without the group `reward_norm` as well."""
    cfg = OmegaConf.create(
        {
            "combine": {"_target_": f"rlhf_trl.rewards.combine.{combine}"},
            "reward": {"a": {"weight": 1.0}, "b": {"weight": 1.0}},
        }
    )
    scales = {"a": Scale(Moments(0.0, 5.0), "four rows"), "b": Scale(Moments(0.0, 0.1), "four rows")}
    assert bool(scale_warning(cfg, None, scales)) == found


def test_costs_stand_beside_the_spread_of_what_is_maximized():
    nodes = OmegaConf.create({name: {"weight": weight} for name, weight in (("a", 2.0), ("b", -0.1), ("c", 1.0))})
    scales = {"a": Scale(Moments(0.0, 3.0), "4 rows"), "b": Scale(Moments(30.0, 8.0), "4 rows")}
    found = constraints_text(nodes, {"b": "<= 12", "c": ">= 1"}, scales)
    assert found == "b <= 12 (mean cost +1.8, std 0.8: 4 rows), c >= 1; std of what is maximized 6"
    made_up = {"b": scales["b"]._replace(is_real=False)}
    assert constraints_text(nodes, {"b": "<= 12"}, made_up) == "b <= 12"


def test_the_gold_reward_of_the_demo_refuses_other_prompts(compose, tmp_path):
    rows = [{"prompt": f"a {word}"} for word in "c d e f g h i j".split()]
    model = ["model=hf", f"model.path={save_model(tmp_path / 'model')}", f"runs_dir={tmp_path}"]
    cfg = compose("stage=ppo", *model, *rows_file(tmp_path, rows), *SMALL_ROLLOUT)
    with pytest.raises(ConfigError, match="(?s)`reward.gold`: The gold reward knows the prompts of .*Row 1 of them"):
        show_plan(cfg)
    cfg = compose("stage=generate", *model, f"stage.prompts={tmp_path / 'rows.jsonl'}")
    with pytest.raises(ConfigError, match="`reward.gold`: The gold reward knows the prompts of the embedded world"):
        show_plan(cfg)


def test_data_that_the_tokenizer_does_not_know_is_an_error(compose, tmp_path):
    rows = [{"prompt": f"Lorem ipsum {i}", "chosen": " dolor", "rejected": " sit amet"} for i in range(40)]
    data = [*rows_file(tmp_path, rows), f"runs_dir={tmp_path}"]
    for stage in ("dpo", "reward"):
        cfg = compose(f"stage={stage}", *data)
        for run in (show_plan, instantiate(cfg.stage.run)):
            with pytest.raises(
                ConfigError, match="100% of the tokens.*are `<unk>`, unknown to the tokenizer of .*demo"
            ):
                run(cfg)
    cfg = compose("stage=generate", f"stage.prompts={tmp_path / 'rows.jsonl'}", f"runs_dir={tmp_path}", "reward=none")
    with pytest.raises(ConfigError, match="100% of the tokens in the data are `<unk>`"):
        show_plan(cfg)


def test_all_problems_of_a_plan_are_named_at_once(compose, tmp_path, monkeypatch):
    rows = [{"prompt": f"a {word}"} for word in "c d e".split()]
    model = ["model=hf", f"model.path={save_model(tmp_path / 'model')}", f"runs_dir={tmp_path}"]
    rewards = ["reward=[demo,http]", "reward.http.url=http://127.0.0.1:9/score"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(ConfigError) as error:
        show_plan(compose("stage=ppo", *model, *rows_file(tmp_path, rows), *SMALL_ROLLOUT, *rewards))
    message = str(error.value)
    assert message.startswith("4 problems:") and "There are 3 prompts, fewer than the 8" in message
    assert "gold reward knows" in message and "can't be reached" in message and "B free. Make room" in message


def test_the_steps_of_packed_rows_are_the_trainers(compose, tmp_path, capsys):
    few = ("data.max_samples=64", "data.max_eval_samples=8", "stage.args.per_device_train_batch_size=2")
    cfg = compose("stage=sft", f"runs_dir={tmp_path}", *few, "+stage.args.packing=true", "stage.args.max_length=64")
    shown = plan_and_run(cfg, capsys)
    steps = int(re.search(r"steps +(\d+) optimizer steps", shown)[1])
    state = json.loads(next(Path(cfg.run_dir).glob("checkpoint-*/trainer_state.json")).read_text())
    assert steps == state["global_step"] < 32


def test_rows_beyond_max_length_are_a_warning(compose, tmp_path, capsys):
    rows = [{"prompt": "a b", "chosen": " c" * (5 + 20 * (i < 8)), "rejected": f" {w}"} for i, w in enumerate(WORDS)]
    model = ["model=hf", f"model.path={save_model(tmp_path / 'model')}", f"runs_dir={tmp_path}"]

    def plan(stage: str) -> str:
        args = ("stage.args.max_length=20", "stage.args.warmup_steps=0")  # of so few steps a warmup is another warning
        show_plan(compose(f"stage={stage}", *model, *rows_file(tmp_path, rows), *args))
        return capsys.readouterr().out

    shown = plan("dpo")
    assert "lengths        rows of 20 tokens (median; the longest 30), up to 20 are read" in shown
    assert "- 50% of the rows in the data are longer than `stage.args.max_length=20` tokens" in shown
    assert "Warnings" not in plan("reward")  # which drops them, and says so


def test_a_run_warns_of_its_learning_rate_as_the_plan_does(compose, tmp_path, capsys):
    few = (
        "data.max_samples=32",
        "data.max_eval_samples=2",
        "stage.args.max_steps=1",
        "stage.args.eval_on_start=false",
    )
    cfg = compose("stage=sft", f"runs_dir={tmp_path}", *few, "stage.args.learning_rate=0.5")
    shown = plan_and_run(cfg, capsys)
    warning = "`stage.args.learning_rate=0.5` is above what full tuning of 230 k parameters stands"
    assert f"- {warning}" in shown and f"warning: {warning}" in capsys.readouterr().out
