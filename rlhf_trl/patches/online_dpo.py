"""TRL: the policy and the reference of online DPO, made as those of its other trainers are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

from accelerate.utils import is_peft_model
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from trl.experimental.online_dpo import OnlineDPOConfig, online_dpo_trainer
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id

from rlhf_trl.patches.engines import DEALT_OUT


@contextmanager
def models_as_in_other_trainers(args: OnlineDPOConfig) -> Iterator[None]:
    """
    Make `trl.experimental.online_dpo.OnlineDPOTrainer` prepare its models as TRL's stable trainers do, while it is
    constructed.

    - The reference of an adapter that is trained further: TRL copies the whole base with it, where `GRPOTrainer` and
      `DPOTrainer` keep a second adapter on the same base. Here there is no copy, and the trainer adds that adapter.
    - An adapter on a quantized base: `trl.experimental.utils.prepare_peft_model` casts the base's weights that aren't
      quantized to float32 and then, with bf16, every float32 weight to bfloat16, adapters and their saved start
      included.
    - A full reference gets the fused output layer before an engine wraps it, so that no logits of the whole vocabulary
      are kept. TRL copies it from the policy, and refuses that under ZeRO-3, which gives each rank parts of weights:
      there it is loaded from the policy's path, with `model_init_kwargs`, which TRL refuses beside a loaded policy.

    Seen in: TRL 1.16.
    Test: `test_the_reference_of_an_adapter_is_an_adapter`, `test_a_reference_that_cannot_be_copied_is_loaded`.

    Args:
        args (`trl.experimental.online_dpo.OnlineDPOConfig`): the trainer's arguments.
    """
    init_kwargs = args.model_init_kwargs
    copied = online_dpo_trainer.create_reference_model

    def prepare_peft_model(
        model: PreTrainedModel, peft_config: PeftConfig | None, args: TrainingArguments
    ) -> PreTrainedModel | PeftModel:
        prepared: Any = model if peft_config is None else get_peft_model(model, peft_config)
        if args.gradient_checkpointing:
            prepared.enable_input_require_grads()
        return prepared

    def loaded(model: Any) -> nn.Module:
        given = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation, "device_map": None}
        given |= {"trust_remote_code": args.trust_remote_code} | cast(dict, init_kwargs or {})
        return create_model_from_path(get_config_model_id(model.config), **given).eval().requires_grad_(False)

    def create_reference_model(model: nn.Module) -> nn.Module | None:
        if is_peft_model(model):
            return None
        dealt_out = any(hasattr(weight, DEALT_OUT) for weight in model.parameters())
        reference: Any = loaded(model) if dealt_out else copied(model)
        add_fused_lm_head(reference)
        return reference

    names = {"prepare_peft_model": prepare_peft_model, "create_reference_model": create_reference_model}
    with patch.multiple(online_dpo_trainer, **names), patch.object(args, "model_init_kwargs", None):
        yield
