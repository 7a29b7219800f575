"""Scores of completions by the rewards of the config, outside of a training."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_trl.data.chat_template import template_columns
from rlhf_trl.data.multimodal import decoded
from rlhf_trl.rewards.base import Reward
from rlhf_trl.rewards.combine import combined, reward_array
from rlhf_trl.rewards.conditioned import counting, spread, subset
from rlhf_trl.rewards.model import ModelReward

COMBINED = ""  # key of the combined reward beside those of single ones


def score(
    rewards: Sequence[Reward],
    prompts: list,
    completions: list,
    completion_ids: list[list[int]],
    columns: Mapping[str, list],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, list[float | None]]:
    """
    Score N completions by each reward.

    Args:
        rewards (`Sequence[Reward]`):
            As in `rlhf_trl.rewards`.
        prompts, completions (`list` of length N):
            Texts or messages, as TRL hands them to reward functions.
        completion_ids (`list[list[int]]` of length N):
            Token ids of the completions, with the end token where it was written.
        columns (`dict[str, list]`):
            Further columns of the data, which function rewards may read; `images` decoded or not.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer that made the ids; policies may have different ones.

    Returns:
        `dict[str, list[float | None]]`: N values by the reward's name, as it gave them: `None` where it doesn't apply.
    """
    given, scores = _given(columns, tokenizer, len(completions)), {}
    if "images" in given and not all(isinstance(reward, ModelReward) for reward in rewards):
        given["images"] = decoded(given["images"])  # as in training; reward models decode a row at a time
    for reward in rewards:
        reward.bind(tokenizer)
        scores[reward.__name__] = reward(
            prompts=prompts, completions=completions, completion_ids=completion_ids, **given
        )
    return scores


def score_members(
    rewards: Sequence[Reward],
    prompts: list,
    completions: list,
    completion_ids: list[list[int]],
    columns: Mapping[str, list],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[dict[str, list[float | None]]]:
    """
    Score N completions by each member of each reward, see [`score`].

    Returns:
        `list[dict]`: for each completion, by the reward's name, the score of each member of an ensemble, of another
        reward its one score; `None` where it doesn't apply or is no finite number.
    """
    count = len(completions)
    given, single = _given(columns, tokenizer, count), []
    found: dict[str, list[list[float | None]]] = {}
    for reward in rewards:
        model, rows = counting(reward, given, count)
        if not isinstance(model, ModelReward):
            single.append(reward)
            continue
        model.bind(tokenizer)
        asked, answers = ([values[i] for i in rows] for values in (prompts, completions))
        chosen = {name: subset(values, rows, count) for name, values in given.items()}
        ids = model.token_rows(asked, answers, [completion_ids[i] for i in rows], columns=chosen)
        members = model.member_scores(ids).T.tolist() if rows else []
        scores = spread(members, rows, count)
        found[reward.__name__] = [[None] * model.members if each is None else each for each in scores]
    for name, values in score(single, prompts, completions, completion_ids, columns, tokenizer).items():
        found[name] = [[value] for value in values]
    return [
        {reward.__name__: [_finite(value) for value in found[reward.__name__][i]] for reward in rewards}
        for i in range(count)
    ]


def _given(columns: Mapping[str, list], tokenizer: PreTrainedTokenizerBase | None, count: int) -> dict[str, Any]:
    """Return the columns that rewards get, with those of a chat template that this tokenizer has."""
    return dict(columns) if tokenizer is None else template_columns(tokenizer, dict(columns), count)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and isfinite(value) else None


def as_arrays(scores: Mapping[str, Sequence[float | None]]) -> dict[str, np.ndarray]:
    """Return scores of shape (N,) each: NaN where a reward doesn't apply, infinite where it is no finite number."""
    return {name: reward_array(values) for name, values in scores.items()}


def combine_scores(scores: Mapping[str, Sequence[float | None]], rewards: Sequence[Reward], combine) -> np.ndarray:
    """
    Return the combined reward of N completions, shape (N,).

    Args:
        scores (`dict[str, list]`): of [`score`].
        rewards (`Sequence[Reward]`): at least one.
        combine (callable): function of `rlhf_trl.rewards.combine`.

    Returns:
        `np.ndarray`: NaN where no reward is left; infinite where one that counts is no finite number.
    """
    return combined(as_arrays(scores), rewards, combine)
