"""Differences between policies on the same prompts, of all of them and of parts."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from rlhf_trl.evaluation.statistics import bootstrap_mean
from rlhf_trl.runs.results import Estimate, PolicyDifference, PromptSlice


def policy_differences(
    names: Sequence[str],
    baseline: str,
    rewards: Mapping[str, np.ndarray],
    outcomes: Mapping[tuple[str, str], np.ndarray],
) -> list[PolicyDifference]:
    """
    Return the paired differences of all policies but the baseline.

    Args:
        names (`Sequence[str]`), baseline (`str`): names of all policies, and of the baseline.
        rewards (`dict[str, np.ndarray]`): combined rewards of shape (P,) by policy; empty where there is no reward.
        outcomes (`dict[tuple[str, str], np.ndarray]`): of each policy against the baseline, shape (P,); NaN where the
            judge gave no verdict.
    """
    found = []
    for one, other in combinations([name for name in names if name != baseline], 2):
        gaps = outcomes[one, baseline] - outcomes[other, baseline]
        judged = np.isfinite(gaps)
        found.append(
            PolicyDifference(
                one=one,
                other=other,
                difference=_resampled(rewards[one] - rewards[other]) if rewards else None,
                wins=_resampled(gaps[judged]) if judged.any() else None,
            )
        )
    return found


def prompt_slices(
    rewards: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray], baseline: str
) -> list[PromptSlice]:
    """
    Return the combined rewards, arrays of shape (P,), on the prompts of each value of each column, shape (P,); nothing
    without rewards.
    """
    if not rewards:
        return []
    parts = [(name, value, values == value) for name, values in columns.items() for value in sorted(set(values))]
    return [
        PromptSlice(
            column=column,
            value=value,
            prompts=int(part.sum()),
            rewards={name: _resampled(values[part]) for name, values in rewards.items()},
            differences={
                name: _resampled(values[part] - rewards[baseline][part])
                for name, values in rewards.items()
                if name != baseline
            },
        )
        for column, value, part in parts
    ]


def _resampled(values: np.ndarray) -> Estimate:
    return bootstrap_mean(values, resamples=2000)  # there may be hundreds of pairs and parts
