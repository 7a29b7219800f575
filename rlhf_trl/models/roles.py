"""Several roles as adapters on one base: policy, reference, critic and reward in a single `PeftModel`."""

import copy
import logging
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import (
    HEADS,
    adapter_config,
    adapter_weights,
    base_path,
    changes_base,
    set_adapter_weights,
)
from rlhf_trl.models.fingerprints import weights_fingerprint
from rlhf_trl.models.quantization import trained_quantization
from rlhf_trl.patches.peft import repair_token_wrappers

logger = logging.getLogger(__name__)


POLICY, CRITIC = "default", "critic"
REFERENCE = "ref"  # TRL's name


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that hold adapters."""
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def begin_training(model: PeftModel) -> None:
    """Let the policy's adapter, frozen till now, be trained, and make the reference that TRL copied its start."""
    repair_token_wrappers(model)
    copy_adapter(model, POLICY, REFERENCE)
    model.peft_config[POLICY].inference_mode = False
    set_trainable(model, roles=(POLICY, CRITIC))


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """
    Give the adapter `target`, where there is one, the weights of `source`.

    TRL 1.16 copies the policy to the reference by names that hold `.default.`: without LoRA's weights of embeddings
    and without single tokens, whose names end in `.default`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        twin = ".".join(target if part == source else part for part in name.split("."))
        if twin != name and twin in parameters:
            parameters[twin].data = parameter.data.clone()


def policy_is_active(layers: list[nn.Module]) -> bool:
    """Whether a forward now computes the policy: true without adapters, and false for a reference made of them."""
    return not layers or (not layers[0].disable_adapters and list(layers[0].active_adapters) == [POLICY])


def add_role(model: PeftModel, name: str, path: str | None = None) -> Tensor | None:
    """
    Add an adapter for another role to the policy's base.

    Args:
        model (`PeftModel`): the policy.
        name (`str`): the adapter's name.
        path (`str`, *optional*): folder or hub id of a trained adapter to start from. Unset, the adapter starts as a
            copy of the policy's.

    Returns:
        `Tensor` or `None`: the weight of the score head that was saved with the adapter, (number of scores, width).

    Raises:
        ConfigError: if `path` is no LoRA adapter, or one of another base.
    """
    repair_token_wrappers(model)
    if path is None:
        config = copy.deepcopy(model.peft_config[POLICY])
        weights = get_peft_model_state_dict(model, adapter_name=POLICY)
    else:
        config = saved_adapter(path)
        check_same_base(path, model)
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
    """Let the adapters of `roles` be trained, and no other adapter. PEFT's `set_adapter` leaves a single one so."""
    adapters = set(model.peft_config)
    for name, parameter in model.named_parameters():
        if adapter := adapters.intersection(name.split(".")):
            parameter.requires_grad_(adapter <= set(roles))


def saved_adapter(path: str) -> PeftConfig:
    """
    The config of an adapter that is to share the policy's base.

    Raises:
        ConfigError: if there is no adapter at `path`.
    """
    config = adapter_config(path)
    if config is None:
        raise ConfigError(
            f"`{path}` holds no adapter, so it can't share the policy's base. Name a run that was trained with "
            "`adapter=lora`, or use `model` instead of `adapter`, which loads it as a network of its own."
        )
    return config


def check_same_base(path: str, model: PeftModel) -> None:
    """
    Raises:
        ConfigError: if the adapter at `path` was trained on another base than the policy's, or on weights that have
            changed since.
    """
    ours = model.get_base_model().config.name_or_path
    theirs = base_path(path, adapter_config(path))
    if Path(ours).is_dir() and Path(theirs).is_dir():
        same = Path(ours).resolve() == Path(theirs).resolve() or weights_fingerprint(ours) == weights_fingerprint(
            theirs
        )
    else:
        same = ours == theirs
    trained, here = trained_quantization(path), getattr(model.get_base_model().config, "quantization_config", None)
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
