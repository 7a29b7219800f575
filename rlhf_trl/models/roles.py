"""Roles on one base: policy, reference, critic and reward as adapters of a single `PeftModel`."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import (
    adapter_config,
    adapter_weights,
    base_path,
    changes_base,
    set_adapter_weights,
)
from rlhf_trl.models.fingerprints import weights_fingerprint
from rlhf_trl.models.heads import HEADS
from rlhf_trl.models.quantization import trained_quantization
from rlhf_trl.patches.peft import repair_token_wrappers

logger = logging.getLogger(__name__)


POLICY, CRITIC = "default", "critic"
REFERENCE = "ref"  # TRL's name


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model that hold adapters."""
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def begin_training(model: PeftModel) -> None:
    """Make the policy's adapter trainable, and the reference that TRL added a copy of it."""
    repair_token_wrappers(model)
    copy_adapter(model, POLICY, REFERENCE)
    model.peft_config[POLICY].inference_mode = False
    set_trainable(model, roles=(POLICY, CRITIC))


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """
    Copy the weights of the adapter `source` to the adapter `target`, if the model has one.

    TRL 1.16 copies the policy to the reference by names that contain `.default.`, and so misses LoRA's weights of
    embeddings and trainable tokens, whose names end in `.default`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        twin = ".".join(target if part == source else part for part in name.split("."))
        if twin != name and twin in parameters:
            parameters[twin].data = parameter.data.clone()


def policy_is_active(layers: Sequence[Any]) -> bool:
    """Return whether a forward pass computes the policy; true for a model without adapters."""
    return not layers or (not layers[0].disable_adapters and list(layers[0].active_adapters) == [POLICY])


def add_role(model: PeftModel, name: str, path: str | None = None) -> Tensor | None:
    """
    Add an adapter for another role to the policy's base.

    Args:
        model (`PeftModel`): the policy.
        name (`str`): the adapter's name.
        path (`str`, *optional*): folder or hub id of a trained adapter to start from; a copy of the policy's when
            unset.

    Returns:
        `Tensor` of shape (heads, width) or `None`: weight of the score head that was saved with the adapter.

    Raises:
        ConfigError: if `path` is no LoRA adapter, or has another base.
    """
    repair_token_wrappers(model)
    if path is None:
        config = cast(LoraConfig, copy.deepcopy(model.peft_config[POLICY]))
        weights = get_peft_model_state_dict(model, adapter_name=POLICY)
    else:
        config = shared_adapter_config(path)
        check_same_base(path, config, model)
        if config.bias != "none" or changes_base(config):
            option = "bias" if config.bias != "none" else "init_lora_weights"
            raise ConfigError(
                f"The adapter `{path}` was trained with `{option}={getattr(config, option)}`, which changes the base "
                "that the policy shares. Train it again without, or use `model` instead of `adapter`."
            )
        weights = adapter_weights(path)
    heads = {key: weight for key, weight in weights.items() if key.split(".")[-2] in HEADS}
    config.task_type = model.peft_config[POLICY].task_type
    config.modules_to_save = [layer for layer in config.modules_to_save or [] if layer not in HEADS] or None
    config.inference_mode, config.lora_dropout = False, 0.0
    model.add_adapter(name, config)
    trunk = {key: weight for key, weight in weights.items() if key not in heads}
    set_adapter_weights(model, trunk, name, path or "default")
    return next((weight for key, weight in heads.items() if "lm_head" not in key and key.endswith("weight")), None)


def set_trainable(model: PeftModel, roles: tuple[str, ...]) -> None:
    """Make the adapters of `roles` trainable and freeze all others; PEFT's `set_adapter` would leave one trainable."""
    adapters = set(model.peft_config)
    for name, parameter in model.named_parameters():
        if adapter := adapters.intersection(name.split(".")):
            parameter.requires_grad_(adapter <= set(roles))


def shared_adapter_config(path: str) -> LoraConfig:
    """
    Return the config of an adapter that is to share the policy's base.

    Raises:
        ConfigError: if there is no LoRA adapter at `path`.
    """
    config = adapter_config(path)
    if config is None:
        raise ConfigError(
            f"`{path}` holds no adapter, so it can't share the policy's base. Name a run that was trained with "
            "`adapter=lora`, or use `model` instead of `adapter`, which loads it as a network of its own."
        )
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"`{path}` is an adapter of type `{getattr(config.peft_type, 'value', config.peft_type)}`, and only LoRA "
            "adapters can share the policy's base. Use `model` instead of `adapter`."
        )
    return config


def check_same_base(path: str, config: PeftConfig, model: PeftModel) -> None:
    """
    Check that an adapter was trained on the policy's base.

    Raises:
        ConfigError: if the adapter at `path` was trained on another base or quantization, or if the base has changed
            since.
    """
    base = cast(PreTrainedModel, model.get_base_model())
    ours, theirs = str(base.config.name_or_path), base_path(path, config)
    if Path(ours).is_dir() and Path(theirs).is_dir():
        same = Path(ours).resolve() == Path(theirs).resolve() or weights_fingerprint(ours) == weights_fingerprint(
            theirs
        )
    else:
        same = ours == theirs
    trained, here = trained_quantization(path), getattr(base.config, "quantization_config", None)
    if trained is not None and (here is None or trained.to_dict() != here.to_dict()):
        raise ConfigError(
            f"The adapter `{path}` was trained on a quantized base, and the policy's is "
            f"{'not quantized' if here is None else 'quantized otherwise'}. Train both on the base as it is in one of "
            "them, such as with `adapter=qlora`."
        )
    if trained is None and here is not None:
        logger.warning("The adapter `%s` was not trained on a quantized base, as the policy's is.", path)
    if not same:
        raise ConfigError(
            f"The adapter `{path}` was trained on the base `{theirs}`, and the policy's base is `{ours}`. Adapters "
            "can only share the base that they were trained on: train both from one model."
        )
