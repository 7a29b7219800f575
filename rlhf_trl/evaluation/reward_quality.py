"""
How good the scores of a reward are, beside what people said: pure functions on numpy arrays.

N completions, M comparisons between two of them. `lead` is the score of the completion that people prefer less the
score of the other one; NaN where one of them has no score.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_trl.evaluation.statistics import (
    Estimate,
    best_of_n,
    best_of_n_kl,
    bootstrap_mean,
    bootstrap_share,
    pearson,
    spearman,
)


def accuracy(lead: np.ndarray, rows: np.ndarray) -> Estimate:
    """
    Share of comparisons with a lead above 0; a lead of 0 counts half, NaN doesn't count.

    Args:
        lead (`np.ndarray` of shape `(M,)`): see the head of this module.
        rows (`np.ndarray` of shape `(M,)`): which row of the data a comparison is from: the interval draws rows.
    """
    valid = ~np.isnan(lead)
    won = (lead[valid] > 0) + 0.5 * (lead[valid] == 0)
    _, number = np.unique(rows[valid], return_inverse=True)
    return bootstrap_share(np.bincount(number, weights=won), np.bincount(number))


class Calibration(NamedTuple):
    """
    Whether sigmoid(lead) is the share of raters who agree.

    `ece` is the expected calibration error; `bins` has, for each bin that isn't empty, `low` and `high` (its ends),
    `n`, `predicted` and `observed` (the means in it).
    """

    ece: float
    bins: list[dict[str, float]]


def calibration(lead: np.ndarray, share: np.ndarray | None = None, bins: int = 10) -> Calibration:
    """
    Each comparison is seen from the side that the reward prefers, so predictions lie between 1/2 and 1: the predicted
    share is sigmoid(|lead|), the observed one the share of raters who prefer that side too. The error is the mean over
    the comparisons of |mean predicted - mean observed| of their bin (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Args:
        lead (`np.ndarray` of shape `(M,)`): see the head of this module; NaN is left out.
        share (`np.ndarray` of shape `(M,)`, *optional*): share of raters who prefer what most people prefer; NaN, or
            without it, 1: the comparison is one person's choice.
        bins (`int`): of equal width.
    """
    share = np.ones(len(lead)) if share is None else np.where(np.isnan(share), 1.0, share)
    valid = ~np.isnan(lead)
    lead, share = lead[valid], share[valid]
    predicted = 1 / (1 + np.exp(-np.abs(lead)))
    # Without a preference of the reward both sides are right to say 1/2
    observed = np.where(lead > 0, share, np.where(lead < 0, 1 - share, 0.5))
    place = np.minimum((2 * (predicted - 0.5) * bins).astype(int), bins - 1)
    found = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            found.append(
                {
                    "low": 0.5 + 0.5 * number / bins,
                    "high": 0.5 + 0.5 * (number + 1) / bins,
                    "n": int(inside.sum()),
                    "predicted": float(predicted[inside].mean()),
                    "observed": float(observed[inside].mean()),
                }
            )
    total = sum(one["n"] for one in found)
    error = sum(one["n"] * abs(one["predicted"] - one["observed"]) for one in found)
    return Calibration(error / total if total else np.nan, found)


def length_slices(chosen: np.ndarray, rejected: np.ndarray, like: float = 0.1) -> dict[str, np.ndarray]:
    """
    Which comparisons have a longer, a like or a shorter completion as the preferred one, shape `(M,)` each. Lengths
    are alike if they differ by no more than `like` of the longer one.
    """
    alike = np.abs(chosen - rejected) <= like * np.maximum(chosen, rejected)
    return {
        "like length": alike,
        "preferred one longer": ~alike & (chosen > rejected),
        "preferred one shorter": ~alike & (chosen < rejected),
    }


def gap_slices(gap: np.ndarray, above: Sequence[float] | None = None) -> dict[str, np.ndarray]:
    """
    Comparisons by how far apart people see the two, shape `(M,)` each: with a gap above each number of `above`, or in
    three parts of about equal size. Empty where no gap is known, or all are the same.
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
    """Comparisons by the share of raters who agree, shape `(M,)` each; empty where it isn't known, or always 1."""
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
    better: Sequence[Sequence[int]],
    worse: Sequence[Sequence],
) -> Estimate:
    """
    Share of rows with three or more compared completions of which the one with the highest score is one that people
    prefer no other one to (the measure of RewardBench 2, arXiv 2506.01937). Several with the highest score count by
    their share.

    Args:
        scores (`np.ndarray` of shape `(N,)`): of all completions.
        completions, better, worse: of each row, the indices of its completions, and of each of its comparisons.
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
    """Values less the mean of their group, shape `(N,)`."""
    _, number = np.unique(groups, return_inverse=True)
    return values - (np.bincount(number, weights=values) / np.bincount(number))[number]


def in_parts(x: np.ndarray, y: np.ndarray, parts: int = 8) -> list[dict[str, float]]:
    """
    How `y` goes with `x`, both of shape (N,): of each of `parts` parts of about equal size in the order of `x`, its
    mean `x`, and median and quartiles of `y` (`y`, `low`, `high`). Equal `x` are never parted.
    """
    edges = np.unique(np.quantile(x, np.linspace(0, 1, parts + 1)[1:-1])) if len(x) else []
    found = []
    for number in range(len(edges) + 1):
        inside = np.searchsorted(edges, x, side="left") == number
        if inside.any():
            low, middle, high = np.quantile(y[inside], [0.25, 0.5, 0.75]).tolist()
            found.append({"x": float(x[inside].mean()), "y": middle, "low": low, "high": high, "n": int(inside.sum())})
    return found


def rater_ceiling(
    ratings: Sequence[Sequence[float]],
    better: np.ndarray,
    worse: np.ndarray,
    draws: int = 20,
    seed: int = 0,
) -> dict[str, Any] | None:
    """
    How well people predict each other: what a reward can't be expected to exceed by much.

    One rater of each completion is drawn and held beside the mean of its others; and the raters of each completion are
    parted into two halves. Means over the draws.

    Args:
        ratings (`Sequence` of length `N`): of each completion the numbers its raters gave; those with fewer than two
            are left out.
        better, worse (`np.ndarray` of shape `(M,)`): indices of the completions of each comparison.
        draws (`int`), seed (`int`): how often raters are drawn, and from which seed.

    Returns:
        `dict`: `completions` and `comparisons` (how many were used), `raters` (mean number a completion); `one_rater`:
            `pearson`, `spearman` of one rater with the mean of the others, and `accuracy`, how often one rater of each
            of two completions puts them into the order of the others (a tie counts half); `half`: the same of one half
            of the raters with the other, and `spearman_brown`, what the correlation would be between means of all
            raters, 2 r / (1 + r). None with fewer than three completions that have two raters.
    """
    usable = np.array([len(each) > 1 for each in ratings], dtype=bool)
    if usable.sum() < 3:
        return None
    random = np.random.default_rng(seed)
    pairs = usable[better] & usable[worse]
    found = {"one_rater": [], "half": []}
    for _ in range(draws):
        sides = np.full((4, len(ratings)), np.nan)
        for i in np.flatnonzero(usable).tolist():
            drawn = random.permutation(np.asarray(ratings[i], dtype=float))
            half = len(drawn) // 2
            sides[:, i] = drawn[0], drawn[1:].mean(), drawn[:half].mean(), drawn[half:].mean()
        for name, (some, others) in zip(found, (sides[:2], sides[2:]), strict=True):
            truth = others[better[pairs]] - others[worse[pairs]]
            guess = np.sign(some[better[pairs]] - some[worse[pairs]]) * np.sign(truth)
            differ = truth != 0
            found[name].append(
                (
                    pearson(some[usable], others[usable]),
                    spearman(some[usable], others[usable]),
                    (0.5 + 0.5 * guess[differ]).mean() if differ.any() else np.nan,
                )
            )
    measures = ["pearson", "spearman", "accuracy"]
    means = {name: dict(zip(measures, np.mean(each, axis=0).tolist(), strict=True))
             for name, each in found.items()}  # fmt: skip
    half = means["half"]["pearson"]
    means["half"]["spearman_brown"] = 2 * half / (1 + half) if half > -1 else np.nan
    return {
        "completions": int(usable.sum()),
        "comparisons": int(pairs.sum()),
        "raters": float(np.mean([len(each) for each, use in zip(ratings, usable, strict=True) if use])),
        **means,
    }


def best_of_n_gains(scores: np.ndarray, gold: np.ndarray, prompts: np.ndarray, most: int = 64) -> list[dict[str, Any]]:
    """
    What choosing the best of n completions by score gains in gold reward over one completion.

    Args:
        scores, gold (`np.ndarray` of shape `(N,)`): of completions; those with NaN are left out.
        prompts (`np.ndarray` of shape `(N,)`): number of each completion's prompt.
        most (`int`): n is 1, 2, 4 ... up to this, as far as a prompt has as many completions.

    Returns:
        `list[dict]`: of each n `n`, `prompts` (with as many completions), `kl` (to the policy that the completions are
            from, log n - (n - 1) / n), and with intervals over prompts `gain`, and `best_gain` of choosing by the gold
            reward itself.
    """
    valid = np.isfinite(scores) & np.isfinite(gold)
    scores, gold, prompts = scores[valid], gold[valid], prompts[valid]
    groups = [np.flatnonzero(prompts == prompt) for prompt in np.unique(prompts)]
    found, n = [], 1
    while n <= most and any(len(group) >= n for group in groups):
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
        found.append(
            {"n": n, "prompts": len(large), "kl": best_of_n_kl(n), "gain": gain._asdict(), "best_gain": best._asdict()}
        )
        n *= 2
    return found


def disagreement(members: np.ndarray, better: np.ndarray, worse: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """
    How much the members of an ensemble differ, and whether it is where they err.

    Args:
        members (`np.ndarray` of shape `(E, N)`): scores of each member, E at least 2.
        better, worse, rows (`np.ndarray` of shape `(M,)`): indices of each comparison's completions, and its row.

    Returns:
        `dict`: `std` (of the members' scores of a completion, mean over completions), `lead_std` (of their leads, mean
            over comparisons), `members` (each one's accuracy), `slices` (accuracy of the members' mean in thirds of
            the comparisons by the standard deviation of their leads: the least disagreement first).
    """
    leads = members[:, better] - members[:, worse]
    spread = leads.std(axis=0, ddof=1)
    known = ~np.isnan(spread)
    order = np.argsort(spread[known], kind="stable")
    parts = np.array_split(np.flatnonzero(known)[order], 3)
    mean = leads.mean(axis=0)
    return {
        "std": float(np.nanmean(members.std(axis=0, ddof=1))),
        "lead_std": float(np.nanmean(spread)),
        "members": [accuracy(lead, rows)._asdict() for lead in leads],
        "slices": [
            {
                "lead_std": float(spread[part].mean()),
                "n": len(part),
                "accuracy": accuracy(mean[part], rows[part])._asdict(),
            }
            for part in parts
            if len(part)
        ],
    }
