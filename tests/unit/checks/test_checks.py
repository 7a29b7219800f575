"""Problems found before any model loads: each once, all in one error, each with what to set."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from rlhf_trl.checks import check, find_problems
from rlhf_trl.config import argument_names, dotpaths
from rlhf_trl.config.values import plain
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.sizes import empty_model
from rlhf_trl.runs.directory import is_finished, resumes


@pytest.fixture
def problems(compose, monkeypatch, tmp_path):
    """`problems(*overrides)` returns the problems of a config, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def found(*overrides: str) -> list[str]:
        return find_problems(compose(*overrides))

    return found


def make_run(name: str, status: str = "done", config: dict | None = None, **record) -> Path:
    folder = Path("runs/default", name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"status": status, "stage": name, **record}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def one(problems: list[str], *parts: str) -> None:
    """There is one problem, and it says all of this."""
    assert len(problems) == 1, problems
    assert all(part in problems[0] for part in parts), problems[0]


def one_or_none(problems: list[str], parts: list[str]) -> None:
    """There is one problem, and it says all of `parts`; without parts there is none."""
    if parts:
        one(problems, *parts)
    else:
        assert problems == []


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "orpo", "kto", "rloo", "grpo", "ppo", "online_dpo", "init"])
def test_defaults_have_no_problem(problems, stage):
    assert problems(f"stage={stage}") == []


@pytest.mark.parametrize(
    ("published", "parts"),
    [
        ("{eval_accuracy: {value: 0.6, source: arXiv 1}, eval_loss: {value: [0.5, 0.6], source: a card}}", []),
        ("{eval_accuracy: 0.6}", ["`published.eval_accuracy` is 0.6", "source: TEXT"]),
        ("{eval_accuracy: {value: 0.6}}", ["`published.eval_accuracy`", "source: TEXT"]),
        ("{eval_accuracy: {value: [1, 2, 3], source: x}}", ["`published.eval_accuracy`", "[LOWEST, HIGHEST]"]),
        ("3", ["`published` is 3", "must hold metrics"]),
    ],
)
def test_published_results_have_a_value_and_a_source(problems, published, parts):
    one_or_none(problems("stage=dpo", f"++published={published}"), parts)


def test_argument_names_are_those_of_the_installed_libraries():
    message = "`python -m rlhf_trl.config.argument_names` writes the file again"
    assert json.loads(json.dumps(argument_names.installed())) == json.loads(argument_names.FILE.read_text()), message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["+stage.args.bta=1"], ["`stage.args.bta`", "`beta`"]),
        (["adapter=lora", "+adapter.peft.alpha=1"], ["`adapter.peft.alpha`", "`lora_alpha`"]),
        (["adapter=qlora", "+adapter.quantization.load_in_4bits=true"], ["`load_in_4bit`"]),
        (["stage.args.learning_rate=fast"], ["`stage.args.learning_rate`", "a number"]),
        (["stage.args.num_iterations=2.0"], ["`stage.args.num_iterations=2`"]),
        (["stage.args.num_iterations=true"], ["an integer"]),
        (["stage.args.lr_scheduler_type=cosin"], ["`cosine`"]),
        (["stage.args.eval_strategy=no"], []),
        (["stage.args.max_completion_length=null"], []),
    ],
)
def test_arguments(problems, overrides, parts):
    one_or_none(problems(*overrides), parts)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("trl.DPOConfig", None),
        ("transformers.BitsAndBytesConfig", None),
        ("os.path.join", None),
        ("math.sqrt", None),
        ("rlhf_trl.rewards.FunctionReward", None),
        ("rlhf_trl.rewards.FunctionRewrd", "Did you mean `FunctionReward`"),
        ("rlhf_trl.errors", "is a module"),
        ("no_such_module.x", "no module `no_such_module`"),
        ("my/file.py", "is no dot path"),
        ("lonely", "is no dot path"),
    ],
)
def test_dot_paths(path, says):
    problem = dotpaths.problem(path)
    assert problem is None if says is None else says in problem


def test_a_reward_and_a_column_may_be_called_as_keys_of_dot_paths_are(problems):
    rewards = ["reward=[demo,function]", "reward.function.function=rlhf_trl.rewards.shaping.eos"]
    constraint = ["combine=lagrange", "combine.constraints={function: '>= 0.5'}"]
    assert problems("stage=ppo", *rewards, *constraint) == []
    one(problems("stage=ppo", rewards[0], "reward.function.function=lonely", *constraint), "is no dot path")
    one(problems("stage=collect", "stage.privacy=lonely"), "is no dot path")


def test_dot_paths_import_nothing(tmp_path, monkeypatch):
    (tmp_path / "loud.py").write_text(
        "raise RuntimeError\ntry:\n    import json as found\nexcept ImportError:\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert dotpaths.problem("loud.found") is None and "has no `lost`" in dotpaths.problem("loud.lost")
    assert "loud" not in sys.modules


def test_a_missing_value_is_named(problems):
    one(problems("stage=sft", "model=hf"), "`model.path` has no value", "`model.path=...`")
    one(problems("reward=function"), "`reward.function.function`")


def test_a_missing_environment_variable_is_named_once(problems, monkeypatch):
    monkeypatch.delenv("RLHF_TRL_REVIEWS", raising=False)
    one(problems("data=reviews", "reward=sentiment"), "`RLHF_TRL_REVIEWS`", "`data.path=...`", "export")


def test_model_paths(problems, monkeypatch):
    one(problems("model.path=demo:sfd"), "`demo:sft`")
    one(problems("model.path=no/such/folder"), "neither a folder nor a hub id")
    one(problems("model.path=justaname"), "neither a folder nor a hub id")
    Path("models/qwen").mkdir(parents=True)
    one(problems("model.path=models/qwem"), "`models/qwen`")
    one(problems("model.path=models/qwen"), "`config.json`")
    Path("models/file").touch()
    one(problems("model.path=models/file"), "Give the folder")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    one(problems("model.path=organization/name"), "`HF_HUB_OFFLINE`")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert problems("model.path=organization/name") == []


def test_earlier_runs(problems):
    one(problems("model.run=sft"), "`model.run`", "stage=sft project=default")
    make_run("sft")
    assert problems("model.run=sft") == []
    one(problems("model.run=sfd"), "Did you mean `sft`?")
    make_run("sft", "stopped", command="accelerate launch train.py stage=sft")
    one(problems("model.run=sft"), "not finished", "accelerate launch train.py stage=sft overwrite=true")
    one(problems("reward=model"), "`reward.model.run`", "stage=reward project=default")
    one(problems("stage=evaluate", "stage.policies.sft=demo:sft", "~stage.policies.dpo"), "`stage.policies.ppo`")


def test_a_reward_model_is_no_policy_and_the_other_way_round(problems):
    make_run("reward", config={"architectures": ["LlamaForSequenceClassification"]})
    make_run("sft", config={"architectures": ["LlamaForCausalLM"]})
    assert problems("model.run=sft", "reward=model") == [] == problems("stage=reward", "run_name=r2", "model.run=sft")
    one(problems("model.run=reward"), "`model`", "reward model")
    for run, kind in {"sft": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}.items():
        make_run(run, config={"architectures": [kind]})
        one(problems("reward=model", f"reward.model.run={run}"), "`reward.model`", "without a score head")


def test_data_paths(problems):
    Path("pairs.jsonl").touch()
    assert problems("stage=dpo", "data=files", "data.paths=pairs.jsonl") == []
    one(problems("stage=dpo", "data=files", "data.paths=[pairs.jsonl,pears.jsonl]"), "`data.paths`", "pears.jsonl")
    one(problems("stage=dpo", "data=files", "data.paths=pairs.jsonl", "data.eval_paths='held*'"), "`data.eval_paths`")
    assert len(problems("stage=dpo", "data=files", "data.paths=[a.jsonl,b.jsonl]")) == 2
    one(problems("stage=dpo", "data=hub", "data.path=./nowhere"), "`data.path`", "no such folder")
    one(problems("stage=dpo", "data=reviews", "data.path=nowhere"), "`data.path`", "nowhere")


def test_a_batch_of_one_in_kto(problems):
    one(problems("stage=kto", "stage.args.per_device_train_batch_size=1"), "KTO takes its KL from other rows")
    assert problems("stage=kto", "stage.args.per_device_train_batch_size=2") == []
    words = ["+stage.args.loss_type=apo_zero_unpaired", "stage.args.per_device_train_batch_size=1"]
    assert problems("stage=kto", *words) == []  # has no KL


ROLLOUT = ["stage=grpo", "stage.args.per_device_train_batch_size=8"]


@pytest.mark.parametrize(
    ("ranks", "overrides", "parts"),
    [
        (
            1,
            ["stage.args.num_generations=6"],
            ["8 completions", "groups of 6", "gradient_accumulation_steps=3", "generations=4"],
        ),
        (2, ["stage.args.num_generations=6"], ["16 completions", "x 2 (ranks)", "gradient_accumulation_steps=3"]),
        (3, ["stage.args.num_generations=6"], []),
        (1, ["stage.args.num_generations=1"], ["2 or more"]),
        (1, ["stage.args.num_generations=0"], ["1 or more"]),
        (1, ["+stage.args.generation_batch_size=16"], ["two ways to set the same"]),
        (
            1,
            ["+stage.args.generation_batch_size=20", "stage.args.steps_per_generation=null"],
            ["generation_batch_size=24"],
        ),
        (2, ["+stage.args.generation_batch_size=32", "stage.args.steps_per_generation=null"], []),
        (1, ["data.max_samples=1"], ["`data.max_samples=2`"]),
        (
            1,
            ["stage.args.eval_strategy=steps", "stage.args.per_device_eval_batch_size=6"],
            ["`stage.args.per_device_eval_batch_size=12`", "num_generations_eval"],
        ),
        (2, ["stage.args.eval_strategy=steps", "stage.args.per_device_eval_batch_size=6"], []),
    ],
)
def test_batch_arithmetic(problems, monkeypatch, ranks, overrides, parts):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    one_or_none(problems(*ROLLOUT, *overrides), parts)


def test_what_batch_arithmetic_proposes_is_right(problems):
    wrong = [*ROLLOUT, "stage.args.num_generations=6"]
    assert problems(*wrong, "stage.args.steps_per_generation=3") == []
    assert problems(*wrong[:-1], "stage.args.num_generations=4") == []


def test_ppo_mini_batches_are_whole(problems):
    words = ["stage=ppo", "stage.args.steps_per_generation=6", "stage.args.gradient_accumulation_steps=4"]
    one(problems(*words), "`steps_per_generation`", "stage.args.steps_per_generation=8")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["~reward.gold"], ["no reward", "`reward=demo`"]),
        (["adapter=lora", "adapter.peft.lora_dropout=0.1"], ["`adapter.peft.lora_dropout=0`"]),
        (
            ["stage=dpo", "adapter=lora", "adapter.peft.lora_dropout=0.1"],
            ["`adapter.peft.lora_dropout=0`, or `stage.args.disable_dropout=false`"],
        ),
        (
            ["stage=dpo", "adapter=lora", "adapter.peft.lora_dropout=0.1", "stage.args.disable_dropout=false"],
            [],
        ),
        (["stage=sft", "adapter=lora", "adapter.peft.lora_dropout=0.1"], []),
        (["stage=grpo", "+stage.args.neftune_noise_alpha=5"], ["`stage.args.neftune_noise_alpha=null`"]),
        (["stage=kto", "+stage.args.neftune_noise_alpha=5"], ["or `stage.args.disable_dropout=false`"]),
        (["stage=sft", "+stage.args.neftune_noise_alpha=5"], []),
        (["stage=rloo", "+stage.args.generation_kwargs={stop_strings: [a]}"], ["generation_kwargs.stop_strings`"]),
        (["stage=ppo", "+stage.args.generation_kwargs={min_new_tokens: 4}"], []),
        (["stage=sft", "+stage.args.packing=true", "+stage.args.packing_strategy=wrapped"], ["Set it to `bfd`"]),
        (["stage=sft", "+stage.args.eval_packing=true"], ["`stage.args.packing=true` as well"]),
        (["stage=sft", "+stage.args.packing=true", "+stage.args.eval_packing=true"], []),
        (["kl=adaptive", "stage.args.beta=0"], ["`AdaptiveKL`", "`kl=fixed`"]),
        (["kl=linear", "stage.args.beta=0.0"], ["`LinearKL`"]),
        (["kl=linear", "kl.final=0.1", "stage.args.beta=0.0"], []),
        (["stage=grpo", "kl=linear", "kl.final=0.1", "stage.args.beta=0.0"], ["`LinearKL`"]),
        (["stage=rloo", "kl=cosine", "stage.args.beta=0"], ["`CosineKL`", "`kl=fixed`"]),
        (["stage=rloo", "kl.guard=5", "stage.args.beta=0"], ["`kl.guard`", "keeps none at `stage.args.beta=0`"]),
        (["kl.guard=5", "stage.args.beta=0"], []),
        (["kl.guard=0"], ["`kl.guard` is 0", "above 0"]),
        (["kl.guard=5", "kl.guard_action=halt"], ["`kl.guard_action`", "`skip`"]),
        (["stage.args.beta=0"], []),
        (["stage=rloo", "stage.args.beta=0"], []),
        (
            ["stage=grpo", "reward_norm=running"],
            ["`stage.args.scale_rewards=group`", "`stage.args.scale_rewards=none`"],
        ),
        (["stage=grpo", "reward_norm=batch", "stage.args.scale_rewards=batch"], ["would be cancelled"]),
        (["stage=grpo", "reward_norm=reference", "stage.args.scale_rewards=none"], []),
        (["stage=grpo", "reward_norm.clip=5"], []),
        (["reward_norm=running", "reward_norm.clip=0"], ["`reward_norm.clip` is 0"]),
        (["reward_norm=reference", "reward_norm.std=-1"], ["`reward_norm.std` is -1"]),
        (
            ["stage=rloo", "reward_norm=running", "+stage.args.normalize_advantages=true", "stage.args.beta=0"],
            ["`stage.args.normalize_advantages=false`"],
        ),
        (["stage=rloo", "reward_norm=running", "+stage.args.normalize_advantages=true"], []),
        (["adapter=qlora", "adapter.peft=null"], ["`adapter.quantization`", "without `adapter.peft`"]),
        (["+adapter.peft.r=4"], ["`adapter=lora`"]),
        (["resume=true", "overwrite=true"], ["only one"]),
        (["resume=true"], ["nothing to resume"]),
    ],
)
def test_combinations(problems, overrides, parts):
    one_or_none(problems(*overrides), parts)


def test_a_critic_that_starts_at_the_scores_learns_from_them_as_they_are(problems):
    make_run("reward")
    words = ["critic=model", "critic.run=reward", "stage.args.critic_score_head=true"]
    assert problems(*words) == [] and problems(*words, "reward_norm.clip=5") == []
    one(problems(*words, "reward_norm=reference"), "rewards on another scale", "`reward_norm=none`")
    assert problems(*words[:2], "reward_norm=reference") == []


def test_a_rollout_is_not_skipped_under_deepspeed(problems, monkeypatch):
    words = ["kl.guard=5", "kl.guard_action=skip"]
    assert problems(*words) == []
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    one(problems(*words), "`kl.guard_action=stop`", "DeepSpeed")


def test_the_policy_is_not_held_still_under_deepspeed(problems, monkeypatch):
    words = ("stage.args.critic_warmup_steps=2",)
    assert problems(*words) == []
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    one(problems(*words), "`stage.args.critic_warmup_steps`", "DeepSpeed", "ddp or fsdp2")


@pytest.mark.parametrize(
    ("environment", "overrides", "parts"),
    [
        ({"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, [], []),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, [], ["accelerate's file", "`SHARDED_STATE_DICT`", "FULL"]),
        ({"FSDP_VERSION": "2"}, [], ["`SHARDED_STATE_DICT`"]),  # accelerate's default
        ({"FSDP_VERSION": "1"}, [], []),
        ({"FSDP_VERSION": "2"}, ["stage=init"], []),
        ({"FSDP_VERSION": "2"}, ["+stage.args.fsdp=full_shard"], []),  # then the Trainer's own values are in force
        (
            {},
            ["+stage.args.fsdp=full_shard", "+stage.args.fsdp_config={fsdp_state_dict_type: SHARDED_STATE_DICT}"],
            ["`stage.args.fsdp_config.state_dict_type` is `SHARDED_STATE_DICT`", "FULL_STATE_DICT"],
        ),
    ],
)
def test_fsdp_saves_whole_weights(problems, monkeypatch, environment, overrides, parts):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    one_or_none(problems("stage=sft", *overrides), parts)


def test_a_quantized_model_is_not_quantized_again(problems):
    make_run("sft", config={"quantization_config": {"quant_method": "gptq"}})
    one(problems("model.run=sft", "adapter=qlora"), "quantized already (gptq)", "`adapter=lora`")


def test_precision_without_an_accelerator(problems, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    one(problems("stage.args.bf16=true"), "`stage.args.bf16`", "use_cpu=true")
    one(problems("+stage.args.fp16=true"), "`stage.args.fp16`")
    assert problems("stage.args.bf16=true", "+stage.args.use_cpu=true") == []
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # ranks of a rehearsal, without `use_cpu`
    assert problems("stage.args.bf16=true") == []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.init_kwargs={rms_norm_eps: 0.1}"], []),
        (["stage=sft", "model.init_kwargs={dtype: bfloat16}"], ["`model.init_kwargs.dtype`", "Set `model.dtype`."]),
        (["model.init_kwargs={quantization_config: 4}"], ["adapter.quantization"]),
        (["model.init_kwargs=3"], ["`model.init_kwargs` is 3"]),
        (["stage.args.model_init_kwargs={use_cache: false}"], ["the reference only", "Set `model.init_kwargs`"]),
        (["stage=sft", "+stage.args.model_init_kwargs={use_cache: false}"], ["Set `model.init_kwargs`"]),
    ],
)
def test_arguments_of_loading_have_one_key_each(problems, overrides, parts):
    one_or_none(problems(*overrides), parts)


def test_missing_packages_are_named(problems, monkeypatch):
    find_spec = importlib.util.find_spec
    missing = ("wandb", "kernels")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    one(problems("logger=wandb"), "`logger=wandb`", "pip install 'rlhf-trl[wandb]'")
    words = ("model.init_kwargs={use_kernels: true}", "`model.init_kwargs.use_kernels=true`")
    one(problems(words[0]), words[1], "pip install 'rlhf-trl[kernels]'")


def test_a_used_run_directory(problems, compose):
    from omegaconf import OmegaConf

    folder = make_run("ppo", "stopped")
    assert problems() == []  # it left nothing
    one(problems("resume=true"), "no checkpoint", "remove `resume=true`")
    (folder / ".unfinished/checkpoint-5").mkdir(parents=True)  # killed while writing it
    assert problems() == []
    one(problems("resume=true"), "no checkpoint")
    (folder / "completions.jsonl").touch()
    (problem,) = problems()  # there is something to lose and nothing to resume
    assert "`overwrite=true`" in problem and "resume" not in problem
    (folder / "checkpoint-5").mkdir()
    one(problems(), "`resume=true`", "`run_name=...`", "`overwrite=true`")
    assert problems("overwrite=true") == [] == problems("run_name=other")
    one(problems("resume=true"), "no `config.yaml`", "`overwrite=true`")
    OmegaConf.save(compose(), folder / "config.yaml", resolve=True)
    assert problems("resume=true") == []
    make_run("ppo", "done")
    one(problems("resume=true"), "finished", "nothing to resume")
    one(problems(), "`run_name=...`", "`overwrite=true`", "`resume=true stage.args.num_train_epochs=...`")


def test_resume_auto_does_what_there_is_to_do(problems, compose):
    """As a scheduler starts the same command again: it begins, resumes, lengthens, or finds a finished run."""
    from omegaconf import OmegaConf

    def does(*words: str) -> tuple[bool, bool]:
        assert problems("resume=auto", *words) == []
        values = plain(compose("resume=auto", *words))[0]
        return resumes(values), is_finished(values)

    assert does() == (False, False)
    folder = make_run("ppo", "preempted")
    OmegaConf.save(compose(), folder / "config.yaml", resolve=True)
    assert does() == (False, False)  # it left nothing
    (folder / "checkpoint-5").mkdir()
    assert does() == (True, False)
    one(problems("resume=auto", "stage.args.beta=0.3"), "`stage.args.beta` was")
    one(problems("resume=auto", "overwrite=true"), "`resume=auto` continues a run and `overwrite=true` deletes it")
    one(problems("resume=auto", "+stage.args.save_only_model=true"), "`stage.args.save_only_model=true` keeps")
    make_run("ppo", "done")
    assert does() == (False, True)
    assert does("stage.args.num_train_epochs=100") == (True, False)
    one(problems("resume=auto", "stage.args.beta=0.3"), "`stage.args.beta` was")
    assert "`resume` is 'always'. There are: `auto`, `false`, `true`." in problems("resume=always")


def test_a_launch_for_fewer_machines_than_slurm_starts(problems, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    one(problems(), "started this launch 2 times, and it is for 1 machine:", "--num_machines 2", "multi_node.sbatch")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert problems() == []
    monkeypatch.delenv("GROUP_WORLD_SIZE")
    monkeypatch.setenv("WORLD_SIZE", "2")  # a task for each rank
    assert problems() == []


def test_processes_of_cpus_that_accelerate_does_not_start(problems, monkeypatch):
    """The environment of `accelerate launch --cpu --num_processes 2`, and of a file with `num_machines: 2`."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert problems() == []
    monkeypatch.setenv("MASTER_PORT", "29500")
    one(problems(), "Accelerate was to start several processes", "`use_cpu: true` it starts one", "ddp.yaml")
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        with monkeypatch.context() as started:
            started.setenv(name, "2")
            assert problems() == []


def test_a_checkpoint_of_transformers_own_is_refused(problems):
    one(problems("+stage.args.enable_jit_checkpoint=true"), "`stage.args.enable_jit_checkpoint`", "SIGTERM")


@pytest.mark.parametrize("status", ["stopped", "done"])
def test_a_run_can_be_lengthened_and_not_shortened(problems, compose, status):
    from omegaconf import OmegaConf

    folder = make_run("ppo", status)
    (folder / "checkpoint-5").mkdir()
    for name, before, longer, shorter in (
        ("num_train_epochs", 20, 30, 10),
        ("total_episodes", 2048, 4096, 1024),
        ("max_steps", 32, 64, 16),
    ):
        key = f"stage.args.{name}"
        OmegaConf.save(compose(f"{key}={before}"), folder / "config.yaml", resolve=True)
        assert problems("resume=true", f"{key}={longer}") == []
        one(problems("resume=true", f"{key}={shorter}"), f"`{key}` was {before} and is {shorter}")
        one(problems("resume=true", f"{key}={longer}", "stage.args.beta=0.3"), "`stage.args.beta` was")


def test_a_labeling_takes_a_larger_budget_and_none_at_all(problems, compose):
    from omegaconf import OmegaConf

    folder = make_run("label", "done")
    (folder / "labels.jsonl").touch()
    words = ["stage=label", "resume=true", "stage.candidates=runs/default/label/run.json"]
    for before, after, works in ((4, 8, True), (4, "null", True), (8, 4, False), ("null", 8, False)):
        started = compose(*words[::2], f"stage.budget={before}", "run_name=label")
        OmegaConf.save(started, folder / "config.yaml", resolve=True)
        found = problems(*words, f"stage.budget={after}", "run_name=label")
        assert bool(found) != works, (before, after, found)


def test_what_a_failed_run_left_is_not_lost(problems):
    folder = make_run("evaluate", "failed")
    words = ["stage=evaluate", *(f"stage.policies.{name}=demo:base" for name in ("sft", "ppo", "dpo"))]
    assert problems(*words) == []
    for name in ("comparison.json", ".completions.jsonl.partial", "completions.jsonl", "model.safetensors"):
        (folder / name).touch()
        one(problems(*words), "already holds a run")
        (folder / name).unlink()


@pytest.mark.parametrize("stage", ["evaluate", "init", "evaluate_reward"])
def test_a_stage_that_does_not_train_uses_its_directory_too(problems, stage):
    for name in ("sft", "ppo", "dpo", "reward", stage):
        make_run(name)
    one(problems(f"stage={stage}"), "already holds a run", "`overwrite=true`")
    assert problems(f"stage={stage}", "overwrite=true") == []


def test_smoke_is_for_stages_that_train(problems):
    make_run("sft")
    one(problems("stage=merge", "model.run=sft", "debug=smoke"), "trains nothing", "`debug=smoke`")


def test_hydras_folder_alone_is_no_use(problems):
    Path("runs/default/ppo/.hydra/rank_0").mkdir(parents=True)
    assert problems() == []


def test_a_resume_with_another_config_lists_the_keys(problems, compose):
    from omegaconf import OmegaConf

    folder = make_run("ppo", "stopped")
    (folder / "checkpoint-5").mkdir()
    OmegaConf.save(compose(), folder / "config.yaml", resolve=True)
    assert problems("resume=true") == [] == problems("resume=true", "stage.args.save_steps=7")
    assert problems("resume=true", "debug=dry_run", "logger=wandb") == []
    found = problems("resume=true", "stage.args.beta=0.2", "seed=3", "+stage.args.max_grad_norm=0.5")
    one(found, "`seed` was 42 and is 3", "`stage.args.beta` was 0.05 and is 0.2", "`stage.args.max_grad_norm`")
    assert "save_steps" not in found[0]


def test_check_raises_one_error_with_all(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = compose("stage=grpo", "model.run=sft", "stage.args.num_generations=7", "+stage.args.bta=1", "reward=model")
    with pytest.raises(ConfigError) as raised:
        check(cfg)
    assert str(raised.value).startswith("4 problems:") and "  4. " in str(raised.value)
    assert not os.listdir(tmp_path)


def test_the_libraries_find_the_rest(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(compose("stage=ppo"))
    both = ["stage.args.missing_eos_penalty=1", "stage.args.missing_eos_score=0"]
    cfg = compose("stage=ppo", *both, "+data.max_sample=3", "+reward.gold.wait=2")
    with pytest.raises(ConfigError) as raised:
        check(cfg)
    for part in (
        "3 problems",
        "missing_eos_score",
        "`data.max_sample`",
        "`max_samples`",
        "`reward.gold.wait`",
        "`weight`",
    ):
        assert part in str(raised.value)


def test_a_model_without_linear_layers_cannot_be_quantized(compose, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    check(compose("stage=sft", "adapter=qlora"))

    def only_a_head(config, **kwargs):
        model = torch.nn.Sequential(torch.nn.Embedding(config.vocab_size, 4))
        model.config, model.name_or_path = config, "only a head"
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", only_a_head)
    empty_model.cache_clear()
    with pytest.raises(ConfigError, match="no linear layer"):
        check(compose("stage=sft", "adapter=qlora"))
    empty_model.cache_clear()


def test_a_word_that_is_not_true_overwrites_nothing(problems):
    make_run("sft")
    wrong, used = problems("stage=sft", "overwrite=no")
    assert "`overwrite` is 'no'" in wrong and "already holds a run" in used


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["stage=sft", "runs_dir=file"], ["`file/default/sft` can't be written", "`runs_dir=...`"]),
        (["stage=sft", "runs_dir=file/deep/er"], ["can't be written"]),
        (["stage=sft", "runs_dir=/proc/x"], ["`/proc/x/default/sft` can't be written"]),
        (["stage=sft", f"run_name={'x' * 300}"], ["can't be written", "`run_name=...`"]),
        (["stage=generate", "stage.output=file/out.jsonl"], ["`stage.output`: `file` can't be written"]),
    ],
)
def test_folders_that_can_not_be_written(problems, overrides, parts):
    Path("file").write_text("")
    one(problems(*overrides), *parts)
    assert [path.name for path in Path().iterdir()] == ["file"]
    assert problems("stage=sft", "runs_dir=not/yet/there") == [] and not Path("not").exists()


@pytest.mark.parametrize(("offline", "token", "says"), [("1", "x", "HF_HUB_OFFLINE"), ("", None, "hf auth login")])
def test_a_push_to_the_hub_needs_a_login(compose, tmp_path, monkeypatch, offline, token, says):
    from rlhf_trl.checks import libraries

    monkeypatch.setattr(libraries, "is_offline_mode", lambda: bool(offline))
    monkeypatch.setattr(libraries, "get_token", lambda: token)
    with pytest.raises(ConfigError, match=f"`stage.args.push_to_hub=true` writes to the hub.*{says}"):
        check(compose("stage=sft", "+stage.args.push_to_hub=true", f"runs_dir={tmp_path}"))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("hub_token=hf_mine", "stand in the records.*`HF_TOKEN`"),
        ("hub_strategy=all_checkpoints", "Set it to `every_save`"),
    ],
)
def test_a_push_holds_no_token_and_no_checkpoints(compose, tmp_path, monkeypatch, word, says):
    from rlhf_trl.checks import libraries

    monkeypatch.setattr(libraries, "_hub_login", lambda why: [])
    with pytest.raises(ConfigError, match=says):
        check(compose("stage=sft", "+stage.args.push_to_hub=true", f"+stage.args.{word}", f"runs_dir={tmp_path}"))


@pytest.mark.parametrize("value", ["wandb", "[wandb]", "[tensorboard,wandb]"])
def test_wandb_is_the_loggers(compose, tmp_path, value):
    with pytest.raises(ConfigError, match="`stage.args.report_to` names wandb.* Set `logger=wandb`"):
        check(compose("stage=sft", f"stage.args.report_to={value}", f"runs_dir={tmp_path}"))


def test_missing_baseline_is_an_error_before_anything_runs(compose, tmp_path):
    words = ("stage=evaluate", f"runs_dir={tmp_path}")
    for policies in ("stage.policies=null", "~stage.policies.sft"):
        problems = find_problems(compose(*words, policies))
        assert any("`stage.baseline` is `sft`, which `stage.policies` doesn't have" in text for text in problems)


def test_without_a_reward_a_judge_alone_compares(problems):
    judged = ["stage=evaluate", "reward=none", "judge=http", "judge.url=http://localhost:1/v1", "judge.model=m"]

    def said(*words: str) -> list[str]:
        return [text for text in problems(*words) if "no such run" not in text]

    assert said(*judged, "stage.best_of_n=0") == []
    one(said(*judged), "` chooses by a reward, and there is none", "Set `stage.best_of_n=0`")
    one(said("stage=evaluate", "reward=none", "stage.best_of_n=0"), "`judge=reward` reads a reward")


@pytest.mark.parametrize("value", ["[a]", "1", "[1,nan]"])
def test_gaps_above_are_numbers(compose, tmp_path, value):
    problems = find_problems(compose("stage=evaluate_reward", f"runs_dir={tmp_path}", f"stage.gaps_above={value}"))
    assert any("`stage.gaps_above` is" in text and "must be a list of numbers" in text for text in problems)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["reward=none"], ["no reward to maximize"]),
        (["reward=none", "judge=http", "judge.url=http://localhost:1/v1", "judge.model=m"], []),
        (["reward.gold.weight=0", "judge=http", "judge.url=http://localhost:1/v1", "judge.model=m"], []),
        (["judge=reward"], ["`judge=reward`", "Set `judge=null`"]),
        (["combine=lagrange", "combine.constraints={gold: 1.0}"], ["`combine=lagrange`", "Set `combine=threshold`"]),
    ],
)
def test_online_dpo_has_a_reward_or_a_judge(problems, words, parts):
    one_or_none(problems("stage=online_dpo", *words), parts)
