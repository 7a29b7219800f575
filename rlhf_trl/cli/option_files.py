"""Files of options: where they are, and what in their form Hydra would pass over. Imports nothing heavy."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from rlhf_trl.runs.paths import conf_dir

GLOBAL = re.compile(r"#\s*@package\s+_global_\s*")


def option_file(group: str, name: str, folders: Sequence[str]) -> Path | None:
    """Return the file of an option of a group, ours or in one of the user's folders; `None` where there is none."""
    files = [Path(folder, group, f"{name.removesuffix('.yaml')}.yaml") for folder in [conf_dir(), *folders]]
    return next((file for file in files if file.is_file()), None)


def shape_problem(file: Path, group: str) -> str | None:
    """Return the problem of a file of a whole run that would have no effect, or `None`."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        content = yaml.safe_load("\n".join(lines))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        return f"`{file}`, line {line}, is no YAML: {error.problem}."
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return f"`{file}` can't be read: {' '.join(str(error).split())}."
    if content is not None and not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else f"`{str(content)[:40]}`"
        return f"`{file}` must hold keys, such as `seed: 3`, and holds {kind}."
    if content and not any(GLOBAL.fullmatch(line.strip()) for line in _header(lines)):
        return (
            f"`{file}` has no line `# @package _global_`, so that its keys would stand below `{group}`, where nothing "
            "reads them. Put that line at its top."
        )
    return None


def _header(lines: Sequence[str]) -> list[str]:
    """Return the lines in which Hydra looks for `# @package`: up to the first one with anything else."""
    return list(itertools.takewhile(lambda line: re.match(r"\s*(#\s*@|$)", line), lines))


def misplaced_header(file: Path) -> str | None:
    """Return the problem of a file whose line `# @package` stands where Hydra doesn't look for it, or `None`."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None  # which Hydra reports, and [`shape_problem`]
    below = [line for line in lines[len(_header(lines)) :] if re.match(r"#\s*@package\s", line)]
    return (
        f"`{file}` has the line `{below[0]}` below others, where it has no effect. Move it to the top."
        if below
        else None
    )
