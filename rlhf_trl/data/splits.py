"""Splitting without leakage, also between stages, by prompts alone; and limiting, deterministic from a seed."""

import hashlib
import json
import random
import unicodedata
from collections.abc import Hashable, Iterable

from datasets import Dataset, DatasetDict

from rlhf_trl.data.formats import prompt_of
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.hints import count_of

BATCH_ROWS = 1000


def hold_out(keys: Iterable[Hashable], eval_size: float | int, by: str = "prompt") -> set:
    """
    The keys (see [`prompt_key`]) that are for evaluation: a share below 1 of them, or a number.

    With a share, a key's side depends on the key alone: other rows, files, stages, forms and seeds agree on it, so the
    share is met about. A number takes those that a share would take first. Neither side is left without a key, or it
    is a `DataError`.
    """
    place = {key: _place(key) for key in keys}
    order = sorted(place, key=place.get)
    if eval_size < 1:
        count = min(max(1, sum(where < eval_size for where in place.values())), len(order) - 1)
    else:
        count = int(eval_size)
    if not 0 < count < len(order):
        raise DataError(
            f"no split leaves rows on both sides: the rows have {count_of(len(order), 'distinct ' + by)}, and "
            f"`data.eval_size={eval_size}`. Type a smaller `data.eval_size`"
            + (", `data.split_by=row` to let the sides share prompts" if by == "prompt" else "")
            + ", or `data.eval_size=null` for no evaluation."
        )
    return set(order[:count])


def _place(key: Hashable) -> float:
    """Where a key lies from 0 to 1, by its hash."""
    digest = hashlib.blake2b(f"split-{key!r}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def prompt_key(prompt: str | list[dict]) -> bytes:
    """
    A digest of what a prompt asks: text is the user's turn, and white space, case, the spelling in Unicode and turns
    of the system make no other prompt of it.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = [
        (turn["role"], " ".join(unicodedata.normalize("NFKC", turn["content"]).casefold().split()))
        for turn in turns
        if turn["role"] not in ("system", "developer")
    ]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).digest()


def prompt_keys(dataset) -> list[bytes]:
    """The [`prompt_key`] of each row (of a conversation: of what stands before its answer; of plain text: its own)."""
    column = next(name for name in ("prompt", "messages", "text") if name in dataset.column_names)
    return [
        prompt_key(prompt_of({column: value}))
        for batch in dataset.select_columns(column).iter(BATCH_ROWS)
        for value in batch[column]
    ]


def part(dataset, keys: list, apart: set) -> dict:
    """`{"train": ..., "eval": ...}` of a dataset: `eval` has the rows whose keys are `apart`. Both keep its order."""
    sides = {"train": [], "eval": []}
    for i, key in enumerate(keys):
        sides["eval" if key in apart else "train"].append(i)
    for side, indices in sides.items():
        if not indices:
            raise DataError(
                f"no row of use to this stage is left for `{side}`: the {len(keys):,} rows are all on the other side "
                f"of the split. Type another `data.eval_size`, or `data.eval_size=null` for no evaluation."
            )
    return {side: dataset.select(indices) for side, indices in sides.items()}


def leave_out(name: str, dataset, keys: list, apart: set, notes: list[str]):
    """The training rows `name` whose prompts' keys aren't `apart`; how many are left out goes to `notes`."""
    indices = [i for i, key in enumerate(keys) if key not in apart]
    if not indices:
        raise DataError(
            f"every row of {name} shares its prompt with an evaluation row. Type `data.split_by=row` if they may."
        )
    if len(indices) == len(dataset):
        return dataset
    notes.append(f"{name}: {len(dataset) - len(indices):,} rows left out that share a prompt with an eval row")
    return dataset.select(indices)


def held_out_keys(splits) -> set[bytes]:
    """The prompts' keys that a source holds out: `build` notes them before a limit; else those of its `eval` rows."""
    noted = getattr(splits, "held_out", None)
    return set(prompt_keys(splits["eval"])) if noted is None and "eval" in splits else noted or set()


def limit(dataset, rows: int | None, seed: int, key: str, notes: list[str]):
    """At most `rows` rows, chosen by `seed`, in their order; what is left out goes to `notes`."""
    if rows is None or len(dataset) <= rows:
        return dataset
    notes.append(f"`{key}={rows}`: {rows:,} of {len(dataset):,} rows kept")
    return dataset.select(draw(len(dataset), rows, f"{seed}-{key}"))


def draw(size: int, count: int, seed: str) -> list[int]:
    """`count` of `size` indices, ascending; beyond `size` all of them as often as they fit, then a random choice."""
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
