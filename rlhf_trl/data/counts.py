"""Number of rows that a training needs."""

from typing import Any

from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.ranks import world_size


def check_enough_rows(args: Any, count: int) -> None:
    """
    Stop a run with fewer rows than ranks, which would train on copies, or fewer prompts than a rollout takes: TRL
    drops what doesn't fill one, and would train on nothing.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with what to lower.
    """
    if count < world_size():
        raise ConfigError(
            f"There are {count} rows for training and {world_size()} ranks, each of which needs one. Launch with "
            f"`--num_processes {count}`, or give more rows."
        )
    if not hasattr(args, "generation_batch_size") or not getattr(args, "fills_rollouts", True):
        return
    needed = args.generation_batch_size // args.num_generations
    if count < needed:
        raise ConfigError(
            f"There are {count} prompts, fewer than the {needed} of one rollout. Lower "
            "`stage.args.per_device_train_batch_size` or `stage.args.steps_per_generation`, or give more prompts."
        )
