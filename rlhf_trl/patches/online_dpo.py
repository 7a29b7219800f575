"""TRL: the policy and the reference of online DPO, made as those of its other trainers are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from accelerate.utils import is_peft_model
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from trl.experimental.online_dpo import online_dpo_trainer
from trl.trainer.utils import add_fused_lm_head


@contextmanager
def models_as_in_other_trainers() -> Iterator[None]:
    """
    Make `trl.experimental.online_dpo.OnlineDPOTrainer` prepare its models as TRL's stable trainers do, while it is
    constructed.

    - The reference of an adapter that is trained further: TRL copies the whole base with it, where `GRPOTrainer` and
      `DPOTrainer` keep a second adapter on the same base. Here there is no copy, and the trainer adds that adapter.
    - An adapter on a quantized base: `trl.experimental.utils.prepare_peft_model` casts the base's weights that aren't
      quantized to float32 and then, with bf16, every float32 weight to bfloat16, adapters and their saved start
      included.
    - A full reference gets the fused output layer before an engine wraps it, so that no logits of the whole vocabulary
      are kept.

    Seen in: TRL 1.16.
    Test: `test_the_reference_of_an_adapter_is_an_adapter`.
    """
    copied = online_dpo_trainer.create_reference_model

    def prepare_peft_model(
        model: PreTrainedModel, peft_config: PeftConfig | None, args: TrainingArguments
    ) -> PreTrainedModel | PeftModel:
        prepared: Any = model if peft_config is None else get_peft_model(model, peft_config)
        if args.gradient_checkpointing:
            prepared.enable_input_require_grads()
        return prepared

    def create_reference_model(model: nn.Module) -> nn.Module | None:
        if is_peft_model(model):
            return None
        reference: Any = copied(model)
        add_fused_lm_head(reference)
        return reference

    with patch.multiple(
        online_dpo_trainer, prepare_peft_model=prepare_peft_model, create_reference_model=create_reference_model
    ):
        yield
