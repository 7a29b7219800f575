"""
Measures of the scores of a reward beside people's judgements: pure functions on numpy arrays.

Shapes: N completions, M comparisons between two of them. `margin` is the score of the completion that people prefer
minus the score of the other one; NaN where one of them has no score.
"""

from collections.abc import Collection, Sequence

import numpy as np

from rlhf_trl.evaluation.statistics import (
    best_of_n,
    best_of_n_kl,
    bootstrap_mean,
    bootstrap_share,
    pearson,
    spearman,
)
from rlhf_trl.runs.results import Estimate
from rlhf_trl.runs.reward_results import (
    BestOfNGain,
    Disagreement,
    DisagreementSlice,
    HalfPrediction,
    QuantilePoint,
    RaterCeiling,
    RaterPrediction,
    Reliability,
    ReliabilityBin,
)


def accuracy(margin: np.ndarray, rows: np.ndarray) -> Estimate:
    """
    Return the share of comparisons with a margin above 0; a margin of 0 counts half, NaN doesn't count.

    Args:
        margin (`np.ndarray` of shape `(M,)`): see the head of this module.
        rows (`np.ndarray` of shape `(M,)`): row of the data that a comparison is from: the interval resamples rows.
    """
    valid = ~np.isnan(margin)
    won = (margin[valid] > 0) + 0.5 * (margin[valid] == 0)
    _, number = np.unique(rows[valid], return_inverse=True)
    return bootstrap_share(np.bincount(number, weights=won), np.bincount(number))


def reliability(margin: np.ndarray, share: np.ndarray | None = None, bins: int = 10) -> Reliability:
    """
    Return the reliability curve of sigmoid(margin) as a predictor of the share of raters who agree, with its expected
    calibration error.

    Each comparison is seen from the side that the reward prefers, so predictions lie between 1/2 and 1: the predicted
    share is sigmoid(|margin|), the observed one the share of raters who prefer that side too. The error is the mean
    over the comparisons of |mean predicted - mean observed| of their bin (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Args:
        margin (`np.ndarray` of shape `(M,)`): see the head of this module; NaN is dropped.
        share (`np.ndarray` of shape `(M,)`, *optional*): share of raters who prefer what most people prefer; NaN, or
            without it, 1: the comparison is one person's choice.
        bins (`int`): number of bins of equal width.
    """
    share = np.ones(len(margin)) if share is None else np.where(np.isnan(share), 1.0, share)
    valid = ~np.isnan(margin)
    margin, share = margin[valid], share[valid]
    predicted = 1 / (1 + np.exp(-np.abs(margin)))
    # Without a preference of the reward both sides are right to say 1/2
    observed = np.where(margin > 0, share, np.where(margin < 0, 1 - share, 0.5))
    place = np.minimum((2 * (predicted - 0.5) * bins).astype(int), bins - 1)
    found = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            found.append(
                ReliabilityBin(
                    low=0.5 + 0.5 * number / bins,
                    high=0.5 + 0.5 * (number + 1) / bins,
                    n=int(inside.sum()),
                    predicted=float(predicted[inside].mean()),
                    observed=float(observed[inside].mean()),
                )
            )
    total = sum(one.n for one in found)
    error = sum(one.n * abs(one.predicted - one.observed) for one in found)
    return Reliability(ece=error / total if total else np.nan, bins=found)


def length_slices(chosen: np.ndarray, rejected: np.ndarray, like: float = 0.1) -> dict[str, np.ndarray]:
    """
    Return which comparisons have a longer, a like or a shorter completion as the preferred one, shape `(M,)` each.
    Lengths are alike if they differ by no more than `like` of the longer one.
    """
    alike = np.abs(chosen - rejected) <= like * np.maximum(chosen, rejected)
    return {
        "like length": alike,
        "preferred one longer": ~alike & (chosen > rejected),
        "preferred one shorter": ~alike & (chosen < rejected),
    }


def rating_gap_slices(gap: np.ndarray, above: Sequence[float] | None = None) -> dict[str, np.ndarray]:
    """
    Return the comparisons by rating gap, shape `(M,)` each: with a gap above each number of `above`, or in three parts
    of about equal size. Empty where no gap is known, or all are the same.
    """
    known = gap[~np.isnan(gap)]
    if len(np.unique(known)) < 2:
        return {}
    if above is not None:
        return {f"gap above {limit:g}": gap > limit for limit in above}
    low, high = np.quantile(known, [1 / 3, 2 / 3])
    parts = {f"gap up to {low:.2g}": gap <= low}
    if low < high:
        parts[f"gap {low:.2g} to {high:.2g}"] = (gap > low) & (gap <= high)
    return parts | {f"gap above {high:.2g}": gap > high}


def share_slices(share: np.ndarray) -> dict[str, np.ndarray]:
    """Return the comparisons by the share of raters who agree, shape `(M,)`; empty where it is unknown or always 1."""
    if not (share < 1).any():
        return {}
    return {
        "less than 75 % of raters agree": share < 0.75,
        "75 % to 95 % of raters agree": (share >= 0.75) & (share <= 0.95),
        "more than 95 % of raters agree": share > 0.95,
    }


def top_one(
    scores: np.ndarray,
    completions: Sequence[Sequence[int]],
    better: Sequence[Collection[int]],
    worse: Sequence[Collection[int]],
) -> Estimate:
    """
    Return the share of rows with three or more compared completions in which the one with the highest score is one
    that people prefer no other one to (the measure of RewardBench 2, arXiv 2506.01937). Several with the highest score
    count by their share.

    Args:
        scores (`np.ndarray` of shape `(N,)`): scores of all completions.
        completions (`Sequence` of length `R`): indices of each row's completions.
        better, worse (`Sequence` of length `R`): those that win, and that lose, one of its comparisons.
    """
    hits = []
    for indices, winners, losers in zip(completions, better, worse, strict=True):
        compared = [i for i in indices if i in winners or i in losers]
        if len(compared) < 3 or np.isnan(scores[compared]).any():
            continue
        highest = [i for i in compared if scores[i] == scores[compared].max()]
        hits.append(np.mean([i not in losers for i in highest]))
    return bootstrap_mean(np.array(hits)) if len(hits) > 1 else Estimate(*[np.nan] * 3)


def within(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return values minus the mean of their group, shape `(N,)`."""
    _, number = np.unique(groups, return_inverse=True)
    return values - (np.bincount(number, weights=values) / np.bincount(number))[number]


def quantile_curve(x: np.ndarray, y: np.ndarray, parts: int = 8) -> list[QuantilePoint]:
    """
    Return the mean `x` and the quartiles of `y`, both of shape (N,), in each of `parts` parts of about equal size in
    the order of `x`. Equal `x` are never parted.
    """
    edges = np.unique(np.quantile(x, np.linspace(0, 1, parts + 1)[1:-1])) if len(x) else []
    found = []
    for number in range(len(edges) + 1):
        inside = np.searchsorted(edges, x, side="left") == number
        if inside.any():
            low, middle, high = np.quantile(y[inside], [0.25, 0.5, 0.75]).tolist()
            point = QuantilePoint(x=float(x[inside].mean()), y=middle, low=low, high=high, n=int(inside.sum()))
            found.append(point)
    return found


def rater_ceiling(
    ratings: Sequence[Sequence[float]],
    better: np.ndarray,
    worse: np.ndarray,
    draws: int = 20,
    seed: int = 0,
) -> RaterCeiling | None:
    """
    Measure how well raters predict each other, which a reward can't be expected to exceed by much.

    One rater of each completion is drawn and compared with the mean of its others; and the raters of each completion
    are split into two halves. The results are means over the draws.

    Args:
        ratings (`Sequence` of length `N`): numbers that the raters of each completion gave; completions with fewer
            than two are dropped.
        better, worse (`np.ndarray` of shape `(M,)`): indices of the completions of each comparison.
        draws (`int`), seed (`int`): how often raters are drawn, and from which seed.

    Returns:
        [`~rlhf_trl.runs.reward_results.RaterCeiling`] or `None`: `accuracy` is how often some raters put two
        completions into the order of the others (a tie counts half), `spearman_brown` the correlation between means
        of all raters, 2 r / (1 + r). `None` with fewer than three completions that have two raters.
    """
    usable = np.array([len(each) > 1 for each in ratings], dtype=bool)
    if usable.sum() < 3:
        return None
    random = np.random.default_rng(seed)
    pairs = usable[better] & usable[worse]
    one_rater, halves = [], []
    for _ in range(draws):
        sides = np.full((4, len(ratings)), np.nan)
        for i in np.flatnonzero(usable).tolist():
            drawn = random.permutation(np.asarray(ratings[i], dtype=float))
            half = len(drawn) // 2
            sides[:, i] = drawn[0], drawn[1:].mean(), drawn[:half].mean(), drawn[half:].mean()
        for found, (some, others) in ((one_rater, sides[:2]), (halves, sides[2:])):
            found.append(
                (
                    pearson(some[usable], others[usable]),
                    spearman(some[usable], others[usable]),
                    _same_order(some, others, better[pairs], worse[pairs]),
                )
            )
    names = ("pearson", "spearman", "accuracy")
    one, half = (dict(zip(names, np.mean(each, axis=0).tolist(), strict=True)) for each in (one_rater, halves))
    r = half["pearson"]
    return RaterCeiling(
        completions=int(usable.sum()),
        comparisons=int(pairs.sum()),
        raters=float(np.mean([len(each) for each, use in zip(ratings, usable, strict=True) if use])),
        one_rater=RaterPrediction(**one),
        half=HalfPrediction(**half, spearman_brown=2 * r / (1 + r) if r > -1 else np.nan),
    )


def _same_order(some: np.ndarray, others: np.ndarray, better: np.ndarray, worse: np.ndarray) -> float:
    """Return how often `some` order two completions as `others` do, of those that these see as different."""
    truth = others[better] - others[worse]
    guess = np.sign(some[better] - some[worse]) * np.sign(truth)
    differ = truth != 0
    return (0.5 + 0.5 * guess[differ]).mean() if differ.any() else np.nan


def best_of_n_gains(scores: np.ndarray, gold: np.ndarray, prompts: np.ndarray, max_n: int = 64) -> list[BestOfNGain]:
    """
    Return what choosing the best of n completions by score gains in gold reward over one completion.

    Args:
        scores, gold (`np.ndarray` of shape `(N,)`): scores and gold rewards; completions with NaN are dropped.
        prompts (`np.ndarray` of shape `(N,)`): number of each completion's prompt.
        max_n (`int`): n is 1, 2, 4 ... up to this, as far as a prompt has as many completions.

    Returns:
        `list[BestOfNGain]`: one per n, with intervals over prompts.
    """
    valid = np.isfinite(scores) & np.isfinite(gold)
    scores, gold, prompts = scores[valid], gold[valid], prompts[valid]
    groups = [np.flatnonzero(prompts == prompt) for prompt in np.unique(prompts)]
    found, n = [], 1
    while n <= max_n and any(len(group) >= n for group in groups):
        large = [group for group in groups if len(group) >= n]
        # One is no choice: no gain, not the rounding of one
        gains = [
            [
                best_of_n(by[group][None], gold[group][None], n)[0] - gold[group].mean() if n > 1 else 0.0
                for group in large
            ]
            for by in (scores, gold)
        ]
        gain, best = (bootstrap_share(np.array(each), np.ones(len(each))) for each in gains)
        found.append(BestOfNGain(n=n, prompts=len(large), kl=best_of_n_kl(n), gain=gain, best_gain=best))
        n *= 2
    return found


def disagreement(members: np.ndarray, better: np.ndarray, worse: np.ndarray, rows: np.ndarray) -> Disagreement:
    """
    Measure how much the members of an ensemble differ, and whether they err where they do.

    Args:
        members (`np.ndarray` of shape `(E, N)`): scores of each member, E at least 2.
        better, worse, rows (`np.ndarray` of shape `(M,)`): indices of each comparison's completions, and its row.
    """
    margins = members[:, better] - members[:, worse]
    spread = margins.std(axis=0, ddof=1)
    known = ~np.isnan(spread)
    order = np.argsort(spread[known], kind="stable")
    parts = np.array_split(np.flatnonzero(known)[order], 3)
    mean = margins.mean(axis=0)
    return Disagreement(
        std=float(np.nanmean(members.std(axis=0, ddof=1))),
        margin_std=float(np.nanmean(spread)),
        members=[accuracy(margin, rows) for margin in margins],
        slices=[
            DisagreementSlice(
                margin_std=float(spread[part].mean()), n=len(part), accuracy=accuracy(mean[part], rows[part])
            )
            for part in parts
            if len(part)
        ],
    )
