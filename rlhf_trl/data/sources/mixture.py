"""Mixtures of several sources by weight."""

import random
from collections.abc import Callable

from rlhf_trl.data.build import describe
from rlhf_trl.data.options import SPLIT_BY, choice_problems
from rlhf_trl.data.row_types import kind_of
from rlhf_trl.data.splits import draw, drop_held_out, held_out_keys, held_out_share, limit_rows, prompt_keys
from rlhf_trl.data.tables import as_dataset, concatenate
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
    hold_out: float | None = None,
    max_samples: int | None = None,
    max_eval_samples: int | None = None,
):
    """
    Mix several sources, each with the share of the training rows that its weight says.

    `weights` are shares (they need not sum to 1). `repeat=false`: the mixture is as large as possible without using a
    row twice, so one source is used up and a random choice of the others is dropped. `repeat=true`: it is as large as
    necessary to use every row, so that all sources but one repeat rows. Without weights every row is used once. Rows
    are shuffled by `seed`. `eval` has all evaluation rows of all sources; with `split_by=prompt`, training rows of any
    source that share a prompt with one of these are dropped first, and counted. Annotated rows get a column `source`
    with the name of theirs.

    Args:
        dataset_type, seed, max_samples, max_eval_samples: as in `load_files`.
        sources (`dict[str, Callable]`): name -> another option of this group, called with `dataset_type` and `seed`.
        weights (`dict[str, float]`, *optional*): name -> share, above 0, of every source.
        repeat (`bool`): see above.
        split_by (`str`): see above; `row` keeps rows that share a prompt with evaluation.
        hold_out (`float`, *optional*): share of the prompts that no source trains on, whether a source has them for
            evaluation or not: those that an `eval_size` of this share holds out of any file, also of one to come.

    Returns:
        `DatasetDict`: `train` and, if a source has any, `eval`.
    """
    from datasets import DatasetDict

    wrong = [
        *type_problems(mix, {"weights": weights, "hold_out": hold_out}, "data"),
        *choice_problems("data.split_by", split_by, SPLIT_BY),
    ]
    if not wrong and hold_out is not None and not 0 < hold_out < 1:
        wrong = [f"`data.hold_out={hold_out}` is no share of the prompts. Set it between 0 and 1, or to null."]
    if not wrong and hold_out is not None and split_by != "prompt":
        wrong = ["`data.hold_out` is a share of prompts, and `data.split_by=row` splits by rows. Set one of them."]
    if wrong:
        raise ConfigError.join(wrong)
    _check_weights(sources, weights)
    loaded = _load(dataset_type, seed, sources)
    notes: list[str] = []
    held_out = set().union(*map(held_out_keys, loaded.values()))
    train = {name: part["train"] for name, part in loaded.items()}
    if hold_out is not None:
        held_out |= held_out_share([key for rows in train.values() for key in prompt_keys(rows)], hold_out)
    if held_out and split_by == "prompt":
        train = {name: drop_held_out(name, rows, prompt_keys(rows), held_out, notes) for name, rows in train.items()}
    mixed = limit_rows(_draw(train, weights, repeat, seed, notes), max_samples, seed, "max_samples", notes)
    splits = {"train": mixed}
    if evaluated := [part["eval"] for part in loaded.values() if "eval" in part]:
        splits["eval"] = limit_rows(_concatenate(evaluated), max_eval_samples, seed, "max_eval_samples", notes)
    mixture = DatasetDict(**splits)
    mixture.held_out = held_out  # pyright: ignore[reportAttributeAccessIssue]  # a mixture of mixtures reads it
    head = f"mixture of {len(loaded)} sources, {describe(mixture, dataset_type)}"
    say("\n".join([head, *(f"  {note}" for note in notes)]))
    return mixture


def _load(dataset_type: str, seed: int, sources: dict[str, Callable]) -> dict:
    """Load each source; raise a `DataError` that names the one which fails, or the kinds of rows that differ."""
    loaded = {}
    for name, source in sources.items():
        try:
            loaded[name] = source(dataset_type=dataset_type, seed=seed)
        except DataError as error:
            raise DataError(f"in the source `{name}` (its options are `data.sources.{name}.*`): {error}") from None
    _check_alike(loaded)
    if dataset_type == "annotated":
        return {name: _with_source(name, splits) for name, splits in loaded.items()}
    return loaded


def _draw(train: dict, weights: dict[str, float] | None, repeat: bool, seed: int, notes: list[str]):
    """Draw the training rows of each source that the mixture takes, and shuffle them."""
    counts = mixture_counts({name: len(rows) for name, rows in train.items()}, weights, repeat)
    total, chosen = sum(counts.values()), []
    for name, count in counts.items():
        size = len(train[name])
        chosen.append(train[name].select(draw(size, count, f"{seed}-{name}")))
        notes.append(f"{name}: {count:,} of {size:,} rows ({count / total:.1%} of the mixture)")
    mixed = _concatenate(chosen)
    order = list(range(len(mixed)))
    random.Random(f"{seed}-mix").shuffle(order)
    return mixed.select(order)


def _concatenate(datasets: list):
    return as_dataset(concatenate([rows.with_format("arrow")[:] for rows in datasets]))


def mixture_counts(sizes: dict[str, int], weights: dict[str, float] | None, repeat: bool) -> dict[str, int]:
    """
    Return how many rows each source gives to a mixture (see `mix`).

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
    """Return `splits` with a column `source`, by which an evaluation slices its comparisons."""
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
        f"the source `{name}` has no weight. Set `+data.weights.{name}=1`." for name in sources if name not in weights
    ]
    problems += [
        f"`data.weights.{name}={weight}` is no share. Set it above 0, or remove the source."
        for name, weight in weights.items()
        if not weight > 0
    ]
    if problems:
        raise ConfigError.join(problems)


def _check_alike(parts: dict) -> None:
    """Raise a `DataError` for sources with rows of several kinds: TRL looks at the first row only."""
    kinds = {name: kind_of(part["train"][0]) for name, part in parts.items()}
    if len(set(kinds.values())) > 1:
        listed = "; ".join(f"`{name}`: {kind}" for name, kind in kinds.items())
        raise DataError(
            f"the sources can't be mixed, they hold rows of several kinds ({listed}). "
            "Set `data.sources.NAME.to_chat=true` for those that hold text, or remove columns that not all have."
        )
