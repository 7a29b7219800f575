"""Fronts of policies by several rewards: points, hypervolumes and a chosen policy, as data and as blocks of a page."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_trl.errors import ConfigError
from rlhf_trl.report import plots
from rlhf_trl.report.options import KNEE, front_problems
from rlhf_trl.report.page import Figure, Table
from rlhf_trl.report.pareto import hypervolume, knee, nondominated
from rlhf_trl.report.plots import Series
from rlhf_trl.report.text import front_note, front_rows, hypervolume_rows
from rlhf_trl.runs.results import Comparison, Estimate, Front

# Names and points: {policy: {reward: mean with its interval}}
Points = Mapping[str, Mapping[str, Estimate | None]]


@dataclass(frozen=True, kw_only=True)
class FrontOptions:
    """
    Options of a front.

    Attributes:
        rewards: names of the rewards; `None`: those that count.
        reference_point: where the hypervolume begins, by reward; `None`: at the worst mean of any policy.
        choose: `knee`, or weights of the rewards, of whose sum the highest is chosen.
    """

    rewards: Sequence[str] | None = None
    reference_point: Mapping[str, float] | None = None
    choose: str | Mapping[str, float] = KNEE

    def of(self, measured: Sequence[str], counted: Sequence[str]) -> list[str]:
        """
        Return the rewards of the front, none where fewer than two count.

        Args:
            measured (`Sequence[str]`): names of all rewards.
            counted (`Sequence[str]`): those of a weight other than 0.

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: if a reward that is named wasn't measured, or the front has but one.
        """
        if problems := front_problems(self.rewards, self.reference_point, self.choose, measured, counted):
            raise ConfigError.join(problems)
        chosen = list(counted if self.rewards is None else self.rewards)
        return chosen if len(chosen) > 1 else []


def front_of(
    means: np.ndarray,
    names: Sequence[str],
    rewards: Sequence[str],
    minimized: Sequence[str],
    options: FrontOptions,
    allowed: Sequence[bool] | None = None,
) -> Front:
    """
    Return the front of policies by the means of several rewards, without hypervolumes.

    Args:
        means (`np.ndarray` of shape `(policies, rewards)`): NaN where a policy has none of a reward.
        names (`Sequence[str]`), rewards (`Sequence[str]`): of the policies and of the rewards.
        minimized (`Sequence[str]`): rewards of which less is better.
        options ([`FrontOptions`]): reference point, and how to choose.
        allowed (`Sequence[bool]`, *optional*): which policies may be chosen: those that satisfy constraints.
    """
    means = np.round(means, 10)  # the same answers in another order of summation are equal
    gains = means * signs_of(rewards, minimized)
    best, is_known = nondominated(gains), np.asarray(np.isfinite(gains).all(axis=1))
    given = options.reference_point
    worst = gains[is_known].min(axis=0, initial=np.inf) * signs_of(rewards, minimized)
    point = {name: float(given[name] if given else value) for name, value in zip(rewards, worst, strict=True)}
    may = is_known & (np.ones(len(names), bool) if allowed is None else np.asarray(allowed, bool))
    chosen, rule = _chosen(gains, means, rewards, options, may, is_known)
    return Front(
        rewards=list(rewards),
        minimized=[name for name in rewards if name in minimized],
        reference_point=point,
        policies=[name for name, is_best in zip(names, best, strict=True) if is_best],
        chosen=None if chosen is None else names[chosen],
        rule=rule,
        missing={name: "no reward" for name, known in zip(names, is_known, strict=True) if not known},
    )


def signs_of(rewards: Sequence[str], minimized: Sequence[str]) -> np.ndarray:
    """Return 1 for a reward of which more is better, and -1 for one of which less is."""
    return np.array([-1.0 if name in minimized else 1.0 for name in rewards])


def volume_of(means: np.ndarray, front: Front) -> float:
    """Return the hypervolume of policies by the means of a front's rewards, shape `(policies, rewards)`."""
    signs = signs_of(front.rewards, front.minimized)
    return hypervolume(means * signs, signs * [front.reference_point[name] for name in front.rewards])


def _chosen(
    gains: np.ndarray,
    means: np.ndarray,
    rewards: Sequence[str],
    options: FrontOptions,
    may: np.ndarray,
    known: np.ndarray,
) -> tuple[int | None, str]:
    """Return the index of the chosen policy, and the rule in words."""
    among = "" if may.sum() == known.sum() else " of those that satisfy the constraints by their means"
    places = np.flatnonzero(may)
    if not len(places):
        return None, "no policy satisfies the constraints by its means"
    if isinstance(options.choose, str):
        place = knee(gains[places])
        if place is None:
            return None, f"there is no knee{among}: no policy lies beyond the line through the best by each reward"
        return int(places[place]), f"the knee{among}: farthest beyond the line through the best by each reward"
    weights = np.array([options.choose.get(name, 0.0) for name in rewards])
    words = " + ".join(f"{weight:g} x {name}" for name, weight in options.choose.items())
    return int(places[(means[places] @ weights).argmax()]), f"the highest {words}{among}"


# ---- Blocks of a page ----


def front_blocks(comparison: Comparison) -> list:
    """Return the policies by several rewards: a figure for each pair, the points and the hypervolumes; or nothing."""
    front = comparison.front
    if front is None:
        return []
    points = {name: result.reward_intervals for name, result in comparison.policies.items()}
    families = {name: result.family or name for name, result in comparison.policies.items()}
    return blocks_of(front, points, families, "Bars are 95 % bootstrap intervals over the prompts.")


def blocks_of(front: Front, points: Points, families: Mapping[str, str], intervals: str) -> list:
    """
    Return the blocks of a front.

    Args:
        front ([`~rlhf_trl.runs.results.Front`]), points (`Points`): the front, and each policy's rewards.
        families (`Mapping[str, str]`): name that a policy shares with the others of its color.
        intervals (`str`): what the intervals are, in a sentence.
    """
    note = "Filled: no other policy is as good in every reward and better in one, by the means."
    figures = [
        Figure(
            plots.frontier(
                _series(front, points, families, x, y), f"Front of {x} and {y}", _axis(front, x), _axis(front, y)
            ),
            f"Mean `{y}` against mean `{x}` of each policy. {note} {intervals}",
            wide=True,
        )
        for x, y in itertools.combinations(front.rewards, 2)
    ]
    headers, rows = front_rows(front, points)
    marked = [i for i, name in enumerate(points) if name in front.policies]
    table = Table(headers, rows, "Policies by their rewards.", marked=marked, note=f"Marked: {note[8:]} {intervals}")
    headers, rows = hypervolume_rows(front)
    volumes = Table(headers, rows, "Hypervolume: what the policies dominate.", note=front_note(front))
    return [*figures, table, volumes]


def _axis(front: Front, reward: str) -> str:
    return f"{reward} (less is better)" if reward in front.minimized else reward


def _series(front: Front, points: Points, families: Mapping[str, str], x: str, y: str) -> list[Series]:
    """Return a series for the non-dominated policies of each family, and one for its others."""
    series = []
    for place, family in enumerate(dict.fromkeys(families.values())):
        for is_best in (True, False):
            names = [
                name
                for name in points
                if families[name] == family and (name in front.policies) == is_best and points[name].get(x)
            ]
            found = [(points[name].get(x), points[name].get(y)) for name in names]
            if not found:
                continue
            across, up = zip(*found, strict=True)
            series.append(
                Series(
                    family,
                    x=[each and each.mean for each in across],
                    y=[each and each.mean for each in up],
                    low=[each and each.low for each in up],
                    high=[each and each.high for each in up],
                    left=[each and each.low for each in across],
                    right=[each and each.high for each in across],
                    labels=[name.removeprefix(f"{family.removesuffix('_sweep')} ") for name in names],
                    line=False,
                    hollow=not is_best,
                    color=place,
                )
            )
    return series
