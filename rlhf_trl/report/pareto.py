"""Pareto fronts: non-dominated points, their hypervolume and their knee."""

from collections.abc import Sequence

import numpy as np


def pareto(gain: Sequence[float | None], cost: Sequence[float | None]) -> list[bool]:
    """Return for each point whether no other one has at least its gain at no more cost, and is better in one."""
    points = [(np.nan if g is None else g, np.nan if c is None else -c) for g, c in zip(gain, cost, strict=True)]
    return nondominated(points)


def nondominated(points: Sequence[Sequence[float]] | np.ndarray) -> list[bool]:
    """
    Return for each point whether no other one is at least as high in every objective, and higher in one. Of equal
    points all are kept or none; a point with NaN is none, and dominates none.

    Args:
        points (`np.ndarray` of shape `(points, objectives)`): higher is better.
    """
    values = np.asarray(points, dtype=float)
    return [
        bool(np.isfinite(one).all() and not ((values >= one).all(axis=1) & (values > one).any(axis=1)).any())
        for one in values
    ]


def hypervolume(points: Sequence[Sequence[float]] | np.ndarray, reference: Sequence[float] | np.ndarray) -> float:
    """
    Return the volume that points dominate above a reference point, exactly (Zitzler and Thiele 1998), by slices along
    one objective after another (While et al. 2006, "A faster algorithm for calculating hypervolume").

    Points that aren't above the reference in every objective, or have NaN, add nothing. The time grows exponentially
    with the objectives; the few of a policy take none.

    Args:
        points (`np.ndarray` of shape `(points, objectives)`): higher is better.
        reference (`np.ndarray` of shape `(objectives,)`): where the volume begins.
    """
    gains = np.asarray(points, dtype=float) - np.asarray(reference, dtype=float)
    return _volume(gains[(gains > 0).all(axis=1)])


def _volume(gains: np.ndarray) -> float:
    if gains.shape[1] == 1 or not len(gains):
        return float(gains.max(initial=0.0))
    gains = gains[np.argsort(-gains[:, -1], kind="stable")]
    depths = gains[:, -1] - np.append(gains[1:, -1], 0.0)
    if gains.shape[1] == 2:
        return float(depths @ np.maximum.accumulate(gains[:, 0]))
    # A slice is as deep as the lowest of the points that reach it
    return sum(depth * _volume(gains[: i + 1, :-1]) for i, depth in enumerate(depths) if depth > 0)


def knee(points: Sequence[Sequence[float]] | np.ndarray) -> int | None:
    """
    Return the index of the non-dominated point that lies farthest beyond the plane through the best points of the
    single objectives, on axes from 0, the worst non-dominated value, to 1, the best (Das 1999, "On characterizing the
    knee of the Pareto curve"). `None` where no point lies beyond it.

    Args:
        points (`np.ndarray` of shape `(points, objectives)`): higher is better.
    """
    values = np.asarray(points, dtype=float)
    kept = np.flatnonzero(nondominated(values))
    if not len(kept):
        return None
    front = values[kept]
    if (front == front[0]).all():  # one point, or equal ones
        return int(kept[0])
    low, high = front.min(axis=0), front.max(axis=0)
    beyond = ((front - low) / np.where(high > low, high - low, 1.0)).sum(axis=1)
    best = int(beyond.argmax())
    return int(kept[best]) if beyond[best] > 1 + 1e-9 else None
