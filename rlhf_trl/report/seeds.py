"""Averages of a sweep's jobs over their seeds, and which of them differ beyond the noise of the seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rlhf_trl.runs.results import Estimate, SweepJob

SEEDS = ("seed", "data_seed")  # last parts of the keys that only seeds are set by
LEVEL = 0.95


@dataclass(frozen=True)
class Setting:
    """
    Jobs that differ in nothing but their seeds.

    Attributes:
        overrides: what they have in common.
        jobs: all of them, failed ones too.
        values: the metric of those that measured it.
    """

    overrides: dict[str, str]
    jobs: list[SweepJob]
    values: list[float]

    @property
    def mean(self) -> float:
        """Mean over the seeds; NaN where nothing was measured."""
        return fmean(self.values) if self.values else math.nan


def is_seed(key: str) -> bool:
    """Return whether an override sets a seed."""
    return key.rsplit(".", 1)[-1] in SEEDS


def settings_of(jobs: Sequence[SweepJob], metric: str | None) -> list[Setting]:
    """Return the settings of a sweep in the order of their first jobs, with their values of a metric."""
    found: dict[tuple, list[SweepJob]] = {}
    for job in jobs:
        found.setdefault(tuple((k, v) for k, v in sorted(job.overrides.items()) if not is_seed(k)), []).append(job)
    return [
        Setting(dict(common), group, [value for job in group if (value := value_of(job, metric)) is not None])
        for common, group in found.items()
    ]


def value_of(job: SweepJob, metric: str | None) -> float | None:
    """Return a metric of a job, `None` where it is not done or didn't measure it: jobs may have other objectives."""
    if not job.done or metric is None:
        return None
    value = job.value if job.objective == metric else job.eval.get(metric)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def spread(settings: Sequence[Setting]) -> tuple[float, int]:
    """
    Return the standard deviation over seeds, one for all settings, and its degrees of freedom.

    Two or three seeds tell little of a setting's own spread, so it is pooled as in an analysis of variance; with one
    seed per setting there are 0 degrees of freedom, and nothing is known.
    """
    squares = sum((value - setting.mean) ** 2 for setting in settings for value in setting.values)
    freedom = sum(len(setting.values) - 1 for setting in settings if setting.values)
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


def estimate_of(setting: Setting, settings: Sequence[Setting]) -> Estimate | None:
    """Return the mean of a setting with its 95 % t interval over seeds; NaN as its ends where the noise is unknown."""
    if not setting.values:
        return None
    std, freedom = spread(settings)
    half = t_quantile(1 - (1 - LEVEL) / 2, freedom) * std / math.sqrt(len(setting.values)) if freedom else math.nan
    return Estimate(setting.mean, setting.mean - half, setting.mean + half)


def contenders(settings: Sequence[Setting], lower_is_better: bool) -> list[Setting]:
    """
    Return the best setting and those that can't be told from it by their seeds, the best first.

    The differences to the best are tested at 5 % together (Bonferroni over the other settings). Where no setting has
    two seeds, none can be told from another.
    """
    known = sorted((each for each in settings if each.values), key=lambda each: each.mean, reverse=not lower_is_better)
    std, freedom = spread(known)
    if not freedom or len(known) < 2:
        return known
    best, others = known[0], known[1:]
    limit = t_quantile(1 - (1 - LEVEL) / 2 / len(others), freedom) * std
    near = [
        each
        for each in others
        if abs(each.mean - best.mean) <= limit * math.sqrt(1 / len(each.values) + 1 / len(best.values))
    ]
    return [best, *near]


def t_quantile(p: float, freedom: int) -> float:
    """
    Return the quantile `p` (above .5) of Student's t distribution with an integer number of degrees of freedom, by
    bisection of its distribution function (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1.0
    while _t_distribution(high, freedom) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_distribution(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def _t_distribution(t: float, freedom: int) -> float:
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    is_odd = freedom % 2
    term, total = (cosine if is_odd else 1.0), 0.0
    for k in range(2 if is_odd else 1, freedom, 2):
        total += term
        term *= k / (k + 1) * cosine**2
    inside = 2 / math.pi * (theta + sine * total) if is_odd else sine * total
    return (1 + inside) / 2
