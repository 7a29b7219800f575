"""Mixing several sources by weight."""

import random
from collections.abc import Callable

from rlhf_trl.data.build import describe
from rlhf_trl.data.formats import kind_of
from rlhf_trl.data.splits import draw, held_out_keys, leave_out, limit, prompt_keys
from rlhf_trl.data.tables import concatenate
from rlhf_trl.data.validation import type_problems
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.hints import did_you_mean, names_of, sentences
from rlhf_trl.terminal import say


def mix(
    dataset_type: str,
    seed: int,
    sources: dict[str, Callable],
    weights: dict[str, float] | None = None,
    repeat: bool = False,
    split_by: str = "prompt",
    max_samples: int | None = None,
    max_eval_samples: int | None = None,
):
    """
    A `DatasetDict` in which each source has the share of the training rows that its weight says.

    `weights` are shares (they need not sum to 1). `repeat=false`: the mixture is as large as it can be without using a
    row twice, so one source is used up and of the others a random choice is left out. `repeat=true`: as large as it
    has to be to use every row, so that all sources but one repeat rows. Without weights every row is used once. Rows
    are shuffled by `seed`. `eval` is all evaluation rows of all sources; with `split_by=prompt`, training rows of any
    source that share a prompt with one of these are dropped first, and counted. Annotated rows get a column
    `source` with the name of theirs.

    Args:
        dataset_type, seed, max_samples, max_eval_samples: as in `load_files`.
        sources (`dict[str, Callable]`): name -> another option of this group, called with `dataset_type` and `seed`.
        weights (`dict[str, float]`, *optional*): name -> share, above 0, of every source.
        repeat (`bool`): see above.
        split_by (`str`): see above; `row` keeps rows that share a prompt with evaluation.
    """
    from datasets import Dataset, DatasetDict

    from rlhf_trl.patches.datasets import exact_json

    wrong = type_problems(mix, {"weights": weights}, "data")
    if split_by not in ("prompt", "row"):
        wrong.append(f"`data.split_by={split_by}` isn't known. Type one of `prompt`, `row`.")
    if wrong:
        raise ConfigError.join(wrong)
    _check_weights(sources, weights)
    parts = {}
    for name, source in sources.items():
        try:
            parts[name] = source(dataset_type=dataset_type, seed=seed)
        except DataError as error:
            raise DataError(f"in the source `{name}` (its options are `data.sources.{name}.*`): {error}") from None
    _check_alike(parts)
    if dataset_type == "annotated":
        parts = {name: _with_source(name, splits) for name, splits in parts.items()}
    notes = []
    held_out = [part["eval"] for part in parts.values() if "eval" in part]
    apart = set().union(*map(held_out_keys, parts.values()))
    train = {name: part["train"] for name, part in parts.items()}
    if apart and split_by == "prompt":
        train = {name: leave_out(name, rows, prompt_keys(rows), apart, notes) for name, rows in train.items()}
    counts = mixture_counts({name: len(rows) for name, rows in train.items()}, weights, repeat)
    chosen = []
    for name, count in counts.items():
        chosen.append(train[name].select(draw(len(train[name]), count, f"{seed}-{name}")))
        notes.append(
            f"{name}: {count:,} of {len(train[name]):,} rows ({count / sum(counts.values()):.1%} of the mixture)"
        )
    mixed = exact_json(Dataset(concatenate([rows.with_format("arrow")[:] for rows in chosen])))
    order = list(range(len(mixed)))
    random.Random(f"{seed}-mix").shuffle(order)
    result = {"train": limit(mixed.select(order), max_samples, seed, "max_samples", notes)}
    if held_out:
        evaluated = exact_json(Dataset(concatenate([rows.with_format("arrow")[:] for rows in held_out])))
        result["eval"] = limit(evaluated, max_eval_samples, seed, "max_eval_samples", notes)
    result = DatasetDict(result)
    result.held_out = apart
    say(
        "\n".join(
            [f"mixture of {len(parts)} sources, {describe(result, dataset_type)}", *(f"  {note}" for note in notes)]
        )
    )
    return result


def mixture_counts(sizes: dict[str, int], weights: dict[str, float] | None, repeat: bool) -> dict[str, int]:
    """
    How many rows each source gives to a mixture (see `mix`), from the sources' sizes and weights.

    The total is the smallest (`repeat`: the largest) of size / share over the sources; fractions are rounded down, and
    no source gives less than one row.
    """
    if weights is None:
        return dict(sizes)
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    totals = {name: size / shares[name] for name, size in sizes.items()}
    total = max(totals.values()) if repeat else min(totals.values())
    # 1e-9: a share such as 0.1 / 1.0 times its own total must not fall below the size by rounding.
    return {name: max(1, int(total * shares[name] + 1e-9)) for name in sizes}


def _with_source(name: str, splits: dict) -> dict:
    """`splits` with a column `source`, by which an evaluation parts its comparisons."""
    return {
        side: rows if "source" in rows.column_names else rows.add_column("source", [name] * len(rows))
        for side, rows in splits.items()
    }


def _check_weights(sources: dict, weights: dict[str, float] | None) -> None:
    if not sources:
        raise ConfigError("`data.sources` is empty. Name at least one: see the head of conf/data/mix.yaml.")
    if weights is None:
        return
    problems = [
        sentences(
            f"`data.weights.{name}` names no source.",
            did_you_mean(name, sources, listed=True),
            f"The sources are {names_of(sources)}.",
        )
        for name in weights
        if name not in sources
    ]
    problems += [
        f"the source `{name}` has no weight. Type `+data.weights.{name}=1`." for name in sources if name not in weights
    ]
    problems += [
        f"`data.weights.{name}={weight}` is no share. Type a number above 0, or leave the source out."
        for name, weight in weights.items()
        if not weight > 0
    ]
    if problems:
        raise ConfigError.join(problems)


def _check_alike(parts: dict) -> None:
    """TRL takes all rows for what the first one is, so a `DataError` where the sources hold rows of several kinds."""
    kinds = {name: kind_of(part["train"][0]) for name, part in parts.items()}
    if len(set(kinds.values())) > 1:
        listed = "; ".join(f"`{name}`: {kind}" for name, kind in kinds.items())
        raise DataError(
            f"the sources can't be mixed, they hold rows of several kinds ({listed}). "
            "Type `data.sources.NAME.to_chat=true` for those that hold text, or leave columns out that not all have."
        )
