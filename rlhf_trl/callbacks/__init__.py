"""What watches and steers a training run: `transformers.TrainerCallback`s, each useful on its own."""

import math

from transformers import TrainingArguments


def steps_per_rollout(args: TrainingArguments) -> int:
    """
    Optimizer steps after which the next rollout begins: only there is nothing half done, so only there a run may stop.

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
