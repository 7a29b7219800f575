"""Launches of `train.py` in a process of its own, which `launch/pipeline.py` and `launch/sweep.py` share."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

from rlhf_trl.cli.outcome import STEP
from rlhf_trl.config.program import ACCELERATE
from rlhf_trl.errors import PREEMPTIONS, ConfigError, Preempted, short_path
from rlhf_trl.health.signs import health_of
from rlhf_trl.runs.directory import LABEL_LENGTHS
from rlhf_trl.runs.lock import in_use_problem, lock_owner
from rlhf_trl.runs.paths import conf_dir, is_resumable
from rlhf_trl.runs.record import CONFIG_FILE, LABELS_FILE, read_metrics, read_run


def launch_dir() -> Path:
    """Return the folder with `accelerate/`, beside `conf`."""
    return conf_dir().parent / "launch"


def launch_command(accelerate: str | None = None, options: Sequence[str] = ()) -> list[str]:
    """
    Return the `accelerate launch ... train.py` to which the overrides of a run are appended.

    Args:
        accelerate (`str`, *optional*):
            Name of a file in `launch/accelerate` (`cpu`, `ddp`, `zero3` ...) or the path of another accelerate
            configuration. Without it accelerate takes its own default.
        options (`Sequence[str]`):
            Further options of `accelerate launch`.
    """
    command = [*ACCELERATE]
    if accelerate:
        ours = launch_dir() / "accelerate" / f"{accelerate}.yaml"
        command += ["--config_file", short_path(ours) if ours.exists() else accelerate]
    script = conf_dir().parent / "train.py"  # only a clone has it
    return [*command, *options, *([short_path(script)] if script.exists() else ["-m", "rlhf_trl.cli"])]


def launch_setting(accelerate: str | None, options: Sequence[str], name: str) -> Any:
    """
    Return a setting of `accelerate launch`, as its options or else its file have it; `None` where neither does.

    Args:
        accelerate (`str`, *optional*), options (`Sequence[str]`): see [`launch_command`].
        name (`str`): such as `num_machines`.
    """
    words = [word for option in options for word in str(option).split("=", 1)]
    for word, value in itertools.pairwise([*words, None]):
        if str(word).startswith("--") and str(word)[2:].replace("-", "_") == name:
            return yaml.safe_load(str(value))
    ours = launch_dir() / "accelerate" / f"{accelerate}.yaml"
    file = ours if ours.exists() else Path(accelerate or "")
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    return content.get(name) if isinstance(content, dict) else None


def machine_problems(accelerate: str | None, options: Sequence[str]) -> list[str]:
    """Return the problem of launches for several machines, which would wait here for the others, or none."""
    if isinstance(options, str) or not isinstance(options, Sequence):
        return []  # reported as no list
    machines = launch_setting(accelerate, options, "num_machines")
    if not isinstance(machines, int) or machines < 2:
        return []
    where = f"`accelerate={accelerate}`" if accelerate else "`launch`"
    return [
        f"{where} is for {machines} machines (`num_machines`), and every run is launched on this one alone, where it "
        "would wait for the others. Set `num_machines` to 1; `launch/slurm/multi_node.sbatch` starts a run on several."
    ]


def shell_line(command: Sequence[str]) -> str:
    """Return a command as a line for a shell."""
    command = list(command)
    if command[: len(ACCELERATE)] == ACCELERATE:
        command[: len(ACCELERATE)] = ["accelerate", "launch"]
    return shlex.join(command)


def run(command: Sequence[str], log: Path | None = None, environment: Mapping[str, str] | None = None) -> int:
    """
    Run a command to its end and return its exit status.

    The command gets a session of its own, so that a terminal's Ctrl-C reaches us alone. The first signal, Ctrl-C or
    one of a scheduler, is forwarded to the training processes, which finish their step and save; a second one kills
    them all, unless both are of a scheduler, which sends several. Where somebody else had handled the signal of a
    scheduler (submitit, which requeues its job), they get it when the command has ended.

    Args:
        command (`Sequence[str]`):
            Program and arguments.
        log (`Path`, *optional*):
            File that gets a copy of the output. Without it the command writes to our own output, as it is.
        environment (`Mapping`, *optional*):
            Environment variables of the command besides our own.

    Raises:
        KeyboardInterrupt: when Ctrl-C ended the command.
        [`~rlhf_trl.errors.Preempted`]: when a signal of a scheduler did.
    """
    pipe = subprocess.PIPE if log else None
    child = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=pipe,
        stderr=subprocess.STDOUT if log else None,
        env={**os.environ, STEP: "1", **(environment or {})},
    )
    signals = []

    def forward(number, frame):
        signals.append(number)
        asked = number in PREEMPTIONS
        kills = len(signals) > 1 and not (asked and signals[0] in PREEMPTIONS)
        # At first not the launcher: accelerate and torchrun answer a signal by killing the ranks they wait for.
        # In the end not by group: torchrun gives each rank a session of its own.
        for process in _tree(child.pid) if kills else _workers(child.pid):
            process.send_signal(signal.SIGKILL if kills else number if asked else signal.SIGINT)

    previous = {}
    if threading.current_thread() is threading.main_thread():  # only it may set signal handlers
        for number in (signal.SIGINT, signal.SIGHUP, *PREEMPTIONS):
            previous[number] = signal.signal(number, forward)
    try:
        if log:
            _copy(child.stdout, log)
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if signals and signals[0] in PREEMPTIONS:
        if callable(others := previous[signals[0]]):
            others(signals[0], None)
        raise Preempted
    if signals:
        raise KeyboardInterrupt
    return code


def _workers(pid: int) -> list:
    """Return the training processes: the children of the launcher, or the process itself where it launches none."""
    launcher, children = psutil.Process(pid), psutil.Process(pid).children()
    return children or [launcher]


def _tree(pid: int) -> list:
    launcher = psutil.Process(pid)
    return [launcher, *launcher.children(recursive=True)]


def _copy(stream, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        while chunk := os.read(stream.fileno(), 65536):
            file.write(chunk)
            file.flush()
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


def state_of(run_dir: str | os.PathLike, overrides: Sequence[str]) -> str:
    """
    Return the state of a run directory for a run with these overrides: `new` (empty), `done`, `resumable` (not done,
    but with a checkpoint or members), `unfinished`, `changed` (done or resumable, from other overrides), or
    `lengthened` (a labeling that is done, and is now to have more answers).

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a run is in progress in it.
    """
    record = read_run(run_dir)
    if record is None:
        return "new"
    if owner := lock_owner(run_dir):
        raise ConfigError(in_use_problem(run_dir, owner))
    done = record.status == "done"
    if not done and not is_resumable(run_dir):
        return "unfinished"
    made, now = overrides_of(record.command), sorted(overrides)
    if made != now:
        more = {word.split("=")[0] for word in {*made} ^ {*now}} <= {*LABEL_LENGTHS}
        return "lengthened" if done and more and is_labeling(run_dir) else "changed"
    return "done" if done else "resumable"


def is_labeling(run_dir: str | os.PathLike) -> bool:
    """Return whether a run directory has labels, which are not to be made again."""
    return Path(run_dir, LABELS_FILE).exists()


# Overrides to add, by the state of the directory. An unfinished run has nothing to lose.
START_OVERRIDES = {
    "new": [],
    "resumable": ["resume=true"],
    "lengthened": ["resume=true"],
    "unfinished": ["overwrite=true"],
}


def overrides_of(command: str) -> list[str]:
    """Return the overrides in a command of `run.json`, sorted, without `resume` and `overwrite`."""
    parts = [part for part in shlex.split(command) if part.startswith("~") or ("=" in part and part[0] != "-")]
    return sorted(part for part in parts if part.split("=")[0] not in ("resume", "overwrite"))


class Measured(NamedTuple):
    """
    Metrics of a finished run.

    Attributes:
        objective: name of the metric that counts.
        start, end: its first and last value; `None` where it was not measured.
        eval: last value of each metric of the evaluation.
        seconds: duration of the run.
        health: worst level of the health monitor with its signs; empty where nothing was watched.
    """

    objective: str | None
    start: float | None
    end: float | None
    eval: dict[str, Any]
    seconds: float
    health: str


def results_of(run_dir: str | os.PathLike) -> Measured:
    """
    Return what a finished run measured.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if one of its files is damaged.
    """
    record, measured = read_run(run_dir), read_metrics(run_dir) or {"eval": {}, "history": []}
    name = yaml.safe_load(Path(run_dir, CONFIG_FILE).read_text(encoding="utf-8")).get("objective")
    values = [entry[name] for entry in measured["history"] if entry.get(name) is not None] or [None]
    seconds = (record and record.seconds) or 0.0
    return Measured(name, values[0], values[-1], measured["eval"], seconds, health_of(measured["history"]))
