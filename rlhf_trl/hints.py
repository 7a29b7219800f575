"""What a misspelt word was meant to be."""

import difflib
from collections.abc import Iterable


def nearest(word: str, candidates: Iterable[str]) -> list[str]:
    """Up to three candidates that look like `word`, the likeliest first."""
    return difflib.get_close_matches(word, list(candidates), n=3, cutoff=0.6)


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """A sentence with the nearest candidates, or with all of them when none is near and they are few; else nothing."""
    candidates = sorted(candidates)
    near = nearest(word, candidates)
    if near:
        return "Did you mean " + " or ".join(f"`{name}`" for name in near) + "?"
    if 0 < len(candidates) <= 30:
        return "There are: " + ", ".join(f"`{name}`" for name in candidates) + "."
    return ""
