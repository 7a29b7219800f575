"""Groups of the config and their options."""

from collections.abc import Sequence
from pathlib import Path

# The group whose options are whole runs, in folders of any depth; by config
WHOLE_RUNS = {"train": "experiment", "sweep": "experiment", "pipeline": "pipeline"}
# Folders and files of these names are no options: the keys that options share (`_base`), and the values that an option
# of another group brings
HELPER = "_"
# `hydra.help.template`. Hydra's own lists helper files as options, and each folder of experiments as a group
HELP = """\
== Groups ==
Choose an option: GROUP=OPTION

{}

== Config ==
Set a key: KEY=VALUE

$CONFIG
Hydra's own options: --hydra-help
"""


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


def help_text(folders: Sequence[str]) -> str:
    """Return the template of `--help`, with the options of each group in the config folders."""
    groups = option_groups(folders)
    return HELP.format("\n".join(f"{group}: {', '.join(sorted(groups[group]))}" for group in sorted(groups)))
