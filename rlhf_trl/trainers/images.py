"""Rows with images: what can't read them, said before a model is loaded."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from rlhf_trl.data.images import decode_images
from rlhf_trl.data.multimodal import processor_of
from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.engines import engine, shards_parameters
from rlhf_trl.runs.ranks import world_size

# Options of TRL's trainers that TRL refuses for rows with images, or whose rows lose them, with the reason
REFUSED = {
    "packing": "TRL packs token ids, and an image isn't one of them",
    "eval_packing": "TRL packs token ids, and an image isn't one of them",
    "padding_free": "TRL joins rows of token ids, and an image isn't one of them",
    "precompute_ref_log_probs": "TRL processes images while it trains",
    "use_transformers_continuous_batching": "continuous batching reads text alone",
    "use_liger_kernel": "it was never tried with images here",
}


def check_readers(dataset: DatasetDict, tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
    """
    Check that the models that read rows with images can.

    Args:
        dataset (`DatasetDict`): rows.
        tokenizers (`Sequence[PreTrainedTokenizerBase]`): those of the models.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: that names a model that reads text alone.
    """
    blind = [tokenizer.name_or_path for tokenizer in tokenizers if processor_of(tokenizer) is None]
    if blind and any("images" in rows.column_names for rows in dataset.values()):
        raise ConfigError(
            f"The data has images, and the model of `{blind[0]}` reads text alone. Name a vision-language model, or "
            "leave the column of images out."
        )


def image_problems(trainer: Any, args: Any, dataset: DatasetDict) -> list[str]:
    """
    Return what keeps a trainer from reading the images of its rows, nothing for rows without.

    Args:
        trainer (`type`): class of the trainer.
        args (`TrainingArguments`): its arguments.
        dataset (`DatasetDict`): rows.
    """
    if not any("images" in rows.column_names for rows in dataset.values()):
        return []
    problems = []
    if reason := getattr(trainer, "READS_NO_IMAGES", None):
        problems.append(f"The data has images, which `{trainer.__name__}` doesn't read: {reason}.")
    problems += [
        f"`stage.args.{name}` doesn't go with images: {reason}. Set it to false."
        for name, reason in REFUSED.items()
        if getattr(args, name, None)
    ]
    for side, rows in dataset.items() if shards_parameters() and world_size() > 1 else ():
        if (row := _row_without(rows)) is not None:
            problems.append(
                f"Row {row + 1} of the split `{side}` has no image, and others have. {engine()} shards the vision "
                "tower: a rank whose rows have no image would wait for the others without end. Remove the rows "
                "without an image, or launch with launch/accelerate/ddp.yaml."
            )
    return problems


def _row_without(rows: Dataset) -> int | None:
    """Return the number of the first row without an image, from 0; `None` where all rows have one, or none has."""
    if "images" not in rows.column_names:
        return None
    images = decode_images(rows.select_columns("images"), False)
    given = [bool(row["images"]) for row in cast(Iterable[dict], images)]
    return None if all(given) or not any(given) else given.index(False)


def check_images(trainer: Any, args: Any, dataset: DatasetDict) -> None:
    """
    Check that a trainer reads the images of its rows, see [`image_problems`].

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: that says what doesn't.
    """
    if problems := image_problems(trainer, args, dataset):
        raise ConfigError.join(problems)
