"""Arithmetic of rollouts and optimizer steps."""

import math
from typing import Any


def steps_per_rollout(args: Any) -> int:
    """
    Return the optimizer steps per rollout. A run may stop only between rollouts, where no update is outstanding.

    Args:
        args (`transformers.TrainingArguments`):
            Arguments of any trainer. Those that generate (`PPOConfig`, `trl.GRPOConfig`, `trl.RLOOConfig`) count
            `steps_per_generation` in micro-batches and repeat each rollout `num_iterations` times.

    Returns:
        `int`: at least 1; 1 for trainers without rollouts.
    """
    if not hasattr(args, "steps_per_generation"):
        return 1
    micro_batches = args.steps_per_generation * args.num_iterations
    # The least common multiple: TRL lets a rollout end in the middle of an optimizer step
    return math.lcm(micro_batches, args.gradient_accumulation_steps) // args.gradient_accumulation_steps
