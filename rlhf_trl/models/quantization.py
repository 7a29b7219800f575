"""Quantization that an adapter was trained on."""

from pathlib import Path
from typing import cast

from transformers import BitsAndBytesConfig

from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.record import read_run
from rlhf_trl.runs.results import RunRecord


def trained_quantization(path: str) -> BitsAndBytesConfig | None:
    """How the base of the adapter in the folder `path`, a run or one of its checkpoints, was quantized in training."""
    record = training_record(path)
    saved = record and record.quantization
    return cast(BitsAndBytesConfig, BitsAndBytesConfig.from_dict(saved)) if saved else None


def training_record(path: str) -> RunRecord | None:
    """Return the record of the run that is the folder `path` or has it as a checkpoint, `None` where there is none."""
    if not Path(path).is_dir():
        return None
    run = Path(path).parent if Path(path).name.startswith("checkpoint-") else path
    return read_run(path) or read_run(run)


def start_quantization(path: str, wanted: BitsAndBytesConfig | None) -> BitsAndBytesConfig | None:
    """
    How the base of an adapter that goes on is quantized: as it was in training.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if another quantization is `wanted`.
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
