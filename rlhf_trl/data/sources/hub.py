"""Datasets of the Hugging Face hub, and folders that `save_to_disk` wrote."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_trl.data.build import build_dataset
from rlhf_trl.data.images import decode_images
from rlhf_trl.data.rows import Row, typed_row
from rlhf_trl.data.tables import BATCH_ROWS
from rlhf_trl.data.validation import type_problems
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.hints import did_you_mean, names_of, sentences


def load_hub(
    dataset_type: str,
    seed: int,
    path: str,
    name: str | None = None,
    split: str = "train",
    eval_split: str | None = None,
    revision: str | None = None,
    **options,
):
    """
    Load a dataset of the Hugging Face hub, or a folder that `save_to_disk` wrote.

    Args:
        dataset_type, seed, **options: as in `load_files`.
        path (`str`): the hub's name (`trl-lib/ultrafeedback_binarized`) or a local folder.
        name (`str`, *optional*): the dataset's configuration.
        split (`str`): the training split; `train[:1000]` works too for a hub dataset.
        eval_split (`str`, *optional*): the evaluation split; without it `eval_size` is split off.
        revision (`str`, *optional*): commit, branch or tag.
    """
    given = {"path": path, "name": name, "split": split, "eval_split": eval_split, "revision": revision}
    if wrong := type_problems(load_hub, given, "data"):
        raise ConfigError.join(wrong)
    splits = [split] if eval_split is None else [split, eval_split]
    loaded = [_load_split(path, name, one, revision) for one in splits]
    names = [f"{path} ({one})" for one in splits]
    train, *held_out = ([(source, _dataset_rows(source, rows))] for source, rows in zip(names, loaded, strict=True))
    return build_dataset(dataset_type, seed, train, held_out[0] if held_out else None, **options)


def _load_split(path: str, name: str | None, split: str, revision: str | None):
    """Load a split of a dataset of the hub or of a folder; raise a `DataError` that says what to check."""
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    folder = Path(path).expanduser()
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        try:
            loaded = load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"`data.path={path}` is incomplete: a dataset that `save_to_disk` wrote can't be read from it "
                f"({type(error).__name__}: {error}). Save it again."
            ) from error
        if isinstance(loaded, Dataset):
            loaded = {"train": loaded}
        if split not in loaded:
            raise DataError(
                sentences(
                    f"`data.split={split}`: {path} has the splits {names_of(map(str, loaded))}.",
                    did_you_mean(split, map(str, loaded), listed=True),
                    "Set `data.split=NAME` (or `data.eval_split=NAME`) to one of these.",
                )
            )
        return loaded[split]
    try:
        return load_dataset(path, name, split=split, revision=revision)
    except (ValueError, OSError, RuntimeError, DatasetsError) as error:  # not found, no such split, a script ...
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"`data.path={path}` (split `{split}`) can't be loaded: {first} "
            "Check `data.path`, `data.name` and `data.split`; for files pass `data=files data.paths=[FILE,...]`."
        ) from error


def _dataset_rows(source: str, dataset) -> Iterator[Row]:
    """Yield place and columns of every row."""
    from rlhf_trl.patches.datasets import exact_json

    number = 0
    batches: Any = decode_images(exact_json(dataset.with_format(None)), False).iter(BATCH_ROWS)
    for batch in batches:
        for values in zip(*batch.values(), strict=True):
            number += 1
            row = dict(zip(batch, values, strict=True))
            yield f"{source}, row {number}", typed_row(row, dataset.features)
