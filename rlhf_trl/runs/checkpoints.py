"""Checkpoints of a run on disk: found, checked to be complete, published and rotated. Imports nothing heavy."""

import os
import shutil
from pathlib import Path

from rlhf_trl.runs.record import read_json, write_json

# The Trainer's own record in each checkpoint (`transformers.trainer.TRAINER_STATE_NAME`)
STATE_FILE = "trainer_state.json"
# In a checkpoint: the sizes of its files
FILES_FILE = "files.json"
# Folder of a run in which a checkpoint is written until it is complete
UNFINISHED = ".unfinished"


def checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """Return all `checkpoint-<step>` directories of a run, by step."""
    found = [
        path for path in Path(run_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit() and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def last_checkpoint(run_dir: str | os.PathLike) -> str | None:
    """Return the path of the newest checkpoint, or `None`. What a killed run left half written has another name."""
    found = checkpoints(run_dir)
    return str(found[-1]) if found else None


def last_whole_checkpoint(run_dir: str | os.PathLike) -> tuple[str | None, dict[str, list[str]]]:
    """
    Return the newest checkpoint of which no file is missing or truncated, and what those after it lack.

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


def missing_files(checkpoint: str | os.PathLike) -> list[str]:
    """
    Return the files of a checkpoint that were written with it and are missing or truncated.

    The Trainer resumes without a missing optimizer, scheduler or random state, and doesn't warn.
    """
    there = _sizes(Path(checkpoint))
    if not {FILES_FILE, STATE_FILE} & there.keys():
        return [STATE_FILE]  # none of it was written
    written = read_json(Path(checkpoint, FILES_FILE)) or {STATE_FILE: there.get(STATE_FILE)}
    return [name for name, size in written.items() if there.get(name) != size]


def publish(run_dir: str | os.PathLike, name: str, limit: int | None, best: str | None) -> None:
    """
    Move a checkpoint from `UNFINISHED` to its final name, once all of it has reached the disk, and rotate.

    The older ones are removed after the rename, so that there is a complete checkpoint at any moment once there was
    one.

    Args:
        run_dir (`str` or `os.PathLike`):
            Directory of the run.
        name (`str`):
            Name of the checkpoint, `checkpoint-<step>`.
        limit (`int`, *optional*):
            Number of checkpoints to keep, `save_total_limit`.
        best (`str`, *optional*):
            Path of the best checkpoint, which is kept.
    """
    run_dir = Path(run_dir)
    written = run_dir / UNFINISHED / name
    write_json(written / FILES_FILE, _sizes(written))
    for path in [path for path in written.parent.rglob("*") if path.is_file()]:
        _sync(path)
    _sync(written)
    _discard(run_dir / name)
    written.rename(run_dir / name)
    _sync(run_dir)
    if limit:
        rotate(run_dir, limit, best)
    clear_unfinished(run_dir)


def rotate(run_dir: str | os.PathLike, limit: int, best: str | None) -> None:
    """Remove all but the newest `limit` checkpoints. The best one counts and is kept."""
    found = checkpoints(run_dir)
    keep = {found[-1]} | {path for path in found if best and path.name == Path(best).name}
    for path in reversed(found):
        if len(keep) < limit:
            keep.add(path)
    for path in found:
        if path not in keep:
            _discard(path)


def clear_unfinished(run_dir: str | os.PathLike) -> None:
    """Remove what was not published."""
    shutil.rmtree(Path(run_dir, UNFINISHED), ignore_errors=True)


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}


def _sync(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint such that it is never partly there under its name."""
    if checkpoint.exists():
        discarded = checkpoint.parent / UNFINISHED / f"old-{checkpoint.name}"
        discarded.parent.mkdir(exist_ok=True)
        checkpoint.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)
