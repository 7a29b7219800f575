"""Numbers of rows that a training and its evaluation need."""

import math
from typing import Any

from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import count_of
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
            f"The training has {count_of(count, 'row')} and {world_size()} ranks, each of which needs one. Launch "
            f"with `--num_processes {count}`, or give more rows."
        )
    if not hasattr(args, "generation_batch_size") or not getattr(args, "fills_rollouts", True):
        return
    needed = args.generation_batch_size // args.num_generations
    if count < needed:
        raise ConfigError(
            f"There are {count} prompts, fewer than the {needed} of one rollout. Lower "
            "`stage.args.per_device_train_batch_size` or `stage.args.steps_per_generation`, or give more prompts."
        )


def check_evaluated_groups(args: Any) -> None:
    """
    Stop a run that would fail when it evaluates, at its end at the latest: a batch of several completions per prompt
    has to hold whole groups.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with what to set.
    """
    group = getattr(args, "num_generations_eval", None) or getattr(args, "num_generations", 1)
    if problem := evaluation_problem(args.per_device_eval_batch_size, group):
        raise ConfigError(problem)


def evaluation_problem(per_device: int, group: int) -> str | None:
    """Return the problem of evaluation batches that hold parts of groups of completions, `None` without one."""
    ranks = world_size()
    if per_device * ranks % group == 0:
        return None
    return (
        f"An evaluation batch of {per_device} (`per_device_eval_batch_size`) x {ranks} (ranks) doesn't divide by "
        f"{group} (`num_generations_eval`, else `num_generations`). Set "
        f"`stage.args.per_device_eval_batch_size={math.lcm(per_device * ranks, group) // ranks}` or "
        "`+stage.args.num_generations_eval=1`."
    )
