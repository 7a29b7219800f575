"""Small parts of messages: lists of names, counts, suggestions; and printing once."""

import os
from collections.abc import Iterable

from rlhf_trl.hints import nearest
from rlhf_trl.terminal import printable


def say(text: str) -> None:
    """Print on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), flush=True)


def names_of(names: Iterable[str]) -> str:
    """`a`, `b`, `c`."""
    return ", ".join(f"`{name}`" for name in names)


def count_of(number: int, noun: str) -> str:
    """1 row, 1,000 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The sentence "Did you mean `x`?", after a space, where a known name is near; else nothing."""
    near = nearest(name, known)
    return f" Did you mean `{near[0]}`?" if near else ""
