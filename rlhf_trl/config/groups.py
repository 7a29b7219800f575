"""Groups of the config and their options."""

from collections.abc import Sequence
from pathlib import Path

# The group whose options are whole runs, in folders of any depth; by config
WHOLE_RUNS = {"train": "experiment", "sweep": "experiment", "pipeline": "pipeline"}
# The folder of a group with the keys that its options share
BASE = "_base"
# `hydra.help.template`. Hydra's own lists base files as options, and each folder of experiments as a group
HELP = """\
== Groups ==
Choose an option: GROUP=OPTION

{}

== Config ==
Set a key: KEY=VALUE

$CONFIG
Hydra's own options: --hydra-help
"""


def option_groups(folders: Sequence[str]) -> dict[str, set[str]]:
    """Return the options of each group in the config folders."""
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for path in Path(folder).glob("*/**/*.yaml"):
            *parents, option = path.relative_to(folder).with_suffix("").parts
            if BASE in parents:
                continue
            depth = 1 if parents[0] in WHOLE_RUNS.values() else len(parents)
            groups.setdefault("/".join(parents[:depth]), set()).add("/".join([*parents[depth:], option]))
    return groups


def help_text(folders: Sequence[str]) -> str:
    """Return the template of `--help`, with the options of each group in the config folders."""
    groups = option_groups(folders)
    return HELP.format("\n".join(f"{group}: {', '.join(sorted(groups[group]))}" for group in sorted(groups)))
