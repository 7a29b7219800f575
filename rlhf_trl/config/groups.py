"""Groups of the config and their options."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

# The group whose options are whole runs, in folders of any depth; by config
WHOLE_RUNS = {"train": "experiment", "sweep": "experiment", "pipeline": "pipeline"}
# Folders and files of these names are no options: the keys that options share (`_base`), and the values that an option
# of another group brings
HELPER = "_"


def is_helper(names: Sequence[str]) -> bool:
    """Return whether the parts of a path name a helper file, and no option."""
    return any(name.startswith(HELPER) for name in names)


def option_groups(folders: Sequence[str]) -> dict[str, set[str]]:
    """Return the options of each group in the config folders."""
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for path in Path(folder).glob("*/**/*.yaml"):
            *parents, option = path.relative_to(folder).with_suffix("").parts
            if is_helper([*parents, option]):
                continue
            depth = 1 if parents[0] in WHOLE_RUNS.values() else len(parents)
            groups.setdefault("/".join(parents[:depth]), set()).add("/".join([*parents[depth:], option]))
    return groups


def head_of(file: Path) -> str:
    """Return the comment at the top of a file, without `@package`."""
    lines = list(itertools.takewhile(lambda line: line.startswith("#"), _lines(file)))
    text = [line.removeprefix("#").removeprefix(" ") for line in lines]
    return "\n".join(text[1:] if text and text[0].startswith("@package") else text)


def summary(file: Path) -> str:
    """Return the first sentence of the comment at the top of a file, up to its colon."""
    return re.split(r"(?<=[.:])\s", " ".join(head_of(file).split()))[0].rstrip(":.")


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()
