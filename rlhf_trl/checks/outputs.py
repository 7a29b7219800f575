"""Output folders that can't be written, names that the file system refuses, and what a run records beside its own."""

import os
import tempfile
from pathlib import Path
from typing import Any

from rlhf_trl.config.values import at

# Stages that leave no files
WRITE_NOTHING = ("rlhf_trl.stages.chat.chat", "rlhf_trl.stages.serve_reward.serve_reward")


def folder_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of the run directory, and of an output file outside of it."""
    if at(values, "stage.run._target_") in WRITE_NOTHING:
        return []
    run_dir, output = values.get("run_dir"), at(values, "stage.output")
    places = {"run_dir": (run_dir, "`runs_dir=...`, `project=...` or `run_name=...`")}
    if isinstance(output, str) and not output.startswith(f"{run_dir}/"):
        places["stage.output"] = (os.path.dirname(output) or ".", "`stage.output=...`")
    problems = [
        f"`{key}`: {problem} Set another {way}."
        for key, (folder, way) in places.items()
        if isinstance(folder, str) and folder and (problem := folder_problem(Path(folder)))
    ]
    return problems


def published_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of results that others published: each needs a value, or a range, and its source."""
    published = values.get("published")
    if not isinstance(published, dict | None):
        return [
            f"`published` is {published!r} and must hold metrics. Set `published: {{METRIC: {{value: ..., ...}}}}`."
        ]
    return [
        f"`published.{name}` is {entry!r}. Set `{{value: NUMBER or [LOWEST, HIGHEST], source: TEXT}}`."
        for name, entry in (published or {}).items()
        if not _is_published(entry)
    ]


def _is_published(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"value", "source"} or not isinstance(entry["source"], str):
        return False
    numbers = entry["value"] if isinstance(entry["value"], list) and len(entry["value"]) == 2 else [entry["value"]]
    return all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)


def folder_problem(folder: Path) -> str | None:
    """Return why a folder, which need not exist, can't be written, or `None`. Nothing is left in it."""
    try:
        parent = nearest_folder(folder)
        longest = os.pathconf(parent, "PC_NAME_MAX")
        if any(len(os.fsencode(name)) > longest for name in folder.parts):
            return f"`{folder}` can't be written (a name in it has more than {longest} bytes)."
        with tempfile.TemporaryDirectory(prefix=".rlhf_trl_", dir=parent):
            return None
    except OSError as error:
        return f"`{folder}` can't be written ({error.strerror})."


def nearest_folder(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that exists; an `OSError` where a file is in the way."""
    for place in (folder, *folder.parents):
        try:
            place.lstat()
        except FileNotFoundError:
            continue
        return place
    return Path()
