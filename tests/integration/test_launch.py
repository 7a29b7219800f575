"""Accelerate's configurations, two CPU ranks, and what Ctrl-C does to a launched process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

from rlhf_trl.cli.launcher import launch_command, launch_dir, overrides_of, shell_line, state_of
from rlhf_trl.errors import PREEMPTED_STATUS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((launch_dir() / "accelerate").glob("*.yaml"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_there_is_a_configuration_for_each_way_to_launch():
    assert {path.stem for path in CONFIGS} == {"cpu", "single_gpu", "ddp", "fsdp2", "zero2", "zero3"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_configuration(path):
    """By accelerate's own loader, which refuses unknown keys, and its own merge into the launcher's arguments."""
    config = load_config_from_file(str(path))
    parser = launch_command_parser()
    for section in (config.fsdp_config, config.deepspeed_config):
        assert set(section or {}) <= {action.dest for action in parser._actions}
    args, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "train.py"]))
    expected = {
        "cpu": (DistributedType.NO, "no", False, False, False),
        "single_gpu": (DistributedType.NO, "no", False, False, False),
        "ddp": (DistributedType.MULTI_GPU, "no", True, False, False),
        "fsdp2": (DistributedType.FSDP, "bf16", False, True, False),
        "zero2": (DistributedType.DEEPSPEED, "bf16", False, False, True),
        "zero3": (DistributedType.DEEPSPEED, "bf16", False, False, True),
    }[path.stem]
    got = (config.distributed_type, args.mixed_precision, args.multi_gpu, args.use_fsdp, args.use_deepspeed)
    assert got == expected
    assert args.num_processes == (1 if config.distributed_type == DistributedType.NO else 2)


def test_the_sharded_configurations_say_how():
    fsdp = load_config_from_file(str(launch_dir() / "accelerate" / "fsdp2.yaml")).fsdp_config
    zero = [
        load_config_from_file(str(launch_dir() / "accelerate" / f"zero{stage}.yaml")).deepspeed_config["zero_stage"]
        for stage in (2, 3)
    ]
    assert fsdp["fsdp_version"] == 2
    assert zero == [2, 3]


def test_launch_command_names_our_configurations_by_their_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = launch_command("ddp", ["--num_processes", "4"])
    expected = "accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 4 train.py"
    assert shell_line(command) == expected
    assert shell_line(launch_command("my.yaml")) == "accelerate launch --config_file my.yaml train.py"
    assert shell_line(launch_command()) == "accelerate launch train.py"


def test_overrides_are_read_back_from_a_recorded_command():
    command = "accelerate launch --config_file=a.yaml train.py stage=ppo project=demo resume=true 'data.path=my file'"
    assert overrides_of(command) == ["data.path=my file", "project=demo", "stage=ppo"]
    command = "python train.py --config-dir conf stage=evaluate '~stage.policies.dpo' overwrite=true"
    assert overrides_of(command) == ["stage=evaluate", "~stage.policies.dpo"]


@pytest.mark.parametrize(
    ("status", "checkpoint", "overrides", "state"),
    [
        ("done", False, ["stage=sft"], "done"),
        ("done", False, ["stage=sft", "seed=1"], "changed"),
        ("stopped", True, ["stage=sft"], "resumable"),
        ("running", True, ["stage=sft"], "resumable"),  # killed: nobody wrote another status
        ("failed", True, ["stage=sft", "seed=1"], "changed"),
        ("failed", False, ["stage=sft", "seed=1"], "unfinished"),
    ],
)
def test_state_of_a_run_directory(tmp_path, status, checkpoint, overrides, state):
    assert state_of(tmp_path, overrides) == "new"
    record = {"stage": "sft", "status": status, "command": "accelerate launch train.py stage=sft", "pid": 2**22 + 1}
    (tmp_path / "run.json").write_text(json.dumps(record))
    if checkpoint:
        (tmp_path / "checkpoint-3").mkdir()
    assert state_of(tmp_path, overrides) == state


def test_an_interrupted_ensemble_is_resumed(tmp_path):
    record = {"stage": "reward", "status": "stopped", "command": "python train.py stage=reward", "pid": 2**22 + 1}
    (tmp_path / "member_0").mkdir()
    for folder in (tmp_path, tmp_path / "member_0"):
        (folder / "run.json").write_text(json.dumps(record))
    assert state_of(tmp_path, ["stage=reward"]) == "resumable"


# A launcher that dies of the first signal, as accelerate and torchrun do, and a worker that finishes its step.
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
"""
WORKER = """
import signal, sys, time
from pathlib import Path
signals = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, _: signals.append(signal.Signals(number).name))
Path("started").touch()
stubborn = "stubborn" in sys.argv
while stubborn or not signals:
    time.sleep(0.02)
time.sleep(0.3)
Path("saved").write_text(" ".join(signals))
"""
OURS = """
import signal
import sys
from pathlib import Path
from rlhf_trl.cli.launcher import run
signal.signal(signal.SIGUSR2, lambda *_: Path("requeued").write_text(Path("saved").read_text()))  # as submitit does
try:
    run([sys.executable, "launcher.py", "worker.py", *sys.argv[1:]])
except KeyboardInterrupt:
    sys.exit(130)
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """Our own process over a launcher over a worker, in a group of its own, as a shell would start it."""
    for name, text in (("launcher.py", LAUNCHER), ("worker.py", WORKER), ("ours.py", OURS)):
        (folder / name).write_text(text)
    command = [sys.executable, "ours.py", *arguments]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, start_new_session=True)
    wait_for(lambda: (folder / "started").exists())
    return process


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it didn't come"
        time.sleep(0.02)


def test_the_first_interrupt_lets_the_worker_save(tmp_path):
    process = start(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    assert process.wait(timeout=60) == 130
    assert (tmp_path / "saved").exists()


def test_the_second_interrupt_kills(tmp_path):
    import psutil

    process = start(tmp_path, "stubborn")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    wait_for(lambda: not any(member.is_running() and member.status() != "zombie" for member in family))
    assert not (tmp_path / "saved").exists()


def test_signals_of_a_scheduler_let_the_worker_save_and_reach_who_requeues(tmp_path):
    process = start(tmp_path)
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # the second of a scheduler doesn't kill
    assert process.wait(timeout=60) == PREEMPTED_STATUS
    assert (tmp_path / "requeued").read_text() == "SIGUSR2 SIGTERM"


@pytest.mark.slow  # the two ranks below train by the same command
def test_two_cpu_ranks_find_each_other(tmp_path):
    """The command in the head of ddp.yaml; accelerate's `--cpu --num_processes 2` would start one rank."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys, torch\n"
        "from transformers import TrainingArguments\n"
        "args = TrainingArguments(output_dir=sys.argv[1], report_to='none')\n"
        "total = torch.tensor(float(args.process_index + 1))\n"
        "torch.distributed.all_reduce(total)\n"
        "with open(f'{sys.argv[1]}/{args.process_index}', 'w') as file:\n"
        "    file.write(f'{args.world_size} {args.device} {total.item()}')\n"
        "torch.distributed.destroy_process_group()\n"  # gloo's threads could abort the process at its end
    )
    command = [*launch_command("ddp")[:-1], str(script), str(tmp_path)]
    subprocess.run(command, env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}, check=True, timeout=300)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 cpu:0 3.0"] * 2


LISTENER = """
import json
from pathlib import Path
import torch
from transformers import TrainerCallback

class Listener(TrainerCallback):
    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.heard.append(logs)

    def on_train_end(self, args, state, control, **kwargs):
        group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        seconds = group.options._timeout.total_seconds()
        seen = {"world": args.world_size, "run_dir": args.output_dir, "heard": self.heard, "timeout": seconds}
        seen["device"] = str(args.device)
        Path(f"rank_{args.process_index}.json").write_text(json.dumps(seen))
"""


def test_two_cpu_ranks_train_as_one(tmp_path, monkeypatch):
    """They agree on the run directory, the config and the reduced metrics, and leave one run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "listener.py").write_text(LISTENER)
    overrides = [
        "stage=dpo",
        "project=two",
        "data.max_samples=64",
        "data.max_eval_samples=16",
        "stage.args.max_steps=2",
    ]
    overrides += ["stage.args.logging_steps=1", "stage.args.per_device_train_batch_size=8"]
    overrides += ["+stage.args.ddp_timeout=240"]
    overrides += ["+callbacks.listener._target_=listener.Listener"]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [*launch_command("ddp")[:-1], str(ROOT / "train.py"), *overrides]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    run_dir = tmp_path / "runs" / "two" / "dpo"
    assert [path.name for path in run_dir.parent.iterdir()] == ["dpo"]
    configs = [(run_dir / ".hydra" / f"rank_{rank}" / "config.yaml").read_text() for rank in range(2)]
    assert configs[0] == configs[1]
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert (
        (first["world"], first["run_dir"])
        == (second["world"], second["run_dir"])
        == (2, str(run_dir.relative_to(tmp_path)))
    )
    assert first["timeout"] == second["timeout"] == 240 and first["device"] == second["device"] == "cpu:0"
    reduced = [
        [
            {key: value for key, value in logs.items() if not key.endswith(("runtime", "per_second"))}
            for logs in seen["heard"]
        ]
        for seen in (first, second)
    ]
    assert any("eval_loss" in logs for logs in reduced[0]) and any("rewards/margins" in logs for logs in reduced[0])
    assert reduced[0] == reduced[1]
    assert json.loads((run_dir / "run.json").read_text())["status"] == "done"
    assert done.stdout.count("no accelerator with bfloat16") == 1  # what is said is said once
