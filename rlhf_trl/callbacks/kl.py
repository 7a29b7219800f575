"""
KL controllers: callbacks that set the KL coefficient of the next rollout, and guard against a KL that runs away.

[`~rlhf_trl.trainers.rollout_hook.RolloutHook`] gives them each rollout of PPO, GRPO and RLOO. They read its KL once it
is optimized, and write `trainer.beta` only between rollouts.
"""

import logging
import math
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from rlhf_trl.callbacks.base import SaveAndStop
from rlhf_trl.callbacks.options import ADAPTIVE_KL, FINAL_KL, KL, guard_problem
from rlhf_trl.config.ranges import ROLLOUTS, check_values
from rlhf_trl.errors import ConfigError
from rlhf_trl.trainers.checkpoints import resumed_state
from rlhf_trl.trainers.rollout_hook import RolloutRecord
from rlhf_trl.trainers.sampling import sampling_differences
from rlhf_trl.trainers.steps import steps_per_rollout

logger = logging.getLogger(__name__)

REPORTED_IN_A_ROW = 3  # skipped rollouts; all are counted
STANDARD_ERRORS = 3.0  # of so many rollouts with a KL near 0, about one in a thousand is that low by chance
ROUNDING = 1e-3  # nats per sequence: differences of half-precision log-probabilities that mean nothing


class FixedKL(SaveAndStop, ExportableState):
    """
    A coefficient that doesn't change; the base of the other controllers, which override `update`.

    It warns once per run, with the reason, if the KL of a rollout is negative ([`is_negative`]).

    Args:
        coef (`float`): the coefficient of the first rollout (`beta`).
        trainer (*optional*): the trainer whose `beta` is controlled: PPO, or TRL's GRPO or RLOO. Without one, `update`
            can be used by itself.
        guard (`float`, *optional*): KL in nats per sequence. A rollout above it (or with a KL that is NaN) is not
            learned from: its optimizer steps move no parameter, while the learning rate schedule advances.
        guard_action (`str`, defaults to `"stop"`): what else a rollout above `guard` leads to. `"stop"` saves a
            checkpoint at its end and ends the training; under DeepSpeed, which updates within `backward`, the
            rollout is still learned from. `"skip"` continues with the next rollout and counts in
            `objective/skipped_rollouts`: for single outliers, since a policy that doesn't move doesn't come
            back either. Either way the controller sees the rollout's KL.

    Attributes:
        reason (`str` or `None`): why the guard ended the training.

    Raises:
        ConfigError: at a value out of range; on GRPO and RLOO at `beta=0`, without a reference, if a KL is needed;
            at `guard_action="skip"` under DeepSpeed.
    """

    needs_kl = False  # whether `update` reads the KL or changes the coefficient

    def __init__(self, coef: float, trainer=None, guard: float | None = None, guard_action: str = "stop"):
        check_values(ROLLOUTS, {"beta": coef}, "stage.args.")
        check_values(KL, {"guard": guard, "guard_action": guard_action}, "kl.")
        self.coef = float(coef)
        self.trainer: Any = trainer
        self.guard = guard
        self.guard_action = guard_action
        self.progress = 0.0  # share of the run that is done
        self.skipped = 0
        self.reason: str | None = None
        self._in_a_row = 0  # rollouts skipped
        self._explained = False
        self._rollout: RolloutRecord | None = None  # the current one
        if trainer is not None:
            self._attach()

    def _attach(self) -> None:
        self.trainer.on_rollout(self._keep)
        if not self.trainer.keeps_reference and (self.needs_kl or self.guard is not None):
            what = f"`{type(self).__name__}`" if self.needs_kl else "The KL guard"
            raise ConfigError(
                f"{what} needs the KL to the reference, and `{type(self.trainer).__name__}` keeps no reference at "
                "`beta=0`. Set `stage.args.beta` above 0, or `kl=fixed` without `kl.guard`."
            )
        if problem := guard_problem(self.guard, self.guard_action, self.trainer.is_deepspeed_enabled):
            raise ConfigError(problem)

    def _keep(self, rollout: RolloutRecord) -> None:
        if rollout.training:
            self._rollout = rollout

    def update(self, kl: float, n: int) -> float:
        """
        Take the KL of a rollout and store and return the coefficient of the next one.

        Args:
            kl (`float`): mean over the rollout's sequences of the summed k1 estimate, in nats.
            n (`int`): number of sequences in the rollout.
        """
        return self.coef

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the coefficient, and how many rollouts were skipped."""
        return {"args": {}, "attributes": {"coef": self.coef, "skipped": self.skipped}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if saved := resumed_state(self, state, "kl"):
            self.coef, self.skipped = saved["coef"], saved["skipped"]
        self.trainer.beta = self.coef
        self.reason, self._in_a_row, self._rollout = None, 0, None

    def on_pre_optimizer_step(self, args, state, control, optimizer: Optimizer, **kwargs):
        if self._is_over():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # an optimizer passes over what has no gradient, weight decay included

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step % steps_per_rollout(args):
            return
        self.progress = state.global_step / state.max_steps
        rollout = self._rollout
        if rollout is None or rollout.kl is None:
            return
        self.trainer.beta = self.update(rollout.kl, rollout.num_sequences)
        number = state.global_step // steps_per_rollout(args)
        if self._is_over():
            self._act(rollout, number, state, control)
        else:
            self._in_a_row = 0
        if self.guard is not None and self.guard_action == "skip":
            self.trainer._metrics["train"]["objective/skipped_rollouts"].append(float(self.skipped))
        if is_negative(rollout) and not self._explained:
            self._explained = True
            if state.is_world_process_zero:
                logger.warning(why_negative(rollout, number, sampling_differences(self.trainer)))

    def _is_over(self) -> bool:
        kl = None if self._rollout is None else self._rollout.kl
        return self.guard is not None and kl is not None and not kl <= self.guard  # NaN is over

    def _act(self, rollout: RolloutRecord, number: int, state: TrainerState, control: TrainerControl) -> None:
        found = f"rollout {number} has a KL of {rollout.kl:.4g} nats per sequence, over `kl.guard={self.guard:g}`"
        if self.guard_action == "stop":
            self.reason = f"KL guard: {found}."
            self.stop(state.global_step, control)
            message = f"{self.reason} Training stops here, with a checkpoint of step {state.global_step}."
        else:
            self.skipped += 1
            self._in_a_row += 1
            message = f"KL guard: {found}. Its update is skipped ({self.skipped} so far)."
            if self._in_a_row == REPORTED_IN_A_ROW:
                message += (
                    f" That is {REPORTED_IN_A_ROW} in a row, and further ones are not reported: a policy that doesn't "
                    "move stays where it is. Raise `kl.guard`, or set `kl.guard_action=stop`."
                )
        if state.is_world_process_zero and self._in_a_row <= REPORTED_IN_A_ROW:
            logger.warning(message)


def is_negative(rollout: RolloutRecord) -> bool:
    """Return whether the KL of a rollout is below 0 by more than its sampling noise: no KL can be."""
    return rollout.kl is not None and rollout.kl < -max(STANDARD_ERRORS * rollout.kl_standard_error, ROUNDING)


def why_negative(rollout: RolloutRecord, number: int, differences: list[str]) -> str:
    """
    Return one sentence about a rollout whose KL is negative.

    Args:
        rollout ([`~rlhf_trl.trainers.rollout_hook.RolloutRecord`]): the rollout, with its KL.
        number (`int`): which rollout of the run, from 1.
        differences (`list[str]`): what [`~rlhf_trl.trainers.sampling.sampling_differences`] found.
    """
    cause = (
        f"sampling differs by {', '.join(differences)}"
        if differences
        else "no sampling setting, rollout function, vLLM or dropout differs, so look for what changes the model "
        "between sampling and scoring"
    )
    return (
        f"The KL of rollout {number} is negative, {rollout.kl:.3g} nats per sequence (standard error "
        f"{rollout.kl_standard_error:.2g}), which no KL can be: the completions don't come from the distribution that "
        f"scores them; {cause}."
    )


class AdaptiveKL(FixedKL):
    """
    Proportional controller that steers KL to a target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2;
    openai/lm-human-preferences `train_policy.py`):

        error = clip(KL / target - 1, -0.2, 0.2);  coef <- coef * (1 + error * n / horizon)

    Args:
        coef (`float`): start value; not 0, which no factor can change.
        target (`float`): KL to hold, in nats per sequence.
        horizon (`float`, defaults to 10 000): sequences over which an error acts; smaller reacts faster.
        trainer, guard, guard_action (*optional*): see [`FixedKL`].
    """

    needs_kl = True

    def __init__(
        self,
        coef: float,
        target: float,
        horizon: float = 10_000,
        trainer=None,
        guard: float | None = None,
        guard_action: str = "stop",
    ):
        if coef == 0:
            raise ConfigError(
                "An adaptive KL coefficient can't start at 0: set `stage.args.beta` above 0, or `kl=fixed`."
            )
        check_values(ADAPTIVE_KL, {"target": target, "horizon": horizon}, "kl.")
        super().__init__(coef, trainer, guard, guard_action)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> float:
        """See [`FixedKL.update`]."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon
        return self.coef


class LinearKL(FixedKL):
    """
    A coefficient that changes linearly from `coef` at the first rollout to `final` at the end of training.

    Args:
        coef (`float`): start value. final (`float`): end value.
        trainer, guard, guard_action (*optional*): see [`FixedKL`].
    """

    needs_kl = True

    def __init__(
        self, coef: float, final: float, trainer=None, guard: float | None = None, guard_action: str = "stop"
    ):
        check_values(FINAL_KL, {"final": final}, "kl.")
        super().__init__(coef, trainer, guard, guard_action)
        self.start, self.final = float(coef), float(final)

    def update(self, kl: float, n: int) -> float:
        """See [`FixedKL.update`]; the KL is not looked at."""
        self.coef = self.start + (self.final - self.start) * self.share()
        return self.coef

    def share(self) -> float:
        """Return the part of the way to `final` that is done, from 0 to 1."""
        return self.progress


class CosineKL(LinearKL):
    """
    A coefficient that follows half a cosine, flat at both ends, from `coef` at the first rollout to `final` at the
    end of training: final + (coef - final) * (1 + cos(pi * progress)) / 2. Arguments as in [`LinearKL`].
    """

    def share(self) -> float:
        """See [`LinearKL.share`]."""
        return (1 - math.cos(math.pi * self.progress)) / 2
