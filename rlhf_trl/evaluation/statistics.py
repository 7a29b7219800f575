"""Intervals and comparisons over prompts: pure functions on numpy arrays of shape (P,), one value per prompt."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from rlhf_trl.report.seeds import t_quantile
from rlhf_trl.runs.results import Estimate

# Below so many values percentiles of the bootstrap are too narrow (Hesterberg 2015, arXiv 1411.5279, section 3.2): of
# 5 normal ones a 95 % interval holds the mean in 83 % of all cases
FEW = 20


def bootstrap_mean(values: np.ndarray, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """
    Return the mean over prompts with its percentile bootstrap interval (Efron 1979): prompts are drawn with
    replacement. Of fewer than 20 prompts the interval is Student's.

    Args:
        values (`np.ndarray` of shape `(P,)`):
            One finite value per prompt, at least one.
        level (`float`):
            Share of the resampled means inside the interval.
        resamples (`int`):
            Number of times that the prompts are resampled.
        seed (`int`):
            Seed of the draws; the same values, level and seed give the same interval.

    Returns:
        [`Estimate`]: with NaN as the ends of the interval for a single value.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 1:
        return Estimate(float(values[0]), np.nan, np.nan)
    if len(values) < FEW:
        return _t_interval(
            float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)), len(values), level
        )
    random = np.random.default_rng(seed)
    # In chunks of about a million draws, to limit the memory
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
    """Return the mean of `values - baseline` over the same prompts, with the interval of the differences."""
    return bootstrap_mean(np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float), **bootstrap)


def win_rate(outcomes: np.ndarray, level: float = 0.95) -> Estimate:
    """
    Return the share of prompts that are won (outcome 1; a tie is 0.5, a loss 0), with its bootstrap interval; of 2 to
    19 prompts, and where all are won or all lost, with Wilson's (1927), which has a width there too.
    """
    rate, n = float(np.mean(outcomes)), len(outcomes)
    if n == 1 or (n >= FEW and 0 < rate < 1):
        return bootstrap_mean(outcomes, level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return Estimate(rate, max(center - half, 0.0), min(center + half, 1.0))


def _t_interval(mean: float, error: float, n: int, level: float) -> Estimate:
    """Return a mean of `n` values with Student's interval, from its standard error."""
    half = t_quantile((1 + level) / 2, n - 1) * error
    return Estimate(mean, mean - half, mean + half)


def percentile_ends(resampled: np.ndarray, n: int, level: float = 0.95, method: Any = "linear") -> np.ndarray:
    """
    Return the ends of a percentile interval from values resampled over `n` prompts, along the first axis; of fewer
    than 20 prompts with the percentiles expanded to the width of Student's interval (Hesterberg 2015, section 3.2).
    `method` is that of `np.quantile` between two values.
    """
    tail = (1 - level) / 2
    if 1 < n < FEW:
        tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t_quantile(1 - tail, n - 1))
    return np.quantile(resampled, [tail, 1 - tail], axis=0, method=method)


def bootstrap_share(
    sums: np.ndarray, counts: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """
    Return sum(sums) / sum(counts), with the percentile bootstrap interval of rows that are drawn with replacement. Of
    fewer than 20 rows the interval is Student's, for a ratio (Cochran 1977, section 6.4).

    Args:
        sums, counts (`np.ndarray` of shape `(R,)`):
            Sum and number of the values of each row; rows are independent of each other, values of one row need not
            be.
        level, resamples, seed:
            See [`bootstrap_mean`].

    Returns:
        [`Estimate`]: with NaN as the ends of the interval for fewer than two rows that have any value.
    """
    has = np.asarray(counts) > 0
    sums, counts = np.asarray(sums, dtype=float)[has], np.asarray(counts, dtype=float)[has]
    if len(sums) < 2:
        return Estimate(float(sums.sum() / counts.sum()) if len(sums) else np.nan, np.nan, np.nan)
    if len(sums) < FEW:
        ratio, n = float(sums.sum() / counts.sum()), len(sums)
        error = math.sqrt(n / (n - 1) * ((sums - ratio * counts) ** 2).sum()) / counts.sum()
        found = _t_interval(ratio, float(error), n, level)
        is_share = bool(((sums >= 0) & (sums <= counts)).all())
        return Estimate(ratio, max(found.low, 0.0), min(found.high, 1.0)) if is_share else found
    random = np.random.default_rng(seed)
    turn = max(1, 1_000_000 // len(sums))
    shares = []
    for done in range(0, resamples, turn):
        drawn = random.integers(len(sums), size=(min(turn, resamples - done), len(sums)))
        shares.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(shares), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Return the correlation coefficient; NaN for fewer than three values, or where one side doesn't vary."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 3:
        return np.nan
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else np.nan


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return the correlation coefficient of the ranks; equal values share the mean of their ranks."""
    return pearson(ranks(x), ranks(y))


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1, the smallest value first; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def best_of_n(select: np.ndarray, measure: np.ndarray, n: int) -> np.ndarray:
    """
    Return the expected value of the best of `n` samples over all ways to draw them from `m`, shape `(P,)`.

    This is the unbiased estimator of Nakano et al. 2021 (WebGPT, arXiv 2112.09332): the sample of rank
    i (from below) is the best of `n` drawn without replacement with probability C(i - 1, n - 1) / C(m, n).

    Args:
        select (`np.ndarray` of shape `(P, m)`):
            Values that choose the best. Equal ones are chosen equally often.
        measure (`np.ndarray` of shape `(P, m)`):
            Values that are averaged over the chosen ones.
        n (`int`):
            1 to `m`.
    """
    select, measure = np.asarray(select, dtype=float), np.asarray(measure, dtype=float)
    m = select.shape[1]
    # From the largest, n / m, down: C(i - 1, n - 1) = C(i, n - 1) (i - n + 1) / i
    i = np.arange(m - 1, 0, -1)
    weights = n / m * np.append(1.0, np.cumprod((i - n + 1).clip(min=0) / i))[::-1]
    values = np.empty(len(select))
    for row, (by, worth) in enumerate(zip(select, measure, strict=True)):
        _, rank_of, count = np.unique(by, return_inverse=True, return_counts=True)
        ends = np.cumsum(count)
        share = np.array([weights[end - size : end].sum() for end, size in zip(ends, count, strict=True)]) / count
        values[row] = (share[rank_of] * worth).sum()
    return values


def best_of_n_kl(n: int) -> float:
    """
    Return the KL of the best of `n` samples to the policy they are from, in nats per sequence: log n - (n - 1) / n.

    Exact where no two samples are equal, else an upper bound (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def length_controlled_win_rate(
    outcomes: np.ndarray,
    length_difference: np.ndarray,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    ridge: float = 0.01,
) -> Estimate:
    """
    Return the win rate at equal length: AlpacaEval 2's logistic regression (Dubois et al. 2024, arXiv 2404.04475, eq.
    2) without its term for the difficulty of a prompt.

    The probability of a win is modeled as sigmoid(a + b tanh(d / std(d))), with `d` the difference in length; the
    result is sigmoid(a), with a percentile interval from prompts drawn with replacement.

    Args:
        outcomes (`np.ndarray` of shape `(P,)`):
            1 for a win, 0.5 for a tie, 0 for a loss.
        length_difference (`np.ndarray` of shape `(P,)`):
            Length of the policy's answer minus that of the baseline's.
        level (`float`), resamples (`int`), seed (`int`):
            See [`bootstrap_mean`].
        ridge (`float`):
            Half of it times a² + b² is added to the loss per prompt, divided by P, so that a policy that always wins
            has a finite estimate.
    """
    y, d = np.asarray(outcomes, dtype=float), np.asarray(length_difference, dtype=float)
    x = np.tanh(d / d.std()) if d.std() > 0 else np.zeros_like(d)
    draws = np.random.default_rng(seed).multinomial(len(y), np.full(len(y), 1 / len(y)), size=resamples)
    counts = np.concatenate([np.ones((1, len(y))), draws])  # the first one is the sample itself
    a, b = np.zeros(len(counts)), np.zeros(len(counts))
    for _ in range(50):
        p = _sigmoid(a[:, None] + b[:, None] * x)
        slack, weight = counts * (y - p), counts * p * (1 - p)
        gradient = np.stack([slack.sum(1) - ridge * a, slack @ x - ridge * b])
        aa, ab, bb = weight.sum(1) + ridge, weight @ x, weight @ x**2 + ridge
        step = np.stack([bb * gradient[0] - ab * gradient[1], aa * gradient[1] - ab * gradient[0]]) / (aa * bb - ab**2)
        step = np.clip(step, -2, 2)  # where wins and losses are separable, a full Newton step overshoots
        a, b = a + step[0], b + step[1]
        if np.abs(step).max() < 1e-8:
            break
    rates = _sigmoid(a)
    low, high = percentile_ends(rates[1:], len(y), level)
    return Estimate(float(rates[0]), float(low), float(high))


def bradley_terry(
    outcomes: dict[tuple[str, str], np.ndarray],
    names: Sequence[str],
    baseline: str,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate | None]:
    """
    Fit the strength of each policy on one scale by maximum likelihood (Bradley and Terry 1952; the iteration of Hunter
    2004): the probability that a beats b is sigmoid(strength a - strength b). The baseline has 0.

    Args:
        outcomes (`dict` of pair of names to `np.ndarray` of shape `(P,)`):
            1 where the first one wins, 0.5 for a tie, 0 where the second wins, NaN where nothing was judged. Half a
            win for either side is added to each pair that was judged, so that a policy that always wins has a finite
            strength.
        names (`Sequence[str]`), baseline (`str`):
            Names of the policies, and that of the baseline.
        level (`float`), resamples (`int`), seed (`int`):
            See [`bootstrap_mean`]: the same prompts are drawn for all pairs.

    Returns:
        `dict`: the strength by name; `None` where no judgements lead from a policy to the baseline.
    """
    outcomes = {pair: values for pair, values in outcomes.items() if np.isfinite(values).any()}
    linked, more = set(), {baseline}
    while more:
        linked |= more
        more = {name for pair in outcomes if linked.intersection(pair) for name in pair} - linked
    found = dict.fromkeys(names)
    names = [name for name in names if name in linked]
    outcomes = {pair: values for pair, values in outcomes.items() if pair[0] in linked}
    if not outcomes:
        return found
    size = len(next(iter(outcomes.values())))
    draws = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=resamples)
    counts = np.concatenate([np.ones((1, size)), draws])
    wins = np.zeros((len(counts), len(names), len(names)))
    for (first, second), values in outcomes.items():
        i, j, judged = names.index(first), names.index(second), np.isfinite(values)
        wins[:, i, j] += counts[:, judged] @ values[judged] + 0.5
        wins[:, j, i] += counts[:, judged] @ (1 - values[judged]) + 0.5
    games, won = wins + wins.transpose(0, 2, 1), wins.sum(2)
    strength = np.zeros(won.shape)
    for _ in range(2000):
        worth = np.exp(strength)
        new = np.log(won) - np.log((games / (worth[:, :, None] + worth[:, None, :])).sum(2))
        new -= new.mean(1, keepdims=True)
        moved, strength = np.abs(new - strength).max(), new
        if moved < 1e-7:
            break
    strength -= strength[:, [names.index(baseline)]]
    low, high = percentile_ends(strength[1:], size, level)
    return found | {name: Estimate(*map(float, (strength[0, i], low[i], high[i]))) for i, name in enumerate(names)}


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the number of different n-grams of words over that of all n-grams (Li et al. 2016, arXiv 1510.03055)."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(texts: Sequence[str], n: int = 4) -> float:
    """Return the mean share of a text's n-grams of words that it repeats (Welleck et al. 2020, seq-rep-n)."""
    grams = [_ngrams(text, n) for text in texts]
    return float(np.mean([1 - len(set(each)) / len(each) if each else 0.0 for each in grams]))


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -500, 500)))
