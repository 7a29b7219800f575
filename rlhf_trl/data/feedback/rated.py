"""Feedback that rates one completion at a time: ratings, thumbs, attributes."""

import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar

from rlhf_trl.data.columns import Theirs
from rlhf_trl.data.feedback.base import (
    ALIKE,
    SYNTHETIC,
    Comparison,
    Feedback,
    Group,
    RatedRow,
    Text,
    add_rater,
    certainty,
    check_list,
    check_number,
    check_texts,
    confidence_in,
    key_of,
)
from rlhf_trl.data.rows import RowError
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.hints import names_of

UP = {"true": True, "1": True, "1.0": True, "up": True, "\N{THUMBS UP SIGN}": True}
DOWN = {"false": False, "0": False, "0.0": False, "-1": False, "down": False, "\N{THUMBS DOWN SIGN}": False}
SCORE, THUMB = "score", "thumb"  # the one dimension of ratings and of thumbs


@dataclass(frozen=True, kw_only=True)
class Rated(Feedback):
    """
    Options of feedback of which a row rates one completion; rows on the same completion of a prompt are pooled.

    Args:
        group_size (`int`, *optional*): maximum number of completions per row (K): more are put into random groups of
            about equal size. Null: all of a prompt in one row.
        rounds (`int`): number of times each completion is put into a group.
        min_gap (`float`): minimum rating gap of a comparison; completions less apart tie.
        **options: see [`Feedback`].
    """

    ADVICE: ClassVar[str] = (
        "Give prompts with several completions of different ratings, or lower `data.feedback.min_gap`."
    )

    group_size: int | None = 4
    rounds: int = 1
    min_gap: float = 0.0

    def _minimums(self):
        return (("group_size", 2), ("rounds", 1), ("min_gap", 0))

    @abstractmethod
    def gap(self, a: RatedRow, b: RatedRow) -> float | None:
        """Return by how much completion `a` is better than `b`; `None` if they can't be compared."""

    @abstractmethod
    def label(self, row: RatedRow) -> bool | None:
        """Return whether a completion is good; `None` if it is neither good nor bad."""

    def target(self, row: RatedRow) -> dict[str, float | None] | None:
        """Return the regression targets of a completion by dimension; `None` where comparisons are trained on."""
        return None

    def side(self, row: RatedRow) -> float | None:
        """Return on which side of a border a completion is, 1 or -1; `None` where no border is trained on."""
        return None

    def share(self, a: RatedRow, b: RatedRow) -> float | None:
        """Return the share of pairs of raters who prefer `a` to `b`."""
        ((of_a,), (of_b,)) = a["ratings"].values(), b["ratings"].values()
        return preference_share(of_a, of_b, a.get("confidences"), b.get("confidences"))

    def annotations(self, ratings: list[dict[str, list[float]]]) -> dict[str, list]:
        """Return the column in which annotated rows hold the ratings of their completions."""
        return {"ratings": [[float(rating) for rating in single] for (single,) in (r.values() for r in ratings)]}


@dataclass(frozen=True, kw_only=True)
class Ratings(Rated):
    """
    Stars or points for single completions: `prompt`, `completion`, `ratings` (a number, or a list with one per rater).

    Args:
        scale (`list`): the minimum and the maximum rating; one outside is an error.
        good_above (`float`, *optional*): completions above it are good ones (KTO's true, demonstrations for SFT),
            those below it are bad ones; null: the middle of the scale.
        use (`str`): what a reward model learns: `pairs` (comparisons) or `regression` (values, scaled to -1 to 1).
        agreement (`str`, *optional*): `weights` or `smoothing` of a comparison from the share of pairs of raters (one
            of each completion) who agree, a tie half; see [`Pairs`]. With confidences c and d of the two, such a pair
            counts as 1/2 + (2c - 1)(2d - 1)/2 for what it says.
        **options: see [`Rated`]. The unit of `margin` and `min_gap` is one of the scale.
    """

    NEEDED: ClassVar[tuple[str, ...]] = ("prompt", "completion", "ratings")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("rater", "confidence")

    scale: list[float] = field(default_factory=lambda: [1, 5])
    good_above: float | None = None
    use: str = "pairs"
    agreement: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_scale_options(self)

    def read(self, row: dict, notes: Counter) -> RatedRow:
        prompt, completions = check_texts(row, ["completion"], notes)
        if "ratings" not in row:
            raise RowError("ratings", "is missing")
        ratings = check_on_scale(row["ratings"], "ratings", self.scale)
        return rated_row(row, prompt, completions[0], SCORE, ratings)

    def gap(self, a: RatedRow, b: RatedRow) -> float:
        return mean(a["ratings"][SCORE]) - mean(b["ratings"][SCORE])

    def label(self, row: RatedRow) -> bool | None:
        return above(mean(row["ratings"][SCORE]), self)

    def target(self, row: RatedRow) -> dict[str, float | None] | None:
        return {SCORE: to_unit(mean(row["ratings"][SCORE]), self.scale)} if self.use == "regression" else None


@dataclass(frozen=True, kw_only=True)
class Thumbs(Rated):
    """
    Thumbs up and down for single completions: `prompt`, `completion`, `thumb` (true or false, 1 or 0, up or down).

    Several thumbs on one completion: the majority decides. Comparisons are of completions of one prompt of which one
    has the larger share of thumbs up.

    Args:
        agreement (`str`, *optional*): see [`Ratings`].
        **options: see [`Rated`]. The unit of `margin` and `min_gap` is the share of thumbs up.
    """

    NEEDED: ClassVar[tuple[str, ...]] = ("prompt", "completion", "thumb")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("rater", "confidence")
    ADVICE: ClassVar[str] = (
        "Give prompts with thumbs up and thumbs down, or train with `stage=kto`, which needs no pairs."
    )

    agreement: str | None = None

    def read(self, row: dict, notes: Counter) -> RatedRow:
        prompt, completions = check_texts(row, ["completion"], notes)
        known, value = UP | DOWN, row.get("thumb")
        if str(value).strip().lower() not in known:
            raise RowError("thumb", f"is {value!r}, where true or false, up or down should be")
        thumb = float(known[str(value).strip().lower()])
        return rated_row(row, prompt, completions[0], THUMB, [thumb])

    def gap(self, a: RatedRow, b: RatedRow) -> float:
        return (mean(a["ratings"][THUMB]) - 0.5) - (mean(b["ratings"][THUMB]) - 0.5)

    def label(self, row: RatedRow) -> bool | None:
        up = mean(row["ratings"][THUMB])
        return None if up == 0.5 else up > 0.5


@dataclass(frozen=True, kw_only=True)
class Attributes(Rated):
    """
    Scores by dimension for single completions: `prompt`, `completion` and a column per dimension (a number, or a list
    with one per rater; null where it wasn't rated).

    `use: regression` trains a head per dimension. `use: border`, of one dimension, trains one score whose zero is the
    border between good and bad (see `good_above`; true and false of a column are the ends of the scale), by that label
    and by the comparisons of completions whose values differ. Where one value is needed (pairs, KTO, SFT) it is the
    weighted mean of the dimensions that were rated, in a comparison of those that both completions were rated in.

    Args:
        dimensions (`list[str]`): the dimensions, which are columns; `columns` renames them too.
        weights (`dict[str, float]`, *optional*): weights of the dimensions in the mean; 1 where none is given.
        scale, good_above, use: see [`Ratings`].
        **options: see [`Rated`].
    """

    NEEDED: ClassVar[tuple[str, ...]] = ("prompt", "completion")

    dimensions: list[str] = field(default_factory=lambda: ["helpful", "harmless", "honest", "clear"])
    weights: dict[str, float] | None = None
    scale: list[float] = field(default_factory=lambda: [-1, 1])
    good_above: float | None = None
    use: str = "regression"

    def __post_init__(self):
        super().__post_init__()
        check_scale_options(self)
        unknown = [name for name in self.weights or {} if name not in self.dimensions]
        if self.use == "border" and len(self.dimensions) != 1:
            raise ConfigError(
                f"`data.feedback.use=border` learns the border of one dimension, and `data.feedback.dimensions` is "
                f"{list(self.dimensions)}. Name one, such as `data.feedback.dimensions=[harmless]`."
            )
        if not self.dimensions:
            raise ConfigError("`data.feedback.dimensions` is empty. Name the columns that hold scores.")
        if len({*self.dimensions, *self.NEEDED}) < len(self.dimensions) + len(self.NEEDED):
            raise ConfigError(
                f"`data.feedback.dimensions` is {list(self.dimensions)}. Name each column once, and none of "
                f"{names_of(self.NEEDED)}."
            )
        if unknown:
            raise ConfigError(
                f"`data.feedback.weights` names {names_of(unknown)}, and the dimensions are "
                f"{names_of(self.dimensions)}."
            )
        for name, weight in (self.weights or {}).items():
            if not weight > 0:
                raise ConfigError(f"`data.feedback.weights.{name}` is {weight}. Set it above 0.")

    @property
    def known(self) -> tuple[str, ...]:
        return (*super().known, *self.dimensions)

    def mapping(self, source: str, found: list[str]) -> dict[str, Theirs]:
        mapping = super().mapping(source, found)
        if missing := [name for name in self.dimensions if name not in mapping]:
            raise DataError(
                f"{source} has no column {names_of(missing)}, but {names_of(found)}. Set "
                "`data.feedback.dimensions=[NAME,...]` to the columns that hold scores."
            )
        return mapping

    def read(self, row: dict, notes: Counter) -> RatedRow:
        prompt, completions = check_texts(row, ["completion"], notes)
        given = {name: _flags(row.get(name), self.scale) for name in self.dimensions}
        ratings = {
            name: [] if value in (None, "") else check_on_scale(value, name, self.scale)
            for name, value in given.items()
        }
        return add_rater({"prompt": prompt, "completion": completions[0], "ratings": ratings}, row)

    def gap(self, a: RatedRow, b: RatedRow) -> float | None:
        both = [name for name in self.dimensions if a["ratings"][name] and b["ratings"][name]]
        return self._mean(a, both) - self._mean(b, both) if both else None

    def label(self, row: RatedRow) -> bool | None:
        return above(self._mean(row, [name for name, ratings in row["ratings"].items() if ratings]), self)

    def target(self, row: RatedRow) -> dict[str, float | None] | None:
        if self.use != "regression":
            return None
        return {
            name: to_unit(mean(ratings), self.scale) if ratings else None for name, ratings in row["ratings"].items()
        }

    def share(self, a: RatedRow, b: RatedRow) -> None:
        return None  # raters agree on each dimension, not on their mean

    def annotations(self, ratings: list[dict[str, list[float]]]) -> dict[str, list]:
        return {"attributes": [{name: mean(each) if each else None for name, each in one.items()} for one in ratings]}

    def side(self, row: RatedRow) -> float | None:
        """Return on which side of the border a completion is, 1 or -1; `None` if on neither."""
        good = self.label(row) if self.use == "border" else None
        return None if good is None else 1.0 if good else -1.0

    def _mean(self, row: RatedRow, names: list[str]) -> float:
        """Return the weighted mean of some dimensions."""
        weights = {name: (self.weights or {}).get(name, 1.0) for name in names}
        total = sum(weights[name] * sum(row["ratings"][name]) / len(row["ratings"][name]) for name in names)
        return total / sum(weights.values())


def rated_row(row: dict, prompt: Text, completion: Text, dimension: str, ratings: list[float]) -> RatedRow:
    """Return what a reader of one dimension makes of `row`."""
    made: RatedRow = {"prompt": prompt, "completion": completion, "ratings": {dimension: ratings}}
    if (confidence := confidence_in(row)) is not None:
        made["confidences"] = [confidence] * len(ratings)
    return add_rater(made, row)


def check_scale_options(feedback: Ratings | Attributes) -> None:
    """Raise a `ConfigError` for a scale or a use that can't be, or for options that regression has no use for."""
    if len(feedback.scale) != 2 or not feedback.scale[0] < feedback.scale[1]:
        raise ConfigError(f"`data.feedback.scale` is {list(feedback.scale)}. Set it to the minimum and the maximum.")
    uses = ("pairs", "regression", "border") if isinstance(feedback, Attributes) else ("pairs", "regression")
    if feedback.use not in uses:
        *first, last = uses
        raise ConfigError(f"`data.feedback.use` is {feedback.use!r}. Set it to {', '.join(first)} or {last}.")
    given = [name for name in ("agreement", "margin", "max_pairs", *SYNTHETIC, *ALIKE) if getattr(feedback, name)]
    if feedback.use == "regression" and given:
        idle = names_of(f"data.feedback.{name}" for name in given)
        raise ConfigError(
            f"`data.feedback.use=regression` compares nothing, so {idle} would do nothing. Remove it, or set "
            "`data.feedback.use=pairs`."
        )


def check_on_scale(value: Any, field: str, scale: list[float]) -> list[float]:
    """Return a number or a list of numbers (several raters) as a list; raise a `RowError` for one off the scale."""
    values = check_list(value, field) if isinstance(value, list) or str(value).strip().startswith("[") else [value]
    if not values:
        raise RowError(field, "is an empty list")
    numbers = [check_number(each, f"{field}[{i}]" if len(values) > 1 else field) for i, each in enumerate(values)]
    for number in numbers:
        if not scale[0] <= number <= scale[1]:
            raise RowError(field, f"is {number:g}, outside the scale from {scale[0]} to {scale[1]}")
    return numbers


def _flags(value: Any, scale: list[float]) -> Any:
    """Return the ends of the scale for true and false, also in a list or as text; anything else as it is."""
    if isinstance(value, list):
        return [_flags(each, scale) for each in value]
    return {"true": scale[1], "false": scale[0]}.get(str(value).strip().lower(), value)


def mean(values: list[float]) -> float:
    """Return the mean of some numbers."""
    return sum(values) / len(values)


def to_unit(value: float, scale: list[float]) -> float:
    """Map a value of the scale to -1 to 1."""
    low, high = scale
    return 2 * (value - low) / (high - low) - 1


def above(value: float, feedback: Ratings | Attributes) -> bool | None:
    """Return whether a value is above `good_above` or the middle of the scale; `None` if it is just that."""
    threshold = sum(feedback.scale) / 2 if feedback.good_above is None else feedback.good_above
    return None if value - threshold == 0 else value - threshold > 0


def preference_share(
    better: list[float],
    worse: list[float],
    confidences_better: list[float] | None = None,
    confidences_worse: list[float] | None = None,
) -> float:
    """
    Return the share of pairs of ratings, one of each list, of which the first is higher; a tie counts half.

    Args:
        better, worse (`list[float]`): ratings of two completions.
        confidences_better, confidences_worse (`list[float]`, *optional*): the confidence in each; 1 where there are
            none, see [`~rlhf_trl.data.feedback.base.certainty`].
    """
    sure = [
        [certainty(confidence) for confidence in given or [1.0] * len(ratings)]
        for given, ratings in ((confidences_better, better), (confidences_worse, worse))
    ]
    ahead = sum(
        0.5 + ((a > b) - (a < b)) * c * d / 2
        for a, c in zip(better, sure[0], strict=True)
        for b, d in zip(worse, sure[1], strict=True)
    )
    return ahead / (len(better) * len(worse))


def drop_unrated(feedback: Rated, rows: list[RatedRow], dataset_type: str, notes: Counter) -> list[RatedRow]:
    """
    Drop rows without any rating.

    Raises:
        DataError: if no row has a rating in one of the dimensions, whose head would learn nothing.
    """
    for name in rows[0]["ratings"] if rows and dataset_type != "prompt" else ():
        if not any(row["ratings"][name] for row in rows):
            raise DataError(
                f"no row has a score for the attribute `{name}`. Remove it from `data.feedback.dimensions`, or give "
                "data that has some."
            )
    rated = [row for row in rows if any(row["ratings"].values())]
    notes["rows dropped: rated in no dimension"] += len(rows) - len(rated)
    return rated


def pool_completions(rows: Iterable[RatedRow], notes: Counter) -> list[list[RatedRow]]:
    """Return the completions of each prompt, each once, with the ratings of all its rows."""
    prompts: dict[str, dict[str, RatedRow]] = {}
    for row in rows:
        pooled = prompts.setdefault(key_of(row["prompt"]), {})
        key = key_of(row["completion"])
        if key in pooled:
            notes["rows pooled with others on the same completion"] += 1
            if "confidences" in row or "confidences" in pooled[key]:
                pooled[key]["confidences"] = [*confidences_of(pooled[key]), *confidences_of(row)]
            for name, ratings in row["ratings"].items():
                pooled[key]["ratings"][name] += ratings
        else:
            pooled[key] = {**row, "ratings": {name: list(ratings) for name, ratings in row["ratings"].items()}}
    return [list(completions.values()) for completions in prompts.values()]


def confidences_of(row: RatedRow) -> list[float]:
    """Return the confidence in each rating of a row, 1 where it names none."""
    return row.get("confidences") or [1.0] * max(map(len, row["ratings"].values()))


def compare(
    feedback: Rated, rows: list[RatedRow], dataset_type: str, rng: random.Random, notes: Counter
) -> Iterator[Group]:
    """
    Group the completions of each prompt, and compare them by their ratings.

    Args:
        feedback (`Rated`): the options.
        rows (`list[RatedRow]`): checked rows.
        dataset_type (`str`): what they become; regression targets are of `comparisons` only.
        rng (`random.Random`): draws the groups.
        notes (`Counter`): counts ties and what is dropped.
    """
    for completions in pool_completions(rows, notes):
        for _ in range(feedback.rounds):
            for group in partition(completions, feedback.group_size, rng):
                yield _compare_group(feedback, group, dataset_type, notes)


def label(feedback: Rated, rows: list[RatedRow], notes: Counter) -> Iterator[tuple[Text, Text, bool | None]]:
    """Yield (prompt, completion, label) of each completion; the label of one that is neither good nor bad is none."""
    for completions in pool_completions(rows, notes):
        for row in completions:
            yield row["prompt"], row["completion"], feedback.label(row)


def partition(items: list, size: int | None, rng: random.Random) -> Iterator[list]:
    """Yield `items` in random groups of at most `size` and about equal sizes."""
    groups = 1 if size is None else -(-len(items) // size)
    order = rng.sample(items, len(items))
    for i in range(groups):
        yield order[i::groups]


def _compare_group(feedback: Rated, rows: list[RatedRow], dataset_type: str, notes: Counter) -> Group:
    prompt, completions = rows[0]["prompt"], [row["completion"] for row in rows]
    targets = [feedback.target(row) for row in rows]
    if dataset_type == "comparisons" and targets[0] is not None:
        return Group(prompt, completions, [], targets)
    safe = [feedback.side(row) for row in rows]
    safe = safe if any(side is not None for side in safe) else None
    labeled = dataset_type == "comparisons" and safe is not None
    notes["completions dropped: no other one of their prompt to compare with"] += len(rows) == 1 and not labeled
    annotated = dataset_type == "annotated"
    comparisons = []
    for i, j in combinations(range(len(rows)), 2):
        gap = feedback.gap(rows[i], rows[j])
        if gap is None or gap == 0 or abs(gap) < feedback.min_gap:
            notes["ties" if gap is not None else "pairs dropped: no dimension in which both were rated"] += 1
            continue
        a, b = (i, j) if gap > 0 else (j, i)
        share = feedback.share(rows[a], rows[b]) if feedback.agreement or annotated else None
        if feedback.agreement and not annotated and share is not None and share <= 0.5:
            notes["ties: the mean and most raters disagree"] += 1
            continue
        notes["pairs on which raters disagree"] += share is not None and share < 1
        comparisons.append(Comparison(a, b, abs(gap), share))
    columns = [row.get("columns") or {} for row in rows]
    shared = {name: value for name, value in columns[0].items() if all(other.get(name) == value for other in columns)}
    for name in {name for other in columns for name in other} - shared.keys():
        notes[f"rows without `{name}`: their completions differ in it"] += 1
    ratings = [row["ratings"] for row in rows]
    return Group(prompt, completions, comparisons, ratings=ratings, columns=shared, safe=safe)
