"""The model that a training run starts from: full, or an adapter that is trained further."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import LoraConfig, LoraModel, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import (
    adapter_config,
    adapter_weights,
    base_path,
    changes_base,
    model_fingerprint,
    set_adapter_weights,
    with_adapter,
)
from rlhf_trl.models.heads import HEADS, adapter_head_names, check_head_count
from rlhf_trl.models.loading import load_full, refuse_reward_model
from rlhf_trl.models.merging import merge_adapter
from rlhf_trl.models.quantization import start_quantization, trained_quantization
from rlhf_trl.models.vision import with_vision
from rlhf_trl.patches.engines import whole_weights

logger = logging.getLogger(__name__)

# Options of a LoraConfig that make two adapters the same network; the others are about initialization and training
SHAPE = ("r", "lora_alpha", "use_rslora", "use_dora", "bias")
# Further ones, which count only if the config sets them
OPTIONAL_SHAPE = ("trainable_token_indices", "rank_pattern", "alpha_pattern")
# File in the folder of a merged initial model, with what it was merged of
SOURCE_FILE = "made_of.txt"


def load_initial_model(
    path: str,
    task_type: str,
    peft_config: PeftConfig | None,
    merge_dir: str,
    revision: str | None = None,
    heads: Sequence[str] | None = None,
    vision: str = "lora",
    **options: Any,
) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
    """
    Return the model that a run starts from and the `peft_config` for its TRL trainer.

    - A full model: itself. The trainer puts a fresh adapter on it if `peft_config` is given.
    - An adapter, with `peft_config`: the same adapter on its unmerged base; TRL keeps a frozen copy of it as the
      reference. A policy's adapter gets a score head for `SEQ_CLS`.
    - An adapter, without `peft_config`: the adapter merged into its base, written to `merge_dir` and loaded from
      there, since TRL loads the reference from the path of the model.

    An adapter is frozen until [`~rlhf_trl.models.roles.begin_training`]: on a quantized base TRL rounds trainable
    weights to bfloat16, which would change a saved adapter and a copy of the base's embedding.

    Args:
        path (`str`):
            Folder or hub id.
        task_type (`str`):
            `CAUSAL_LM` or `SEQ_CLS`.
        peft_config (`peft.PeftConfig`, *optional*):
            Adapter to train.
        merge_dir (`str`):
            Folder for the merged model.
        revision (`str`, *optional*):
            As in `from_pretrained`.
        heads (`Sequence[str]`, *optional*):
            Names of the heads of a `SEQ_CLS` model; one score without them.
        vision (`str`):
            What an adapter does with a model's vision tower, see [`~rlhf_trl.models.vision.with_vision`].
        **options:
            See [`~rlhf_trl.models.loading.load_model`].

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the adapter at `path` has another shape than `peft_config`.
    """
    saved = adapter_config(path, revision)
    if saved is None:
        model = load_full(path, task_type, revision=revision, heads=heads, **options)
        if peft_config is not None:
            peft_config.inference_mode = True
            peft_config = with_vision(peft_config, model, vision)
        return model, peft_config
    refuse_reward_model(path, task_type, saved.task_type == "SEQ_CLS")
    if peft_config is None:
        with PartialState().main_process_first():
            # An earlier run may have merged another adapter, or a base that has been trained again since
            source = f"{path} {model_fingerprint(path, revision)} {trained_quantization(path)}"
            stamp = Path(merge_dir, SOURCE_FILE)
            if not stamp.is_file() or stamp.read_text(encoding="utf-8") != source:
                merge_adapter(path, merge_dir, revision, options.get("trust_remote_code", False))
                stamp.write_text(source, encoding="utf-8")
        return load_full(merge_dir, task_type, heads=heads, **options), None
    if not isinstance(saved, LoraConfig) or not isinstance(peft_config, LoraConfig):
        kind = (saved if isinstance(peft_config, LoraConfig) else peft_config).peft_type
        raise ConfigError(
            f"The run would train the adapter `{path}` further, which is for LoRA adapters only, and one of the type "
            f"`{getattr(kind, 'value', kind)}` is there or in `adapter.peft`. Set `adapter=none` (it is merged, and "
            "everything is trained)."
        )
    if options.get("device_map") != "meta":  # where nothing is computed
        options["quantization_config"] = start_quantization(path, options.get("quantization_config"))
        if options["quantization_config"] is not None and trained_quantization(path) is None:
            logger.warning("The adapter `%s` was trained on an unquantized base, and this one is quantized.", path)
    base = load_full(base_path(path, saved), task_type, revision=saved.revision, heads=heads, **options)
    _check_shape(path, saved, cast(LoraConfig, with_vision(peft_config, base, vision)), base)
    saved.base_model_name_or_path = base.config.name_or_path
    saved.lora_dropout = peft_config.lora_dropout
    if saved.task_type == task_type:
        if task_type == "SEQ_CLS":
            check_head_count(path, len(adapter_head_names(path, revision)), len(heads or ["score"]))
        model = with_adapter(base, path, saved, revision)
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise ConfigError(
                f"The adapter `{path}` changes the output layer, and TRL's trainers read that layer's own weights. "
                f"Merge it with `stage=merge model.path={path}` and start from `{path}/merged`."
            )
        return model, None
    return _with_score_head(base, path, saved, revision), None


def _check_shape(path: str, saved: LoraConfig, wanted: LoraConfig, base: PreTrainedModel) -> None:
    if changes_base(saved):
        raise ConfigError(
            f"The adapter `{path}` began with `init_lora_weights={saved.init_lora_weights}`, which changes its base, "
            f"so it has no unchanged base to be trained further on. Merge it with `stage=merge model.path={path}` "
            f"and start from `{path}/merged`."
        )
    names = [
        *(n for n in SHAPE if getattr(saved, n) != getattr(wanted, n)),
        *(n for n in OPTIONAL_SHAPE if getattr(wanted, n) and getattr(saved, n) != getattr(wanted, n)),
    ]
    if wanted.modules_to_save and set(wanted.modules_to_save) - HEADS != set(saved.modules_to_save or []) - HEADS:
        names.append("modules_to_save")
    differing = [
        f"`{name}` is {getattr(saved, name)} there and {getattr(wanted, name)} in `adapter.peft`" for name in names
    ]
    if _adapted_layers(saved, base, wanted.task_type) != _adapted_layers(wanted, base, wanted.task_type):
        differing.append(
            f"`target_modules` is {_target_modules(saved)} there and {_target_modules(wanted)} in `adapter.peft`"
        )
    if differing:
        raise ConfigError(
            f"The run would train the adapter `{path}` further, and asks for an adapter of another shape: "
            f"{'; '.join(differing)}. Set `adapter.peft` to the same, or merge the adapter with "
            f"`stage=merge model.path={path}` and start from `{path}/merged`."
        )


def _adapted_layers(config: LoraConfig, base: PreTrainedModel, task_type: Any) -> set[str]:
    """Return the names of the layers that get an adapter, found on a copy of the base without weights."""
    config = copy.deepcopy(config)
    config.task_type = task_type  # decides which head `all-linear` excludes
    with whole_weights(), torch.device("meta"):
        return set(LoraModel(type(base)._from_config(base.config), config, "default").targeted_module_names)


def _target_modules(config: LoraConfig) -> str:
    targets = config.target_modules
    return targets if isinstance(targets, str) else str(sorted(targets or []))


def score_config(saved: LoraConfig) -> LoraConfig:
    """Return the config of a policy's adapter on a classifier, whose score head is trained with it."""
    config = copy.deepcopy(saved)
    config.task_type = "SEQ_CLS"  # PEFT adds the score head to `modules_to_save`
    config.modules_to_save = [name for name in saved.modules_to_save or [] if name not in HEADS]
    return config


def _with_score_head(base: PreTrainedModel, path: str, saved: LoraConfig, revision: str | None) -> PeftModel:
    """Return `base`, a classifier, with a policy's adapter and a trainable score head."""
    config = score_config(saved)
    config.inference_mode = True
    model = get_peft_model(base, config)
    head = {name: weight for name, weight in get_peft_model_state_dict(model).items() if ".score." in name}
    policy = {name: weight for name, weight in adapter_weights(path, revision).items() if "lm_head" not in name}
    set_adapter_weights(model, head | policy, "default", path)
    return model
