"""
Combination of several rewards into the one score that a policy learns from (group `combine`). Pure functions.

N completions, F reward functions. A combination takes

    values   (N, F)  rewards on the scale that is learned from, normalized where a normalizer is set
    raw      (N, F)  rewards as the functions gave them
    weights  (F,)    weights of the functions
    names            F names of the functions

and returns scores (N,). NaN in `values` and `raw` is a reward that doesn't apply to a completion (`None`); NaN in the
scores is a completion without any reward that counts, see [`without_reward`].
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.base import Reward
from rlhf_trl.rewards.options import threshold_problem


def combined(
    scores: Mapping[str, np.ndarray], rewards: Sequence[Reward], combine: Callable[..., Tensor]
) -> np.ndarray:
    """
    Combine the rewards of N completions that were generated outside of training.

    Args:
        scores (`Mapping[str, np.ndarray]`): rewards of each of `rewards` by name, shape (N,), see [`reward_array`].
        rewards (`Sequence[Reward]`): at least one.
        combine (callable): combination of this module.

    Returns:
        `np.ndarray` of shape (N,), float64: NaN where no reward applies, infinite where one that counts is invalid.
    """
    names = [reward.__name__ for reward in rewards]
    raw = torch.from_numpy(np.stack([scores[name] for name in names], axis=1).astype(float))
    weights = torch.tensor([reward.weight for reward in rewards], dtype=raw.dtype)
    invalid = (raw.isinf() & (weights != 0)).any(dim=1)
    raw = raw.masked_fill(raw.isinf(), torch.nan)
    return combine(raw, raw, weights, names).masked_fill(invalid, torch.inf).numpy()


def reward_array(values: Iterable[float | None]) -> np.ndarray:
    """Return rewards as [`combined`] takes them: NaN for `None`, which doesn't apply, infinite for an invalid one."""
    return np.array(
        [np.nan if value is None else float(value) if np.isfinite(value) else np.inf for value in values], dtype=float
    )


def without_reward(values: Tensor, weights: Tensor) -> Tensor:
    """
    Return which completions no reward that counts applies to, shape (N,). One of weight 0 is logged and doesn't count,
    unless all of them have it.
    """
    return values[:, _counted(weights)].isnan().all(dim=1)


def _counted(weights: Tensor) -> Tensor:
    """Return which rewards count, shape (F,)."""
    counted = weights != 0
    return counted if counted.any() else torch.ones_like(counted)


def weighted_sum(values: Tensor, raw: Tensor, weights: Tensor, names: Sequence[str]) -> Tensor:
    """Return sum_f w_f r_f."""
    return (values * weights).nansum(dim=1).masked_fill(without_reward(values, weights), torch.nan)


def minimum(values: Tensor, raw: Tensor, weights: Tensor, names: Sequence[str]) -> Tensor:
    """Return min_f w_f r_f: only the worst reward counts. One of weight 0 is logged and not counted."""
    ignored = values.isnan() | ~_counted(weights)
    lowest = torch.where(ignored, torch.inf, values * weights).amin(dim=1)
    return lowest.masked_fill(ignored.all(dim=1), torch.nan)


def product(values: Tensor, raw: Tensor, weights: Tensor, names: Sequence[str]) -> Tensor:
    """
    Return prod_f r_f ^ w_f of rewards of 0 or more. One of weight 0 is logged and not counted.

    Raises:
        ConfigError: for a negative reward, since two of them would make a good score of two bad rewards.
    """
    negative = (values < 0) & (weights != 0)
    if negative.any():
        row, column = negative.nonzero()[0].tolist()
        raise ConfigError(
            f"The reward `{names[column]}` is {values[row, column].item():.4g} for completion {row}, and "
            "`combine=product` takes rewards of 0 or more: two negative ones would make a good score. Use rewards "
            "such as probabilities and `reward=format`, or set `combine=min` or `combine=threshold`."
        )
    powers = torch.where(values.isnan(), 1.0, values.nan_to_num() ** weights)
    return powers.prod(dim=1).masked_fill(without_reward(values, weights), torch.nan)


def threshold(
    values: Tensor,
    raw: Tensor,
    weights: Tensor,
    names: Sequence[str],
    constraints: Mapping[str, float],
    floor: float = 0.0,
) -> Tensor:
    """
    Return rewards that count only once others, the constraints, are satisfied.

    With t_c the threshold of constraint c, and c the first one whose raw reward falls short, w_c (r_c - t_c) < 0:

        score = floor + w_c (r_c - t_c)

    and where none falls short, the weighted sum of the rewards that aren't constraints. A constraint with a negative
    weight is an upper limit; one that doesn't apply to a completion (`None`) counts as satisfied. With `floor` at or
    below the lowest such sum, a completion that breaks a constraint never scores above one that keeps all. One
    constraint of weight 1 with floor = t is the rule of Llama 2 for safety and helpfulness (arXiv 2307.09288, 3.2.3).

    Args:
        values, raw, weights, names: see the module.
        constraints (`Mapping[str, float]`): threshold of each constraint on the raw scale, by name of the reward, the
            most important first.
        floor (`float`): score at a threshold, from below.

    Raises:
        ConfigError: if a constraint names no reward, or every reward is a constraint.
    """
    if problem := threshold_problem(constraints, names):
        raise ConfigError(problem)
    columns = [names.index(name) for name in constraints]
    others = [column for column in range(len(names)) if column not in columns]
    score = weighted_sum(values[:, others], raw[:, others], weights[others], [names[column] for column in others])
    # From the last constraint to the first, so that the first one that falls short has the last word
    for column, limit in reversed(list(zip(columns, constraints.values(), strict=True))):
        slack = weights[column] * (raw[:, column] - limit)
        score = torch.where(slack < 0, floor + slack, score)
    return score
