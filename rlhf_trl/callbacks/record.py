"""What a run directory tells about its run: `run.json`, `metrics.json`, and checkpoints that are whole."""

import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rlhf_trl.directory import discard_old

RUN_FILE = "run.json"
METRICS_FILE = "metrics.json"
# In a checkpoint: the sizes of its files
FILES_FILE = "files.json"
# Where a checkpoint is written until it is whole
UNFINISHED = ".unfinished"
# A long history is not written again at each of many log steps
SECONDS_BETWEEN_WRITES = 5.0
PACKAGES = ("rlhf_trl", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "hydra-core", "bitsandbytes")


def write_json(path: str | os.PathLike, content: dict) -> None:
    """
    Writes a JSON file that is there whole or not at all, whenever the process is killed.

    Numbers that JSON lacks (NaN, infinity) become `null`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    # Half of a surrogate pair, which UTF-8 lacks, stands as JSON's own escape of it
    with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(_finite(content), file, indent=2, ensure_ascii=False, allow_nan=False, default=float)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_run(run_dir: str | os.PathLike) -> dict | None:
    """The content of `run.json`, or `None` where no run was started in `run_dir`."""
    path = Path(run_dir, RUN_FILE)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def start_run(
    run_dir: str | os.PathLike,
    stage: str,
    command: str,
    model: str | None,
    inputs: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes `run.json` with status `running`. Call it on rank 0, after the checks.

    Args:
        run_dir (`str`):
            Directory of the run; made if need be.
        stage (`str`):
            Name of the stage.
        command (`str`):
            The command that starts this run, as one would type it.
        model (`str`, *optional*):
            Path or hub id of the model that the run starts from.
        inputs (`Mapping`, *optional*):
            What else its result depends on, see [`~rlhf_trl.inputs.inputs_of`]. A resumed run keeps those that it
            began with.
        quantization (`Mapping`, *optional*):
            How the base under its adapter is quantized: whoever loads the adapter loads the base so.
    """
    os.makedirs(run_dir, exist_ok=True)
    earlier = read_run(run_dir) or {}
    content = {
        "stage": stage,
        "command": command,
        "status": "running",
        "model": model,
        "pid": os.getpid(),
        # A resumed run keeps the time of its first start
        "started": earlier.get("started", _now()),
        "ended": None,
        "versions": versions(),
        "inputs": {**(inputs or {}), **earlier.get("inputs", {})},
        "quantization": quantization,
    }
    write_json(Path(run_dir, RUN_FILE), content)


def finish_run(run_dir: str | os.PathLike, status: str, **extra) -> None:
    """
    Writes how a run ended into its `run.json`. Call it on rank 0, after everything else has been written.

    Args:
        run_dir (`str`):
            Directory of the run.
        status (`str`):
            `done`, `stopped` (by a signal; it can be resumed) or `failed`.
        **extra:
            What else is worth keeping, such as `error`.
    """
    write_json(Path(run_dir, RUN_FILE), {**read_run(run_dir), "status": status, "ended": _now(), **extra})


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # optional, or run from a checkout
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_metrics(run_dir: str | os.PathLike, history: list[dict]) -> None:
    """
    Writes `metrics.json`: `{"train": {...}, "eval": {...}, "history": [...]}`, the last value of each metric and all.

    Args:
        run_dir (`str`):
            Directory of the run.
        history (`list[dict]`):
            `trainer.state.log_history`: one dict a call of `Trainer.log`, with its `step`. Those of evaluations have
            keys that begin with `eval_`.
    """
    last = {"train": {}, "eval": {}}
    for entry in history:
        evaluation = any(key.startswith("eval_") for key in entry)
        last["eval" if evaluation else "train"].update(entry)
    write_json(Path(run_dir, METRICS_FILE), {**last, "history": history})


def checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """All `checkpoint-<step>` directories, by step."""
    found = [
        path for path in Path(run_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit() and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def last_checkpoint(run_dir: str | os.PathLike) -> str | None:
    """Path of the newest checkpoint, or `None`. What a killed run left half written has another name."""
    found = checkpoints(run_dir)
    return str(found[-1]) if found else None


def save_whole_checkpoints(trainer) -> None:
    """
    Makes each checkpoint of a `transformers.Trainer` appear when all of it has reached the disk, or not at all.

    All ranks write into a folder of another name, which is renamed as the last act. `save_total_limit` acts after
    that, so that at any moment a whole checkpoint exists once there was one.
    """
    write = trainer._save_checkpoint

    @functools.wraps(write)
    def save_checkpoint(model, trial):
        args, state, wait = trainer.args, trainer.state, trainer.accelerator.wait_for_everyone
        run_dir = Path(args.output_dir)
        unfinished, name = run_dir / UNFINISHED, f"checkpoint-{state.global_step}"
        if args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        wait()
        trainer._get_output_dir = lambda trial=None: str(unfinished)
        try:
            write(model, trial)
        finally:
            del trainer._get_output_dir
        wait()
        best_so_far = state.best_model_checkpoint == str(unfinished / name)
        if best_so_far:
            state.best_model_checkpoint = str(run_dir / name)
        if args.should_save:
            if best_so_far:
                state.save_to_json(str(unfinished / name / "trainer_state.json"))
            write_json(unfinished / name / FILES_FILE, _sizes(unfinished / name))
            for path in [path for path in unfinished.rglob("*") if path.is_file()]:
                _sync(path)
            _sync(unfinished / name)
            _discard(run_dir / name)
            (unfinished / name).rename(run_dir / name)
            _sync(run_dir)
            if args.save_total_limit:
                rotate(run_dir, args.save_total_limit, state.best_model_checkpoint)
            shutil.rmtree(unfinished, ignore_errors=True)
        wait()

    trainer._save_checkpoint = save_checkpoint


def never_past_the_end(trainer) -> None:
    """
    Keep a `transformers.Trainer` that resumes from its last step from taking one more.

    It looks at `max_steps` after a step only (5.23), so that a run killed during its final evaluation would train a
    step too many, unless the last step ends an epoch.
    """
    run_epoch = trainer._run_epoch

    @functools.wraps(run_epoch)
    def unless_at_the_end(*args, **kwargs):
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
        else:
            run_epoch(*args, **kwargs)

    trainer._run_epoch = unless_at_the_end


def tied_weights_are_there(trainer) -> None:
    """
    Keep a `transformers.Trainer` that resumes from warning of weights that are another name of ones that were loaded.

    A checkpoint holds tied weights once, and the Trainer (5.23) calls the other name missing.
    """
    warn = trainer._issue_warnings_after_load

    @functools.wraps(warn)
    def of_the_rest(loaded):
        tied = getattr(trainer.model, "all_tied_weights_keys", {})
        pairs = {**tied, **{source: name for name, source in tied.items()}}
        missing = [key for key in loaded.missing_keys if pairs.get(key, key) in loaded.missing_keys]
        warn(loaded._replace(missing_keys=missing))

    trainer._issue_warnings_after_load = of_the_rest


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}


def missing_files(checkpoint: str | os.PathLike) -> list[str]:
    """
    Files of a checkpoint that were written with it and are gone, or not whole any more.

    The trainer goes on without a missing optimizer, scheduler or random state, and says nothing.
    """
    path = Path(checkpoint, FILES_FILE)
    if not path.exists():
        return []
    there = _sizes(Path(checkpoint))
    written = json.loads(path.read_text(encoding="utf-8"))
    return [name for name, size in written.items() if there.get(name) != size]


def _sync(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _discard(checkpoint: Path) -> None:
    """Deletes a checkpoint such that it is never half there under its name."""
    if checkpoint.exists():
        grave = checkpoint.parent / UNFINISHED / f"old-{checkpoint.name}"
        grave.parent.mkdir(exist_ok=True)
        checkpoint.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)


def rotate(run_dir: str | os.PathLike, limit: int, best: str | None) -> None:
    """Removes all but the newest `limit` checkpoints. The best one counts and stays."""
    found = checkpoints(run_dir)
    keep = {found[-1]} | {path for path in found if best and path.name == Path(best).name}
    for path in reversed(found):
        if len(keep) < limit:
            keep.add(path)
    for path in found:
        if path not in keep:
            _discard(path)


class RunRecord(TrainerCallback):
    """
    Keeps `metrics.json` up to date, and deletes the run that this one overwrites when it has taken its first step.

    Args:
        run_dir (`str`):
            Directory of the run, which is the trainer's `output_dir`.
    """

    def __init__(self, run_dir: str):
        self.run_dir = run_dir
        self._written = -math.inf

    def on_train_end(self, args, state, control, **kwargs):
        self._write(state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            discard_old(self.run_dir)

    def on_log(self, args, state, control, **kwargs):
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self._write(state)

    def on_evaluate(self, args, state, control, **kwargs):
        self._write(state)

    def on_save(self, args, state, control, **kwargs):
        self._write(state)

    def _write(self, state) -> None:
        if state.is_world_process_zero:
            write_metrics(self.run_dir, state.log_history)
            self._written = time.monotonic()
