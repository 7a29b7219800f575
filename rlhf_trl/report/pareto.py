"""Pareto fronts."""

from collections.abc import Sequence

import numpy as np


def pareto(gain: Sequence[float | None], cost: Sequence[float | None]) -> list[bool]:
    """Return for each point whether no other one has at least its gain at no more cost, and is better in one."""
    points = [(np.nan if g is None else g, np.nan if c is None else c) for g, c in zip(gain, cost, strict=True)]
    return [
        bool(np.isfinite(g + c)) and not any(g <= G and c >= C and (g < G or c > C) for G, C in points)
        for g, c in points
    ]
