"""Parts of messages: suggestions for misspelt words, lists of names, and counts."""

import difflib
from collections.abc import Iterable


def names_of(names: Iterable[str]) -> str:
    """Return a list of quoted names: `a`, `b`, `c`."""
    return ", ".join(f"`{name}`" for name in names)


def count_of(number: int, noun: str) -> str:
    """Return a count with its noun: 1 row, 1,000 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_of(number: float) -> str:
    """Return a large number in three digits: 135 M, 6.9 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def nearest(word: str, candidates: Iterable[str]) -> list[str]:
    """Return up to three candidates that look like `word`, the most similar first."""
    return difflib.get_close_matches(word, list(candidates), n=3, cutoff=0.6)


def suggestion(names: Iterable[str]) -> str:
    """Return the sentence that suggests names: Did you mean `a` or `b`?"""
    return f"Did you mean {' or '.join(f'`{name}`' for name in names)}?"


def did_you_mean(word: str, candidates: Iterable[str], listed: bool = False) -> str:
    """
    Return a sentence with the nearest candidates or, when none is near and they are few, with all of them.

    Args:
        word (`str`): the word that isn't known.
        candidates (`Iterable[str]`): the known ones.
        listed (`bool`, *optional*, defaults to `False`): whether the message lists the candidates itself.

    Returns:
        `str`: the sentence, or an empty string.
    """
    candidates = sorted(candidates)
    near = nearest(word, candidates)
    if near:
        return suggestion(near)
    if not listed and 0 < len(candidates) <= 30:
        return f"There are: {names_of(candidates)}."
    return ""


def sentences(*parts: str) -> str:
    """Join the sentences of a message, without empty ones."""
    return " ".join(part for part in parts if part)
