"""Mixin of all trainers of the package, and the trainers that add nothing else to TRL's."""

from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model

from rlhf_trl.patches.dropout import disable_dropout
from rlhf_trl.patches.engines import cast_to_shards, fsdp_on_cpu_ranks, keep_output_types
from rlhf_trl.patches.log_probs import speed_up_log_probs
from rlhf_trl.patches.peft import repair_token_wrappers
from rlhf_trl.trainers.checkpoints import CompleteCheckpoints
from rlhf_trl.trainers.held_out import ExactEvaluation
from rlhf_trl.trainers.publishing import Publishing
from rlhf_trl.trainers.workers import ignore_preemptions


class TrainerMixin(CompleteCheckpoints, ExactEvaluation, Publishing):
    """
    Mixin for trainers of TRL: [`CompleteCheckpoints`], [`~rlhf_trl.trainers.held_out.ExactEvaluation`],
    [`~rlhf_trl.trainers.publishing.Publishing`], and patched models and engines.

    With `args.disable_dropout`, dropout is disabled on every architecture, see
    [`~rlhf_trl.patches.dropout.disable_dropout`].
    """

    model: Any  # set once the constructor has run

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._patch_models()

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with FSDP2 patched before it wraps a model, see [`~rlhf_trl.patches.engines`]."""
        with fsdp_on_cpu_ranks():
            super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            keep_output_types(self.accelerator.state.fsdp_plugin)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Make the trainer's optimizer, of weights that DeepSpeed takes."""
        if self.is_deepspeed_enabled:
            cast_to_shards(self.model)
        return super().create_optimizer(*args, **kwargs)

    def get_train_dataloader(self):
        """Return the trainer's data loader, whose workers leave the signals of schedulers to this process."""
        return ignore_preemptions(super().get_train_dataloader())

    def _patch_models(self) -> None:
        for model in (self.model, getattr(self, "ref_model", None)):
            if model is not None:
                model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
                speed_up_log_probs(model.get_base_model() if is_peft_model(model) else model)
        repair_token_wrappers(self.model)
        if getattr(self.args, "disable_dropout", False):
            disable_dropout(self.model)

    def _precompute_ref_logps(self, *args, **kwargs):
        """Precompute the reference log-probabilities of DPO and KTO, which call this before their constructors end."""
        repair_token_wrappers(self.model)
        # Of the trainer that this class is mixed into
        return super()._precompute_ref_logps(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class DPOTrainer(TrainerMixin, trl.DPOTrainer):
    """`trl.DPOTrainer` with [`TrainerMixin`]."""


class KTOTrainer(TrainerMixin, trl.KTOTrainer):
    """`trl.KTOTrainer` with [`TrainerMixin`]."""
