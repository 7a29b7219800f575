"""Scores of the members of a reward model ensemble."""

from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from rlhf_trl.data.lengths import head_names
from rlhf_trl.reward_modeling.collator import ComparisonCollator
from rlhf_trl.reward_modeling.losses import reference_scores, score_margins
from rlhf_trl.reward_modeling.trainer import CALIBRATION_COMPLETIONS
from rlhf_trl.rewards.model import ModelReward

ROWS_AT_ONCE = 64


def score(reward: ModelReward, dataset: Dataset, calibrate_on: str) -> tuple[Tensor, dict[str, float]]:
    """
    What the members of an ensemble say of the rows of the reward stage, dealt to the ranks.

    Returns:
        their scores of reference answers, shape (members, n, heads), float64; and the metrics `eval_accuracy` and
        `eval_disagreement` of all rows.
    """
    collate = ComparisonCollator(cast(int, reward.tokenizer.pad_token_id), head_names(dataset) or reward.heads)
    ranks, rank, parts = PartialState().num_processes, PartialState().process_index, []
    for start in range(rank * ROWS_AT_ONCE, len(dataset), ranks * ROWS_AT_ONCE):
        rows = [dataset[i] for i in range(start, min(start + ROWS_AT_ONCE, len(dataset)))]
        inputs = collate(rows)
        scores = reward.head_scores([ids for row in rows for ids in row["completion_ids"]]).transpose(0, 1)
        leads, spread = score_margins(scores.mean(dim=1), inputs), scores.std(dim=1).flatten()
        parts.append((start, reference_scores(scores, inputs, calibrate_on), leads, spread))  # (n, members, heads)
    parts = sorted(gather_object(parts), key=lambda part: part[0])
    references, leads, spread = (torch.cat(each) for each in list(zip(*parts, strict=True))[1:])
    metrics = {"eval_disagreement": spread.mean().item()}
    if len(leads):
        metrics["eval_accuracy"] = (leads > 0).float().mean().item()
    return references[:CALIBRATION_COMPLETIONS].transpose(0, 1).double(), metrics


def mean_of(metrics: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric that all have."""
    shared = [key for key in metrics[0] if all(isinstance(each.get(key), int | float) for each in metrics)]
    return {key: sum(each[key] for each in metrics) / len(metrics) for key in shared}
