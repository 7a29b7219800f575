"""What is wrong with a config is found before a model loads: each rule once, on the real config."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from rlhf_trl import argument_names, dotpaths
from rlhf_trl.checks import check, find_problems
from rlhf_trl.errors import ConfigError
from rlhf_trl.paths import conf_dir

STAGES = sorted(path.stem for path in conf_dir().glob("stage/*.yaml"))
TRAINING = [
    stage for stage in STAGES if "args" in yaml.safe_load((conf_dir() / f"stage/{stage}.yaml").read_text())["stage"]
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder to stand in, on one rank."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


def make_run(name: str, status: str = "done", cfg=None, **files) -> Path:
    run_dir = Path("runs/default", name)
    run_dir.mkdir(parents=True)
    record = {"stage": name, "status": status, "pid": 2**22 + 1, "command": f"python train.py stage={name}"}
    (run_dir / "run.json").write_text(json.dumps(record))
    for file, content in files.items():
        (run_dir / f"{file}.json").write_text(json.dumps(content))
    if cfg is not None:
        OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
    return run_dir


def problem(compose, *overrides: str) -> str:
    """The only problem of a config."""
    problems = find_problems(compose(*overrides))
    assert len(problems) == 1, problems
    return problems[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_as_it_is_has_no_problem(compose, stage):
    for name in ("sft", "ppo", "dpo", "reward"):
        make_run(name)
    assert find_problems(compose(f"stage={stage}", "run_name=new")) == []


# ---- Names and values ----

WRONG = {
    "+stage.args.bta=1": "no argument of `rlhf_trl.ppo.PPOConfig`. Did you mean `beta`",
    "stage.args.learning_rate=high": "`stage.args.learning_rate` is 'high' and must be a number",
    "stage.args.num_train_epochs=two": "must be a number",
    "stage.args.max_steps=2.0": "Type `stage.args.max_steps=2`",
    "stage.args.whiten_rewards=1": "must be true or false",
    "stage.args.save_strategy=stps": "Did you mean `steps`",
    "stage.args.eval_strategy=false": "is false, which is how YAML reads a bare no",
    "stage.args._target_=rlhf_trl.ppo.PPOConfg": "`rlhf_trl.ppo` has no `PPOConfg`. Did you mean `PPOConfig`",
    "stage.args.per_device_train_batch_size=0": "Set it to 1 or more",
    "reward.gold.function=rlhf_trl.demo.gold": "`reward.gold.function`",
    "reward.gold.function=my_rewards.brevity": "There is no module `my_rewards`",
    "stage.args.seed=???": "`stage.args.seed` has no value. Type `stage.args.seed=...`",
    "run_name=${nme}": "`run_name` can't be resolved",
}


@pytest.mark.parametrize(("override", "part"), WRONG.items(), ids=WRONG)
def test_a_name_or_a_value_that_is_wrong(compose, override, part):
    assert part in problem(compose, override)


def test_a_reward_function_in_the_folder_where_one_stands(compose, folder, monkeypatch):
    (folder / "my_rewards.py").write_text("def brevity(prompts, completions, **kwargs):\n    return [0.0]\n")
    monkeypatch.syspath_prepend(str(folder))
    mine = ("reward=function", "reward.function.function=my_rewards.brevity")
    assert find_problems(compose(*mine)) == []
    assert "Did you mean `brevity`" in problem(
        compose, "reward=function", "reward.function.function=my_rewards.brvity"
    )


def test_dot_paths_are_followed_without_an_import():
    assert dotpaths.problem("my/rewards.py").startswith("`my/rewards.py` is no dot path")
    assert dotpaths.problem("rlhf_trl.errors") == "`rlhf_trl.errors` is a module. Name the function or class in it."
    assert "Did you mean `ConfigError`" in dotpaths.problem("rlhf_trl.errors.ConfgError")
    for path in ("trl.DPOConfig", "os.path.join", "math.sqrt", "torch.nn.Linear", "trl.experimental.orpo.ORPOTrainer"):
        assert dotpaths.problem(path) is None, path


def test_the_shipped_argument_names_are_the_installed_libraries():
    assert json.loads(argument_names.FILE.read_text()) == argument_names.installed(), (
        "run `python -m rlhf_trl.argument_names`"
    )


def test_the_types_of_arguments_accept_their_defaults():
    """Else a value that the class itself has would be refused."""
    from rlhf_trl.checks.names import _type_problem

    for target in argument_names.CLASSES:
        for name, (expected, default) in argument_names.arguments(target).items():
            assert _type_problem(name, default, expected) == [], (target, name)


# ---- Models, earlier runs and data ----


def test_models_that_are_not_there(compose, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "empty").mkdir()
    (folder / "model.gguf").touch()
    hf = ("stage=sft", "model=hf")
    assert "`model.path` has no value. Type `model.path=...`" in problem(compose, *hf)
    assert "Did you mean `empty`" in problem(compose, *hf, "model.path=emty")
    assert "a folder without `config.json`" in problem(compose, *hf, "model.path=empty")
    assert "is the file `model.gguf`" in problem(compose, *hf, "model.path=model.gguf")
    assert "`HF_HUB_OFFLINE` is set" in problem(compose, *hf, "model.path=Qwen/Qwen3-0.6B")
    assert "Did you mean `demo:base`" in problem(compose, "stage=sft", "model.path=demo:bas")
    assert "`model.chat_template` is `chat.jinja`" in problem(compose, "stage=sft", "model.chat_template=chat.jinja")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert find_problems(compose(*hf, "model.path=Qwen/Qwen3-0.6B")) == []


def test_a_missing_run_names_the_command_that_makes_it(compose, folder):
    command = "`accelerate launch train.py stage=sft project=default`"
    assert command in problem(compose, "stage=dpo", "model.run=sft")
    elsewhere = problem(compose, "stage=dpo", "model.run=sft", "runs_dir=out", "project=p")
    assert "`accelerate launch train.py stage=sft project=p runs_dir=out`" in elsewhere
    make_run("my_sft")
    near = problem(compose, "stage=dpo", "model.run=my_sf")
    assert "Did you mean `my_sft`" in near and "stage=... run_name=my_sf" in near
    assert "`reward.model.run` is `reward`" in problem(compose, "reward=model")
    policies = find_problems(compose("stage=compare"))
    assert [text.split("`")[1] for text in policies] == [f"stage.policies.{name}" for name in ("sft", "ppo", "dpo")]
    make_run("sft", status="stopped")
    unfinished = problem(compose, "stage=dpo", "model.run=sft")
    assert "its status is `stopped`" in unfinished and "stage=sft resume=true`" in unfinished


def test_a_policy_is_no_reward_model_and_the_other_way_round(compose):
    make_run("sft", config={"architectures": ["LlamaForCausalLM"]})
    make_run("reward", config={"architectures": ["LlamaForSequenceClassification"]})
    make_run("reward_lora", adapter_config={"task_type": "SEQ_CLS"})
    assert "without a score head" in problem(compose, "reward=model", "reward.model.run=sft")
    assert "which can't write text" in problem(compose, "model.run=reward")
    assert "which can't write text" in problem(compose, "model.run=reward_lora")
    assert find_problems(compose("reward=model", "model.run=sft")) == []
    assert find_problems(compose("stage=reward", "model.run=sft", "run_name=new")) == []


def test_data_that_is_not_there(compose, folder, monkeypatch):
    monkeypatch.delenv("RLHF_TRL_REVIEWS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "rows.jsonl").touch()
    (folder / "rows.txt").touch()
    assert "`data.paths` has no value" in problem(compose, "stage=sft", "data=files")
    problems = find_problems(
        compose("stage=sft", "data=files", "data.paths=[rows.json,rows.txt]", "data.eval_paths=x")
    )
    assert ["`data.paths`" in text for text in problems] == [True, True, False] and "`data.eval_paths`" in problems[2]
    assert find_problems(compose("stage=sft", "data=files", "data.paths='r*.jsonl'")) == []
    assert "`RLHF_TRL_REVIEWS`, which is not set" in problem(compose, "stage=sft", "data=reviews")
    assert "`HF_HUB_OFFLINE` is set" in problem(compose, "stage=sft", "data=hub", "data.path=a/b")
    mixed = "data.sources={a:{_target_:rlhf_trl.data.load_files,_partial_:true,paths:x.jsonl}}"
    assert "`data.sources.a.paths`" in problem(compose, "stage=sft", "data=mix", mixed)


# ---- Batches ----

GRPO = "stage=grpo"
BATCHES = {
    (GRPO, "stage.args.num_generations=1"): "a group needs 2 or more",
    (GRPO, "stage.args.per_device_train_batch_size=6", "stage.args.per_device_eval_batch_size=4"): (
        "= 6 completions doesn't divide into groups of 4 (`num_generations`). Set `stage.args.steps_per_generation=2` "
        "or `stage.args.num_generations=3`"
    ),
    (GRPO, "stage.args.eval_strategy=steps", "stage.args.per_device_eval_batch_size=6"): (
        "Set `stage.args.per_device_eval_batch_size=12` or `+stage.args.num_generations_eval=1`"
    ),
    (GRPO, "+stage.args.generation_batch_size=64"): "say the same twice",
    (GRPO, "stage.args.steps_per_generation=null", "+stage.args.generation_batch_size=65"): (
        "Set `stage.args.generation_batch_size=128`"
    ),
    (GRPO, "data.max_samples=15"): "less than the 16 prompts of one rollout",
    ("stage=ppo", "stage.args.gradient_accumulation_steps=3"): "Set `stage.args.steps_per_generation=6`",
}


@pytest.mark.parametrize(("overrides", "part"), BATCHES.items(), ids=lambda value: " ".join(value)[:60])
def test_batches_that_do_not_divide(compose, overrides, part):
    assert part in problem(compose, *overrides)


def test_the_advice_about_batches_helps(compose):
    """What is told to be typed is typed, and no problem is left."""
    for overrides, part in BATCHES.items():
        for advice in re.findall(r"`\+?(stage\.args\.\w+=\d+)`", part):
            key = advice.split("=")[0]
            others = [word for word in overrides if key not in word]
            sign = "+" if "_eval" in key and "num" in key or "generation_batch_size" in key else ""
            assert find_problems(compose(*others, sign + advice)) == [], advice


def test_batches_count_the_ranks(compose, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    few = ("stage=grpo", "stage.args.per_device_train_batch_size=2", "data.max_samples=100")
    assert "2 (`per_device_train_batch_size`) x 3 (ranks) x 1" in problem(compose, *few)


# ---- What can't go together ----


def test_impossible_combinations(compose, monkeypatch):
    assert "has no reward to maximize" in problem(compose, "~reward.gold")
    assert "Set `adapter.peft.lora_dropout=0`" in problem(compose, "adapter=lora", "adapter.peft.lora_dropout=0.1")
    assert find_problems(compose("stage=sft", "adapter=lora", "adapter.peft.lora_dropout=0.1")) == []
    assert "type `kl=fixed`" in problem(compose, "kl=adaptive", "stage.args.beta=0")
    assert "`+stage.args.use_cpu=true`" in problem(compose, "stage=sft", "stage.args.bf16=true")
    assert find_problems(compose("stage=sft", "stage.args.bf16=true", "+stage.args.use_cpu=true")) == []
    assert "4-bit weights can't be trained" in problem(compose, "stage=sft", "adapter=qlora", "adapter.peft=null")
    make_run("awq", config={"quantization_config": {"quant_method": "awq"}})
    assert "quantized already (awq)" in problem(compose, "adapter=qlora", "model.run=awq")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = find_problems(compose("stage=sft", "adapter=qlora", "logger=wandb"))
    assert any("pip install 'rlhf-trl[qlora]'" in text for text in found)
    assert any("pip install 'rlhf-trl[wandb]'" in text for text in found)


def test_smoke_is_for_stages_that_train(compose):
    make_run("sft")
    assert "trains nothing" in problem(compose, "stage=merge", "model.run=sft", "debug=smoke")


# ---- The run directory ----


@pytest.mark.parametrize("stage", ["sft", "ppo", "compare", "init", "reward_pairs"])
def test_a_used_run_directory_names_the_ways_out(compose, stage):
    for name in {"sft", "ppo", "dpo", "reward"} - {stage}:
        make_run(name)
    make_run(stage, status="stopped")
    used = [text for text in find_problems(compose(f"stage={stage}")) if "already holds a run" in text]
    assert len(used) == 1
    assert all(way in used[0] for way in ("`resume=true`", "`run_name=...`", "`overwrite=true`"))
    others = find_problems(compose(f"stage={stage}", "overwrite=true"))
    assert not [text for text in others if "already holds a run" in text]


def test_hydras_own_folder_does_not_use_a_run_directory(compose):
    Path("runs/default/ppo/.hydra/rank_0").mkdir(parents=True)
    assert find_problems(compose()) == []


def test_a_resume_that_can_not_be(compose):
    assert "nothing to resume" in problem(compose, "resume=true")
    assert "Type only one of them" in problem(compose, "resume=true", "overwrite=true")
    cfg = compose("stage=sft")
    run_dir = make_run("sft", status="failed", cfg=cfg)
    assert "no complete checkpoint" in problem(compose, "stage=sft", "resume=true")
    (run_dir / "checkpoint-3").mkdir()
    (run_dir / "checkpoint-3/complete").touch()
    assert find_problems(compose("stage=sft", "resume=true", "stage.args.save_steps=9", "logger=wandb")) == []
    changed = problem(compose, "stage=sft", "resume=true", "seed=1", "stage.args.learning_rate=7e-3")
    assert "`seed` was 42 and is 1" in changed and "`stage.args.learning_rate` was 0.001 and is 0.007" in changed
    assert all(way in changed for way in ("values it began with", "`run_name=...`", "`overwrite=true`"))
    (run_dir / "run.json").write_text(json.dumps({"status": "done"}))
    assert "finished" in problem(compose, "stage=sft", "resume=true")


def test_a_run_that_is_under_way_is_left_alone(compose):
    alive = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()", "train.py"], stdin=subprocess.PIPE)
    try:
        run_dir = make_run("sft", status="running")
        (run_dir / "run.json").write_text(json.dumps({"status": "running", "pid": alive.pid}))
        for way in ("overwrite=true", "resume=true"):
            assert f"still under way, as process {alive.pid}" in problem(compose, "stage=sft", way)
    finally:
        alive.communicate()


# ---- All at once, and at once ----


def test_several_mistakes_make_one_numbered_list(compose):
    make_run("ppo")
    cfg = compose(
        "stage.args.learning_rate=high", "+stage.args.bta=1", "model.run=sft", "stage.args.steps_per_generation=0"
    )
    with pytest.raises(ConfigError) as error:
        check(cfg)
    lines = str(error.value).splitlines()
    assert lines[0] == "5 problems:"
    assert [line.split()[0] for line in lines[1:]] == [f"{i}." for i in range(1, 6)]


def test_the_light_checks_import_nothing_heavy():
    code = (
        "import sys, hydra\nfrom rlhf_trl.checks import find_problems\nfrom rlhf_trl.paths import conf_dir\n"
        "with hydra.initialize_config_dir(str(conf_dir()), version_base='1.3'):\n"
        "    cfg = hydra.compose('train', ['adapter=qlora', 'reward=[demo,model]', 'kl=adaptive', 'logger=wandb'])\n"
        "print(len(find_problems(cfg)), {'torch', 'numpy', 'transformers', 'trl', 'datasets'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(conf_dir().parent)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["1", "set()"]


# ---- With the libraries ----


def test_what_only_the_libraries_know(compose, folder, tiny_llama):
    def refusal(*overrides: str) -> str:
        cfg = compose(*overrides)
        assert find_problems(cfg) == []
        with pytest.raises(ConfigError) as error:
            check(cfg)
        return str(error.value)

    assert "loss_type" in refusal("+stage.args.loss_type=grpo")  # PPOConfig's own rule
    assert "`data.max_sample` is no argument" in refusal("stage=sft", "+data.max_sample=3")
    (folder / "broken.py").write_text("import nowhere_to_be_found\ndef f(): ...\n")
    sys.path.insert(0, str(folder))
    assert "can't be imported" in refusal("reward=function", "reward.function.function=broken.f")
    sys.path.remove(str(folder))


def test_a_model_without_linear_layers_can_not_be_quantized(compose, folder):
    from transformers import AutoConfig

    AutoConfig.for_model("mamba", num_hidden_layers=0, hidden_size=8, vocab_size=16).save_pretrained(folder / "bare")
    cfg = compose("stage=sft", "adapter=qlora", "model=hf", "model.path=bare")
    with pytest.raises(ConfigError, match="no linear layer"):
        check(cfg)
    check(compose("stage=sft", "adapter=qlora"))


def test_a_check_leaves_nothing(compose, folder):
    check(compose("stage=sft"))
    assert list(folder.iterdir()) == []
