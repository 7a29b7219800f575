"""Quantization of the base that an adapter was trained on."""

from transformers import BitsAndBytesConfig

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import base_record


def trained_quantization(path: str) -> BitsAndBytesConfig | None:
    """Return the quantization that the base of the adapter at `path` had in training, `None` if it had none."""
    return base_record(path).quantization


def start_quantization(path: str, wanted: BitsAndBytesConfig | None) -> BitsAndBytesConfig | None:
    """
    Return the quantization of the base for further training of the adapter at `path`: the one of its training.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if another one is `wanted`.
    """
    trained = trained_quantization(path)
    if trained is None or wanted is None:
        return wanted or trained
    there, here = trained.to_dict(), wanted.to_dict()
    if differing := [key for key in there if here.get(key) != there[key]]:
        raise ConfigError(
            f"The adapter `{path}` was trained on a base quantized with `{differing[0]}={there[differing[0]]}`, and "
            f"`adapter.quantization` has {here.get(differing[0])}. Set it to the same."
        )
    return trained
