"""
From rows of named sources to a `DatasetDict`: checks, conversion, splits and limits.

Every row is checked, and dropped rows are counted and reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from rlhf_trl.data.feedback.convert import adds_synthetic
from rlhf_trl.data.feedback.reader import FeedbackReader
from rlhf_trl.data.messages import is_chat
from rlhf_trl.data.options import LoadOptions, check_dataset_type
from rlhf_trl.data.reader import Reader, Side
from rlhf_trl.data.rows import Problems, Source
from rlhf_trl.data.splits import chosen, drop_held_out, hold_out, limit_rows, prompt_keys, split_dataset
from rlhf_trl.data.tables import as_dataset, concatenate
from rlhf_trl.errors import DataError
from rlhf_trl.hints import count_of
from rlhf_trl.terminal import say

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def build_dataset(
    dataset_type: str, seed: int, train: Sequence[Source], held_out: Sequence[Source] | None = None, **options
) -> DatasetDict:
    """
    Build the datasets of a stage from named sources; the common end of `load_files` and `load_hub`.

    Args:
        dataset_type (`str`): what the stage trains on, see `load_files`.
        seed (`int`): seeds the choices of limits and feedback.
        train (`Sequence`): name and rows of each source for training.
        held_out (`Sequence`, *optional*): name and rows of each source for evaluation; without them `eval_size` is
            split off `train`.
        **options: see [`LoadOptions`].

    Returns:
        `DatasetDict`: `train` and, if there is any, `eval`. Its attribute `held_out` has the keys of held-out prompts.

    Raises:
        DataError: that lists malformed rows, or says why no row is left.
    """
    from datasets import DatasetDict

    check_dataset_type(dataset_type)
    given = LoadOptions(**options)
    problems = Problems()
    reader = make_reader(dataset_type, given, problems)
    sides = {"train": reader.read(train)}
    if held_out is not None:
        sides["eval"] = reader.read(held_out)
    stop_at_malformed_rows(problems, given.bad_rows)
    notes = reader.summary()
    if problems.count:
        notes.append(f"{count_of(problems.count, 'malformed row')} dropped (`bad_rows=drop`):\n{problems.text()}")
    splits, held_out_keys = split_sides(sides, given, notes)
    limits = {"train": given.max_samples, "eval": given.max_eval_samples}
    if isinstance(reader, FeedbackReader):
        before = None  # synthetic comparisons come on top of the rows that people gave
        if adds_synthetic(reader.feedback, dataset_type) and (rows := limits.pop("train")) is not None:
            before = partial(chosen, rows=rows, seed=seed, key="max_samples", notes=notes)
        splits = {
            side: reader.convert(side, rows, seed, notes, held_out_keys, before if side == "train" else None)
            for side, rows in splits.items()
        }
    keys = {"train": "max_samples", "eval": "max_eval_samples"}
    splits = {side: limit_rows(rows, limits.get(side), seed, keys[side], notes) for side, rows in splits.items()}
    built = DatasetDict(**splits)
    built.held_out = held_out_keys  # pyright: ignore[reportAttributeAccessIssue]  # a mixture holds them out of all
    say("\n".join([describe(built, dataset_type), *(f"  {note}" for note in notes)]))
    return built


def make_reader(dataset_type: str, options: LoadOptions, problems: Problems) -> Reader:
    """Return the reader of rows, of feedback where the options have any."""
    if options.feedback:
        return FeedbackReader(options.feedback, dataset_type, options, problems)
    return Reader(dataset_type, options, problems)


def stop_at_malformed_rows(problems: Problems, bad_rows: str) -> None:
    """Raise a `DataError` that lists malformed rows, unless they may be dropped."""
    if problems.count and (bad_rows == "error" or problems.fatal):
        remedy = "Fix them, or set `data.bad_rows=drop` to drop and count them."
        if problems.fatal:
            remedy = "Fix them: after such an error the rest of the file can't be read."
        raise DataError(f"{count_of(problems.count, 'malformed row')}:\n{problems.text()}\n{remedy}")


def split_sides(sides: dict[str, Side], options: LoadOptions, notes: list[str]) -> tuple[dict[str, Dataset], set]:
    """
    Split the rows that were read, so that no prompt is on both sides unless `split_by` is `row`.

    Args:
        sides (`dict[str, Side]`): `train`, and `eval` where it has sources of its own.
        options (`LoadOptions`): the options.
        notes (`list[str]`): gets what was done.

    Returns:
        `tuple`: the datasets `train` and, if there is any, `eval`; and the keys of the prompts that are held out.
    """
    splits = {name: join_tables(name, side.tables, notes) for name, side in sides.items()}
    keys = sides["train"].keys
    held_out = set()
    if "eval" not in sides and options.eval_size:
        held_out = hold_out(sides["train"].known, options.eval_size, options.split_by, sides["train"].ends)
        splits = split_dataset(splits["train"], keys, held_out)
        notes.append(f"eval is {len(splits['eval']):,} rows of these, split by {options.split_by}")
    elif "eval" in sides and options.split_by == "prompt":
        held_out = set(sides["eval"].known)
        splits["train"] = drop_held_out("train", splits["train"], keys, held_out, notes)
    elif "eval" in sides:
        shared = set(prompt_keys(splits["train"]))
        if leaks := sum(key in shared for key in prompt_keys(splits["eval"])):
            notes.append(f"note: {leaks:,} of {len(splits['eval']):,} eval rows have a prompt that train has too")
    if "eval" in splits and options.split_by == "row":
        held_out = set(prompt_keys(splits["eval"]))
    return splits, held_out


def join_tables(side: str, tables: list, notes: list[str]) -> Dataset:
    """Return the tables of a side as one dataset; raise a `DataError` that repeats the notes if there is none."""
    if not tables:
        what = "\n".join(f"  {note}" for note in notes)
        raise DataError(
            f"no rows are left for `{side}`:\n{what}\nGive `data` a source with rows of use to this stage."
        )
    return as_dataset(concatenate(tables))


def describe(datasets: DatasetDict, dataset_type: str) -> str:
    """Return a line on loaded datasets: dataset type, chat or text, and the rows and prompts of each side."""
    kind = "chat" if is_chat(datasets["train"][0]) else "text"
    sides = [
        f"{side} {count_of(len(dataset), 'row')} ({count_of(len(set(prompt_keys(dataset))), 'prompt')})"
        for side, dataset in datasets.items()
    ]
    return f"data: {dataset_type}, {kind}: {', '.join(sides)}"
