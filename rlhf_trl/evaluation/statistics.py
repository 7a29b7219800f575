"""Intervals and comparisons over prompts: pure functions on numpy arrays of shape (P,), one value a prompt."""

from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean with the lower and upper end of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: np.ndarray, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """
    Mean over prompts with its percentile bootstrap interval (Efron 1979): prompts are drawn with replacement.

    Args:
        values (`np.ndarray` of shape `(P,)`):
            One finite value a prompt, at least one.
        level (`float`):
            Share of the resampled means inside the interval.
        resamples (`int`):
            How many times the prompts are drawn anew.
        seed (`int`):
            Seed of the draws; the same values, level and seed give the same interval.
    """
    values = np.asarray(values, dtype=float)
    random = np.random.default_rng(seed)
    # In turns of about a million draws, so that many prompts don't need much memory
    turn = max(1, 1_000_000 // len(values))
    means = np.concatenate(
        [
            values[random.integers(len(values), size=(min(turn, resamples - done), len(values)))].mean(axis=1)
            for done in range(0, resamples, turn)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def paired_difference(values: np.ndarray, baseline: np.ndarray, **bootstrap) -> Estimate:
    """Mean of `values - baseline` over the same prompts, with the interval of the differences."""
    return bootstrap_mean(np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float), **bootstrap)


def win_rate(values: np.ndarray, baseline: np.ndarray, **bootstrap) -> Estimate:
    """Share of prompts on which `values` is above `baseline`; a tie counts half."""
    values, baseline = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    return bootstrap_mean((values > baseline) + 0.5 * (values == baseline), **bootstrap)


def bootstrap_share(
    sums: np.ndarray, counts: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """
    sum(sums) / sum(counts), with the percentile bootstrap interval of rows that are drawn with replacement.

    Args:
        sums, counts (`np.ndarray` of shape `(R,)`):
            Of each row, the sum of its values and how many there are; rows are independent of each other, values of
            one row need not be.
        level, resamples, seed:
            See [`bootstrap_mean`].

    Returns:
        [`Estimate`]: with NaN as the ends of the interval for fewer than two rows that have any value.
    """
    has = np.asarray(counts) > 0
    sums, counts = np.asarray(sums, dtype=float)[has], np.asarray(counts, dtype=float)[has]
    if len(sums) < 2:
        return Estimate(float(sums.sum() / counts.sum()) if len(sums) else np.nan, np.nan, np.nan)
    random = np.random.default_rng(seed)
    turn = max(1, 1_000_000 // len(sums))
    shares = []
    for done in range(0, resamples, turn):
        drawn = random.integers(len(sums), size=(min(turn, resamples - done), len(sums)))
        shares.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(shares), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation coefficient; NaN for fewer than three values, or where one side doesn't vary."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 3:
        return np.nan
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else np.nan


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation coefficient of the ranks; equal values share the mean of their ranks."""
    return pearson(ranks(x), ranks(y))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, the smallest value first; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]
