"""Loading of models from folders and the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import (
    adapter_config,
    adapter_weights,
    base_path,
    set_adapter_weights,
    with_adapter,
)
from rlhf_trl.models.heads import HEADS, adapter_head_names, check_head_count
from rlhf_trl.models.precision import weights_dtype
from rlhf_trl.models.quantization import trained_quantization
from rlhf_trl.models.vision import auto_class
from rlhf_trl.models.weights import load_weights
from rlhf_trl.patches.bitsandbytes import keep_trainable
from rlhf_trl.patches.engines import whole_weights
from rlhf_trl.patches.peft import cast_head_inputs
from rlhf_trl.runs.paths import ensemble_members


def any_config(path: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """
    Return the config of a full model of any kind.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if Transformers knows none.
    """
    if Path(path).is_absolute() and not Path(path).is_dir():  # the hub would call it a malformed id
        raise ConfigError(f"The model folder `{path}` doesn't exist. Give an existing folder or a hub id.")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError) as error:
        remedy = "Give the folder of a model, or a hub id."
        if "trust_remote_code" in str(error):
            remedy = "It has code of its own: read it, and set `trust_remote_code` to true if you trust it."
        raise ConfigError(
            f"The model `{path}` can't be loaded ({' '.join(str(error).split())[:200]}). {remedy}"
        ) from error


def model_config(path: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """
    Return the config of a full model that is a decoder-only language model, as all stages need.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if it is none, or Transformers knows no config.
    """
    config = any_config(path, trust_remote_code, revision)
    encodes = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if getattr(config, "is_encoder_decoder", False) or (encodes and not decodes):
        kind = "encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "encoder-only"
        raise ConfigError(
            f"`{path}` is an {kind} model (`{config.model_type}`), and all stages take decoder-only ones. Use "
            "a model such as Llama, Qwen or GPT-2. (A classifier as a reward: `reward=classifier "
            "reward.classifier.path=...`.)"
        )
    return config


def load_model(
    path: str,
    task_type: str = "CAUSAL_LM",
    dtype: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
    device_map: str | None = None,
    init_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """
    Load a model as it was saved: a full one, or a frozen adapter on its base.

    Args:
        path (`str`):
            Folder or hub id.
        task_type (`str`):
            `CAUSAL_LM`, or `SEQ_CLS` for one score per sequence and head.
        dtype (`str`, *optional*):
            Type of the weights (of the base's, for an adapter): `float32`, `bfloat16`, `auto` (as saved) ... Unset,
            bfloat16 where the device supports it, else float32.
        attn_implementation (`str`, *optional*), trust_remote_code (`bool`), revision (`str`, *optional*):
            As in `from_pretrained`.
        quantization (`transformers.BitsAndBytesConfig`, *optional*):
            Quantization of the weights (of the base's, for an adapter). By default an adapter's base is quantized as
            in its training.
        device_map (`str`, *optional*):
            As in `from_pretrained`; `meta` checks the files and takes no memory.
        init_kwargs (`dict`, *optional*):
            Further arguments of `from_pretrained`, such as `use_kernels`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a reward model is loaded as a policy, or the base of an adapter is gone.
    """
    options = {
        "dtype": weights_dtype(dtype, is_trained=False),
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "quantization_config": quantization,
        "device_map": device_map,
        **(init_kwargs or {}),
    }
    config = adapter_config(path, revision)
    if config is None:
        return load_full(path, task_type, revision=revision, **options)
    refuse_reward_model(path, task_type, config.task_type == "SEQ_CLS")
    if device_map != "meta":  # where nothing is computed
        options["quantization_config"] = quantization or trained_quantization(path)
    heads = adapter_head_names(path, revision) if task_type == "SEQ_CLS" else None
    base = load_full(base_path(path, config), task_type, revision=config.revision, heads=heads, **options)
    # A PeftModel forwards every attribute of the model that it wraps
    return cast(PreTrainedModel, with_adapter(base, path, config, revision).eval())


@whole_weights()
def load_reward_model(
    path: str, dtype: str | None = None, trust_remote_code: bool = False, device_map: str | None = None
) -> PreTrainedModel:
    """
    Load a trained reward model, full or a frozen adapter on its base.

    It gives one score per sequence and head; the names of the heads are in `config.id2label`. An ensemble is one base
    with an adapter for each member. Each rank loads all of it, also where an engine shards the policy.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the model has no trained score head, or the members of an ensemble don't
            share a base.
    """
    if members := ensemble_members(path):
        configs = [cast(PeftConfig, adapter_config(member)) for member in members]  # which `ensemble_members` checked
        bases = {base_path(member, config) for member, config in zip(members, configs, strict=True)}
        if len(bases) > 1:
            raise ConfigError(f"The members of the ensemble `{path}` have several bases: {', '.join(sorted(bases))}.")
        if len({str(trained_quantization(member)) for member in members}) > 1:
            raise ConfigError(f"The members of the ensemble `{path}` were trained on differently quantized bases.")
        model = cast(PeftModel, load_reward_model(members[0], dtype, trust_remote_code, device_map))
        for i in range(1, len(members)):
            configs[i].inference_mode = True
            model.add_adapter(f"member_{i}", configs[i])
            set_adapter_weights(model, adapter_weights(members[i]), f"member_{i}", members[i])
        return cast(PreTrainedModel, model.eval())
    if task_type(path, trust_remote_code) != "SEQ_CLS":
        raise ConfigError(f"`{path}` is no reward model: it has no score head. Train one with `stage=reward`.")
    return load_model(path, "SEQ_CLS", dtype, trust_remote_code=trust_remote_code, device_map=device_map)


def task_type(path: str, trust_remote_code: bool = False) -> str:
    """Return `SEQ_CLS` for a reward model and `CAUSAL_LM` for a policy, full or as an adapter."""
    if (adapter := adapter_config(path)) is not None:
        return "SEQ_CLS" if adapter.task_type == "SEQ_CLS" else "CAUSAL_LM"
    architectures = model_config(path, trust_remote_code).architectures or [""]
    return "SEQ_CLS" if "SequenceClassification" in architectures[0] else "CAUSAL_LM"


def load_full(
    path: str,
    task_type: str,
    trust_remote_code: bool = False,
    revision: str | None = None,
    heads: Sequence[str] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """
    Load a full model, not an adapter, as [`load_model`] does.

    Args:
        path (`str`), task_type (`str`), trust_remote_code (`bool`), revision (`str`, *optional*), **options: see
            [`load_model`].
        heads (`Sequence[str]`, *optional*): names of the heads of a new classifier, or of those that a saved one must
            have.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the model can't be loaded, or doesn't fit the task.
    """
    config = model_config(path, trust_remote_code, revision)
    architecture = (config.architectures or [""])[0]
    refuse_reward_model(path, task_type, "SequenceClassification" in architecture)
    if revision is not None and not Path(path).is_dir():
        # TRL loads the reference by the model's path alone, so the path must be that of the revision
        path, revision = snapshot_download(path, revision=revision), None
    is_scored = "SequenceClassification" in architecture
    if task_type == "SEQ_CLS" and not is_scored:
        names = list(heads or ["score"])
        options |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = load_weights(
        auto_class(config, task_type), path, new_head=not is_scored, trust_remote_code=trust_remote_code, **options
    )
    if task_type == "SEQ_CLS":
        if heads is not None:
            check_head_count(path, cast(int, model.config.num_labels), len(heads))
        for name, head in model.named_children():
            if name in HEADS and isinstance(head, torch.nn.Linear):
                # A score of 4 in bfloat16 is a multiple of 1/64, and a trained head would round its updates away
                cast_head_inputs(head.float())
    if getattr(model, "is_loaded_in_4bit", False):
        keep_trainable(model)
    return model


def refuse_reward_model(path: str, task_type: str, is_reward_model: bool) -> None:
    """
    Refuse to load a reward model as a policy.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if it is one.
    """
    if is_reward_model and task_type == "CAUSAL_LM":
        raise ConfigError(
            f"`{path}` is a reward model and can't write text. Start from a policy: set `model.run=sft`, or its path."
        )
