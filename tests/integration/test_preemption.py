"""Signals of schedulers: the same command goes on, and ends as a run that nobody interrupted, to the bit."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rlhf_trl.cli.launcher import launch_command
from rlhf_trl.errors import PREEMPTED_STATUS
from rlhf_trl.runs.checkpoints import last_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = ["data.max_samples=96", "data.max_eval_samples=16", "stage.args.logging_steps=1", "resume=auto"]
SLOW = ["+callbacks.slow._target_=tests.helpers.watching.Slow", "+callbacks.slow.seconds=0.2"]
STAGES = {
    "sft": ["stage=sft", "stage.args.max_steps=12", "stage.args.save_steps=2"],
    # Two epochs of two mini-batches: four steps a rollout
    "ppo": [
        *("stage=ppo", "stage.args.max_steps=16", "stage.args.save_steps=1", "stage.args.num_iterations=2"),
        *("stage.args.steps_per_generation=2", "stage.args.max_completion_length=12", "stage.args.save_total_limit=9"),
    ],
}
# Saved between rollouts, of four steps each
STAGES |= {
    stage: [
        *(f"stage={stage}", "stage.args.max_steps=16", "stage.args.save_steps=4", "stage.args.num_iterations=2"),
        *("stage.args.steps_per_generation=2", "stage.args.max_completion_length=12", "stage.args.save_total_limit=9"),
        "stage.args.num_generations=4",
    ]
    for stage in ("grpo", "rloo")
}
NO_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed isn't installed: pip install 'rlhf-trl[deepspeed]'",
)


def start(folder: Path, stage: str, ranks: int, engine: str = "ddp", more: list[str] = SLOW) -> subprocess.Popen:
    """Start a run, which is the same command each time."""
    program = [sys.executable] if ranks == 1 else launch_command(engine, ["--num_processes", str(ranks)])[:-1]
    rows = f"stage.args.per_device_train_batch_size={8 // ranks}"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "OMP_NUM_THREADS": "1",
        **({"DS_ACCELERATOR": "cpu"} if engine.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}),
        # As the scripts in launch/slurm have it
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
    }
    command = [*program, str(ROOT / "train.py"), *STAGES[stage], *SMALL, *more, rows, f"runs_dir={folder}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]
    return said


def record(run_dir: Path) -> dict:
    return json.loads((run_dir / "run.json").read_text())


def history(run_dir: Path) -> list[dict]:
    """Return the metrics of a run without those that are times."""
    entries = json.loads((run_dir / "metrics.json").read_text())["history"]
    kept = ("loss", "grad_norm", "objective/", "policy/", "value/", "eval_loss", "eval_objective/")
    return [{key: value for key, value in entry.items() if key.startswith(kept)} for entry in entries]


def other_rank(process: subprocess.Popen, run_dir: Path) -> int:
    """Return the process of the rank of two that doesn't write the record."""
    (other,) = {child.pid for child in psutil.Process(process.pid).children()} - {record(run_dir)["pid"]}
    return other


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ranks", "receiver", "number", "engine"),
    [
        ("sft", 1, "run", signal.SIGTERM, "ddp"),
        ("ppo", 1, "run", signal.SIGUSR1, "ddp"),
        ("grpo", 1, "run", signal.SIGTERM, "ddp"),
        ("ppo", 2, "launcher", signal.SIGUSR1, "ddp"),
        ("sft", 2, "launcher", signal.SIGTERM, "ddp"),
        ("ppo", 2, "one rank", signal.SIGUSR2, "ddp"),
        ("rloo", 2, "launcher", signal.SIGUSR1, "ddp"),
        ("sft", 2, "launcher", signal.SIGTERM, "fsdp2"),
        ("ppo", 2, "one rank", signal.SIGUSR2, "fsdp2"),
        pytest.param("sft", 2, "one rank", signal.SIGUSR2, "zero2", marks=NO_DEEPSPEED),
        pytest.param("ppo", 2, "launcher", signal.SIGUSR1, "zero3", marks=NO_DEEPSPEED),
    ],
)
def test_a_preempted_run_ends_as_an_uninterrupted_one(tmp_path, stage, ranks, receiver, number, engine):
    finish(start(tmp_path / "whole", stage, ranks, engine))
    whole, run_dir = (tmp_path / name / "default" / stage for name in ("whole", "again"))
    first = 2 if stage == "sft" else 4

    process = start(tmp_path / "again", stage, ranks, engine)
    while not (run_dir / f"checkpoint-{first}").is_dir():
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.01)
    if receiver == "one rank":
        os.kill(other_rank(process, run_dir), number)
    else:
        process.send_signal(number)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == (PREEMPTED_STATUS if ranks == 1 else 1), said[-3000:]
    step = int(last_checkpoint(run_dir).rsplit("-", 1)[1])
    before, stopped, _ = said.partition(f"Preempted at step {step} of")
    assert stopped and "Traceback" not in before, said[-3000:]  # the launcher ends in a traceback of its own
    assert first < step < 12 if stage == "sft" else step == 8  # the rollout is finished first
    assert record(run_dir)["status"] == "preempted" and "error" not in record(run_dir)
    if ranks > 1:
        names = {path.name for path in (run_dir / f"checkpoint-{step}").glob("rng_state_*")}
        assert names == {"rng_state_0.pth", "rng_state_1.pth"}

    assert f"Resuming from {run_dir / f'checkpoint-{step}'}" in finish(start(tmp_path / "again", stage, ranks, engine))
    assert record(run_dir)["status"] == "done"
    for file in [path.name for path in whole.glob("*.safetensors")]:
        one, other = load_file(whole / file), load_file(run_dir / file)
        assert one.keys() == other.keys() and all(torch.equal(other[name], weight) for name, weight in one.items())
    assert history(run_dir) == history(whole)
    assert "is finished: nothing to do" in finish(start(tmp_path / "again", stage, ranks, engine))


@pytest.mark.slow
def test_a_rank_that_is_preempted_in_the_last_evaluation_preempts_the_run(tmp_path):
    """It leaves at once, and the rank that writes the record sees a lost connection."""
    target = "+callbacks.slow._target_=tests.helpers.watching.SlowEvaluation"
    more = [target, "+callbacks.slow.seconds=0.5", "stage.args.eval_strategy=no", "stage.args.max_steps=2"]
    more.append("stage.args.per_device_eval_batch_size=1")
    run_dir = tmp_path / "default" / "sft"
    process = start(tmp_path, "sft", 2, more=more)
    while not (run_dir / "evaluating").is_file():
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.01)
    os.kill(other_rank(process, run_dir), signal.SIGUSR2)
    said, _ = process.communicate(timeout=300)
    assert record(run_dir)["status"] == "preempted" and "error" not in record(run_dir), said[-3000:]
    (run_dir / "evaluating").unlink()
    finish(start(tmp_path, "sft", 2, more=more))
    assert record(run_dir)["status"] == "done" and (run_dir / "model.safetensors").is_file()
