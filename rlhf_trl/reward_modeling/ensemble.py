"""Evaluation of reward model ensembles on held-out rows."""

from typing import NamedTuple, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.lengths import head_names
from rlhf_trl.data.multimodal import PromptIds, extra_inputs
from rlhf_trl.reward_modeling.collator import ComparisonCollator
from rlhf_trl.reward_modeling.losses import reference_scores, score_margins
from rlhf_trl.reward_modeling.trainer import CALIBRATION_COMPLETIONS
from rlhf_trl.rewards.model import ModelReward, disagreement

BATCH_ROWS = 64


class EnsembleScores(NamedTuple):
    """
    Scores of an ensemble on held-out rows.

    Attributes:
        references (`Tensor` of shape `(members, n, heads)`): scores of the reference answers, float64.
        metrics (`dict[str, float]`): `eval_accuracy` of the members' mean score, and `eval_disagreement`.
    """

    references: Tensor
    metrics: dict[str, float]


def evaluate_ensemble(reward: ModelReward, dataset: Dataset, calibrate_on: str) -> EnsembleScores:
    """
    Score the rows of the reward stage with all members, a share of them on each rank. Call it on all ranks.

    Args:
        reward ([`~rlhf_trl.rewards.ModelReward`]): the ensemble.
        dataset (`Dataset`): rows of [`~rlhf_trl.data.tokenize_comparisons`].
        calibrate_on (`str`): which completions are reference answers, see [`~rlhf_trl.reward_modeling.RewardConfig`].
    """
    pad_token_id, heads = cast(int, reward.tokenizer.pad_token_id), head_names(dataset) or reward.heads
    collate = ComparisonCollator(pad_token_id, heads, tokenizer=reward.tokenizer)
    ranks, rank, parts = PartialState().num_processes, PartialState().process_index, []
    for start in range(rank * BATCH_ROWS, len(dataset), ranks * BATCH_ROWS):
        rows = [dataset[i] for i in range(start, min(start + BATCH_ROWS, len(dataset)))]
        inputs = collate(rows)
        scores = reward.head_scores([ids for row in rows for ids in _completions(reward, row)])  # (members, N, heads)
        margins, spread = score_margins(scores.mean(dim=0), inputs), disagreement(scores).flatten()
        parts.append((start, reference_scores(scores.transpose(0, 1), inputs, calibrate_on), margins, spread))
    parts = sorted(gather_object(parts), key=lambda part: part[0])
    references, margins, spread = (torch.cat(each) for each in list(zip(*parts, strict=True))[1:])
    metrics = {"eval_disagreement": spread.mean().item()}
    if len(margins):
        metrics["eval_accuracy"] = (margins > 0).float().mean().item()
    return EnsembleScores(references[:CALIBRATION_COMPLETIONS].transpose(0, 1).double(), metrics)


def _completions(reward: ModelReward, row: dict) -> list[list[int]]:
    """Return the ids of a row's completions, with the images of their prompt."""
    if not row.get("images"):
        return row["completion_ids"]
    extra = extra_inputs(reward.tokenizer, row["prompt"], **template_kwargs(row))
    return [PromptIds(ids, lambda: extra) for ids in row["completion_ids"]]


def mean_metrics(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric that all have."""
    shared = [key for key in metrics[0] if all(isinstance(each.get(key), int | float) for each in metrics)]
    return {key: sum(each[key] for each in metrics) / len(metrics) for key in shared}
