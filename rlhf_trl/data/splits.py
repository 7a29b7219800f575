"""Splitting without leakage and limiting, deterministic from a seed."""

import hashlib
import json
import random
from collections import Counter

from rlhf_trl.data.words import count_of
from rlhf_trl.errors import DataError

BATCH_ROWS = 1000


def split(dataset, eval_size: float | int, seed: int, by: str = "prompt") -> dict:
    """
    `{"train": ..., "eval": ...}` of a dataset: about `eval_size` rows (a share below 1 or a number) for evaluation.

    `by="prompt"`: all rows with one prompt are on one side; prompts are drawn by `seed` and one that would exceed the
    size is passed over. Both sides keep the dataset's order. A `DataError` where no split leaves rows on both sides.
    """
    keys = prompt_keys(dataset) if by == "prompt" else range(len(dataset))
    sizes = Counter(keys)  # in the order of first appearance
    target = int(eval_size if eval_size >= 1 else max(1, round(eval_size * len(dataset))))
    names = list(sizes)
    random.Random(f"{seed}-split").shuffle(names)
    chosen, rows = set(), 0
    for name in names:
        if rows + sizes[name] <= target:
            chosen.add(name)
            rows += sizes[name]
    if not chosen and len(names) > 1:  # every prompt has more rows than were asked for: take the one with the fewest
        chosen = {min(names, key=sizes.__getitem__)}
    if not chosen or len(chosen) == len(names):
        raise DataError(
            f"no split leaves rows on both sides: {len(dataset):,} rows have "
            f"{count_of(len(names), 'distinct ' + by)}, and `data.eval_size={eval_size}`. "
            "Type a smaller `data.eval_size`"
            + (", `data.split_by=row` to let the sides share prompts" if by == "prompt" else "")
            + ", or `data.eval_size=null` for no evaluation."
        )
    sides = {"train": [], "eval": []}
    for i, key in enumerate(keys):
        sides["eval" if key in chosen else "train"].append(i)
    return {side: dataset.select(indices) for side, indices in sides.items()}


def prompt_keys(dataset) -> list[bytes]:
    """A digest of each row's prompt (of a conversation: what stands before its last turn; of plain text: the text)."""
    column = next(name for name in ("prompt", "messages", "text") if name in dataset.column_names)
    keys = []
    for batch in dataset.select_columns(column).iter(BATCH_ROWS):
        for value in batch[column]:
            value = value[:-1] if column == "messages" else value
            text = value.strip() if isinstance(value, str) else json.dumps([(m["role"], m["content"]) for m in value])
            keys.append(hashlib.blake2b(text.encode(), digest_size=16).digest())
    return keys


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
