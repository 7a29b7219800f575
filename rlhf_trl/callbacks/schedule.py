"""The warning of a schedule that is all warmup."""

from typing import Any

import torch
from transformers import TrainerCallback, get_scheduler

from rlhf_trl.terminal import say

LOW = 0.5  # share of the learning rate that a run is to reach


class ScheduleWarning(TrainerCallback):
    """Say before the first step that the warmup is longer than the run, so that little or nothing is learned."""

    def on_train_begin(self, args, state, control, **kwargs):
        if problem := schedule_problem(args, state.max_steps):
            say(f"warning: {problem}")


def schedule_problem(args: Any, steps: int) -> str | None:
    """
    Return what is to be expected of a schedule that stays below half of the learning rate at every step, `None` of any
    other.

    Args:
        args (`transformers.TrainingArguments`): arguments of the trainer.
        steps (`int`): optimizer steps of the run.
    """
    warmup = args.get_warmup_steps(steps)
    if not warmup or args.learning_rate == 0:
        return None
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=args.lr_scheduler_kwargs
    )
    highest = 0.0
    for _ in range(steps):
        highest = max(highest, optimizer.param_groups[0]["lr"])
        if highest >= LOW:
            return None
        optimizer.step()
        schedule.step()
    much = "is 0 at every step" if highest == 0 else f"doesn't get above {highest:.0%} of `stage.args.learning_rate`"
    learned = "nothing is learned" if highest == 0 else "little is learned"
    counted = "1 optimizer step" if steps == 1 else f"{steps:,} optimizer steps"
    return (
        f"the learning rate {much}, so that {learned}: the run has {counted}, and `stage.args.warmup_steps` "
        f"({args.warmup_steps:g}) makes {warmup:,} of warmup. Set `stage.args.warmup_steps=0`, or train for longer."
    )
