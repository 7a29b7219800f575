"""Adapters on disk: their config, base, weights and heads."""

import copy
import re
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from peft import (
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import count_of
from rlhf_trl.models.calibration import read_calibration
from rlhf_trl.models.fingerprints import weights_fingerprint
from rlhf_trl.models.quantization import training_record
from rlhf_trl.models.weights import check_finite, first_of, readable
from rlhf_trl.runs.paths import ensemble_members

# What makes two adapters the same network; the rest of a LoraConfig is about how they begin or are trained.
SHAPE = ("r", "lora_alpha", "use_rslora", "use_dora", "bias")
# Of those that may be left open, since the saved adapter has them
OPEN = ("trainable_token_indices", "rank_pattern", "alpha_pattern")
# Values of `init_lora_weights` that leave the base as it is, and add nothing to it at first
NEUTRAL_INIT = (True, "gaussian", "eva", "orthogonal", "mica")
HEADS = {"lm_head", "score", "classifier"}


def adapter_config(path: str, revision: str | None = None) -> PeftConfig | None:
    """The adapter's config if `path` (folder or hub id) holds an adapter, else `None`."""
    missing = Path(path).is_absolute() and not Path(path).is_dir()  # which the hub would call a malformed id
    if missing or find_adapter_config_file(path, revision=revision) is None:
        return None
    try:
        return PeftConfig.from_pretrained(path, revision=revision)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"`adapter_config.json` of the adapter `{path}` can't be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Copy or download it again."
        ) from error


def base_path(path: str, config: PeftConfig) -> str:
    """
    The base model of an adapter: an absolute folder, or a hub id.

    A relative folder is looked for where the user stands, as PEFT does, and then beside the adapter.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the base was a folder that is gone, or whose weights are others than those
            that a run's adapter was trained on.
    """
    base = config.base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"The adapter `{path}` doesn't say what its base model is. Write its folder or hub id into "
            f"`base_model_name_or_path` of `{path}/adapter_config.json`."
        )
    for folder in (Path(base), Path(path, base)):
        if folder.is_dir():
            record = training_record(path)
            trained_on = record and record.base_fingerprint
            if trained_on is not None and trained_on != weights_fingerprint(str(folder)):
                raise ConfigError(
                    f"The adapter `{path}` was trained on `{folder.resolve()}`, whose weights have changed since. "
                    "Train it again."
                )
            return str(folder.resolve())
    if Path(base).is_absolute() or base.startswith("."):
        raise ConfigError(
            f"The base model `{base}` of the adapter `{path}` doesn't exist. Put it there, or write its new place "
            f"into `base_model_name_or_path` of `{path}/adapter_config.json`."
        )
    return base


def model_fingerprint(path: str, revision: str | None = None) -> str | None:
    """
    What tells the weights at `path` from others: of an adapter its own and its base's, of an ensemble its members', of
    a model of the hub its commit. `None` where there is nothing to tell by.
    """
    if not Path(path).is_dir():
        file = try_to_load_from_cache(path, "config.json", revision=revision)
        return Path(file).parent.name if isinstance(file, str) else None
    parts = [weights_fingerprint(folder) for folder in [path, *ensemble_members(path)]]
    config = adapter_config(path)
    if config is not None:
        parts.append(model_fingerprint(base_path(path, config), config.revision))
    return "-".join(part for part in parts if part) or None


def score_heads(model: PreTrainedModel | PeftModel) -> list[torch.nn.Linear]:
    """The layers that give a classifier's scores; under an adapter the original and the trained copy."""
    labels = model.config.num_labels
    return [
        module
        for name, module in model.named_modules()
        if {"score", "classifier"} & set(name.split("."))
        and isinstance(module, torch.nn.Linear)
        and module.out_features == labels
    ]


def adapter_heads(path: str, revision: str | None = None) -> list[str]:
    """Names of the scores of a reward model's adapter, whose files hold the head but not the model's config."""
    weights = adapter_weights(path, revision)
    count = next(
        (len(weight) for name, weight in weights.items() if re.search(r"\.(score|classifier)\.weight$", name)), 1
    )
    names = (read_calibration(path) or {}).get("heads", [])
    return names if len(names) == count else ["score"] if count == 1 else [f"LABEL_{i}" for i in range(count)]


def check_heads(path: str, found: int, wanted: int) -> None:
    if found != wanted:
        plural = "s" * (found != 1)
        raise ConfigError(
            f"The reward model `{path}` gives {found} score{plural} a completion, and the data is for {wanted}. Start "
            "from a policy, or give the data that the reward model was trained on."
        )


def check_shape(path: str, saved: PeftConfig, wanted: PeftConfig, base: PreTrainedModel) -> None:
    if not isinstance(saved, LoraConfig) or not isinstance(wanted, LoraConfig):
        raise ConfigError(
            f"`{path}` is an adapter of the kind `{saved.peft_type.value}`, which a run can't go on training. "
            "Set `adapter=none` (it is merged, and everything is trained)."
        )
    if changes_base(saved):
        raise ConfigError(
            f"The adapter `{path}` began with `init_lora_weights={saved.init_lora_weights}`, which changes its base, "
            "so a second adapter can't stand on that base. Write its merged model with `stage=merge "
            f"model.path={path}` and start from `{path}/merged`."
        )
    differing = [
        f"`{name}` is {getattr(saved, name)} there and {getattr(wanted, name)} in `adapter.peft`"
        for name in SHAPE
        if getattr(saved, name) != getattr(wanted, name)
    ]
    if _targets(saved, base, wanted.task_type) != _targets(wanted, base, wanted.task_type):
        differing.append(f"`target_modules` is {_shown(saved)} there and {_shown(wanted)} in `adapter.peft`")
    if wanted.modules_to_save and set(wanted.modules_to_save) - HEADS != set(saved.modules_to_save or []) - HEADS:
        differing.append(
            f"`modules_to_save` is {saved.modules_to_save} there and {wanted.modules_to_save} in `adapter.peft`"
        )
    differing += [
        f"`{name}` is {getattr(saved, name)} there and {getattr(wanted, name)} in `adapter.peft`"
        for name in OPEN
        if getattr(wanted, name) and getattr(saved, name) != getattr(wanted, name)
    ]
    if differing:
        raise ConfigError(
            f"The run would go on training the adapter `{path}`, but an adapter of another shape is asked for: "
            f"{'; '.join(differing)}. Set `adapter.peft` to the same, or write the adapter's merged model with "
            f"`stage=merge model.path={path}` and start from `{path}/merged`."
        )


def changes_base(config: PeftConfig) -> bool:
    """Whether an adapter subtracts from the base's weights what it begins with, as PiSSA and OLoRA do."""
    init = getattr(config, "init_lora_weights", True)
    return isinstance(init, str) and init not in NEUTRAL_INIT


def _targets(config: LoraConfig, base: PreTrainedModel, task_type: str) -> set[str]:
    """Names of the layers that get an adapter, found on a copy of the base without weights."""
    config = copy.deepcopy(config)
    config.task_type = task_type  # says which head `all-linear` leaves out
    with torch.device("meta"):
        return set(LoraModel(type(base)._from_config(base.config), config, "default").targeted_module_names)


def _shown(config: LoraConfig) -> str:
    targets = config.target_modules
    return targets if isinstance(targets, str) else str(sorted(targets))


def with_score_head(base: PreTrainedModel, path: str, saved: LoraConfig, revision: str | None) -> PeftModel:
    config = copy.deepcopy(saved)
    config.task_type = "SEQ_CLS"  # PEFT adds the score head to `modules_to_save`
    config.inference_mode = True
    config.modules_to_save = [name for name in saved.modules_to_save or [] if name not in HEADS]
    model = get_peft_model(base, config)
    head = {name: weight for name, weight in get_peft_model_state_dict(model).items() if ".score." in name}
    policy = {name: weight for name, weight in adapter_weights(path, revision).items() if "lm_head" not in name}
    set_adapter_weights(model, head | policy, "default", path)
    return model


def with_adapter(base: PreTrainedModel, path: str, config: PeftConfig, revision: str | None) -> PeftModel:
    config.base_model_name_or_path = base.config.name_or_path
    config.inference_mode = True
    model = get_peft_model(base, config)
    set_adapter_weights(model, adapter_weights(path, revision), "default", path)
    return model


def adapter_weights(path: str, revision: str | None = None) -> dict[str, Tensor]:
    """
    The weights of a saved adapter, on the CPU.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there are none, or they can't be read or aren't finite.
    """
    with readable(path):
        weights = load_peft_weights(path, device="cpu", revision=revision)
    check_finite(path, weights.items())
    return weights


def set_adapter_weights(model: PeftModel, weights: dict[str, Tensor], name: str, path: str) -> None:
    """
    Give the adapter `name` of `model` the weights that were saved at `path`, each of them and no others.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if weights are missing, have no place, or another shape: an adapter of
            another base.
    """
    base = model.get_base_model().config.name_or_path
    unexpected = []
    try:
        found = set_peft_model_state_dict(model, weights, adapter_name=name)
    except KeyError as error:  # of a layer in `modules_to_save`
        lacking = [error.args[0]]
    except RuntimeError as error:
        sizes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if not sizes:
            raise
        raise ConfigError(
            f"The adapter `{path}` doesn't fit the base `{base}`: {sizes[0]} Give the base that it was trained on."
        ) from error
    else:
        unexpected = list(found.unexpected_keys)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        filled = {id(parameter) for key, parameter in parameters.items() if key not in found.missing_keys}
        biases = {"all": ".bias", "lora_only": ".base_layer.bias"}.get(getattr(model.peft_config[name], "bias", None))
        # Buffers aren't saved, and neither is the second of two tied layers
        lacking = [
            key
            for key in found.missing_keys
            if (name in key.split(".") or (biases and key.endswith(biases)))
            and key in parameters
            and id(parameters[key]) not in filled
        ]
    if lacking or unexpected:
        said = [f"{count_of(len(lacking), 'weight')} missing from its files ({first_of(lacking)})"] * bool(lacking)
        said += [f"{count_of(len(unexpected), 'weight')} without a place ({first_of(unexpected)})"] * bool(unexpected)
        raise ConfigError(
            f"The adapter `{path}` doesn't fit the base `{base}`: {' and '.join(said)}. Give the base that it was "
            "trained on, or train it again."
        )
