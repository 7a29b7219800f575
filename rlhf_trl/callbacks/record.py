"""Checkpoints that are whole, and `metrics.json` kept up to date."""

import functools
import math
import os
import shutil
import time
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from rlhf_trl.directory import discard_old
from rlhf_trl.runs.record import read_json, write_json, write_metrics

# In a checkpoint: the sizes of its files
FILES_FILE = "files.json"
# Where a checkpoint is written until it is whole
UNFINISHED = ".unfinished"
# A long history is not written again at each of many log steps
SECONDS_BETWEEN_WRITES = 5.0


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


def last_whole_checkpoint(run_dir: str | os.PathLike) -> tuple[str | None, dict[str, list[str]]]:
    """
    Return the newest checkpoint of which no file is missing or cut off, and what those after it lack.

    Returns:
        `tuple`: path of the checkpoint, `None` where there is none; for each damaged one after it, the newest first,
        its path and the names of the files.
    """
    damaged = {}
    for path in reversed(checkpoints(run_dir)):
        missing = missing_files(path)
        if not missing:
            return str(path), damaged
        damaged[str(path)] = missing
    return None, damaged


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
    there = _sizes(Path(checkpoint))
    if not {FILES_FILE, TRAINER_STATE_NAME} & there.keys():
        return [TRAINER_STATE_NAME]  # none of it was written
    written = read_json(Path(checkpoint, FILES_FILE)) or {TRAINER_STATE_NAME: there.get(TRAINER_STATE_NAME)}
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
