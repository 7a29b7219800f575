"""Measures of a comparison of policies that its tables, figures and verdicts share."""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from rlhf_trl.report.plots import PALETTE
from rlhf_trl.report.text import number
from rlhf_trl.runs.results import Comparison, Estimate, PolicyDifference, PolicyResult

# The last colors are those of the best-of-n curves
POLICY_COLORS = len(PALETTE) - 2


def known(comparison: Comparison) -> Comparison:
    """Return the comparison with `None` in place of estimates without a mean, which could not be made."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            is_unknown = "mean" in value and value["mean"] is None
            return None if is_unknown else {key: without(item) for key, item in value.items()}
        return [without(item) for item in value] if isinstance(value, list) else value

    return Comparison.from_json(without(comparison.to_json()))


def kl_of(comparison: Comparison, name: str) -> float:
    """Return the KL of a policy to the baseline, NaN where it is unknown."""
    kl = comparison.policies[name].kl
    return kl.mean if kl else 0.0 if name == comparison.baseline else float("nan")


def is_rewarded(comparison: Comparison) -> bool:
    """Return whether a reward counts in a comparison; where none does, a judge alone compares."""
    return any(comparison.weights.values())


def base_of(comparison: Comparison, reward: str) -> tuple[float | None, float | None]:
    """Return mean and standard deviation of a reward over the baseline's answers; `""` is the combined reward."""
    if reward:
        return comparison.base.rewards[reward], comparison.base.reward_std[reward]
    rewards = [sample.rewards[comparison.baseline] for sample in comparison.samples]
    values = [value for value in rewards if value is not None]
    return (float(np.mean(values)), float(np.std(values))) if values else (None, None)


def gain_of(comparison: Comparison, result: PolicyResult, reward: str) -> float | None:
    """Return what a policy gained by a reward, in standard deviations of the baseline's answers."""
    value = result.rewards[reward] if reward else part_of(result.reward, "mean")
    return scaled(value, *base_of(comparison, reward))


def scaled(value: float | None, mean: float | None, std: float | None) -> float | None:
    """Return a value in standard deviations; `None` where one of the three is missing, or nothing varies."""
    return None if value is None or mean is None or not std else (value - mean) / std


def part_of(estimate: Estimate | None, part: str) -> float | None:
    """Return the mean, or an end of the interval, of an estimate; `None` where it could not be made."""
    return None if estimate is None else getattr(estimate, part)


def has_interval(estimate: Estimate | None) -> bool:
    """Return whether an estimate has an interval: that of a single value has none."""
    return estimate is not None and np.isfinite(estimate.low) and np.isfinite(estimate.high)


def among(estimate: Estimate, count: int) -> Estimate:
    """
    Return one of `count` estimates with the interval that holds for all of them together (Bonferroni), from its own of
    95 % as of a normal distribution: for what is picked out because it is extreme.
    """
    normal = NormalDist()
    factor = normal.inv_cdf(1 - 0.025 / count) / normal.inv_cdf(0.975)
    mean, low, high = estimate
    return Estimate(mean, mean + factor * (low - mean), mean + factor * (high - mean))


def share(value: float | None) -> str:
    """Return a share in percent, an empty text for `None`."""
    return number(value, "{:.0%}")


def names_in_words(names: Sequence[str]) -> str:
    """Return names with an `and` before the last."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def policy_colors(comparison: Comparison) -> dict[str, int]:
    """Return the color of each policy, the same in every figure; checkpoints and runs of a sweep share theirs."""
    found: dict[str, int] = {}
    for name, result in comparison.policies.items():
        found.setdefault(result.family or name, len(found) % POLICY_COLORS)
    return {name: found[result.family or name] for name, result in comparison.policies.items()}


def curve_color(place: int) -> int:
    """Return the color of a best-of-n curve, none of the policies'."""
    return len(PALETTE) - 1 - place % (len(PALETTE) - POLICY_COLORS)


class BesideBestOfN(NamedTuple):
    """
    A policy beside the best of n samples of the baseline, which needs no training.

    Attributes:
        by: reward that chooses the samples; the combined reward if empty.
        difference: reward of the policy minus that of best-of-n at the policy's KL; `None` where the KL is beyond the
            largest n.
        as_good_as: smallest n whose reward is at least the policy's; `None` if no measured one is.
        largest: largest n that was measured.
    """

    by: str
    difference: Estimate | None
    as_good_as: int | None
    largest: int

    @property
    def is_below(self) -> bool:
        """True where best-of-n has more reward for the same KL, beyond chance."""
        return self.difference is not None and self.difference.high < 0

    @property
    def rank(self) -> str:
        """The n that has as much reward, in words."""
        return f"n = {self.as_good_as}" if self.as_good_as else f"more than n = {self.largest}"


def beside_best_of_n(comparison: Comparison, name: str) -> BesideBestOfN | None:
    """
    Return a policy beside best-of-n, chosen by what the policies were trained on where that was measured; `None` where
    one of the two is unknown. Between two n the reward is taken as linear in the root of the KL (Gao et al. 2023,
    arXiv 2210.10760), as the figure draws it. The interval is that of [`minus`], and leaves out the error of the
    policy's KL.
    """
    result = comparison.policies[name]
    if not comparison.curves or not result.kl or not result.reward:
        return None
    curve = comparison.curves[-1]
    points = [(point.n, point.kl, point.reward) for point in curve.points if point.reward]
    if not points:
        return None
    sizes, kls, rewards = zip(*points, strict=True)
    as_good = next((n for n, _, reward in points if reward.mean >= result.reward.mean), None)
    difference = None
    if result.kl.mean <= kls[-1]:
        at = max(result.kl.mean, 0.0)  # an estimate of a small KL may be below 0
        mean, low, high = (np.interp(np.sqrt(at), np.sqrt(kls), [reward[i] for reward in rewards]) for i in range(3))
        difference = minus(result.reward, Estimate(float(mean), float(low), float(high)))
    return BesideBestOfN(curve.by, difference, as_good, sizes[-1])


def difference_of(comparison: Comparison, one: str, other: str) -> Estimate | None:
    """Return the reward of one policy minus that of another on the same prompts; `None` where it wasn't measured."""
    return _paired(comparison, one, other, lambda result: result.difference, lambda found: found.difference)


def wins_of(comparison: Comparison, one: str, other: str) -> Estimate | None:
    """
    Return the win rate of one policy against the baseline minus that of another, on the same prompts; that of the
    baseline against itself is 0.5. `None` where it wasn't measured.
    """

    def over_half(result: PolicyResult) -> Estimate | None:
        return None if result.win_rate is None else Estimate(*(end - 0.5 for end in result.win_rate))

    return _paired(comparison, one, other, over_half, lambda found: found.wins)


def advantage_of(comparison: Comparison, one: str, other: str) -> Estimate | None:
    """
    Return what tells whether one policy is better than another, above 0 if it is: the difference in reward; where no
    reward counts, that in win rates. `None` where it wasn't measured.
    """
    return (difference_of if is_rewarded(comparison) else wins_of)(comparison, one, other)


def minus(one: Estimate, other: Estimate) -> Estimate:
    """
    Return the difference of two means. Its interval takes both errors as independent: on the same prompts it is too
    wide rather than too narrow.
    """
    gap, half = one.mean - other.mean, float(np.hypot(one.high - one.low, other.high - other.low)) / 2
    return Estimate(gap, gap - half, gap + half)


def _paired(
    comparison: Comparison,
    one: str,
    other: str,
    to_baseline: Callable[[PolicyResult], Estimate | None],
    between: Callable[[PolicyDifference], Estimate | None],
) -> Estimate | None:
    if other == comparison.baseline:
        return to_baseline(comparison.policies[one])
    if one == comparison.baseline:
        return _negative(to_baseline(comparison.policies[other]))
    for found in comparison.differences:
        if (found.one, found.other) == (one, other):
            return between(found)
        if (found.one, found.other) == (other, one):
            return _negative(between(found))
    return None


def _negative(estimate: Estimate | None) -> Estimate | None:
    return None if estimate is None else Estimate(-estimate.mean, -estimate.high, -estimate.low)
