"""Fronts of policies by several rewards, with bootstrap intervals over the prompts (`stage=evaluate`)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rlhf_trl.evaluation.judges import Answers
from rlhf_trl.hints import names_of
from rlhf_trl.report.fronts import FrontOptions, front_of, volume_of
from rlhf_trl.rewards.base import Reward
from rlhf_trl.runs.results import Estimate, Front, PolicyResult
from rlhf_trl.terminal import say

RESAMPLES = 1000


def front_rewards(rewards: Sequence[Reward], options: FrontOptions) -> dict[str, float]:
    """
    Return the rewards of the front with their weights; nothing where fewer than two count.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the options name another reward.
    """
    weights = {reward.__name__: reward.weight for reward in rewards}
    chosen = options.of(list(weights), [name for name, weight in weights.items() if weight])
    return {name: weights[name] for name in chosen}


def policy_front(
    answers: Mapping[str, Answers],
    results: Mapping[str, PolicyResult],
    rewards: Mapping[str, float],
    options: FrontOptions,
) -> Front | None:
    """
    Return the front of policies by the means of several rewards, with the hypervolume of all and of each family;
    `None`, with a warning, where no policy has a value of each of the rewards.

    Args:
        answers (`Mapping[str, Answers]`): completions of the same prompts with their rewards.
        results (`Mapping[str, PolicyResult]`): families, and whether the constraints are satisfied.
        rewards (`Mapping[str, float]`): weights by name; of a reward of negative weight less is better.
        options ([`~rlhf_trl.report.fronts.FrontOptions`]): reference point, and how to choose.
    """
    names = list(answers)
    values = np.stack([np.stack([each.rewards[name] for name in rewards], axis=-1) for each in answers.values()])
    there = np.asarray(np.isfinite(values).any(axis=1))  # (policies, rewards)
    if not there.all(axis=1).any():
        absent = [name for name, known in zip(rewards, there.T, strict=True) if not known.any()]
        why = f"`{absent[0]}` has no value" if absent else "no policy has a value of each"
        say(f"warning: no front of {names_of(rewards)}: {why}")
        return None
    minimized = [name for name, weight in rewards.items() if weight < 0]
    allowed = [
        all(each.excess is not None and each.excess <= 0 for each in results[name].constraints.values())
        for name in names
    ]
    counts = np.ones((1, values.shape[1]))
    front = front_of(_means(values, counts)[0], names, list(rewards), minimized, options, allowed)
    families: dict[str, list[int]] = {"": list(range(len(names)))}
    for place, name in enumerate(names):
        families.setdefault(results[name].family or name, []).append(place)
    return replace(front, hypervolumes=_hypervolumes(values, front, families))


def _hypervolumes(values: np.ndarray, front: Front, families: Mapping[str, Sequence[int]]) -> dict[str, Estimate]:
    """
    Return the hypervolumes of families of policies with basic bootstrap intervals (Davison and Hinkley 1997, 2.4) over
    prompts that are drawn together for all policies. The hypervolume of noisy means is too large on average, and
    that of resampled ones again as much: the basic interval takes the second excess off, a percentile one adds it.

    Args:
        values (`np.ndarray` of shape `(policies, prompts, rewards)`): NaN where there is none.
    """
    prompts = values.shape[1]
    counts = np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    resampled, means = _means(values, counts.astype(float)), _means(values, np.ones((1, prompts)))[0]
    found = {}
    for family, places in families.items():
        volume = volume_of(means[places], front)
        high, low = np.quantile([volume_of(each[places], front) for each in resampled], [0.025, 0.975])
        found[family] = Estimate(volume, max(0.0, 2 * volume - float(low)), 2 * volume - float(high))
    return found


def _means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """
    Return the means of rewards over prompts, each counted as often as it was drawn.

    Args:
        values (`np.ndarray` of shape `(policies, prompts, rewards)`), counts (`np.ndarray` of shape
            `(resamples, prompts)`).

    Returns:
        `np.ndarray` of shape `(resamples, policies, rewards)`: NaN where no prompt has the reward.
    """
    finite = np.isfinite(values)
    sums = np.einsum("rp,kpm->rkm", counts, np.where(finite, values, 0.0), optimize=True)
    numbers = np.einsum("rp,kpm->rkm", counts, finite.astype(float), optimize=True)
    return np.divide(sums, numbers, out=np.full_like(sums, np.nan), where=numbers > 0)
