"""Disk space that a training needs: checkpoints with their optimizer states, and the trained model."""

import math
from typing import Any, NamedTuple

from rlhf_trl.models.optimizers import optimizer_bytes


class Weights(NamedTuple):
    """
    Weights of a training, in parameters.

    Attributes:
        total (`int`): all of the model's.
        trained (`int`): those that are trained, in the model or in an adapter on it.
        itemsize (`int`): bytes of a trained one.
    """

    total: int
    trained: int
    itemsize: int


class DiskNeed(NamedTuple):
    """
    Bytes that a training writes.

    Attributes:
        checkpoint (`float`): one checkpoint.
        checkpoints (`int`): checkpoints that are there at a time, at most.
        result (`int`): the trained model.
    """

    checkpoint: float
    checkpoints: int
    result: int

    @property
    def total(self) -> float:
        """All of it."""
        return self.checkpoint * self.checkpoints + self.result


def disk_need(args: Any, policy: Weights, critic: int, steps: int, written: int = 0) -> DiskNeed:
    """
    Estimate the disk space that a training needs.

    Args:
        args (`transformers.TrainingArguments`): arguments of the trainer.
        policy ([`Weights`]): weights of the model.
        critic (`int`): parameters that a critic trains beside them.
        steps (`int`): optimizer steps of the run.
        written (`int`): bytes of merged models that are written beside the result.
    """
    weights, trained = policy.trained * policy.itemsize, policy.trained + critic
    optimizer = str(getattr(args.optim, "value", args.optim))
    states = 0.0 if args.save_only_model else optimizer_bytes(optimizer, trained, policy.itemsize)
    checkpoint = trained * policy.itemsize + states
    saves = _saves(args, steps)
    kept = min(saves, args.save_total_limit or saves)
    # A new checkpoint is complete before the oldest one is deleted
    return DiskNeed(checkpoint, kept + (saves > kept), weights + written)


def _saves(args: Any, steps: int) -> int:
    """Return how many checkpoints a run writes."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return math.ceil(args.num_train_epochs) if args.max_steps <= 0 else 1
    if strategy == "best":
        return args.save_total_limit or 1
    counted_in = getattr(args, "steps_per_rollout", 1)  # PPO counts rollouts
    every = args.save_steps * steps if args.save_steps < 1 else args.save_steps * counted_in
    return max(1, math.ceil(steps / max(1, every)))


def bytes_text(count: float) -> str:
    """Return a number of bytes for people."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
