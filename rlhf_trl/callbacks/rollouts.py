"""
What a rollout tells a controller: the KL to the reference, for trainers that don't keep it themselves.

[`PPOTrainer`] has an attribute `last_rollout`; [`record_rollouts`] gives TRL's `GRPOTrainer` and `RLOOTrainer` the
same. It wraps private methods of TRL 1.16; tests/test_kl.py compares what it finds with forwards of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from rlhf_trl.callbacks.base import steps_per_rollout


def record_rollouts(trainer: Trainer) -> bool:
    """
    Makes `trainer.last_rollout` tell the KL of the rollout just made, on every rank alike:

        kl (`float`): mean over sequences of the summed k1 estimate, in nats; kl_std (`float`): its standard deviation
        over them; num_sequences (`int`).

    It is empty before the first rollout. `objective/kl` and `objective/kl_coef` are logged once a rollout.

    Args:
        trainer ([`PPOTrainer`], [`~trl.GRPOTrainer`] or [`~trl.RLOOTrainer`]): may be given several times.

    Returns:
        `bool`: whether KL is measured. GRPO and RLOO keep no reference where `beta` is 0: `last_rollout` stays empty.
    """
    recorded = any(isinstance(callback, RolloutRecorder) for callback in trainer.callback_handler.callbacks)
    if not recorded and not hasattr(trainer, "last_rollout"):  # PPO keeps it itself
        recorded, trainer.last_rollout = True, {}
        trainer.add_callback(RolloutRecorder(trainer))
    return trainer.beta != 0 or not recorded


class RolloutRecorder(TrainerCallback):
    """
    Keeps `last_rollout` of a `trl.GRPOTrainer` or `trl.RLOOTrainer`, see [`record_rollouts`].

    Both compute the policy's and the reference's log-probabilities of a rollout right after they sampled it, and they
    are taken from there. GRPO leaves the policy's out where a rollout is optimized in one step: then they are those of
    the loss's own forwards, in which the policy has not moved yet. No forward is added.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._heard: list[Tensor] | None = None  # log-probabilities computed since listening began
        self._rows: list[Tensor] = []  # summed k1 of this rank's sequences, one tensor a micro-batch
        self._missing = 0  # micro-batches of the rollout that the policy's log-probabilities are still missing of
        self._generate = trainer._generate_and_score_completions
        self._loss = trainer._compute_loss
        self._log_probabilities = trainer._get_per_token_logps_and_entropies
        trainer._generate_and_score_completions = self._generate_and_score_completions
        trainer._compute_loss = self._compute_loss
        trainer._get_per_token_logps_and_entropies = self._get_per_token_logps_and_entropies

    def on_step_begin(self, args, state, control, **kwargs):
        # TRL lets a rollout begin in the middle of an optimizer step: all since the last whole one count as one
        if state.global_step % steps_per_rollout(args) == 0:
            self._rows.clear()

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = self._log_probabilities(*args, **kwargs)
        if self._heard is not None:
            self._heard.append(result[0].detach())
        return result

    def _listen(self, function: Callable, *args) -> tuple[Any, list[Tensor]]:
        """What `function` returns, and the log-probabilities computed in it, in order."""
        self._heard = []
        try:
            return function(*args), self._heard
        finally:
            self._heard = None

    def _generate_and_score_completions(self, inputs):
        if not self.trainer.model.training:
            return self._generate(inputs)
        rollout, heard = self._listen(self._generate, inputs)
        if len(heard) == 2:  # the policy's, then the reference's
            self._add(*heard, rollout)
            self._tell()
        elif self.trainer.beta != 0:
            self._missing = self.trainer.args.steps_per_generation
        return rollout

    def _compute_loss(self, model, inputs):
        if not self._missing or not self.trainer.model.training:
            return self._loss(model, inputs)
        loss, heard = self._listen(self._loss, model, inputs)
        self._add(heard[0], inputs["ref_per_token_logps"], inputs)
        self._missing -= 1
        if not self._missing:
            self._tell()
        return loss

    def _add(self, logps: Tensor, ref_logps: Tensor, inputs: dict[str, Tensor]) -> None:
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        self._rows.append(torch.where(mask, logps - ref_logps, 0.0).sum(dim=1))

    def _tell(self) -> None:
        trainer = self.trainer
        kl = trainer.accelerator.gather(torch.cat(self._rows)).double()
        trainer.last_rollout = {
            "kl": kl.mean().item(),
            "kl_std": kl.std(unbiased=False).item(),
            "num_sequences": len(kl),
        }
        trainer._metrics["train"]["objective/kl"].append(trainer.last_rollout["kl"])
        trainer._metrics["train"]["objective/kl_coef"].append(float(trainer.beta))
