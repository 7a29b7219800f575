"""Splits without leakage, also between stages, by prompts alone; and limits, deterministic given a seed."""

import hashlib
import json
import random
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise, repeat

from datasets import Dataset, DatasetDict

from rlhf_trl.data.images import decode_images, keys_of
from rlhf_trl.data.row_types import prompt_of
from rlhf_trl.data.tables import BATCH_ROWS
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.hints import count_of


def hold_out(keys: Iterable[Hashable], eval_size: float | int, by: str = "prompt", ends: Sequence[int] = ()) -> set:
    """
    Choose the keys that are held out for evaluation.

    With a share, a key's side depends on the key alone: other rows, files, stages, dataset types and seeds agree on
    it, so the share is approximate. Only where so few keys leave a side empty, it gets the key nearest to the limit:
    in each file that should have some by its size, so that what one file holds out doesn't depend on the others. A
    number takes those that a share would take first.

    Args:
        keys (`Iterable`): what rows are split by, see [`prompt_key`], in the order of the rows.
        eval_size (`float` or `int`): a share below 1, or a number of keys.
        by (`str`): what a key stands for, for the message.
        ends (`Sequence[int]`): number of keys up to the end of each file.

    Raises:
        DataError: if a side would be empty.
    """
    position = {key: _position(key) for key in keys}
    order = sorted(position, key=lambda key: position[key])
    if eval_size < 1:
        held_out = _below(position, eval_size, ends)
        if len(held_out) == len(order):
            held_out = set(order[:-1])
    else:
        held_out = set(order[: int(eval_size)])
    count = len(held_out) if eval_size < 1 else int(eval_size)
    if not 0 < count < len(order):
        raise DataError(
            f"no split leaves rows on both sides: the rows have {count_of(len(order), 'distinct ' + by)}, and "
            f"`data.eval_size={eval_size}`. Set a smaller `data.eval_size`"
            + (", `data.split_by=row` to let the sides share prompts" if by == "prompt" else "")
            + ", or `data.eval_size=null` for no evaluation."
        )
    return held_out


def _below(position: dict[Hashable, float], eval_size: float, ends: Sequence[int]) -> set:
    """Return the keys below a share, and the lowest one of each file that should have some and has none."""
    held_out, rows = {key for key, value in position.items() if value < eval_size}, list(position)
    for start, end in pairwise([0, *(ends or [len(rows)])]):
        own = rows[start:end]
        expected = not start or len(own) * eval_size >= 1
        if len(own) > 1 and expected and held_out.isdisjoint(own):
            held_out.add(min(own, key=lambda key: position[key]))
    if not held_out and len(rows) > 1:
        held_out.add(min(rows, key=lambda key: position[key]))
    return held_out


def held_out_share(keys: Iterable[Hashable], share: float) -> set:
    """Return the keys that [`hold_out`] holds out of any rows by a share."""
    return {key for key in keys if _position(key) < share}


def _position(key: Hashable) -> float:
    """Return a number from 0 to 1 by the hash of a key."""
    digest = hashlib.blake2b(f"split-{key!r}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def prompt_key(prompt: str | list[dict], images: Sequence[str] = ()) -> bytes:
    """
    Return a digest of a prompt, which doesn't depend on white space, case, Unicode normalization, and system turns.
    Text is the user's turn.

    Args:
        prompt (`str` or `list[dict]`): text or chat.
        images (`Sequence[str]`): keys of its images, where they don't stand in the chat.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said, shown = [], list(images)
    for turn in turns:
        if turn["role"] in ("system", "developer"):
            continue
        words = turn["content"]
        if isinstance(words, list):
            shown += [part["image"] for part in words if "image" in part]
            words = " ".join(part["text"] for part in words if part["type"] == "text")
        said.append((turn["role"], " ".join(unicodedata.normalize("NFKC", words).casefold().split())))
    key: list = [said, shown] if shown else said
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()


def prompt_keys(dataset) -> list[bytes]:
    """Return the [`prompt_key`] of each row: of a conversation without its answer, of plain text as it is."""
    column = next(name for name in ("prompt", "messages", "text") if name in dataset.column_names)
    shown = ["images"] if "images" in dataset.column_names else []
    return [
        prompt_key(prompt_of({column: value}), keys_of(images))
        for batch in decode_images(dataset.select_columns([column, *shown]), False).iter(BATCH_ROWS)
        for value, images in zip(batch[column], batch.get("images") or repeat(None), strict=False)
    ]


def split_dataset(dataset, keys: list, held_out: set) -> dict:
    """Split a dataset into `train` and `eval`, which has the rows whose keys are held out. Both keep its order."""
    sides = {"train": [], "eval": []}
    for i, key in enumerate(keys):
        sides["eval" if key in held_out else "train"].append(i)
    for side, indices in sides.items():
        if not indices:
            raise DataError(
                f"no row of use to this stage is left for `{side}`: the {len(keys):,} rows are all on the other side "
                f"of the split. Set another `data.eval_size`, or `data.eval_size=null` for no evaluation."
            )
    return {side: dataset.select(indices) for side, indices in sides.items()}


def drop_held_out(name: str, dataset, keys: list, held_out: set, notes: list[str]):
    """Drop the training rows of the source `name` whose prompts are held out; `notes` gets their number."""
    indices = [i for i, key in enumerate(keys) if key not in held_out]
    if not indices:
        raise DataError(
            f"every row of {name} has a prompt that is held out. Set `data.split_by=row` if it may be trained on, in "
            "a mixture with `data.hold_out=null`."
        )
    if len(indices) == len(dataset):
        return dataset
    notes.append(f"{name}: {len(dataset) - len(indices):,} rows dropped whose prompts are held out")
    return dataset.select(indices)


def held_out_keys(splits) -> set[bytes]:
    """Return the keys of the prompts that a source holds out, as `build_dataset` noted them, or of its `eval` rows."""
    noted = getattr(splits, "held_out", None)
    return set(prompt_keys(splits["eval"])) if noted is None and "eval" in splits else noted or set()


def limit_rows(dataset, rows: int | None, seed: int, key: str, notes: list[str]):
    """Choose at most `rows` rows by `seed`, in their order; `notes` gets how many are kept."""
    if rows is None or len(dataset) <= rows:
        return dataset
    return dataset.select(chosen(len(dataset), rows, seed, key, notes))


def chosen(size: int, rows: int, seed: int, key: str, notes: list[str]) -> Sequence[int]:
    """Return the indices of at most `rows` of `size` rows, see [`limit_rows`]."""
    if size <= rows:
        return range(size)
    notes.append(f"`{key}={rows}`: {rows:,} of {size:,} rows kept")
    return draw(size, rows, f"{seed}-{key}")


def draw(size: int, count: int, seed: str) -> list[int]:
    """Draw `count` of `size` indices, ascending; beyond `size` all as often as they fit, and some at random."""
    whole, rest = divmod(count, size)
    return list(range(size)) * whole + sorted(random.Random(seed).sample(range(size), rest))


def eval_split(datasets: DatasetDict) -> Dataset:
    """
    Return the eval split, for stages that need held-out rows.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there is none, or nothing in it.
    """
    dataset = datasets.get("eval")
    if dataset is None or len(dataset) == 0:
        raise ConfigError(
            "An evaluation needs held-out prompts, and the data has no `eval` split with rows. Add one to `data`."
        )
    return dataset
