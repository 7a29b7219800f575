"""Loading of weights, all of them or none, and checks of their values."""

import logging
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import count_of, names_of
from rlhf_trl.patches.warnings import no_load_report

logger = logging.getLogger(__name__)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_weights(auto_class: type, path: str, new_head: bool = False, **options: Any) -> PreTrainedModel:
    """
    Load a full model, all of whose weights must be in its files.

    Args:
        auto_class (`type`):
            Class such as `transformers.AutoModelForCausalLM`.
        path (`str`):
            Folder or hub id.
        new_head (`bool`):
            Whether a classifier gets a new head and drops the one in the files, which are a policy's.
        **options:
            As in `from_pretrained`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if weights are missing, have another shape than `config.json` says, aren't
            finite, or can't be read.
    """
    with no_load_report(), reading_weights(path):
        # With mismatched sizes ignored here, they are named below
        model, found = auto_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if new_head and auto_class is AutoModelForSequenceClassification:
        trunk = f"{model.base_model_prefix}."
        missing, unexpected = ([key for key in keys if key.startswith(trunk)] for keys in (missing, unexpected))
    if mismatched := sorted(found["mismatched_keys"]):
        key, there, wanted = mismatched[0]
        labels = model.config.num_labels
        text = (
            f"{count_of(len(mismatched), 'weight')} of `{path}` {'has' if len(mismatched) == 1 else 'have'} another "
            f"shape than its config.json says: `{key}` is {_as_text(there)}, and {_as_text(wanted)} is expected."
        )
        if wanted[0] == labels != there[0] and not key.startswith(f"{model.base_model_prefix}."):
            text += (
                f" `num_labels` is {labels} there (2 where config.json doesn't name it). "
                f'Write `"num_labels": {there[0]}` into `{path}/config.json`.'
            )
        raise ConfigError(text)
    if missing:
        text = f"`{path}` lacks {count_of(len(missing), 'weight')} of {type(model).__name__}: {first_names(missing)}. "
        if unexpected:
            text += f"Its files hold {first_names(unexpected)} instead, which have no place in it. "
        raise ConfigError(f"{text}Rename what has another name, or give a folder that holds the whole model.")
    if unexpected:
        logger.warning(
            "`%s` holds %s that %s has no place for and that stay unused: %s.",
            path,
            count_of(len(unexpected), "weight"),
            type(model).__name__,
            first_names(unexpected),
        )
    check_finite(path, model.named_parameters())
    return model


@contextmanager
def reading_weights(path: str) -> Iterator[None]:
    """
    Turn the errors of missing and damaged weight files into one that names the file.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: for such an error.
    """
    try:
        yield
    except (OSError, EOFError, SafetensorError, pickle.UnpicklingError, HFValidationError) as error:
        reason, remedy = " ".join(str(error).split())[:200], "Copy or download the folder again."
        if isinstance(error, pickle.UnpicklingError):
            reason = "a pickle that is damaged, or that holds more than weights and could run code"
            remedy = "Give the model as safetensors."
        where = _broken_weights(path) or path
        raise ConfigError(f"The weights of `{where}` can't be read ({reason}). {remedy}") from error


def _broken_weights(folder: str) -> Path | None:
    """Return the first weight file of a local model that can't be opened, or that is a pickle; `None` without one."""
    for path in sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else ():
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return path
    return next(iter(sorted(Path(folder).glob("*.bin"))), None)


def check_finite(path: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """
    Check that weights hold neither NaN nor infinity.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if one does.
    """
    if name := next(nonfinite_weights(weights), None):
        raise ConfigError(
            f"`{name}` of `{path}` holds NaN or infinite numbers, so it can't compute anything. Start from an earlier "
            "model, such as one of the run's checkpoints."
        )


def nonfinite_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Yield the names of the weights that hold NaN or infinity on this rank. Quantized ones can't."""
    for name, weight in weights:
        # Ranks that get their weights from the first, as under FSDP and ZeRO-3, have none yet
        if weight.dtype not in FLOATS or weight.is_meta:
            continue
        local = local_part(weight.detach())
        if local.numel() and not all(bound.isfinite() for bound in local.aminmax()):
            yield name


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_names(names: Sequence[str]) -> str:
    """Return the first three names, for messages."""
    return names_of(names[:3]) + (" ..." if len(names) > 3 else "")


def _as_text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
