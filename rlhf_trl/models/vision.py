"""Models that read images beside text: which ones do, their parts, and score heads on them."""

import functools
import re
from typing import Any, cast

from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from rlhf_trl.data.multimodal import processor_of
from rlhf_trl.errors import ConfigError

CHOICES = ("frozen", "lora", "full")


def has_processor(model_type: str | None) -> bool:
    """Return whether models of a type read more than text, such as images or sound, by their `model_type`."""
    return model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


def reads_images(config: PreTrainedConfig) -> bool:
    """Return whether a model reads images, by its config; false for the language part of one, saved by itself."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return False
    whole = _class_of(config).__name__
    return (config.architectures or [whole])[0] in (whole, f"{_stem(whole)}ForSequenceClassification")


def auto_class(config: PreTrainedConfig, task_type: str) -> type:
    """
    Return the class of transformers that loads a model for a task.

    Args:
        config (`PreTrainedConfig`): that of the model.
        task_type (`str`): `CAUSAL_LM` or `SEQ_CLS`.
    """
    if task_type == "SEQ_CLS":
        if reads_images(config):
            register_scores(config)
        return AutoModelForSequenceClassification
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def register_scores(config: PreTrainedConfig) -> None:
    """
    Let `AutoModelForSequenceClassification` make and load models of this type with a score head: on the last token's
    hidden state of the whole model. transformers has such classes for a few types only.
    """
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        AutoModelForSequenceClassification.register(type(config), _score_class(_class_of(config)), exist_ok=True)


@functools.cache
def _score_class(whole: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class of a model that writes, with a score head instead of its output layer."""
    base = next(each for each in whole.__mro__ if each.__name__.endswith("PreTrainedModel"))
    name = f"{_stem(whole.__name__)}ForSequenceClassification"
    prefix = whole.base_model_prefix
    if not prefix:
        raise ConfigError(f"`{whole.__name__}` has no trunk of its own to put a score head on. Give another model.")
    members = {"base_model_prefix": prefix, "__module__": __name__}
    return cast(type[PreTrainedModel], type(name, (GenericForSequenceClassification, base), members))


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    found: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _stem(name: str) -> str:
    return re.split("For[A-Z]", name)[0]


def find_unused_parameters(args: Any, tokenizer: Any) -> None:
    """
    Let DDP look for parameters without a gradient, where a model reads images: not every layer of a vision tower is
    read (LLaVA's last norm isn't), and rows without images leave all of it out. TRL does so in its own trainers with
    images.

    Args:
        args (`TrainingArguments`): changed in place.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
    """
    if tokenizer is not None and processor_of(tokenizer) is not None:
        args.ddp_find_unused_parameters = True


def vision_parts(model: PreTrainedModel) -> list[str]:
    """Return the names of the parts of a model beside its language part: the vision tower, the projector ..."""
    trunk: Any = model.base_model
    language = trunk.get_decoder() if hasattr(trunk, "get_decoder") else trunk.language_model
    prefix = next(name for name, module in model.named_modules() if module is trunk)
    inside = set(map(id, language.modules()))
    return [
        f"{prefix}.{name}"
        for name, child in trunk.named_children()
        if id(child) not in inside and any(True for _ in child.parameters()) and not _holds(child, language)
    ]


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(each is part for each in module.modules())


def with_vision(peft_config: PeftConfig, model: PreTrainedModel, vision: str) -> PeftConfig:
    """
    Set what an adapter does with the parts of a model beside its language part.

    Args:
        peft_config (`peft.PeftConfig`): the adapter; changed in place.
        model (`PreTrainedModel`): its base.
        vision (`str`): `frozen`: those parts stay as they are. `lora`: they get an adapter too. `full`: they are
            trained in full, and saved with the adapter.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: for another value, or an adapter that excludes layers of its own.
    """
    if vision not in CHOICES:
        raise ConfigError(f"`adapter.vision` is `{vision}`. Set it to one of {', '.join(CHOICES)}.")
    if not reads_images(model.config) or vision == "lora":
        return peft_config
    if not isinstance(peft_config, LoraConfig) or peft_config.exclude_modules:
        raise ConfigError(
            f"`adapter.vision={vision}` sets `exclude_modules` of a LoRA adapter, which this one has already or "
            "doesn't know. Set `adapter.vision=lora`, and name the layers in `adapter.peft`."
        )
    parts = vision_parts(model)
    peft_config.exclude_modules = rf"(.*\.)?({'|'.join(map(re.escape, parts))})(\..*)?"
    if vision == "full":
        peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *parts]
    return peft_config
