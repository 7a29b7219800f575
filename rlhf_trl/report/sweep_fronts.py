"""Fronts of the settings of a sweep by the held-out means of several rewards (`sweep=pareto`)."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhf_trl.report.fronts import FrontOptions, Points, blocks_of, front_of, volume_of
from rlhf_trl.report.records import metric_names
from rlhf_trl.report.seeds import Setting, estimate_of, is_seed, settings_of, value_of
from rlhf_trl.runs.results import Estimate, Front, SweepJob

MEAN = re.compile(r"eval_rewards/(.+)/mean")
WEIGHT = re.compile(r"reward\.(.+)\.weight")
CONSTRAINTS = "combine.constraints"


@dataclass(frozen=True)
class SweepFront:
    """
    Settings of a sweep by several rewards.

    Attributes:
        front: the front, its policies named by their settings.
        points: means of the rewards by setting, with intervals over seeds.
        seeds: number of seeds of which the hypervolume is a mean.
    """

    front: Front
    points: Points
    seeds: int

    @property
    def blocks(self) -> list:
        """Blocks of the page."""
        with_seeds = f"Bars are 95 % Student intervals over {self.seeds} seeds."
        with_one = "With one seed there are no intervals; `stage=evaluate stage.sweeps=[...]` has those over prompts."
        intervals = with_seeds if self.seeds > 1 else with_one
        return blocks_of(self.front, self.points, dict.fromkeys(self.points, "settings"), intervals)

    @property
    def in_words(self) -> str:
        """The result in a few sentences."""
        names = " and ".join(self.front.rewards)
        chosen = f" Chosen: {self.front.chosen}, {self.front.rule}." if self.front.chosen else ""
        return f"{len(self.front.policies)} of {len(self.points)} settings are non-dominated by {names}.{chosen}"


def front_of_jobs(
    jobs: Sequence[SweepJob],
    keys: Sequence[str],
    label: Callable[[Setting], str],
    options: FrontOptions | None = None,
) -> SweepFront | None:
    """
    Return the front of a sweep; `None` where no weight of a reward and no constraint differs, or fewer than two
    rewards that count were measured on held-out prompts.

    Args:
        jobs (`Sequence[SweepJob]`), keys (`Sequence[str]`): the jobs, and the overrides in which they differ.
        label (callable): name of a setting.
        options ([`~rlhf_trl.report.fronts.FrontOptions`], *optional*): reference point, and how to choose.
    """
    done = [job for job in jobs if job.done]
    metrics = [
        name
        for name in metric_names(jobs)
        if (match := MEAN.fullmatch(name))
        and all(name in job.eval for job in done)
        and not _is_only_watched(jobs, match[1])
    ]
    if len(metrics) < 2 or not any(WEIGHT.fullmatch(key) or key.startswith(CONSTRAINTS) for key in keys):
        return None
    rewards = [MEAN.sub(r"\1", name) for name in metrics]
    settings = {reward: settings_of(jobs, metric) for reward, metric in zip(rewards, metrics, strict=True)}
    names = [label(setting) for setting in settings[rewards[0]]]
    points = {
        name: {reward: estimate_of(found[i], found) for reward, found in settings.items()}
        for i, name in enumerate(names)
    }
    means = np.array([[found[i].mean for found in settings.values()] for i in range(len(names))])
    front = front_of(means, names, rewards, _minimized(jobs, rewards), options or FrontOptions())
    groups = settings[rewards[0]]
    failed = {
        f"job {job.number} ({name})": job.status
        for name, setting in zip(names, groups, strict=True)
        for job in setting.jobs
        if not job.done
    }
    volumes = [volume_of(each, front) for each in _by_seed(groups, metrics)]
    known = {name: why for name, why in front.missing.items() if not any(f"({name})" in job for job in failed)}
    return SweepFront(
        replace(front, hypervolumes={"": _over_seeds(volumes, volume_of(means, front))}, missing=known | failed),
        points,
        len(volumes),
    )


def _minimized(jobs: Sequence[SweepJob], rewards: Sequence[str]) -> list[str]:
    """Return the rewards with a negative weight, or an upper bound, in any job."""
    return [
        name
        for name in rewards
        if any(weight < 0 for weight in _weights(jobs, name)) or any("<=" in bound for bound in _bounds(jobs, name))
    ]


def _is_only_watched(jobs: Sequence[SweepJob], reward: str) -> bool:
    """Return whether a reward has the weight 0 in all jobs, and no bound in any."""
    weights = _weights(jobs, reward)
    return bool(weights) and not any(weights) and not _bounds(jobs, reward)


def _weights(jobs: Sequence[SweepJob], reward: str) -> list[float]:
    """Return the weight of a reward in each job that has one: its override, else that of the config."""
    found = (job.overrides.get(f"reward.{reward}.weight", job.weights.get(reward)) for job in jobs)
    return [float(weight) for weight in found if weight is not None]


def _bounds(jobs: Sequence[SweepJob], reward: str) -> list[str]:
    """Return the bounds that constraints of the jobs set a reward, as text."""
    overrides = [
        f"{key}:{value}" for job in jobs for key, value in job.overrides.items() if key.startswith(CONSTRAINTS)
    ]
    bound = re.compile(rf"\b{re.escape(reward)}\b[^,}}]*[<>]=[^,}}]*")
    return [each for text in overrides for each in bound.findall(text)]


def _by_seed(settings: Sequence[Setting], metrics: Sequence[str]) -> list[np.ndarray]:
    """Return the rewards of all settings, shape (settings, rewards), of each seed that every setting has."""
    rows: list[dict[tuple, list[float]]] = []
    for setting in settings:
        rows.append({})
        for job in setting.jobs:
            values = [value_of(job, metric) for metric in metrics]
            if all(value is not None for value in values):
                seed = tuple(sorted((k, v) for k, v in job.overrides.items() if is_seed(k)))
                rows[-1][seed] = [float(value) for value in values if value is not None]
    rows = [row for row in rows if row]  # a setting whose jobs all failed is on no front
    shared = [seed for seed in (rows[0] if rows else ()) if all(seed in row for row in rows)]
    return [np.array([row[seed] for row in rows]) for seed in shared]


def _over_seeds(volumes: Sequence[float], of_means: float) -> Estimate:
    """Return the mean over seeds with its t interval; where no seed is in all settings, that of the means."""
    setting = Setting({}, [], list(volumes))
    return estimate_of(setting, [setting]) or Estimate(of_means, math.nan, math.nan)
