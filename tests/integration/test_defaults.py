"""Default values of the stages: for real models, of adapters and critics, and of the embedded model."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_trl.cli.main import command_line_problems
from rlhf_trl.cli.overrides import composed, parse_command_line
from rlhf_trl.config.groups import option_groups
from tests.helpers.architectures import save_architecture
from tests.helpers.configs import CONF
from tests.helpers.data import write_letter_pairs

STAGES = ("sft", "reward", "dpo", "modpo", "orpo", "kto", "grpo", "rloo", "ppo", "online_dpo")
REAL = ("model=hf", "model.path=organization/name")
# Learning rates of full fine-tuning, LoRA (and DoRA) and QLoRA; their sources stand in conf/stage and conf/adapter
LEARNING_RATES = {
    "sft": (2e-5, 2e-4, 2e-4),
    "reward": (1e-5, 1e-4, 1e-4),
    "dpo": (1e-6, 1e-5, 5e-6),
    "modpo": (1e-6, 1e-5, 5e-6),
    "orpo": (8e-6, 8e-5, 8e-5),
    "kto": (1e-6, 1e-5, 5e-6),
    "grpo": (1e-6, 1e-5, 1e-5),
    "rloo": (1e-6, 1e-5, 1e-5),
    "ppo": (3e-6, 3e-5, 3e-5),
    "online_dpo": (5e-7, 5e-6, 5e-6),
}
ADAPTERS = {"none": 0, "lora": 1, "dora": 1, "qlora": 2}
CRITICS = {"head": 5e-5, "model": 1e-5, "adapter": 1e-4}
# Rows or completions per device, and tokens
SIZES = {stage: {"per_device_train_batch_size": 8, "max_length": 1024} for stage in STAGES[:6]} | {
    "grpo": {"per_device_train_batch_size": 8, "steps_per_generation": 8, "num_generations": 8, "beta": 0.04},
    "rloo": {"per_device_train_batch_size": 8, "steps_per_generation": 8, "num_generations": 2, "beta": 0.05},
    "ppo": {"per_device_train_batch_size": 8, "steps_per_generation": 16, "gradient_accumulation_steps": 4},
    "online_dpo": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "temperature": 0.9,
        "beta": 0.1,
    },
}
# Of the embedded model, which the demo and the loss curves were made with
OFFLINE = {"per_device_train_batch_size": 32, "warmup_steps": 0.05, "max_length": 512}
GROUPS_OF_4 = {
    **{"per_device_train_batch_size": 64, "steps_per_generation": 1, "learning_rate": 5e-4},
    **{"max_completion_length": 64, "num_generations": 4, "beta": 0.05},
}
EMBEDDED = {
    "sft": OFFLINE | {"learning_rate": 1e-3},
    "reward": OFFLINE | {"learning_rate": 5e-4},
    "dpo": OFFLINE | {"learning_rate": 2e-4},
    "modpo": OFFLINE | {"learning_rate": 2e-4},
    "orpo": OFFLINE | {"learning_rate": 2e-4},
    "kto": OFFLINE | {"learning_rate": 2e-4},
    "grpo": GROUPS_OF_4,
    "rloo": GROUPS_OF_4,
    "ppo": {
        **{"per_device_train_batch_size": 32, "steps_per_generation": 4, "learning_rate": 1e-4},
        **{"warmup_steps": 0.05, "max_completion_length": 40, "num_iterations": 4, "beta": 0.05},
    },
    "online_dpo": {
        **{"per_device_train_batch_size": 32, "learning_rate": 2e-4},
        **{"max_completion_length": 64, "temperature": 1.0},
    },
}
EMBEDDED_CRITICS = {"head": 1e-2, "model": 1e-3, "adapter": 1e-3}


def config(*words: str, folders=()):
    return composed("train", words, folders)


@pytest.mark.parametrize("stage", STAGES)
def test_a_real_model_gets_values_for_its_stage_and_adapter(stage):
    for adapter, column in ADAPTERS.items():
        found = config(f"stage={stage}", f"adapter={adapter}", *REAL).stage.args
        assert found.learning_rate == LEARNING_RATES[stage][column], adapter
    assert {key: found[key] for key in SIZES[stage]} == SIZES[stage]
    assert found.get("max_completion_length", 512) == 512
    assert found.gradient_checkpointing is True and found.per_device_eval_batch_size == 8
    assert found.get("warmup_steps", 0) == (0.1 if "max_length" in found or stage == "online_dpo" else 0)


@pytest.mark.parametrize("stage", STAGES)
def test_the_embedded_model_brings_its_own_values(stage):
    """Whatever the adapter, and for a run that starts from an earlier one."""
    for words in ([], ["adapter=lora", "model.run=sft"]):
        found = config(f"stage={stage}", *words).stage.args
        assert {key: found[key] for key in EMBEDDED[stage]} == EMBEDDED[stage]
        assert found.gradient_checkpointing is False and found.gradient_accumulation_steps == 1
        assert found.per_device_eval_batch_size == 64


@pytest.mark.parametrize(
    ("critic", "adapter"),
    [
        ("head", "none"),
        ("model", "none"),
        ("head", "lora"),
        ("model", "lora"),
        ("adapter", "lora"),
        ("adapter", "qlora"),
    ],
)
def test_a_critic_learns_at_a_sane_multiple_of_the_policys_rate(critic, adapter):
    words = ("stage=ppo", f"critic={critic}", f"adapter={adapter}")
    found = config(*words, *REAL).stage.args
    assert found.critic_learning_rate == CRITICS[critic]
    assert found.critic_learning_rate <= 20 * found.learning_rate  # OpenRLHF: 18 times, verl: 10 times
    assert config(*words).stage.args.critic_learning_rate == EMBEDDED_CRITICS[critic]


def test_lengths_of_generation_and_evaluation_are_those_of_training():
    for stage in ("generate", "chat"):
        assert config(f"stage={stage}", *REAL).stage.max_completion_length == 512
        assert config(f"stage={stage}").stage.max_completion_length == 256
    for stage in ("evaluate", "evaluate_reward"):
        own = config(f"stage={stage}", "data=hub", "data.path=organization/name").stage
        assert (own.max_completion_length, own.batch_size, own.dtype) == (512, 16, None)
        demo = config(f"stage={stage}").stage
        assert (demo.max_completion_length, demo.batch_size, demo.dtype) == (64, 64, "float32")


EXPERIMENT = """\
# @package _global_
defaults:
  - override /stage: ppo
  - override /model: hf
  - override /adapter: lora
"""
OWN_STAGE = """\
# @package _global_
defaults: [_base/offline, {/model: demo}, {/data: demo}, {/adapter: none}, _self_]
stage: {name: cpo, dataset_type: preference, args: {learning_rate: 4.0e-5}}
"""


def write(folder, group: str, name: str, text: str) -> None:
    (folder / group).mkdir(exist_ok=True)
    (folder / group / f"{name}.yaml").write_text(text)


def test_experiments_and_the_command_line_win(tmp_path):
    """Also where an experiment chooses model and adapter, and the command line others."""

    def rate(*words: str) -> float:
        return config(
            "experiment=own", "model.path=organization/name", *words, folders=[tmp_path]
        ).stage.args.learning_rate

    write(tmp_path, "experiment", "own", EXPERIMENT)
    assert (rate(), rate("adapter=none"), rate("stage=dpo", "adapter=qlora")) == (3e-5, 3e-6, 5e-6)
    assert rate("model=demo") == 1e-4
    write(tmp_path, "experiment", "own", f"{EXPERIMENT}stage: {{args: {{learning_rate: 7.0e-6}}}}\n")
    assert (rate(), rate("adapter=none"), rate("model=demo")) == (7e-6, 7e-6, 7e-6)
    assert rate("stage.args.learning_rate=1e-3") == 1e-3
    assert rate("adapter.learning_rates.ppo=1e-3") == 7e-6


def test_adapters_and_stages_of_the_users_own(tmp_path):
    """An adapter based on ours has its learning rates; a stage that comes last in its own list keeps its own."""
    write(tmp_path, "adapter", "wide", "defaults: [lora, _self_]\npeft: {r: 256}\n")
    write(tmp_path, "stage", "cpo", OWN_STAGE)
    wide = config("stage=dpo", "adapter=wide", *REAL, folders=[tmp_path])
    assert (wide.stage.args.learning_rate, wide.adapter.peft.r) == (1e-5, 256)
    for words in ([], ["adapter=lora"], ["model=demo"]):
        assert config("stage=cpo", *words, folders=[tmp_path]).stage.args.learning_rate == 4e-5


def test_an_adapters_learning_rate_that_is_not_taken_is_an_error(models):
    def problems(*words: str) -> list[str]:
        return command_line_problems(parse_command_line(words))

    real = ["model=hf", f"model.path={models['llama']}"]
    words = ["stage=dpo", "adapter=lora", "adapter.learning_rates.dpo=1e-3"]
    (problem,) = problems(*words)
    assert "`adapter.learning_rates.dpo` has no effect" in problem and "the embedded model" in problem
    assert problems(*words, *real) == []
    (problem,) = problems(*words, *real, "stage.args.learning_rate=2e-3")
    assert "`stage.args.learning_rate` is 0.002" in problem
    # One list of overrides for all steps of a pipeline has those of other stages
    assert problems("stage=sft", *words[1:]) == []


def test_another_model_never_gets_the_values_of_the_embedded_one(tmp_path, models, monkeypatch):
    """Neither by its path nor by its run; a run of `stage=init`, which has no start, may."""
    monkeypatch.chdir(tmp_path)
    for run, start in {"sft": {"path": "demo:base"}, "mine": {"path": models["llama"]}, "init": None}.items():
        folder = tmp_path / "runs" / "default" / run
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"status": "done", "stage": "sft"}))
        (folder / "config.yaml").write_text(json.dumps({} if start is None else {"model": start}))

    def problems(*words: str) -> list[str]:
        return command_line_problems(parse_command_line(words))

    for words in (["model.run=sft"], ["model.run=init"], ["model=hf", "model.run=mine"], ["model.path=demo:base"]):
        assert problems("stage=dpo", *words) == []
    for words in (
        ["model.run=mine"],
        [f"model.path={models['llama']}"],
        ["model=demo", f"model.path={models['llama']}"],
    ):
        (problem,) = problems("stage=dpo", *words)
        assert words[-1].replace("=", "` is `") in problem and "Set `model=hf` as well" in problem
    for place, name in ((models["llama"], "llama"), ("mine", "mine"), ("runs/default/mine", "mine")):
        policies = f"stage.policies=[sft,{place}]"
        (problem,) = problems("stage=chat", policies)
        assert f"`stage.policies.{name}` is `{place}`" in problem and "Set `model=hf` as well" in problem
        assert problems("stage=chat", "model=hf", policies) == []
    assert problems("stage=chat", "stage.policies=[sft,init,demo:sft,runs/default/sft]") == []
    assert problems("stage=merge", f"model.path={models['llama']}", "run_name=m") != []  # nothing to merge
    assert "model=hf" not in str(problems("stage=merge", f"model.path={models['llama']}"))
    (problem,) = problems("stage=dpo", "model=hf")
    assert "`model.path` has no value" in problem and "`model.run=...`" in problem


def test_no_helper_file_is_listed_or_left_unused():
    """Each file of an embedded model's values belongs to a stage, critic or data option that is there."""
    groups = option_groups([str(CONF)])
    owners = {"model/_demo": "stage", "critic/_values/demo": "critic", "data/_values/demo": "stage"}
    for folder, group in owners.items():
        names = {path.stem for path in (CONF / folder).glob("*.yaml") if not path.stem.startswith("_")}
        assert names and names <= groups[group]
    assert not [group for group in groups if group.rpartition("/")[2][:1] == "_"]


def test_each_learning_rate_has_its_source_above_it():
    for stage in STAGES:
        lines = (CONF / "stage" / f"{stage}.yaml").read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.strip().startswith("learning_rate:"))
        assert any(source in lines[at - 1] for source in ("TRL", "arXiv", "paper")), lines[at - 1]


ARCHITECTURES = ("llama", "gpt2", "qwen2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: save_architecture(folder / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Return a file of as many prompts as a rollout of PPO takes, with two answers each."""
    return write_letter_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.mark.parametrize(
    ("stage", "architecture"),
    [
        pytest.param(stage, name, marks=() if i % 3 == j else pytest.mark.slow)
        for i, stage in enumerate(STAGES)
        for j, name in enumerate(ARCHITECTURES)
    ],
)
def test_every_stage_trains_other_architectures_as_it_is(train, tmp_path, models, pairs, stage, architecture):
    """With the batches, rates and gradient checkpointing of the defaults: no NaN, and the weights move."""
    words = [f"stage={stage}", "model=hf", f"model.path={models[architecture]}", "data=files", f"data.paths={pairs}"]
    words += ["data.eval_size=8", "stage.args.eval_on_start=false", "stage.args.logging_steps=1"]
    words += [f"stage.args.learning_rate={LEARNING_RATES[stage][0]}"]
    if "max_length" in SIZES[stage]:
        words += ["stage.args.max_length=60", "stage.args.max_steps=2"]
    else:
        words += ["stage.args.max_completion_length=8", f"stage.args.max_steps={16 if stage == 'ppo' else 2}"]
        words += ["reward=function", "reward.function.function=tests.helpers.held_out.score"]
    run = Path(train(tmp_path, *words))
    history = json.loads((run / "metrics.json").read_text())["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses and all(loss is not None and math.isfinite(loss) for loss in losses)
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(models[architecture]), run))
    assert any(not torch.equal(before[name], after[name]) for name in before if name in after)
    assert all(weight.isfinite().all() for weight in after.values())
