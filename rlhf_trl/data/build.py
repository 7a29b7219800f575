"""
From rows of named sources to a `DatasetDict`: checks, conversion, splits and limits.

Every row is checked, and dropped rows are counted and reported.
"""

from collections.abc import Iterable, Sequence

from rlhf_trl.data.dataset_types import SOURCES
from rlhf_trl.data.feedback.base import Feedback
from rlhf_trl.data.feedback.reader import FeedbackReader
from rlhf_trl.data.formats import FORMATS
from rlhf_trl.data.messages import is_chat
from rlhf_trl.data.reader import Reader
from rlhf_trl.data.rows import Problems, Row
from rlhf_trl.data.splits import hold_out, leave_out, limit, part, prompt_keys
from rlhf_trl.data.tables import concatenate
from rlhf_trl.data.validation import type_problems
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.hints import count_of, did_you_mean, names_of, sentences
from rlhf_trl.terminal import say


def build(
    dataset_type: str,
    seed: int,
    train: Sequence[tuple[str, Iterable[Row]]],
    held_out: Sequence[tuple[str, Iterable[Row]]] | None = None,
    *,
    format: str | None = None,
    columns: dict[str, str | None] | None = None,
    system_prompt: str | None = None,
    to_chat: bool = False,
    messages: str = "last_turn",
    eval_size: float | int | None = None,
    split_by: str = "prompt",
    bad_rows: str = "error",
    max_samples: int | None = None,
    max_eval_samples: int | None = None,
    feedback: Feedback | None = None,
):
    """
    Check and convert the rows of named sources, split and limit them; the common end of `load_files` and `load_hub`.

    Args:
        train, held_out: (name, rows) of each source; `held_out` is for evaluation, `None` splits some off `train`.
        format (`str`, *optional*): what the rows hold (a key of `FORMATS`); `None` recognizes it by the columns.
        columns (`dict`, *optional*): our name of a column -> the file's, `{"prompt": "question"}`.
        system_prompt (`str`, *optional*): a system turn before every chat that has none.
        to_chat (`bool`): text prompts become user turns, text answers assistant turns.
        messages (`str`): `last_turn` takes a conversation's last assistant turn as the completion, `whole` leaves
            conversations as they are (for SFT: all turns are trained on).
        eval_size (`float` or `int`, *optional*): share (below 1) or number of prompts to hold out; `None`: none.
        split_by (`str`): `prompt` keeps rows with the same prompt on one side, the same one in every stage, and drops
            training rows whose prompt `held_out` has; `row` doesn't, and `eval_size` is then of rows.
        bad_rows (`str`): `error` stops at malformed rows, `drop` leaves them out, counted.
        max_samples, max_eval_samples (`int`, *optional*): a random choice of so many rows, in the order of the file.
        feedback (`Feedback`, *optional*): the rows are feedback of this kind, which names its own columns (`format`,
            `columns` and `messages` don't apply). Splits are made before rows become comparisons, limits act after.
    """
    from datasets import DatasetDict

    if wrong := type_problems(build, {"columns": columns, "system_prompt": system_prompt}, "data"):
        raise ConfigError.join(wrong)
    check_options(dataset_type, format, messages, eval_size, split_by, bad_rows, max_samples, max_eval_samples)
    problems = Problems()
    options = {"system_prompt": system_prompt, "to_chat": to_chat, "split_by": split_by}
    if feedback:
        if format is not None or any((columns or {}).values()):
            raise ConfigError(
                "`data.format` and `data.columns` are of data without `data/feedback`. Name the columns of the "
                f"{feedback.name} in `data.feedback.columns`."
            )
        reader = FeedbackReader(feedback, dataset_type, problems, **options)
    else:
        reader = Reader(dataset_type, problems, format=format, columns=columns, messages=messages, **options)
    tables = {"train": [reader.read(name, rows) for name, rows in train]}
    keys, known = reader.keys, reader.known
    if held_out is not None:
        reader.keys, reader.known = [], {}
        tables["eval"] = [reader.read(name, rows) for name, rows in held_out]
    if problems.count and (bad_rows == "error" or problems.fatal):
        remedy = "Mend them, or type `data.bad_rows=drop` to leave them out, counted."
        if problems.fatal:
            remedy = "Mend them: after such an error nothing more of the file can be read."
        raise DataError(f"{count_of(problems.count, 'malformed row')}:\n{problems.text()}\n{remedy}")
    notes = reader.summary()
    if problems.count:
        notes.append(f"{count_of(problems.count, 'malformed row')} left out (`bad_rows=drop`):\n{problems.text()}")
    result = {side: _join(side, parts, notes) for side, parts in tables.items()}
    if held_out is None and eval_size:
        apart = hold_out(known, eval_size, split_by)
        result = part(result["train"], keys, apart)
        notes.append(f"eval is {len(result['eval']):,} rows of these, split by {split_by}")
    elif held_out is not None and split_by == "prompt":
        apart = set(reader.known)
        result["train"] = leave_out("train", result["train"], keys, apart, notes)
    elif held_out is not None:
        shared = set(prompt_keys(result["train"]))
        if leaks := sum(key in shared for key in prompt_keys(result["eval"])):
            notes.append(f"note: {leaks:,} of {len(result['eval']):,} eval rows have a prompt that train has too")
    if "eval" in result and split_by == "row":
        apart = set(prompt_keys(result["eval"]))
    if feedback:
        result = {side: reader.convert(side, rows, seed, notes) for side, rows in result.items()}
    result["train"] = limit(result["train"], max_samples, seed, "max_samples", notes)
    if "eval" in result:
        result["eval"] = limit(result["eval"], max_eval_samples, seed, "max_eval_samples", notes)
    result = DatasetDict(result)
    result.held_out = apart if "eval" in result else set()  # a mixture keeps them out of all sources
    say("\n".join([describe(result, dataset_type), *(f"  {note}" for note in notes)]))
    return result


def check_options(
    dataset_type, format, messages, eval_size, split_by, bad_rows, max_samples, max_eval_samples
) -> None:
    """Raise one `ConfigError` with every option of `build` whose value isn't one it takes."""
    choices = [
        ("dataset_type", dataset_type, tuple(SOURCES)),
        ("data.format", format, (None, *FORMATS)),
        ("data.messages", messages, ("last_turn", "whole")),
        ("data.split_by", split_by, ("prompt", "row")),
        ("data.bad_rows", bad_rows, ("error", "drop")),
    ]
    problems = [
        sentences(
            f"`{key}={value}` isn't known.",
            did_you_mean(str(value), filter(None, known), listed=True),
            f"Set it to one of {names_of(filter(None, known))}.",
        )
        for key, value, known in choices
        if value not in known
    ]
    for key, value in (("max_samples", max_samples), ("max_eval_samples", max_eval_samples)):
        if value is not None and value < 1:
            problems.append(f"`data.{key}={value}` keeps no rows. Type a number of rows from 1, or null for all.")
    if eval_size is not None and (eval_size < 0 or (eval_size > 1 and eval_size != int(eval_size))):
        problems.append(f"`data.eval_size={eval_size}` isn't a size. Type a share below 1, or a number of rows.")
    if problems:
        raise ConfigError.join(problems)


def describe(datasets, dataset_type: str) -> str:
    """One line on a loaded `DatasetDict`: dataset_type, chat or text, and the rows and prompts of each side."""
    kind = "chat" if is_chat(datasets["train"][0]) else "text"
    sides = [
        f"{side} {count_of(len(dataset), 'row')} ({count_of(len(set(prompt_keys(dataset))), 'prompt')})"
        for side, dataset in datasets.items()
    ]
    return f"data: {dataset_type}, {kind}: {', '.join(sides)}"


def _join(side: str, tables: list, notes: list[str]):
    from datasets import Dataset

    from rlhf_trl.patches.datasets import exact_json

    tables = [table for table in tables if table is not None]
    if not tables:
        what = "\n".join(f"  {note}" for note in notes)
        raise DataError(
            f"no rows are left for `{side}`:\n{what}\nGive `data` a source with rows of use to this stage."
        )
    return exact_json(Dataset(concatenate(tables)))
