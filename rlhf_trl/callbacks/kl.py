"""
KL controllers: callbacks that set the KL coefficient of the next rollout.

They read the KL of the rollout just made from `trainer.last_rollout` and write `trainer.beta`, only between rollouts.
"""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..errors import ConfigError
from . import steps_per_rollout


class FixedKL(TrainerCallback, ExportableState):
    """
    A coefficient that doesn't change; the base of the other controllers, which override `update`.

    Args:
        coef (`float`): the coefficient of the first rollout (`beta`).
        trainer (*optional*): the trainer whose `beta` is controlled. Without one, `update` can be used by itself.
    """

    def __init__(self, coef: float, trainer=None):
        if coef < 0:
            raise ConfigError(f"The KL coefficient is {coef}. Set `stage.args.beta` to 0 or more.")
        self.coef = float(coef)
        self.trainer = trainer
        self.progress = 0.0  # share of the run that is done

    def update(self, kl: float, n: int) -> float:
        """
        Take the KL of a rollout and store and return the coefficient of the next one.

        Args:
            kl (`float`): mean over the rollout's sequences of the summed k1 estimate, in nats.
            n (`int`): number of sequences in the rollout.
        """
        return self.coef

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the coefficient."""
        return {"args": {}, "attributes": {"coef": self.coef}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # transformers would rebuild the callback without its trainer; read the state back here instead
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved and state.global_step > 0:
            self.coef = saved["attributes"]["coef"]
        self.trainer.beta = self.coef

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step % steps_per_rollout(args) == 0:
            self.progress = state.global_step / state.max_steps
            rollout = self.trainer.last_rollout
            self.trainer.beta = self.update(rollout["kl"], rollout["num_sequences"])


class AdaptiveKL(FixedKL):
    """
    Proportional controller that steers KL to a target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2;
    openai/lm-human-preferences `train_policy.py`):

        error = clip(KL / target - 1, -0.2, 0.2);  coef <- coef * (1 + error * n / horizon)

    Args:
        coef (`float`): start value; not 0, which no factor can change.
        target (`float`): KL to hold, in nats a sequence.
        horizon (`float`, defaults to 10 000): sequences over which an error acts; smaller reacts faster.
        trainer (*optional*): the trainer whose `beta` is controlled.
    """

    def __init__(self, coef: float, target: float, horizon: float = 10_000, trainer=None):
        super().__init__(coef, trainer)
        if coef == 0:
            raise ConfigError(
                "An adaptive KL coefficient can't start at 0: set `stage.args.beta` above 0, or `kl=fixed`."
            )
        if target <= 0:
            raise ConfigError(f"The target KL is {target}. Set `kl.target` above 0.")
        if horizon <= 0:
            raise ConfigError(f"The horizon is {horizon}. Set `kl.horizon` above 0.")
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> float:
        """See [`FixedKL.update`]."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon
        return self.coef


class LinearKL(FixedKL):
    """
    A coefficient that goes in a straight line from `coef` at the first rollout to `final` at the end of training.

    Args:
        coef (`float`): start value. final (`float`): end value.
        trainer (*optional*): the trainer whose `beta` is controlled.
    """

    def __init__(self, coef: float, final: float, trainer=None):
        super().__init__(coef, trainer)
        if final < 0:
            raise ConfigError(f"The final KL coefficient is {final}. Set `kl.final` to 0 or more.")
        self.start, self.final = float(coef), float(final)

    def update(self, kl: float, n: int) -> float:
        """See [`FixedKL.update`]; the KL is not looked at."""
        self.coef = self.start + (self.final - self.start) * self.progress
        return self.coef
