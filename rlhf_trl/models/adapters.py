"""Saved adapters: their config, base and weights."""

from pathlib import Path
from typing import NamedTuple, cast

from huggingface_hub import try_to_load_from_cache
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import count_of
from rlhf_trl.models.fingerprints import weights_fingerprint
from rlhf_trl.models.weights import check_finite, first_names, reading_weights
from rlhf_trl.runs.paths import ensemble_members
from rlhf_trl.runs.record import read_run

# Values of `init_lora_weights` that leave the base as it is, and add nothing to it at first
NEUTRAL_INIT = (True, "gaussian", "eva", "orthogonal", "mica")


class BaseRecord(NamedTuple):
    """
    Base of an adapter as the run recorded it that trained the adapter.

    Attributes:
        fingerprint (`str`, *optional*): hash of the base's weights.
        quantization (`BitsAndBytesConfig`, *optional*): quantization of the base in training.
    """

    fingerprint: str | None
    quantization: BitsAndBytesConfig | None


def adapter_config(path: str, revision: str | None = None) -> PeftConfig | None:
    """Return the config of the adapter at `path` (folder or hub id), `None` if it holds no adapter."""
    missing = Path(path).is_absolute() and not Path(path).is_dir()  # the hub would call it a malformed id
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
    Return the base model of an adapter: an absolute folder, or a hub id.

    A relative folder is looked up in the working directory, as PEFT does, and then beside the adapter.

    Args:
        path (`str`): folder or hub id of the adapter.
        config (`PeftConfig`): its config.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the base is a folder that is gone, or whose weights have changed since a
            run trained the adapter.
    """
    base = config.base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"The adapter `{path}` doesn't say what its base model is. Write its folder or hub id into "
            f"`base_model_name_or_path` of `{path}/adapter_config.json`."
        )
    for folder in (Path(base), Path(path, base)):
        if folder.is_dir():
            trained_on = base_record(path).fingerprint
            if trained_on is not None and trained_on != weights_fingerprint(str(folder)):
                raise ConfigError(
                    f"The adapter `{path}` was trained on `{folder.resolve()}`, whose weights have changed since. "
                    "Train it again."
                )
            return str(folder.resolve())
    if Path(base).is_absolute() or base.startswith("."):
        raise ConfigError(
            f"The base model `{base}` of the adapter `{path}` doesn't exist. Put it there, or write its new path "
            f"into `base_model_name_or_path` of `{path}/adapter_config.json`."
        )
    return base


def base_record(path: str) -> BaseRecord:
    """Return what the run that trained the adapter at `path`, a run's folder or checkpoint, recorded of its base."""
    record = None
    if Path(path).is_dir():
        run = Path(path).parent if Path(path).name.startswith("checkpoint-") else path
        record = read_run(path) or read_run(run)
    if record is None:
        return BaseRecord(None, None)
    quantization = BitsAndBytesConfig.from_dict(record.quantization) if record.quantization else None
    return BaseRecord(record.base_fingerprint, cast(BitsAndBytesConfig | None, quantization))


def model_fingerprint(path: str, revision: str | None = None) -> str | None:
    """
    Return a hash of all weights that a model is made of, `None` if there is nothing to hash.

    For an adapter it covers its own and its base's, for an ensemble its members'; for a model of the hub it is the
    commit.
    """
    if not Path(path).is_dir():
        file = try_to_load_from_cache(path, "config.json", revision=revision)
        return Path(file).parent.name if isinstance(file, str) else None
    parts = [weights_fingerprint(folder) for folder in [path, *ensemble_members(path)]]
    config = adapter_config(path)
    if config is not None:
        parts.append(model_fingerprint(base_path(path, config), config.revision))
    return "-".join(part for part in parts if part) or None


def changes_base(config: PeftConfig) -> bool:
    """Return whether the adapter's initialization changes the base's weights, as PiSSA and OLoRA do."""
    init = getattr(config, "init_lora_weights", True)
    return isinstance(init, str) and init not in NEUTRAL_INIT


def with_adapter(base: PreTrainedModel, path: str, config: PeftConfig, revision: str | None) -> PeftModel:
    """Return `base` with the frozen adapter that was saved at `path` with `config`."""
    config.base_model_name_or_path = base.config.name_or_path
    config.inference_mode = True
    model = get_peft_model(base, config)
    set_adapter_weights(model, adapter_weights(path, revision), "default", path)
    return model


def adapter_weights(path: str, revision: str | None = None) -> dict[str, Tensor]:
    """
    Return the weights of a saved adapter, on the CPU.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there are none, or they can't be read or aren't finite.
    """
    with reading_weights(path):
        weights = load_peft_weights(path, device="cpu", revision=revision)
    check_finite(path, weights.items())
    return weights


def set_adapter_weights(model: PeftModel, weights: dict[str, Tensor], name: str, path: str) -> None:
    """
    Load all weights of a saved adapter into a model.

    Args:
        model (`PeftModel`): model with the adapter `name`.
        weights (`dict[str, Tensor]`): see [`adapter_weights`].
        name (`str`): name of the adapter in `model`.
        path (`str`): where the weights were saved, for messages.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if weights are missing, unexpected, or of another shape, as in an adapter of
            another base.
    """
    base = cast(PreTrainedModel, model.get_base_model()).config.name_or_path
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
        biases = {"all": ".bias", "lora_only": ".base_layer.bias"}.get(
            getattr(model.peft_config[name], "bias", "none")
        )
        # Buffers aren't saved, and neither is the second of two tied layers
        lacking = [
            key
            for key in found.missing_keys
            if (name in key.split(".") or (biases and key.endswith(biases)))
            and key in parameters
            and id(parameters[key]) not in filled
        ]
    if lacking or unexpected:
        problems = [f"{count_of(len(lacking), 'weight')} missing from its files ({first_names(lacking)})"] * bool(
            lacking
        )
        problems += [f"{count_of(len(unexpected), 'weight')} without a place ({first_names(unexpected)})"] * bool(
            unexpected
        )
        raise ConfigError(
            f"The adapter `{path}` doesn't fit the base `{base}`: {' and '.join(problems)}. Give the base that it was "
            "trained on, or train it again."
        )
