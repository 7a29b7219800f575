"""Callbacks that [`PPOTrainer`] adds to itself."""

import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from rlhf_trl.ppo.critic import is_critic


class CountInRollouts(TrainerCallback):
    """
    Log, evaluate and save every so many rollouts: in between, a rollout is half-way through its optimization.

    Args:
        steps_per_rollout (`int`): optimizer steps per rollout.
    """

    def __init__(self, steps_per_rollout: int):
        self.steps_per_rollout = steps_per_rollout

    def on_step_end(self, args, state, control, **kwargs):
        rollouts, within = divmod(state.global_step, self.steps_per_rollout)

        def due(strategy, given, steps) -> bool:
            if strategy != IntervalStrategy.STEPS or within or not steps:
                return False
            every = int(steps) if given >= 1 else math.ceil(steps / self.steps_per_rollout)
            return rollouts % every == 0

        control.should_log = due(args.logging_strategy, args.logging_steps, state.logging_steps)
        if args.logging_first_step and state.global_step == self.steps_per_rollout:
            control.should_log = True
        control.should_evaluate = due(args.eval_strategy, args.eval_steps or 0, state.eval_steps)
        if args.eval_delay and rollouts < args.eval_delay:
            control.should_evaluate = False
        if state.global_step < state.max_steps:
            control.should_save = due(args.save_strategy, args.save_steps, state.save_steps)
        elif args.logging_strategy == IntervalStrategy.STEPS:  # the metrics of the last rollouts would be lost
            control.should_log = True


class CriticWarmup(TrainerCallback):
    """
    Withhold the critic's warm-up from the policy: without a gradient, not even weight decay moves a parameter.

    Args:
        trainer ([`PPOTrainer`]): the trainer, with the property `in_critic_warmup`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.in_critic_warmup:
            for name, parameter in self.trainer.model.named_parameters():
                if not is_critic(name):
                    parameter.grad = None
