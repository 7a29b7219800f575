"""A run directory that is in use, that can't be resumed, or that holds what must not be deleted."""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf_trl.config.values import at, flatten, plain, read_json, texts
from rlhf_trl.runs.directory import holder, under_way
from rlhf_trl.runs.paths import ENSEMBLE_FILE
from rlhf_trl.runs.record import CONFIG_FILE, RUN_FILE

MODEL_FILES = ("config.json", "adapter_config.json")


# Keys that name what is written, or nothing on the disk
NOT_READ = {"run_dir", "runs_dir", "output_dir", "logging_dir", "output", "run_name", "name", "project", "starts_from"}
RUNS = {"run", "policy", "policies", "sweeps"}
GLOBS = {"paths", "eval_paths", "prompts"}


def read_paths(values: dict[str, Any]) -> list[tuple[str, Path]]:
    """
    Every file and folder that the command reads, with the key that names it: whatever text of the config is the path
    of something that exists, the runs of the project that it names, and of adapters and ensembles what they stand on.
    """
    found = [(key, path) for key, path in _named_paths(values) if os.path.exists(path)]
    for key, path in found:  # which grows
        adapter, ensemble = (read_json(path / name) or {} for name in (MODEL_FILES[1], ENSEMBLE_FILE))
        more = [path / str(name) for name in ensemble.get("members") or []]
        if base := adapter.get("base_model_name_or_path"):
            more += [Path(base), path / base]
        found += [(key, each) for each in more if os.path.exists(each) and (key, each) not in found]
    return found


def _named_paths(values: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    for key, value in texts(values):
        names = re.split(r"[.\[]", key)
        if NOT_READ & {names[-1]} or names[0] == "logger" or not value:
            continue
        if RUNS & set(names):
            yield key, project_dir(values) / value
        yield key, Path(value).expanduser()
        if GLOBS & set(names):
            yield from ((key, Path(match)) for match in glob.glob(os.path.expanduser(value), recursive=True))


def project_dir(values: dict[str, Any]) -> Path:
    """The directory with all runs of the project."""
    return Path(str(values.get("runs_dir") or "runs"), str(values.get("project") or ""))


# Files that a run would write its own over
MODELS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", "checkpoint-*/")

# A resumed run may differ in these from its beginning: none of them can change the weights.
FREE_KEYS = (
    "resume",
    "overwrite",
    "merge",
    "dry_run",
    "logger",
    "health",
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


def name_problems(values: dict[str, Any]) -> list[str]:
    """Of the names that make the run directory, in which things are deleted: each is one path below its parent."""
    problems = []
    for key in [key for key in ("runs_dir", "run_dir") if key in values]:
        if not values[key]:
            problems.append(f"`{key}` is empty. Type `{key}=FOLDER`, or leave it out.")
    for key in [key for key in ("project", "run_name") if key in values]:
        name = values[key]
        if isinstance(name, int | float):
            continue  # which is said with all other text that YAML reads so
        if key == "run_name" and name == "report" != at(values, "stage.name"):
            problems.append("`run_name` is `report`, the folder of the project's page. Set another `run_name=...`.")
            continue
        if isinstance(name, str) and all(part.strip() not in ("", ".", "..") for part in name.split("/")):
            continue
        shown = f"`{name}`, which is no folder below" if str(name or "").strip() else "empty, and names a folder in"
        above = "`runs_dir`" if key == "project" else "the project's"
        problems.append(
            f"`{key}` is {shown} {above}. Type a name such as `{key}=mine`; parts of it may be joined by a `/`."
        )
    return problems


def run_directory_problems(values: dict[str, Any]) -> list[str]:
    """A directory is used when it holds `run.json`; Hydra's `.hydra` alone says nothing."""
    if problems := name_problems(values):
        return problems
    run_dir, resume, overwrite = Path(values["run_dir"]), values.get("resume") is True, values.get("overwrite") is True
    if resume and overwrite:
        return ["`resume=true` goes on with a run and `overwrite=true` deletes it. Type only one of them."]
    if owner := holder(run_dir):
        return [under_way(run_dir, owner)]
    record = read_json(run_dir / RUN_FILE)
    if foreign := _foreign(run_dir, record):
        remedy = ", or delete the folder if it is a damaged run of yours" if RUN_FILE in foreign else ""
        return [f"`{run_dir}` {foreign}, so it is no run's. Type another `run_name=...`{remedy}."]
    if record is None:
        return [f"`{run_dir}` holds no run, so there is nothing to resume. Leave out `resume=true`."] if resume else []
    status = record["status"]
    if resume:
        return _resume_problems(run_dir, status, values)
    if overwrite:
        return _overwrite_problems(run_dir, values)
    go_on = (
        "it is finished, so `resume=true` has nothing to do" if status == "done" else "go on with it: `resume=true`"
    )
    return [
        f"`{run_dir}` already holds a run (its status is `{status}`). Ways out: {go_on}; keep it and start another: "
        "`run_name=...`; delete it and start again: `overwrite=true`."
    ]


def _foreign(run_dir: Path, record: dict[str, Any] | None) -> str | None:
    """What says that something else than a run of ours is in a directory."""
    if (run_dir / RUN_FILE).exists():
        is_ours = record is not None and isinstance(record.get("status"), str) and "stage" in record
        return None if is_ours else f"holds a `{RUN_FILE}` that isn't ours"
    if run_dir.exists() and not run_dir.is_dir():
        return "is a file"
    models = [path.name for pattern in MODELS for path in run_dir.glob(pattern)]
    return f"holds a model (`{models[0]}`) without `{RUN_FILE}`" if models else None


def _overwrite_problems(run_dir: Path, values: dict[str, Any]) -> list[str]:
    """What would be deleted with the earlier run and is none of it: other runs, and what this command reads."""
    file = run_dir / CONFIG_FILE
    members = file.is_file() and (OmegaConf.select(OmegaConf.load(file), "stage.members") or 1) > 1
    nested = [
        path.parent
        for path in sorted(run_dir.rglob(RUN_FILE))
        if path.parent != run_dir and not (members and path.parent.parent == run_dir and "member_" in str(path))
    ]
    if nested:
        return [
            f"`overwrite=true` would delete `{nested[0]}`, another run, with the one in `{run_dir}`. Move it, or type "
            "another `run_name=...`."
        ]
    inside = run_dir.resolve()
    lost = [(key, path) for key, path in read_paths(values) if path.resolve().is_relative_to(inside)]
    return [
        f"`overwrite=true` would delete `{path}` with the run in `{run_dir}`, and the command needs it: `{key}`. Type "
        "another `run_name=...`."
        for key, path in dict(reversed(lost)).items()
    ]


def _resume_problems(run_dir: Path, status: str, values: dict[str, Any]) -> list[str]:
    if status == "done":
        return [
            f"The run in `{run_dir}` is finished, so there is nothing to resume. Start another with `run_name=...`, "
            "or delete it and start again: `overwrite=true`."
        ]
    problems = []
    if at(values, "stage.args.save_only_model") is True:
        problems.append(
            "`stage.args.save_only_model=true` keeps no optimizer in a checkpoint, so the run can't be resumed. Start "
            "again: `overwrite=true`."
        )
    if not any(run_dir.glob("checkpoint-*/")) and not any(run_dir.glob(f"member_*/{RUN_FILE}")):
        problems.append(
            f"`{run_dir}` holds no checkpoint, so there is nothing to resume. Start again: `overwrite=true`."
        )
    return problems or resume_changes(run_dir, values)


def resume_changes(run_dir: Path, values: dict[str, Any]) -> list[str]:
    """
    The problem of a resume with another config than the run was begun with, which lists the keys that differ.

    Args:
        run_dir (`Path`): directory of the run, with the `config.yaml` that it was begun with.
        values (`dict`): the config now, see [`~rlhf_trl.config.values.plain`].
    """
    if not (run_dir / CONFIG_FILE).is_file():
        return [
            f"`{run_dir}` has no `config.yaml`, so nothing says what the run began with, and it can't be resumed. Put "
            "the file back, or start again: `overwrite=true`."
        ]
    before, now = flatten(plain(OmegaConf.load(run_dir / CONFIG_FILE))[0]), flatten(values)
    changed = [
        f"`{key}` was {before.get(key, 'not set')} and is {now.get(key, 'not set')}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in FREE_KEYS)
    ]
    if not changed:
        return []
    return [
        f"The run in `{run_dir}` can't be resumed with another config: {'; '.join(changed)}. Give the values it "
        "began with, or another `run_name=...`, or `overwrite=true`."
    ]
