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
