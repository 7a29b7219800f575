"""Tokenization and length limits of whole datasets."""

import functools
from collections import Counter

from rlhf_trl.data.chat_template import render_chat, template_kwargs, without_bos
from rlhf_trl.data.dataset_types import comparisons_of, select_completions
from rlhf_trl.data.images import decode_images
from rlhf_trl.data.tokenize import prompt_ids, row_ids
from rlhf_trl.errors import DataError
from rlhf_trl.hints import count_of
from rlhf_trl.terminal import say


def keep_one_bos(dataset, tokenizer):
    """Return a `DatasetDict` without the BOS, at the beginning of texts, that the tokenizer adds; how many is said."""
    for side, rows in dataset.items():
        field = next((name for name in ("prompt", "text") if name in rows.column_names), None)
        if field is None or not isinstance(rows[0][field], str):
            continue
        begin = sum(without_bos(tokenizer, text) != text for text in rows[field])
        if begin:
            say(
                f"data: {begin:,} of {len(rows):,} {side} rows begin with the BOS token `{tokenizer.bos_token}`, and "
                "the tokenizer adds one: it is taken out of their text, so that it stands there once"
            )
            dataset[side] = rows.map(
                lambda row, field=field: {field: without_bos(tokenizer, row[field])}, desc="Keeping one BOS"
            )
    return dataset


def tokenize_comparisons(dataset, tokenizer, max_length: int | None = None, split: str = ""):
    """
    Add `completion_ids` (token ids of each completion, see `row_ids`) and `length` (of the longest) to rows.

    Args:
        dataset (`Dataset` or `DatasetDict`): rows with `prompt` and `completions`; or with `prompt`, `chosen` and
            `rejected`, which become two completions of which the first is `better`.
        tokenizer: the reward model's.
        max_length (`int`, *optional*): longer completions are dropped, see [`keep_short_completions`].
        split (`str`, *optional*): name of the rows, for the message.
    """

    def tokenize(row):
        row = comparisons_of(row) if "chosen" in row else row
        kwargs = template_kwargs(row)
        start = prompt_ids(tokenizer, row["prompt"], **kwargs)
        ids = [row_ids(tokenizer, row["prompt"], each, start=start, **kwargs) for each in row["completions"]]
        return {**row, "completion_ids": ids, "length": max(map(len, ids))}

    if isinstance(dataset, dict):
        sides = {side: tokenize_comparisons(rows, tokenizer, max_length, side) for side, rows in dataset.items()}
        return type(dataset)(sides)
    pairs = [name for name in ("chosen", "rejected") if name in dataset.column_names]
    dataset = decode_images(dataset, False)  # what `map` decodes it would encode anew
    dataset = dataset.map(tokenize, desc="Tokenizing completions", remove_columns=pairs)
    return decode_images(keep_short_completions(dataset, max_length, split))


def keep_short_completions(dataset, max_length: int | None, split: str = ""):
    """
    Drop completions of more than `max_length` tokens, with their comparisons and targets, and rows without any left.

    Args:
        dataset (`Dataset`): with `completion_ids`.
        max_length (`int`, *optional*): `None` keeps all.
        split (`str`, *optional*): name of the rows, for the message that says how many are dropped.
    """
    if max_length is None or max(dataset["length"]) <= max_length:
        return dataset
    counts = Counter()

    def shorten(row):
        keep = [i for i, ids in enumerate(row["completion_ids"]) if len(ids) <= max_length]
        counts["completions"] += len(row["completion_ids"]) - len(keep)
        before = len(row.get("better") or [])
        short = select_completions(row, keep)
        counts["comparisons"] += before - len(short.get("better") or [])
        return {**short, "length": max(map(len, short["completion_ids"]), default=0)}

    total, longest = sum(map(len, dataset["completion_ids"])), max(dataset["length"])
    shortest = min(len(ids) for row in dataset["completion_ids"] for ids in row)
    # No cache: the counts are made by going over the rows
    short = dataset.map(shorten, load_from_cache_file=False, desc="Dropping long completions")
    informed = [
        i
        for i, row in enumerate(short)
        if row.get("better")
        or ((row.get("targets") or (isinstance(row.get("safe"), list) and any(row["safe"]))) and row["completions"])
    ]
    split = f"{split} " if split else ""
    if not informed:
        raise DataError(
            f"no {split}row is left: the completions are longer than `max_length={max_length}` "
            f"(the shortest has {shortest} tokens with its prompt). Set `stage.args.max_length={longest}` to keep "
            "all."
        )
    say(
        f"data: {counts['completions']:,} of {total:,} {split}completions dropped, longer than "
        f"`max_length={max_length}` tokens (the longest: {longest:,}), and with them {counts['comparisons']:,} "
        f"comparisons; {len(dataset) - len(informed):,} of {len(dataset):,} rows say nothing more and are dropped"
    )
    return short.select(informed)


def head_names(dataset) -> list[str] | None:
    """Return the names of the regression targets, from the columns' types; `None` without targets."""
    from datasets import List

    targets = dataset.features.get("targets")  # of that name there may be a column for a reward function too
    return list(targets.feature) if isinstance(targets, List) and isinstance(targets.feature, dict) else None


def has_safety_labels(dataset) -> bool:
    """Return whether rows of comparisons say which of their completions are safe."""
    from datasets import List

    return isinstance(dataset.features.get("safe"), List)  # of that name there may be a column for a reward function


def report_cut_rows(dataset, tokenizer, max_length: int | None = None):
    """
    Print how many rows a trainer truncates to `max_length` tokens, and how many of them lose the whole completion.

    Returns:
        `DatasetDict`: the dataset as it is.

    Raises:
        [`~rlhf_trl.errors.DataError`]: if no row of a split keeps any of its completion, or all training rows have one
            label.
    """
    if "label" in dataset["train"].column_names:
        labels = set(dataset["train"]["label"])
        if len(labels) == 1:
            raise DataError(
                f"all {len(dataset['train']):,} training rows are labelled {str(labels.pop()).lower()}, and this "
                "stage learns from good and bad completions. Give data that has both."
            )
    for split, rows in dataset.items() if max_length is not None else ():
        rows = decode_images(rows, False)
        measured = rows.map(
            lambda row: dict(zip(("prompt_tokens", "tokens"), prompt_and_row_length(tokenizer, row), strict=True)),
            remove_columns=rows.column_names,
            desc="Measuring rows",
        )
        longest = max(measured["tokens"])
        cut = sum(tokens > max_length for tokens in measured["tokens"])
        lost = sum(tokens >= max_length for tokens in measured["prompt_tokens"])
        if lost == len(rows):
            raise DataError(
                f"all {len(rows):,} {split} rows have prompts of `max_length={max_length}` tokens or more, so nothing "
                f"of any completion is left. Set `stage.args.max_length={longest}` to keep all."
            )
        if cut and "images" in rows.column_names:
            raise DataError(
                f"{cut:,} of {len(rows):,} {split} rows are longer than `max_length={max_length}` tokens (the "
                f"longest: {longest:,}), and rows with images can't be cut: the tokens of an image would be lost. Set "
                f"`stage.args.max_length={longest}`, or drop the long rows."
            )
        if cut:
            what = f"; {lost:,} lose the whole completion" if lost else ""
            say(
                f"data: {cut:,} of {len(rows):,} {split} rows are cut after `max_length={max_length}` tokens "
                f"(the longest: {longest:,}){what}"
            )
    return dataset


def prompt_and_row_length(tokenizer, row: dict) -> tuple[int, int]:
    """Return the tokens of a row's prompt, and of the whole row (with the longer completion of a pair)."""
    prompt = len(prompt_ids(tokenizer, row["prompt"], **template_kwargs(row))) if "prompt" in row else 0
    return prompt, max(map(len, _whole_rows(tokenizer, row)))


def _whole_rows(tokenizer, row: dict) -> list[list[int]]:
    """Return the ids that a trainer reads of a row: of a pair both sides; of a prompt alone, that."""
    kwargs = template_kwargs(row)
    if "completion_ids" in row and "length" in row:  # of `tokenize_comparisons`; a column of that name may be anything
        return row["completion_ids"]
    if "messages" in row:
        return [render_chat(tokenizer, row["messages"], tokenize=True, **kwargs)["input_ids"]]
    if "text" in row:
        return [[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]
    completions = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    if not completions:
        return [prompt_ids(tokenizer, row["prompt"], **kwargs)]
    return [
        row_ids(tokenizer, row["prompt"], completion, **kwargs)
        if isinstance(completion, str) or "images" in kwargs
        # with what the template adds after the end of a turn
        else render_chat(tokenizer, row["prompt"] + completion, tokenize=True, **kwargs)["input_ids"]
        for completion in completions
    ]


def row_lengths(rows, tokenizer) -> list[int]:
    """Return the tokens of each row, of a pair those of its longer side, as a trainer reads it."""
    return [max(map(len, _whole_rows(tokenizer, row)), default=0) for row in rows]


def measure(dataset, tokenizer, max_length: int | None = None) -> tuple[int, int]:
    """Return the tokens of the longest row of a `DatasetDict`, truncated to `max_length`, and the largest id in it."""

    def sizes(row):
        ids = [ids[:max_length] for ids in _whole_rows(tokenizer, row)]
        return {
            "tokens": max(map(len, ids), default=0),
            "largest": max((max(row, default=0) for row in ids), default=0),
        }

    tokens, largest = [0], [0]
    for rows in map(functools.partial(decode_images, decode=False), dataset.values()):
        measured = rows.map(sizes, remove_columns=rows.column_names, desc="Measuring rows")
        tokens.append(max(measured["tokens"]))
        largest.append(max(measured["largest"]))
    return max(tokens), max(largest)


def filter_prompts(dataset, tokenizer, max_prompt_length: int | None = None):
    """Drop prompts of more than `max_prompt_length` tokens from a `Dataset` or `DatasetDict`, and print how many."""

    def length(row):
        return len(prompt_ids(tokenizer, row["prompt"], **template_kwargs(row)))

    return _keep_short(
        dataset, length, max_prompt_length, "prompts", "max_prompt_length", "stage.prepare.max_prompt_length"
    )


def _keep_short(dataset, length, limit: int | None, noun: str, name: str, key: str):
    """Return the rows whose `length(row)` is at most `limit`; raise a `DataError` if there is none."""
    if isinstance(dataset, dict):
        kept = {side: _keep_short(rows, length, limit, f"{side} {noun}", name, key) for side, rows in dataset.items()}
        return type(dataset)(kept)
    if limit is None:
        return dataset
    lengths = [length(row) for row in decode_images(dataset, False)]
    short = [i for i, tokens in enumerate(lengths) if tokens <= limit]
    if not short:
        raise DataError(
            f"all {len(dataset):,} {noun} are longer than `{name}={limit}`: the shortest has {min(lengths)} tokens. "
            f"Set `{key}={max(lengths)}` to keep all."
        )
    if len(short) == len(dataset):
        return dataset
    say(
        f"data: {len(dataset) - len(short):,} of {len(dataset):,} {noun} dropped, longer than `{name}={limit}` "
        f"tokens (the longest: {max(lengths):,}); {count_of(len(short), 'row')} kept"
    )
    return dataset.select(short)
