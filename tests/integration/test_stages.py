"""The training stages: composed, trained, saved, resumed, and loaded by plain transformers."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.errors import ConfigCompositionException
from hydra.utils import get_class
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from rlhf_trl.build import load_data, make_trainer, training_arguments
from rlhf_trl.checks.devices import unused_devices
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.fingerprints import weights_fingerprint
from rlhf_trl.models.loading import load_model
from rlhf_trl.models.merging import merge_adapter
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.runs.paths import conf_dir, resolve_path
from tests.helpers.run_files import metrics, record
from tests.helpers.spies import CRASH, SPY, Crash, Spy, logits

STAGES = ("sft", "reward", "ppo", "dpo", "modpo", "orpo", "kto", "rloo", "grpo", "online_dpo")
RL = ("ppo", "rloo", "grpo")
# The metric that must improve, and whether it must rise
LEARNED = {
    "sft": ("eval_loss", -1),
    "reward": ("eval_loss", -1),
    "dpo": ("eval_loss", -1),
    "modpo": ("eval_loss", -1),
    "orpo": ("eval_loss", -1),
    "kto": ("eval_loss", -1),
    "rloo": ("eval_reward", 1),
    "grpo": ("eval_reward", 1),
    "online_dpo": ("eval_reward", 1),
}
LORA = ("adapter=lora", "adapter.peft.r=4", "stage.args.learning_rate=1e-2")


def weights(run_dir: str) -> dict[str, torch.Tensor]:
    files = [path for path in Path(run_dir).glob("*.safetensors") if path.name != "critic.safetensors"]
    assert len(files) == 1, files
    return load_file(files[0])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def sft(train, tmp_path_factory) -> Path:
    """Folder of runs with a full SFT run in it."""
    runs = tmp_path_factory.mktemp("full")
    train(runs, "stage=sft", SPY)
    return runs


@pytest.fixture(scope="module")
def sft_lora(train, tmp_path_factory) -> Path:
    """Folder of runs with an SFT adapter in it."""
    runs = tmp_path_factory.mktemp("lora")
    train(runs, "stage=sft", *LORA)
    return runs


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_composes_and_trl_takes_its_arguments(compose, tmp_path, stage):
    cfg = compose(f"stage={stage}", f"runs_dir={tmp_path}")
    groups = {"model", "data", "adapter", "logger"}
    rl = {"reward", "reward_norm", "combine", "kl", "health"}
    groups |= rl if stage in RL else set()  # critic=head has no node of its own
    groups |= rl - {"kl", "reward_norm"} if stage == "online_dpo" else set()
    groups |= {"reward"} if stage == "modpo" else set()
    assert groups == {key for key in cfg if isinstance(cfg[key], dict | type(cfg))} - {
        "stage",
        "callbacks",
        "published",
    }
    assert cfg.run_dir == f"{tmp_path}/default/{stage}" and cfg.objective == cfg.stage.objective
    args = training_arguments(cfg.stage.args)
    assert isinstance(args, get_class(cfg.stage.args._target_)) and args.report_to == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_arguments_are_fields_of_its_dataclass(compose, stage):
    args = compose(f"stage={stage}").stage.args
    fields = {field.name for field in dataclasses.fields(get_class(args._target_))}
    assert set(args) - {"_target_", "_convert_"} <= fields


@pytest.mark.parametrize("option", ["reward=demo", "kl=fixed", "reward_norm=none", "health=none"])
def test_an_option_that_a_stage_does_not_read_is_refused(compose, option):
    with pytest.raises(ConfigCompositionException, match=option.split("=")[0]):
        compose("stage=sft", option)


def test_the_command_line_and_experiments_change_the_groups_of_a_stage(compose, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /stage: dpo\n  - override /model: hf\n"
        "  - override /adapter: qlora\nmodel: {path: x/y}\nstage: {args: {beta: 0.3}}\n"
    )
    mine = (f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    cfg = compose(*mine)
    assert (cfg.stage.name, cfg.model.path, cfg.stage.args.beta) == ("dpo", "x/y", 0.3)
    assert cfg.adapter.quantization.load_in_4bit and cfg.adapter.peft.task_type == "CAUSAL_LM"
    cfg = compose(*mine, "model.path=a/b", "stage.args.beta=0.5", "adapter=none")
    assert (cfg.model.path, cfg.stage.args.beta, cfg.adapter.peft) == ("a/b", 0.5, None)
    assert set(compose("stage=grpo", "reward=[demo]").reward) == {"gold"}


def test_importing_the_package_is_quick_and_turns_telemetry_off():
    code = (
        "import sys, rlhf_trl; assert rlhf_trl.__version__; assert not {'torch', 'transformers'} & set(sys.modules);"
        "from huggingface_hub import constants; assert constants.HF_HUB_DISABLE_TELEMETRY"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=conf_dir().parent)


def test_bf16_is_off_without_support_and_an_error_when_asked_for(compose):
    assert training_arguments(compose("stage=sft").stage.args).bf16 is False
    with pytest.raises(ConfigError, match="use_cpu"):
        training_arguments(compose("stage=sft", "stage.args.bf16=true").stage.args)
    assert training_arguments(compose("stage=sft", "stage.args.bf16=true", "+stage.args.use_cpu=true").stage.args).bf16


def test_a_single_process_trains_on_one_of_several_gpus(compose, monkeypatch):
    cfg = compose("stage=sft", "stage.args.bf16=false")
    assert unused_devices(training_arguments(cfg.stage.args)) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert unused_devices(training_arguments(cfg.stage.args)) is None  # on the CPU
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert TrainingArguments("runs").n_gpu == 4
    args = training_arguments(cfg.stage.args)
    assert args.n_gpu == 1 and args.train_batch_size == args.per_device_train_batch_size
    assert "--num_processes 4" in unused_devices(args)


def test_the_stage_sets_the_precision_and_not_the_launch(compose, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for words, precision in ((["stage.args.bf16=false"], "no"), ([], "no"), (["stage.args.bf16=true"], "bf16")):
        args = training_arguments(compose("stage=sft", "+stage.args.use_cpu=true", *words).stage.args)
        assert args.mixed_precision == precision
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_arguments_of_loading_reach_the_policy_and_its_reference(compose, tmp_path):
    words = ["model.init_kwargs={rms_norm_eps: 0.01}", "data.max_samples=16", "data.max_eval_samples=4"]
    cfg = compose("stage=dpo", f"runs_dir={tmp_path}", *words)
    path = resolve_path(cfg.model.path, None, "")
    tokenizer = load_tokenizer(path, None, None)
    trainer = make_trainer(cfg, training_arguments(cfg.stage.args), path, tokenizer, load_data(cfg, tokenizer))
    for model in (trainer.model, trainer.ref_model):
        assert {module.variance_epsilon for module in model.modules() if "RMSNorm" in type(module).__name__} == {0.01}


def test_what_trl_refuses_is_a_config_error(compose):
    with pytest.raises(ConfigError, match="num_generations"):
        training_arguments(compose("stage=grpo", "stage.args.num_generations=3").stage.args)


@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=[pytest.mark.slow] * (s in ("modpo", "online_dpo"))) for s in LEARNED]
)
def test_a_stage_learns_and_its_model_loads_elsewhere(train, tmp_path, stage):
    run_dir = train(tmp_path, f"stage={stage}", SPY)
    metric, direction = LEARNED[stage]
    values = [entry[metric] for entry in metrics(run_dir)["history"] if metric in entry]
    assert (values[-1] - values[0]) * direction > 0
    assert record(run_dir)["status"] == "done"
    assert Path(run_dir, "config.yaml").is_file()
    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    loaded = auto.from_pretrained(run_dir)
    state = Spy.model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in loaded.state_dict().items())
    torch.testing.assert_close(logits(loaded), logits(Spy.model), rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(run_dir)
    assert tokenizer.chat_template and loaded.config.pad_token_id == tokenizer.pad_token_id


def test_the_objective_is_returned(compose, tmp_path):
    from hydra.utils import instantiate

    few = ["data.max_samples=16", "data.max_eval_samples=8", "stage.args.max_steps=1", f"runs_dir={tmp_path}"]
    cfg = compose("stage=sft", "objective=eval_mean_token_accuracy", *few)
    value = instantiate(cfg.stage.run)(cfg)
    assert value == metrics(cfg.run_dir)["eval"]["eval_mean_token_accuracy"]


def test_data_without_an_eval_split_is_not_evaluated(train, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "What is it?", "completion": f" It is {i}."} for i in range(32)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    run_dir = train(
        tmp_path, "stage=sft", "data=files", f"data.paths={data}", "data.eval_size=null", "stage.args.max_steps=2"
    )
    assert metrics(run_dir)["eval"] == {} and record(run_dir)["status"] == "done"


def test_a_run_that_could_not_be_evaluated_does_not_begin(train, tmp_path):
    """The end of a run is evaluated without `eval_strategy` too."""
    with pytest.raises(ConfigError, match="An evaluation batch of 6"):
        train(tmp_path, "stage=grpo", "+stage.args.num_generations_eval=4", "stage.args.per_device_eval_batch_size=6")
    assert not any(tmp_path.iterdir())


def test_the_same_command_gives_the_same_weights(train, sft, tmp_path):
    assert same(weights(train(tmp_path, "stage=sft", SPY)), weights(sft / "test/sft"))
    short = ("stage=grpo", "stage.args.max_steps=2", "data.max_samples=64")
    runs = [weights(train(tmp_path / str(i), *short)) for i in range(2)]
    assert same(*runs)


def test_an_adapter_run_is_an_adapter_on_its_base(sft_lora):
    run_dir = sft_lora / "test/sft"
    base = json.loads((run_dir / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).is_absolute() and base.endswith("checkpoints/base") and record(run_dir)["base"] == base
    assert metrics(run_dir)["eval"]["eval_loss"] < metrics(run_dir)["history"][0]["eval_loss"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run_dir)
    torch.testing.assert_close(logits(plain), logits(load_model(str(run_dir))), rtol=0, atol=0)


def ref_and_policy() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    state = Spy.model.state_dict()
    adapters = ({k.replace(f".{n}.", "."): v for k, v in state.items() if f".{n}." in k} for n in ("ref", "default"))
    return tuple(adapters)


@pytest.mark.parametrize("stage", ["dpo", "kto", "grpo", "ppo", pytest.param("online_dpo", marks=pytest.mark.slow)])
def test_an_adapter_is_trained_further_and_its_start_stays_the_reference(train, sft_lora, stage):
    name = f"{stage}_on"
    run_dir = train(sft_lora, f"stage={stage}", f"run_name={name}", "model.run=sft", *LORA, SPY)
    start, saved = weights(sft_lora / "test/sft"), weights(run_dir)
    reference, policy = ref_and_policy()
    trunk = {k: v for k, v in policy.items() if "lora_" in k}
    assert same({k: v for k, v in reference.items() if "lora_" in k}, start)
    assert same(trunk, saved) and not same(saved, start)
    ref_parameters = {id(p) for k, p in Spy.model.named_parameters() if ".ref." in k}
    optimized = {id(p) for group in Spy.optimizer.param_groups for p in group["params"]}
    assert ref_parameters and not ref_parameters & optimized
    assert not Path(run_dir, "ref").exists()


def test_an_adapter_becomes_a_reward_model_that_peft_loads(train, sft_lora):
    run_dir = train(sft_lora, "stage=reward", "model.run=sft", *LORA, SPY)
    assert metrics(run_dir)["eval"]["eval_loss"] < metrics(run_dir)["history"][0]["eval_loss"]
    base = AutoModelForSequenceClassification.from_pretrained(record(run_dir)["base"], num_labels=1)
    base.config.pad_token_id = AutoTokenizer.from_pretrained(run_dir).pad_token_id
    plain = PeftModel.from_pretrained(base, run_dir)
    torch.testing.assert_close(logits(plain), logits(Spy.model), rtol=1e-5, atol=1e-5)


def test_an_adapter_start_without_an_adapter_is_trained_in_full(train, sft_lora):
    run_dir = train(sft_lora, "stage=dpo", "run_name=dpo_full", "model.run=sft", "stage.args.learning_rate=1e-4")
    merged = AutoModelForCausalLM.from_pretrained(Path(run_dir, "start"))
    start = load_model(str(sft_lora / "test/sft"))
    torch.testing.assert_close(logits(merged), logits(start), rtol=1e-4, atol=1e-4)
    # Policy and reference begin alike: the loss begins at ln 2
    assert metrics(run_dir)["history"][0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert not same(weights(run_dir), weights(Path(run_dir, "start")))


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_full_start_gets_a_fresh_adapter(train, sft, adapter):
    run_dir = train(sft, "stage=dpo", f"run_name={adapter}", "model.run=sft", *LORA, f"adapter={adapter}")
    assert record(run_dir)["base"] == str(sft / "test/sft")
    assert metrics(run_dir)["history"][0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics(run_dir)["eval"]["eval_loss"] < math.log(2)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "orpo", pytest.param("online_dpo", marks=pytest.mark.slow)])
def test_qlora_trains_on_a_cpu(train, sft_lora, stage):
    run_dir = train(
        sft_lora, f"stage={stage}", f"run_name={stage}_q", "model.run=sft", *LORA, "adapter=qlora", SPY,
        "stage.args.max_steps=2",
    )  # fmt: skip
    kinds = {type(module).__name__ for module in Spy.model.modules()}
    assert "Linear4bit" in kinds
    start, saved = weights(sft_lora / "test/sft"), weights(run_dir)
    assert all(torch.isfinite(weight).all() for weight in saved.values())
    # The evaluation at the start must not cut the gradient off at a 4-bit layer: adapters of all layers have moved
    moved = {name for name in start if not torch.equal(saved[name].bfloat16(), start[name].bfloat16())}
    assert moved == set(start)


def test_merging_with_a_run_and_after_it(train, sft_lora, compose):
    from hydra.utils import instantiate

    run_dir = train(sft_lora, "stage=dpo", "run_name=merged", "model.run=sft", *LORA, "merge=true")
    merged = AutoModelForCausalLM.from_pretrained(Path(run_dir, "merged"))
    torch.testing.assert_close(logits(merged), logits(load_model(run_dir)), rtol=1e-4, atol=1e-4)
    cfg = compose("stage=merge", "model.run=sft", f"runs_dir={sft_lora}", "project=test")
    instantiate(cfg.stage.run)(cfg)
    later = AutoModelForCausalLM.from_pretrained(sft_lora / "test/sft/merged")
    torch.testing.assert_close(logits(later), logits(load_model(str(sft_lora / "test/sft"))), rtol=1e-4, atol=1e-4)


def test_orpos_likelihood_counts_the_prompt_and_its_odds_do_not(train, tmp_path):
    """As conf/stage/orpo.yaml says of TRL's loss: held to plain PyTorch on one pair with a prompt."""
    data = tmp_path / "pair.jsonl"
    row = {"prompt": "Question: what is it? Answer:", "chosen": " a dog, I think", "rejected": " no"}
    data.write_text("\n".join([json.dumps(row)] * 8))
    run_dir = train(
        tmp_path, "stage=orpo", "data=files", f"data.paths={data}", "data.eval_size=null", "stage.args.max_steps=1",
        "data.to_chat=false", "stage.args.logging_steps=1", "stage.args.per_device_train_batch_size=1",
    )  # fmt: skip
    start = record(run_dir)["model"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)

    def logps(completion: str) -> tuple[torch.Tensor, int]:
        ids = tokenizer(row["prompt"] + completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        prompt = len(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"])
        ids = torch.tensor([ids if tokenizer.bos_token_id in (None, ids[0]) else [tokenizer.bos_token_id, *ids]])
        prompt += ids.shape[1] - len(tokenizer(row["prompt"] + completion, add_special_tokens=False)["input_ids"]) - 1
        with torch.no_grad():
            scores = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
        return scores, prompt - 1

    (chosen, start_w), (rejected, start_l) = logps(row["chosen"]), logps(row["rejected"])
    lw, ll = chosen[start_w:].mean(), rejected[start_l:].mean()
    odds = (lw - ll) - (torch.log1p(-lw.exp()) - torch.log1p(-ll.exp()))
    expected = -chosen.mean() - 0.1 * torch.nn.functional.logsigmoid(odds)
    assert metrics(run_dir)["train"]["loss"] == pytest.approx(expected.item(), abs=1e-3)


def test_a_run_resumes_from_its_newest_checkpoint(train, tmp_path, monkeypatch):
    # More rows than eight steps take: a resumed epoch skips what was seen
    options = ("stage=sft", "stage.args.save_steps=3", CRASH)
    whole = train(tmp_path / "whole", *options)
    monkeypatch.setattr(Crash, "at", 7)
    with pytest.raises(RuntimeError, match="on purpose"):
        train(tmp_path / "broken", *options)
    run_dir = tmp_path / "broken/test/sft"
    assert record(run_dir)["status"] == "failed" and "crashed on purpose" in record(run_dir)["error"]
    (run_dir / ".unfinished").mkdir()  # as if killed while writing the next one
    (run_dir / "checkpoint-6").rename(run_dir / ".unfinished/checkpoint-6")
    monkeypatch.setattr(Crash, "at", None)
    train(tmp_path / "broken", *options, "resume=true", "stage.args.logging_steps=1", "merge=true")
    assert record(run_dir)["status"] == "done"
    assert same(weights(run_dir), weights(whole))


def test_a_resume_with_another_config_names_the_keys(train, sft, tmp_path):
    run_dir = tmp_path / "test/sft"
    shutil.copytree(sft / "test/sft", run_dir)
    (run_dir / "run.json").write_text(json.dumps(record(run_dir) | {"status": "stopped"}))
    before, words = weights(run_dir), ("stage.args.learning_rate=7e-3", "seed=1", "stage.args.save_steps=9")
    with pytest.raises(ConfigError) as error:
        train(tmp_path, "stage=sft", SPY, "resume=true", *words)
    message = str(error.value)
    assert "`seed` was 42 and is 1" in message and "`stage.args.learning_rate` was 0.002 and is 0.007" in message
    assert "save_steps" not in message and same(weights(run_dir), before)


def test_a_wrong_adapter_leaves_the_run_directory_free(train, sft_lora):
    options = ("stage=dpo", "run_name=free", "model.run=sft", *LORA)
    with pytest.raises(ConfigError, match="`r` is 4 there and 8"):
        train(sft_lora, *options, "adapter.peft.r=8")
    assert [path.name for path in (sft_lora / "test/free").iterdir()] == [".lock"]


@pytest.mark.parametrize("leftover", ["of an error", "of an older version", "of a base trained again"])
def test_a_run_starts_from_its_recorded_model(train, sft_lora, tmp_path, leftover):
    """A merged start that another run has left in the directory is not taken for one's own."""
    project, still = tmp_path / "test", ("stage=dpo", "run_name=full", "stage.args.learning_rate=0")
    for name in ("first", "second"):
        shutil.copytree(sft_lora / "test/sft", project / name)
    adapter = load_file(project / "second/adapter_model.safetensors")
    save_file({k: 3 * v for k, v in adapter.items()}, project / "second/adapter_model.safetensors", {"format": "pt"})
    if leftover == "of an error":
        with pytest.raises(ConfigError, match="on purpose"):
            train(tmp_path, *still, "model.run=first", "+callbacks.wrong._target_=tests.helpers.spies.Wrong")
        assert [path.name for path in (project / "full").iterdir()] == [".lock"]
    elif leftover == "of an older version":
        merge_adapter(str(project / "first"), str(project / "full/start"))
    else:
        base = shutil.copytree(record(project / "second")["base"], tmp_path / "base")
        config = json.loads((project / "second/adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(base)
        (project / "second/adapter_config.json").write_text(json.dumps(config))
        train(tmp_path, *still, "model.run=second")
        (project / "full").rename(project / "before")
        (project / "full").mkdir()
        (project / "before/start").rename(project / "full/start")
        state = load_file(base / "model.safetensors")
        save_file({k: 1.1 * v for k, v in state.items()}, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConfigError, match="whose weights have changed since. Train it again"):
            train(tmp_path, *still, "model.run=second")
        again = record(project / "second") | {
            "base_fingerprint": weights_fingerprint(str(base))
        }  # as if the adapter was, too
        (project / "second/run.json").write_text(json.dumps(again))
    run_dir = train(tmp_path, *still, "model.run=second")
    merge_adapter(str(project / "second"), str(tmp_path / "merged"))
    assert same(weights(run_dir), weights(tmp_path / "merged"))


def test_overwrite_deletes_the_old_run_first(train, tmp_path):
    few = ("stage=sft", "stage.args.max_steps=2", "data.max_samples=64")
    run_dir = train(tmp_path, *few, "stage.args.save_steps=1")
    assert Path(run_dir, "checkpoint-1").is_dir()
    train(tmp_path, *few, "overwrite=true")
    assert not Path(run_dir, "checkpoint-1").exists() and record(run_dir)["status"] == "done"
    with pytest.raises(ConfigError, match="the command needs it: `model.run`"):
        train(tmp_path, *few, "overwrite=true", "model.run=sft")
    assert weights(run_dir)
