"""Multipliers of constraints in the checkpoints of a training with `combine=lagrange`."""

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from rlhf_trl.rewards.lagrange import Lagrange
from rlhf_trl.trainers.checkpoints import resumed_state


class Multipliers(TrainerCallback, ExportableState):
    """
    Keep the multipliers of a [`~rlhf_trl.rewards.lagrange.Lagrange`] in the checkpoints of its trainer.

    Args:
        lagrange ([`~rlhf_trl.rewards.lagrange.Lagrange`]): the combination of the trainer's rewards.
    """

    def __init__(self, lagrange: Lagrange):
        self.lagrange = lagrange

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": self.lagrange.state()}

    def on_train_begin(self, args, state, control, **kwargs):
        if saved := resumed_state(self, state, "combine"):
            self.lagrange.load_state(saved)
