"""
The directory of a run: whether a new run may open it, resume the one in it, or overwrite it, and the backup of an
overwritten run until the new one has begun. Imports nothing heavy.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_trl.config.values import at, flatten, plain
from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.checkpoints import last_checkpoint
from rlhf_trl.runs.lock import LOCK_FILE, in_use_problem, lock_owner
from rlhf_trl.runs.paths import MODEL_FILES, is_resumable, read_paths
from rlhf_trl.runs.ranks import world_size
from rlhf_trl.runs.record import (
    COMPARISON_FILE,
    CONFIG_FILE,
    DRAWS_FILE,
    ENSEMBLE_FILE,
    LABELS_FILE,
    METRICS_FILE,
    QUALITY_FILE,
    RUN_FILE,
    is_done,
    read_run,
)
from rlhf_trl.runs.results import RunRecord

# Files that a run would write its own over
MODELS = ("*.safetensors", "*.bin", *MODEL_FILES, "checkpoint-*/")
# A resumed run may differ in these from its beginning: none of them can change the weights
FREE_KEYS = (
    "resume",
    "overwrite",
    "merge",
    "dry_run",
    "time_steps",
    "logger",
    "health",
    "labeler",
    "runs_dir",
    "run_dir",
    "stage.args.output_dir",
    "stage.args.report_to",
    "stage.args.save_strategy",
    "stage.args.save_steps",
    "stage.args.save_total_limit",
    "stage.args.logging_steps",
    "stage.args.logging_first_step",
    "stage.args.disable_tqdm",
)
# On another number of ranks this may differ, so that a step has as many rows as before: `STEP` of the inputs
ROWS = "stage.args.per_device_train_batch_size"
STEP = "rows per step"
# `resume=auto`, for schedulers that start the same command again
AUTO = "auto"
# Lengths of a training or a labeling, which a resumed run may raise, a finished one included
LABEL_LENGTHS = ("stage.budget", "stage.overlap")
LENGTHS = ("stage.args.num_train_epochs", "stage.args.max_steps", "stage.args.total_episodes", *LABEL_LENGTHS)
# Null is no limit
UNLIMITED = ("stage.budget",)
# What a stage has made when it ended well, and the partial files of what it was making
RESULTS = (*MODELS, COMPARISON_FILE, QUALITY_FILE, ENSEMBLE_FILE, "*.partial", "*completions*")
# The labeler whose answers can't be made again
PEOPLE = "rlhf_trl.labels.human.HumanLabeler"
BACKUP = ".overwritten"  # the earlier run, all of it
MOVING = f"{BACKUP}.partial"  # on its way there or back
DELETED = f"{BACKUP}.deleted"
# Hydra's folder and logs are the new run's already: Hydra writes them before anything of ours is called
KEPT = {".hydra", LOCK_FILE, BACKUP, MOVING, DELETED}


def name_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of the names that make the run directory: each must be one path below its parent."""
    problems = []
    for key in [key for key in ("runs_dir", "run_dir") if key in values]:
        if not values[key]:
            problems.append(f"`{key}` is empty. Set `{key}=FOLDER`, or remove it.")
    for key in [key for key in ("project", "run_name") if key in values]:
        name = values[key]
        if isinstance(name, int | float):
            continue  # reported with all other text that YAML reads as a number
        if key == "run_name" and name == "report" != at(values, "stage.name"):
            problems.append("`run_name` is `report`, the folder of the project's page. Set another `run_name=...`.")
            continue
        if isinstance(name, str) and all(part.strip() not in ("", ".", "..") for part in name.split("/")):
            continue
        shown = f"`{name}`, which is no folder below" if str(name or "").strip() else "empty, and names a folder in"
        above = "`runs_dir`" if key == "project" else "the project's"
        problems.append(
            f"`{key}` is {shown} {above}. Set a name such as `{key}=mine`; parts of it may be joined by a `/`."
        )
    return problems


def run_directory_problems(values: dict[str, Any]) -> list[str]:
    """
    Return what keeps a run from opening its directory as the config says: new, with `resume` or with `overwrite`.

    A directory is used when it holds `run.json`; Hydra's `.hydra` alone is no run.
    """
    if problems := name_problems(values):
        return problems
    run_dir, overwrite = Path(values["run_dir"]), values.get("overwrite") is True
    if overwrite and values.get("resume") in (True, AUTO):
        resume = str(values["resume"]).lower()
        return [f"`resume={resume}` continues a run and `overwrite=true` deletes it. Set only one of them."]
    if values.get("resume") == AUTO and at(values, "stage.args.save_only_model") is True:
        return [
            "`resume=auto` resumes a run that was stopped, and `stage.args.save_only_model=true` keeps no optimizer "
            "to resume with. Remove one of them."
        ]
    if owner := lock_owner(run_dir):
        return [in_use_problem(run_dir, owner)]
    try:
        record = read_run(run_dir)
    except ConfigError:
        record = None
    if foreign := _foreign(run_dir, record):
        remedy = ", or delete the folder if it is a damaged run of yours" if RUN_FILE in foreign else ""
        return [f"`{run_dir}` {foreign}, so it is not a run directory. Set another `run_name=...`{remedy}."]
    resume = resumes(values)
    if record is None:
        return [f"`{run_dir}` holds no run, so there is nothing to resume. Remove `resume=true`."] if resume else []
    status = record.status
    if is_finished(values):
        return resume_changes(run_dir, values)
    if resume:
        return _resume_problems(run_dir, record, values)
    if overwrite:
        return _overwrite_problems(run_dir, values)
    if is_empty(run_dir, record) and not _overwrite_problems(run_dir, values):
        return []
    resumed = "resume it: `resume=true`; " if is_resumable(run_dir) else ""
    if status == "done":
        longer = [key for key in LENGTHS if _is_number(at(values, key))]
        lengthened = f", unless it is lengthened: `resume=true {longer[0]}=...`" if longer else ""
        resumed = f"it is finished, so `resume=true` has nothing to do{lengthened}; "
    return [
        f"`{run_dir}` already holds a run (its status is `{status}`). Ways out: {resumed}keep it and start another: "
        "`run_name=...`; delete it and start again: `overwrite=true`."
    ]


def resumes(values: dict[str, Any]) -> bool:
    """Return whether a run resumes the one in its directory. With `resume=auto` it does where it can."""
    if values.get("resume") != AUTO:
        return values.get("resume") is True
    run_dir = Path(values["run_dir"])
    record = read_run(run_dir)
    if record is None:
        return False
    return is_lengthened(run_dir, values) if record.status == "done" else is_resumable(run_dir)


def is_finished(values: dict[str, Any]) -> bool:
    """Return whether `resume=auto` has nothing to do: the run is done, and is not lengthened."""
    return values.get("resume") == AUTO and is_done(values["run_dir"]) and not resumes(values)


def _foreign(run_dir: Path, record: RunRecord | None) -> str | None:
    """Return what shows that something else than a run of ours is in a directory, `None` where nothing does."""
    if (run_dir / RUN_FILE).exists():
        return None if record is not None and record.stage else f"holds a `{RUN_FILE}` that isn't ours"
    if run_dir.exists() and not run_dir.is_dir():
        return "is a file"
    models = [path.name for pattern in MODELS for path in run_dir.glob(pattern)]
    return f"holds a model (`{models[0]}`) without `{RUN_FILE}`" if models else None


def _overwrite_problems(run_dir: Path, values: dict[str, Any]) -> list[str]:
    """
    Return what would be deleted with the earlier run and is no part of it, or can't be made again: other runs, what
    this command reads, labels of people.
    """
    file = run_dir / CONFIG_FILE
    before = OmegaConf.load(file) if file.is_file() else OmegaConf.create()
    labels = run_dir / LABELS_FILE
    if OmegaConf.select(before, "labeler._target_") == PEOPLE and labels.is_file() and labels.stat().st_size:
        return [
            f"`overwrite=true` would delete what people answered, `{labels}`. Move it elsewhere first, or set another "
            "`run_name=...`."
        ]
    members = (OmegaConf.select(before, "stage.members") or 1) > 1
    is_grid = OmegaConf.select(before, "stage.models") is not None
    nested = [
        folder
        for folder in (path.parent for path in sorted(run_dir.rglob(RUN_FILE)))
        if folder != run_dir
        and not (members and folder.parent == run_dir and "member_" in str(folder))
        and not (is_grid and folder.parent == run_dir and folder.name.isdigit())
    ]
    if nested:
        return [
            f"`overwrite=true` would delete `{nested[0]}`, another run, with the one in `{run_dir}`. Move it, or set "
            "another `run_name=...`."
        ]
    inside = run_dir.resolve()
    lost = [(key, path) for key, path in read_paths(values) if path.resolve().is_relative_to(inside)]
    return [
        f"`overwrite=true` would delete `{path}` with the run in `{run_dir}`, and the command needs it: `{key}`. Set "
        "another `run_name=...`."
        for key, path in dict(reversed(lost)).items()
    ]


def is_empty(run_dir: str | os.PathLike, record: RunRecord) -> bool:
    """
    Return whether a run ended before it left anything that a new one could cost: it failed or was stopped before its
    first checkpoint, or before its result was there.
    """
    folders = [Path(run_dir), *Path(run_dir).glob("member_*/")]
    left = any(any(folder.glob(pattern)) for folder in folders for pattern in RESULTS)
    return record.status != "done" and not has_begun(run_dir) and not left


def is_lengthened(run_dir: str | os.PathLike, values: dict[str, Any]) -> bool:
    """Return whether a config trains for longer than the one that the run in `run_dir` was started with."""
    before = _config_of(Path(run_dir))
    return before is not None and any(_is_longer(key, before.get(key), at(values, key)) for key in LENGTHS)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_longer(key: str, before: Any, now: Any) -> bool:
    if now is None:
        return _is_number(before) and key in UNLIMITED
    return _is_number(before) and _is_number(now) and now > before


def _config_of(run_dir: Path) -> dict[str, Any] | None:
    """Return the config that a run was started with, flat; `None` where there is none."""
    if not (run_dir / CONFIG_FILE).is_file():
        return None
    config = OmegaConf.load(run_dir / CONFIG_FILE)
    return flatten(plain(config)[0]) if isinstance(config, DictConfig) else {}


def _resume_problems(run_dir: Path, record: RunRecord, values: dict[str, Any]) -> list[str]:
    if record.status == "done" and not is_lengthened(run_dir, values):
        shorter = [
            f"`{key}` was {before[key]} and is {now}"
            for before in [_config_of(run_dir) or {}]
            for key in LENGTHS
            if _is_number(before.get(key)) and _is_number(now := at(values, key)) and now < before[key]
        ]
        why = f" A run can be lengthened, and not shortened: {'; '.join(shorter)}." if shorter else ""
        return [
            f"The run in `{run_dir}` is finished, so there is nothing to resume.{why} Start another with "
            "`run_name=...`, or delete it and start again: `overwrite=true`."
        ]
    problems = []
    if at(values, "stage.args.save_only_model") is True:
        problems.append(
            "`stage.args.save_only_model=true` keeps no optimizer in a checkpoint, so the run can't be resumed. Start "
            "again: `overwrite=true`."
        )
    if not is_resumable(run_dir):
        way = "remove `resume=true`" if is_empty(run_dir, record) else "`overwrite=true`"
        problems.append(f"`{run_dir}` holds no checkpoint, so there is nothing to resume. Start again: {way}.")
    return problems or resume_changes(run_dir, values, record.inputs.get("ranks"))


def input_changes(run_dir: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """
    Return the problem of a resumed run whose inputs have changed since it began, or none. The number of ranks may
    change where each step keeps its rows.

    Args:
        run_dir (`Path`): directory of the run.
        before, now (`Mapping`): the inputs that `run.json` records, and those of now.
    """
    changed = [key for key in before if key in now and before[key] != now[key]]
    if {before.get("engine"), now.get("engine")} == {"none", "DDP"}:  # which write the same checkpoints
        changed = [key for key in changed if key != "engine"]
    remedy, rows = "", before.get(STEP)
    # DeepSpeed's checkpoints hold a part of the optimizer's state for each rank
    if "ranks" in changed and "engine" not in changed and rows and not str(now["engine"]).startswith("DeepSpeed"):
        if rows == now.get(STEP):
            changed.remove("ranks")
        elif rows % now["ranks"] == 0:
            remedy = f", keep the rows of a step (`{ROWS}={rows // now['ranks']}`)"
    if not changed:
        return []
    text = "; ".join(f"`{key}` was {before[key]} and is {now[key]}" for key in changed)
    return [
        f"The run in `{run_dir}` can't be resumed, since what it depends on has changed: {text}. "
        f"Restore what it was started with{remedy}, or start again with another `run_name=...` or `overwrite=true`."
    ]


def resume_changes(run_dir: Path, values: dict[str, Any], ranks: int | None = None) -> list[str]:
    """
    Return the problem of a resume with another config than the run was started with, which lists the changed keys.

    Args:
        run_dir (`Path`): directory of the run, with the `config.yaml` that it was started with.
        values (`dict`): the config now, see [`~rlhf_trl.config.values.plain`].
        ranks (`int`, *optional*): the number of ranks that it was started with.
    """
    before = _config_of(run_dir)
    if before is None:
        return [
            f"`{run_dir}` has no `{CONFIG_FILE}`, so the config it was started with isn't known, and it can't be "
            "resumed. Restore the file, or start again: `overwrite=true`."
        ]
    now = flatten(values)
    numbers = all(_is_number(each.get(ROWS)) for each in (before, now)) and ranks
    same_rows = numbers and before[ROWS] * ranks == now[ROWS] * world_size()
    changed = [
        f"`{key}` was {before.get(key, 'not set')} and is {now.get(key, 'not set')}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
        and not any(f"{key}.".startswith(f"{free}.") for free in FREE_KEYS)
        and not (key in LENGTHS and _is_longer(key, before.get(key), now.get(key)))
        and not (key == ROWS and same_rows)
    ]
    if not changed:
        return []
    return [
        f"The run in `{run_dir}` can't be resumed with another config: {'; '.join(changed)}. Set the values it "
        "was started with, or another `run_name=...`, or `overwrite=true`."
    ]


def _entries(run_dir: str | os.PathLike) -> list[Path]:
    return [path for path in Path(run_dir).iterdir() if path.name not in KEPT and path.suffix != ".log"]


def _clear(run_dir: str | os.PathLike) -> None:
    for path in _entries(run_dir):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def back_up(run_dir: str | os.PathLike) -> None:
    """Move the files of an earlier run out of the way of the one that overwrites it."""
    moving = Path(run_dir, MOVING)
    moving.mkdir()
    for path in _entries(run_dir):
        path.rename(moving / path.name)
    moving.rename(Path(run_dir, BACKUP))


def restore_backup(run_dir: str | os.PathLike) -> None:
    """Delete the files of the new run, and move those of the one that it was to overwrite back, if there is one."""
    backup, moving = Path(run_dir, BACKUP), Path(run_dir, MOVING)
    if not moving.exists():
        _clear(run_dir)
        if backup.exists():
            backup.rename(moving)
    if moving.exists():
        for path in moving.iterdir():
            path.rename(Path(run_dir, path.name))
        moving.rmdir()


def has_backup(run_dir: str | os.PathLike) -> bool:
    """Return whether an earlier run is backed up: the new one has not begun."""
    return Path(run_dir, BACKUP).exists()


def delete_backup(run_dir: str | os.PathLike) -> None:
    """Delete the run that was backed up: the new one has begun."""
    backup, deleted = Path(run_dir, BACKUP), Path(run_dir, DELETED)
    if backup.exists():
        backup.rename(deleted)  # at once: a part of it must never be restored
    shutil.rmtree(deleted, ignore_errors=True)


def has_begun(run_dir: str | os.PathLike) -> bool:
    """
    Return whether a run, or a member of an ensemble, has a checkpoint or is done, or its result is there (labels and
    collected completions count): what fails after that, such as a merge or the page of an evaluation, must not delete
    it.
    """
    members = list(Path(run_dir).glob("member_*/"))
    is_trained = Path(run_dir, METRICS_FILE).is_file() and any(Path(run_dir).glob("*.safetensors"))
    kept = (COMPARISON_FILE, QUALITY_FILE, LABELS_FILE, DRAWS_FILE)
    if is_trained or any(Path(run_dir, name).is_file() for name in kept):
        return True
    return any(is_done(member) for member in members) or any(
        last_checkpoint(folder) is not None for folder in (run_dir, *members)
    )


def recover(run_dir: str | os.PathLike) -> None:
    """Clean up after a killed process: the earlier run is restored unless the new one has a checkpoint."""
    if (has_backup(run_dir) and not has_begun(run_dir)) or Path(run_dir, MOVING).exists():
        restore_backup(run_dir)
    delete_backup(run_dir)
