"""
How several rewards become the one score that a policy learns from (group `combine`): pure functions.

N completions, F reward functions. Each takes `values` (N, F), what the functions gave, on the scale that is learned
from; `raw` (N, F), the same as they gave it; `weights` (F,); and `names`, F of them. NaN says that a function doesn't
apply to a completion. Each returns (N,), NaN where no reward is left.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.options import threshold_problem


def combined(
    scores: Mapping[str, np.ndarray], rewards: Sequence[Callable], combine: Callable[..., Tensor]
) -> np.ndarray:
    """
    The one score of each of N completions that were written outside of a training, shape (N,), float64.

    Args:
        scores (`dict[str, np.ndarray]`): what each of `rewards` says, by its name, shape (N,); NaN where it doesn't
            apply, infinite where it is no number.
        rewards (`Sequence[Callable]`): with `__name__` and `weight`; at least one.
        combine (callable): one of this module.

    Returns:
        `np.ndarray`: NaN where no reward is left; infinite where one that counts is no number.
    """
    names = [reward.__name__ for reward in rewards]
    raw = torch.from_numpy(np.stack([scores[name] for name in names], axis=1).astype(float))
    weights = torch.tensor([reward.weight for reward in rewards], dtype=raw.dtype)
    broken = (raw.isinf() & (weights != 0)).any(dim=1)
    raw = raw.masked_fill(raw.isinf(), torch.nan)
    return combine(raw, raw, weights, names).masked_fill(broken, torch.inf).numpy()


def number_of(value: float | None) -> float:
    """A reward as [`combined`] takes it: NaN for None, which doesn't apply, and infinite for what is no number."""
    if value is None:
        return np.nan
    return float(value) if np.isfinite(value) else np.inf


def weighted_sum(values: Tensor, raw: Tensor, weights: Tensor, names: Sequence[str]) -> Tensor:
    """sum over f of w_f r_f."""
    return (values * weights).nansum(dim=1).masked_fill(values.isnan().all(dim=1), torch.nan)


def minimum(values: Tensor, raw: Tensor, weights: Tensor, names: Sequence[str]) -> Tensor:
    """min over f of w_f r_f: the worst reward is the one that counts. One of weight 0 is only watched."""
    left_out = values.isnan() | (weights == 0)
    least = torch.where(left_out, torch.inf, values * weights).amin(dim=1)
    return least.masked_fill(left_out.all(dim=1), torch.nan)


def product(values: Tensor, raw: Tensor, weights: Tensor, names: Sequence[str]) -> Tensor:
    """
    product over f of r_f ^ w_f, for rewards of 0 or more: one that is 0 leaves nothing of the others. One of weight 0
    is only watched.

    Raises:
        ConfigError: at a negative reward. Two of them would make a good score of two bad ones.
    """
    negative = (values < 0) & (weights != 0)
    if negative.any():
        row, column = negative.nonzero()[0].tolist()
        raise ConfigError(
            f"The reward `{names[column]}` is {values[row, column].item():.4g} for completion {row}, and "
            "`combine=product` takes rewards of 0 or more: two negative ones would make a good score. Give rewards "
            "such as probabilities and `reward=format`, or type `combine=min` or `combine=threshold`."
        )
    powers = torch.where(values.isnan(), 1.0, values.nan_to_num() ** weights)
    return powers.prod(dim=1).masked_fill(values.isnan().all(dim=1), torch.nan)


def threshold(
    values: Tensor,
    raw: Tensor,
    weights: Tensor,
    names: Sequence[str],
    constraints: Mapping[str, float],
    floor: float = 0.0,
) -> Tensor:
    """
    Rewards that count only once others are satisfied, in the order of `constraints`. With t_c the threshold of
    constraint c, and c the first one whose raw reward falls short, w_c (r_c - t_c) < 0:

        score = floor + w_c (r_c - t_c)

    and where none does, the weighted sum of the rewards that aren't constraints. A constraint with a negative weight
    says "at most". With `floor` at or below the lowest such sum, a completion that breaks a constraint never scores
    above one that keeps all. With one constraint, weight 1 and floor = t it is the rule of Llama 2 (arXiv 2307.09288,
    3.2.3).

    A constraint that doesn't apply to a completion (None) counts as satisfied.

    Args:
        constraints (`dict[str, float]`): name of a reward and its threshold, on the raw scale, the most important
            first.
        floor (`float`): score just below a threshold.

    Raises:
        ConfigError: if a constraint names no reward, or no reward is left besides the constraints.
    """
    if problem := threshold_problem(constraints, names):
        raise ConfigError(problem)
    places = [names.index(name) for name in constraints]
    others = [place for place in range(len(names)) if place not in places]
    score = weighted_sum(values[:, others], raw[:, others], weights[others], [names[place] for place in others])
    for place, least in reversed(list(zip(places, constraints.values(), strict=True))):
        lead = weights[place] * (raw[:, place] - least)
        score = torch.where(lead < 0, floor + lead, score)
    return score
