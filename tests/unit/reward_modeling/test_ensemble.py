"""Ensembles of reward models: training by one command, resuming, and use as rewards of PPO, RLOO and GRPO."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from rlhf_trl.checks import find_problems
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.loading import load_reward_model
from rlhf_trl.models.merging import merge_adapter
from rlhf_trl.rewards.adapter import AdapterReward
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.runs.paths import conf_dir

LORA = ("adapter=lora", "adapter.peft.r=4")
MEMBERS = ("stage=reward", "stage.members=3", *LORA, "stage.args.max_steps=4", "stage.args.eval_strategy='no'")
PROMPTS = [[{"role": "user", "content": text}] for text in ("How do I bake bread?", "What does a cat eat?")] * 4
COMPLETIONS = [
    [{"role": "assistant", "content": text}]
    for text in (
        "First, mix flour.",
        "I do not care.",
        "A cat eats fish.",
        "I am sorry.",
        "It is a cat.",
        "No.",
        "",
        "x",
    )
]


def read(folder, name) -> dict:
    return json.loads(Path(folder, name).read_text())


def scored(reward) -> torch.Tensor:
    ids = [[] for _ in PROMPTS]
    return torch.tensor(reward(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=ids))


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory) -> Path:
    """Folder of runs: an SFT adapter, an ensemble and a single reward model that start from it."""
    runs = tmp_path_factory.mktemp("runs")
    train(runs, "stage=sft", *LORA)
    train(
        runs,
        *MEMBERS,
        "model.run=sft",
        "run_name=ensemble",
        "+callbacks.seen._target_=tests.unit.reward_modeling.test_ensemble.Seen",
    )
    train(runs, "stage=reward", *LORA, "model.run=sft", "run_name=single")
    return runs


@pytest.fixture
def ensemble(runs) -> str:
    return f"{runs}/test/ensemble"


class Seen(TrainerCallback):
    """Keeps the rows of each member's first batches, in the order of the training."""

    batches: ClassVar[list[list[int]]] = []

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        Seen.batches.append([ids for batch in train_dataloader for ids in batch["input_ids"][:, :12].tolist()][:64])


def test_members_share_a_base_and_differ_in_seed_and_order_of_the_data(ensemble):
    folders = [Path(ensemble, f"member_{i}") for i in range(3)]
    assert read(ensemble, "ensemble.json") == {"members": [folder.name for folder in folders]}
    assert read(ensemble, "run.json")["status"] == "done" and read(ensemble, "run.json")["stage"] == "reward"
    bases = {read(folder, "adapter_config.json")["base_model_name_or_path"] for folder in folders}
    assert len(bases) == 1 and all(read(folder, "run.json")["status"] == "done" for folder in folders)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    for name in weights[0]:
        assert not torch.equal(weights[0][name], weights[1][name]), name
    # One split for all, in an order of its own for each
    orders = Seen.batches
    assert len(orders) == 3 and orders[0] != orders[1] != orders[2] != orders[0]
    metrics = read(ensemble, "metrics.json")["eval"]
    each = [read(folder, "metrics.json")["eval"]["eval_accuracy"] for folder in folders]
    assert metrics["eval_member_accuracy"] == pytest.approx(sum(each) / 3)
    assert 0 <= metrics["eval_accuracy"] <= 1 and metrics["eval_disagreement"] > 0


def test_ensemble_is_one_reward_with_one_base(ensemble):
    members = torch.stack([scored(ModelReward(f"{ensemble}/member_{i}")) for i in range(3)])
    assert members.std(dim=0).min() > 1e-3
    reward = ModelReward(ensemble)
    assert reward.members == 3
    torch.testing.assert_close(scored(reward), members.mean(dim=0))
    torch.testing.assert_close(scored(ModelReward(ensemble, ensemble="min")), members.amin(dim=0))
    lower = ModelReward(ensemble, ensemble="mean_minus_std", std_coef=2.0)
    torch.testing.assert_close(scored(lower), members.mean(dim=0) - 2 * members.std(dim=0))
    # The base is there once: what each further member adds is an adapter and a head
    own, whole = (
        sum(p.numel() for p in load_reward_model(path).parameters()) for path in (f"{ensemble}/member_0", ensemble)
    )
    added = sum(weight.numel() for weight in load_file(f"{ensemble}/member_0/adapter_model.safetensors").values())
    assert whole == own + 2 * added and added < own / 4


def test_the_calibration_is_of_the_combined_score(runs, ensemble):
    calibration = read(ensemble, "calibration.json")
    members = torch.tensor(calibration["members"], dtype=torch.float64)
    assert members.shape == (3, calibration["n"], 1) and calibration["on"] == "all completions of eval"
    for i in range(3):  # they are the very completions that each member was calibrated on
        own = read(f"{ensemble}/member_{i}", "calibration.json")
        assert own["n"] == calibration["n"]
        assert members[i].mean().item() == pytest.approx(own["mean"], abs=1e-4)
        assert members[i].std().item() == pytest.approx(own["std"], abs=1e-4)
    members = members[:, :, 0]
    for options, expected in (
        ({}, members.mean(0)),
        ({"ensemble": "min"}, members.amin(0)),
        ({"ensemble": "mean_minus_std", "std_coef": 0.5}, members.mean(0) - 0.5 * members.std(0)),
        ({"ensemble": "mean_minus_var", "std_coef": 0.5}, members.mean(0) - 0.5 * members.var(0)),
    ):
        found = ModelReward(ensemble, **options).calibration
        assert found == (pytest.approx(expected.mean().item()), pytest.approx(expected.std().item()))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mean", 7 / 3),
        ("min", 1.0),
        ("mean_minus_std", 7 / 3 - 0.5 * (7 / 3) ** 0.5),
        ("mean_minus_var", 1.1666666667),
    ],
)
def test_worked_numbers_of_three_members(kind, expected):
    reward = object.__new__(ModelReward)
    reward.ensemble, reward.std_coef = kind, 0.5
    assert reward._combine(torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)).item() == pytest.approx(expected)


def test_members_with_several_heads(train, runs, tmp_path):
    run_dir = train(
        tmp_path, *MEMBERS, "stage.members=2", "data/feedback=attributes", f"model.path={runs}/test/sft", "model=hf"
    )
    calibration = read(run_dir, "calibration.json")
    members = torch.tensor(calibration["members"], dtype=torch.float64)
    heads = calibration["heads"]
    assert members.shape == (2, calibration["n"], len(heads)) and len(heads) > 1
    assert calibration["mean"] == pytest.approx(members.mean((0, 1)).tolist())
    weights = {heads[0]: 2.0, heads[1]: -1.0}
    reward = ModelReward(run_dir, head_weights=weights, ensemble="min")
    parts = [scored(ModelReward(f"{run_dir}/member_{i}", head_weights=weights)) for i in range(2)]
    torch.testing.assert_close(scored(reward), torch.minimum(*parts))
    combined = (members @ torch.tensor([2.0, -1.0] + [0.0] * (len(heads) - 2), dtype=torch.float64)).amin(0)
    assert reward.calibration.mean == pytest.approx(combined.mean().item())
    with pytest.raises(ConfigError, match="has the heads"):
        ModelReward(run_dir)


# ---- In training ----


def history(run_dir, key) -> list[float]:
    return [entry[key] for entry in read(run_dir, "metrics.json")["history"] if key in entry]


@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo"])
@pytest.mark.parametrize("reward", ["model", "adapter"])
def test_disagreement_is_logged(train, runs, stage, reward):
    options = [f"reward={reward}", f"reward.{reward}.run=ensemble", f"reward.{reward}.ensemble=mean_minus_std"]
    options += ["stage.args.max_steps=4", "stage.args.per_device_train_batch_size=8", "data.max_eval_samples=8"]
    options += ["stage.args.per_device_eval_batch_size=8", "stage.args.max_completion_length=8", *LORA]
    run_dir = train(runs, f"stage={stage}", "model.run=sft", f"run_name={stage}_{reward}", *options)
    found = history(run_dir, f"rewards/{reward}/disagreement")
    assert found and all(value > 0 for value in found)
    assert history(run_dir, f"eval_rewards/{reward}/disagreement")
    # The policy's files hold the policy alone
    weights = load_file(f"{run_dir}/adapter_model.safetensors")
    assert not [name for name in weights if "reward" in name or "score" in name]


def test_ensemble_on_the_policys_base_has_the_scores_of_a_separate_one(runs, ensemble):
    from peft import PeftModel

    from rlhf_trl.models.loading import load_model

    policy = load_model(f"{runs}/test/sft")
    assert isinstance(policy, PeftModel)
    tokenizer = AutoTokenizer.from_pretrained(f"{runs}/test/sft")
    before = sum(p.numel() for p in policy.parameters())
    own = AdapterReward(ensemble, ensemble="min")
    with pytest.raises(ConfigError, match="Call `attach"):
        scored(own)
    own.bind(tokenizer)
    own.attach(policy)
    own.attach(policy)  # again changes nothing
    assert own.members == 3 and sum(p.numel() for p in policy.parameters()) < 1.5 * before
    other = ModelReward(ensemble, ensemble="min")
    other.bind(tokenizer)
    ids = [
        tokenizer(turn[0]["content"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for turn in COMPLETIONS
    ]
    rows = {"prompts": PROMPTS, "completions": COMPLETIONS, "completion_ids": ids}
    assert own(**rows) == pytest.approx(other(**rows), abs=1e-5)
    assert own.calibration == other.calibration


# ---- Resume ----


class CrashInTheSecond(TrainerCallback):
    """Fails in the second member's third step, once."""

    trainings, armed = 0, True

    def on_train_begin(self, args, state, control, **kwargs):
        CrashInTheSecond.trainings += 1

    def on_step_end(self, args, state, control, **kwargs):
        if CrashInTheSecond.armed and CrashInTheSecond.trainings == 2 and state.global_step == 3:
            CrashInTheSecond.armed = False
            raise RuntimeError("crashed on purpose")


def test_resumed_ensemble_keeps_the_finished_members(train, runs, tmp_path):
    options = (*MEMBERS, "stage.members=2", "model=hf", f"model.path={runs}/test/sft", "stage.args.save_steps=2")
    crash = "+callbacks.crash._target_=tests.unit.reward_modeling.test_ensemble.CrashInTheSecond"
    with pytest.raises(RuntimeError, match="on purpose"):
        train(tmp_path, *options, crash)
    run_dir = Path(tmp_path, "test", "reward")
    assert read(run_dir, "run.json")["status"] == "failed"
    finished = run_dir / "member_0" / "adapter_model.safetensors"
    before = finished.stat().st_mtime_ns
    train(tmp_path, *options, crash, "resume=true")
    assert read(run_dir, "run.json")["status"] == "done" and finished.stat().st_mtime_ns == before
    assert CrashInTheSecond.trainings == 3  # the first one, the second one, and its rest
    whole = train(tmp_path, *options, "run_name=whole")
    for i in range(2):
        files = [Path(folder, f"member_{i}", "adapter_model.safetensors") for folder in (run_dir, whole)]
        resumed, straight = map(load_file, files)
        for name in straight:
            torch.testing.assert_close(resumed[name], straight[name], atol=1e-6, rtol=0)
    assert read(run_dir, "calibration.json")["mean"] == pytest.approx(
        read(whole, "calibration.json")["mean"], abs=1e-5
    )


class InterruptTheSecond(TrainerCallback):
    """Ctrl-C in the second member's second step, once."""

    trainings = 0

    def on_train_begin(self, args, state, control, **kwargs):
        InterruptTheSecond.trainings += 1

    def on_step_end(self, args, state, control, **kwargs):
        if InterruptTheSecond.trainings == 2 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_stopped_ensemble_is_resumed(train, runs, tmp_path):
    options = (*MEMBERS, "stage.members=2", "model=hf", f"model.path={runs}/test/sft")
    stop = "+callbacks.stop._target_=tests.unit.reward_modeling.test_ensemble.InterruptTheSecond"
    with pytest.raises(SystemExit, match="130"):
        train(tmp_path, *options, stop)
    run_dir = Path(tmp_path, "test", "reward")
    assert [read(folder, "run.json")["status"] for folder in (run_dir, run_dir / "member_1")] == ["stopped"] * 2
    train(tmp_path, *options, stop, "resume=true")
    assert read(run_dir, "run.json")["status"] == "done" and InterruptTheSecond.trainings == 3


@pytest.mark.slow
def test_two_ranks_calibrate_on_all_rows(runs, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    options = [
        *MEMBERS,
        "stage.members=2",
        f"runs_dir={tmp_path}",
        "data.max_samples=128",
        "data.max_eval_samples=256",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, *options], cwd=conf_dir().parent, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run_dir = Path(tmp_path, "default", "reward")
    calibration = read(run_dir, "calibration.json")
    for i in range(2):  # all rows, each once and in order
        own = read(run_dir / f"member_{i}", "calibration.json")
        members = torch.tensor(calibration["members"][i], dtype=torch.float64)
        assert len(members) == own["n"] == 512
        assert members.mean().item() == pytest.approx(own["mean"], abs=1e-4)


@pytest.mark.slow
def test_ensemble_killed_in_the_second_member_is_resumed(tmp_path):
    command = [sys.executable, "train.py", *MEMBERS, f"runs_dir={tmp_path}", "stage.args.max_steps=30"]
    command += ["stage.args.save_steps=2", "data.max_samples=256", "data.max_eval_samples=32", "stage.members=2"]
    command += ["stage.args.save_total_limit=null", "stage.args.per_device_train_batch_size=4"]
    options = {"cwd": conf_dir().parent, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run_dir, process = Path(tmp_path, "default", "reward"), subprocess.Popen(command, **options)
    deadline = time.monotonic() + 240
    while not list(run_dir.glob("member_1/checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert read(run_dir, "run.json")["status"] == "running" and not (run_dir / "ensemble.json").exists()
    before = (run_dir / "member_0" / "adapter_model.safetensors").stat().st_mtime_ns
    done = subprocess.run([*command, "resume=true"], timeout=240, **options)
    assert done.returncode == 0, done.stdout[-3000:]
    assert (run_dir / "member_0" / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert re.search(r"Resuming from .*member_1/checkpoint-\d+", done.stdout) and "Member 1 of 2" not in done.stdout
    assert ModelReward(str(run_dir)).members == 2


# ---- What can't be ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage.members=0", "adapter=lora"], "`stage.members` is 0. Set it to 1"),
        (["stage.members=two", "adapter=lora"], "`stage.members` is 'two'"),
        (["stage.members=3"], "Set `adapter=lora` as well"),
        (["stage.members=3", "adapter=lora", "merge=true"], "would write 3 full models"),
    ],
)
def test_invalid_members_are_named(compose, tmp_path, words, message):
    problems = find_problems(compose("stage=reward", f"runs_dir={tmp_path}", *words))
    assert len(problems) == 1 and message in problems[0], problems


def test_one_member_is_a_reward_model(train, runs, tmp_path):
    run_dir = train(tmp_path, *MEMBERS, "stage.members=1", "model=hf", f"model.path={runs}/test/sft")
    assert Path(run_dir, "adapter_config.json").is_file() and not Path(run_dir, "ensemble.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=merge", "model.run=ensemble"], "Name one of its members: `model.run=ensemble/member_0`"),
        (["stage=reward", *LORA, "model.run=ensemble", "run_name=more"], "`model.run=ensemble/member_0`"),
        (
            ["stage=ppo", *LORA, "model.run=sft", "critic=adapter", "critic.run=ensemble"],
            "`critic.run=ensemble/member_0`",
        ),
        (["stage=ppo", "model.run=sft", "reward=model", "reward.model.run=ensemble"], None),
        (
            ["stage=ppo", "model.run=sft", "reward=model", "reward.model.run=single", "reward.model.ensemble=min"],
            "`reward.model.ensemble` is `min`, and ",
        ),
        (
            ["stage=ppo", "model.run=sft", "reward=model", "reward.model.run=ensemble", "reward.model.ensemble=max"],
            "Use one of: mean, min, mean_minus_std",
        ),
        (["stage=ppo", *LORA, "model.run=sft", "reward=adapter", "reward.adapter.run=ensemble"], None),
        (["stage=ppo", *LORA, "model.run=sft", "reward=model", "reward.model.run=ensemble/member_1"], None),
    ],
)
def test_ensemble_is_allowed_as_a_reward_only(compose, runs, words, message):
    problems = find_problems(compose(f"runs_dir={runs}", "project=test", "run_name=other", *words))
    assert (not problems) if message is None else (len(problems) == 1 and message in problems[0]), problems


def test_ensembles_are_refused_where_one_model_is_needed(runs, ensemble, tmp_path):
    with pytest.raises(ConfigError, match="an ensemble of 3 reward models, which don't merge into one"):
        merge_adapter(ensemble, str(tmp_path / "merged"))
    with pytest.raises(ConfigError, match="`reward.model.ensemble` is `min`, and .* is a single reward model"):
        ModelReward(f"{runs}/test/single", ensemble="min", name="model")
    with pytest.raises(ConfigError, match="Use one of: mean, min, mean_minus_std"):
        ModelReward(ensemble, ensemble="max")
    with pytest.raises(ConfigError, match="`reward.m.std_coef` is -1"):
        ModelReward(ensemble, ensemble="mean_minus_std", std_coef=-1, name="m")
    for content in ('{"members": ["member_0"]}', '{"members": ["a", "b"]}', "[]", "{"):
        (tmp_path / "ensemble.json").write_text(content)
        with pytest.raises(ConfigError, match="folders of two or more adapters"):
            ModelReward(str(tmp_path))


def test_group_reward_has_the_options_of_ensembles(compose, runs):
    cfg = compose("stage=ppo", "reward=model", "reward.model.ensemble=min")
    assert (cfg.reward.model.ensemble, cfg.reward.model.std_coef) == ("min", 1.0)
    node = dict(cfg.reward.model) | {"path": f"{runs}/test/ensemble"}
    for key in ("run", "when"):
        node.pop(key)
    assert instantiate(node).members == 3
