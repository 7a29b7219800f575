"""Batch arithmetic: sizes that don't divide, and what to set instead."""

import math
from collections.abc import Callable
from typing import Any

from rlhf_trl.config.argument_names import arguments
from rlhf_trl.config.values import at, section
from rlhf_trl.data.counts import evaluation_problem
from rlhf_trl.ppo.options import MINI_BATCHES
from rlhf_trl.runs.ranks import world_size

COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "generation_batch_size",
    "num_generations",
    "num_generations_eval",
    "num_iterations",
)


def batch_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of the stage's batch sizes, on the number of ranks of this launch."""
    args = section(values, "stage.args")
    known = arguments(str(args.get("_target_"))) or {}
    get = {name: args.get(name, default) for name, (_, default) in known.items()}.get
    counts = [get(name) for name in COUNTS if get(name) is not None]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        return []  # a wrong number is a problem of its range
    has_kl = "desirable_weight" in known and get("loss_type") != "apo_zero_unpaired"
    if has_kl and get("per_device_train_batch_size") == 1:
        return [
            "`stage.args.per_device_train_batch_size` is 1, and KTO takes its KL from other rows of the batch. "
            "Set it to 2 or more."
        ]
    if "num_generations" not in known:
        return []
    return _rollout(get, is_ppo="cliprange_value" in known, rows=at(values, "data.max_samples"))


def _rollout(get: Callable[[str], Any], is_ppo: bool, rows: int | None) -> list[str]:
    """Return what `trl.GRPOConfig` would refuse of the batch sizes, all problems at once and with what to set."""
    ranks, micro, generations = world_size(), get("per_device_train_batch_size"), get("num_generations")
    accumulation, steps, rollout = (
        get(name) for name in ("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size")
    )
    problems = []
    if not is_ppo and generations < 2:
        problems.append("`stage.args.num_generations` is 1, and a group needs 2 or more. Set it, for example to 4.")
    per_step = micro * ranks
    if steps and rollout:
        problems.append(
            "`stage.args.steps_per_generation` and `stage.args.generation_batch_size` are two ways to set the "
            "same. Set one of them to null."
        )
    elif rollout and rollout % per_step:
        problems.append(
            f"`stage.args.generation_batch_size` {rollout} doesn't divide by a micro-batch of all ranks, "
            f"{micro} (`per_device_train_batch_size`) x {ranks} (ranks) = {per_step}. "
            f"Set `stage.args.generation_batch_size={math.ceil(rollout / per_step) * per_step}`."
        )
    else:
        steps = rollout // per_step if rollout else steps or accumulation * (MINI_BATCHES if is_ppo else 1)
        problems += _groups(per_step, micro, ranks, steps, generations)
        if is_ppo and steps % accumulation:
            problems.append(
                f"A rollout of {steps} micro-batches (`steps_per_generation`) doesn't divide into mini-batches of "
                f"{accumulation} (`gradient_accumulation_steps`). "
                f"Set `stage.args.steps_per_generation={math.ceil(steps / accumulation) * accumulation}`."
            )
        prompts = per_step * steps // generations
        if isinstance(rows, int) and rows < prompts:
            problems.append(
                f"`data.max_samples` {rows} is less than the {prompts} prompts of one rollout. "
                f"Set `data.max_samples={prompts}` or more, or a smaller rollout."
            )
    if get("eval_strategy") != "no":  # else the rows tell whether any are evaluated
        problem = evaluation_problem(get("per_device_eval_batch_size"), get("num_generations_eval") or generations)
        problems += [problem] if problem else []
    return problems


def _groups(per_step: int, micro: int, ranks: int, steps: int, generations: int) -> list[str]:
    total = per_step * steps
    if total % generations == 0:
        return []
    whole = math.lcm(per_step, generations) // per_step
    divisor = max(d for d in range(1, min(generations, total) + 1) if total % d == 0)
    return [
        f"A rollout of {micro} (`per_device_train_batch_size`) x {ranks} (ranks) x {steps} (`steps_per_generation`) = "
        f"{total} completions doesn't divide into groups of {generations} (`num_generations`). "
        f"Set `stage.args.steps_per_generation={math.ceil(steps / whole) * whole}` "
        f"or `stage.args.num_generations={divisor}`."
    ]
