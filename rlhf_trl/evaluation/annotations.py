"""Annotated completions: comparisons and ratings that rewards are evaluated on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from datasets import Dataset, Image, List

from rlhf_trl.data.dataset_types import ANNOTATED
from rlhf_trl.data.feedback.base import key_of
from rlhf_trl.data.images import decode_images, keys_of
from rlhf_trl.data.messages import as_text
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.columns import slice_columns
from rlhf_trl.evaluation.reward_measures import length_slices, rating_gap_slices, share_slices
from rlhf_trl.hints import count_of


@dataclass
class Annotations:
    """
    Annotated rows, each completion of a prompt once.

    R rows, N completions, M comparisons.

    Attributes:
        prompts, completions (`list` of length `N`): texts or messages.
        prompt_numbers (`list[int]` of length `N`): number of each completion's prompt.
        ratings (`list[list[float]]` of length `N`): ratings of each completion, empty where there are none.
        first_row (`list[int]` of length `N`): first row that holds the completion.
        of_row (`list[list[int]]` of length `R`): indices of each row's completions.
        comparisons (`list[tuple]` of length `M`): indices of the better and the worse completion, the row, the rating
            gap and the share of raters who agree (NaN where unknown).
        columns (`dict[str, list]`): the other columns, R values each.
        attributes (`dict[str, list[tuple]]`): comparisons by dimension: indices of the better and the worse
            completion, and the row.
        sides (`np.ndarray` of shape `(N,)`): 1 for a completion above the border of a cost model (safe), -1 for one
            below; NaN where there is no label.
        better, worse, row, rating_gap, share (`np.ndarray` of shape `(M,)`): the comparisons by column.
        lengths (`np.ndarray` of shape `(N,)`): lengths of the completions in characters.
    """

    prompts: list
    completions: list
    prompt_numbers: list[int]
    ratings: list[list[float]]
    first_row: list[int]
    of_row: list[list[int]]
    comparisons: list[tuple]
    columns: dict[str, list]
    attributes: dict[str, list[tuple[int, int, int]]]
    sides: np.ndarray

    def __post_init__(self):
        better, worse, row, gap, share = np.array(self.comparisons, dtype=float).reshape(-1, 5).T
        self.better, self.worse, self.row = better.astype(int), worse.astype(int), row.astype(int)
        self.rating_gap, self.share = gap, share
        self.lengths = np.array([_length(completion) for completion in self.completions], dtype=float)

    @property
    def mean_ratings(self) -> np.ndarray:
        """Mean rating of each completion, shape (N,); NaN where there is none."""
        return np.array([np.mean(each) if each else np.nan for each in self.ratings])

    def attribute_arrays(self) -> dict[str, np.ndarray]:
        """Return better, worse and row of the comparisons of each dimension, shape (3, comparisons)."""
        return {name: np.array(pairs, dtype=int).reshape(-1, 3).T for name, pairs in self.attributes.items()}

    def of_completions(self) -> Dataset:
        """Return the prompt and the other columns of each completion, N rows."""
        columns = {name: [values[row] for row in self.first_row] for name, values in self.columns.items()}
        return _dataset({"prompt": self.prompts, **columns})

    def first_prompts(self, count: int) -> Dataset:
        """Return the first `count` prompts with the other columns, one row per prompt."""
        rows = sorted(dict(zip(self.prompt_numbers[::-1], self.first_row[::-1], strict=True)).values())[:count]
        prompts = [self.prompts[self.first_row.index(row)] for row in rows]
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return _dataset({"prompt": prompts, **columns})


def _dataset(columns: dict[str, list]) -> Dataset:
    dataset = Dataset.from_dict(columns)
    return dataset.cast_column("images", List(Image())) if "images" in columns else dataset


def _length(completion: str | list[dict]) -> int:
    if isinstance(completion, str):
        return len(completion.strip())
    return sum(len(as_text(turn["content"] or "")) for turn in completion)


def read_annotated(dataset: Dataset) -> Annotations:
    """
    Return the completions and comparisons of an annotated dataset.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if it compares nothing.
    """
    dataset = decode_images(dataset, False)
    columns = {name: dataset[name][:] for name in dataset.column_names if name not in ("prompt", *ANNOTATED)}
    prompts, completions, prompt_numbers, ratings, first_row, of_row, comparisons = ([] for _ in range(7))
    numbers: dict[str, int] = {}
    places: dict[tuple[int, str], int] = {}
    attributes: dict[str, list[tuple[int, int, int]]] = {}
    sides: dict[int, float] = {}
    for r, row in enumerate(cast(Iterable[dict[str, Any]], dataset)):
        asked = " ".join([key_of(row["prompt"]), *keys_of(row.get("images"))])
        number = numbers.setdefault(asked, len(numbers))
        indices = []
        for i, completion in enumerate(row["completions"]):
            key = (number, key_of(completion))
            if key not in places:
                places[key] = len(places)
                prompts.append(row["prompt"])
                completions.append(completion)
                prompt_numbers.append(number)
                ratings.append(list((row.get("ratings") or {i: []})[i] or []))
                first_row.append(r)
            indices.append(places[key])
        of_row.append(indices)
        labels = zip(indices, row.get("border") or [], strict=False)
        sides |= {place: side for place, side in labels if side is not None}
        gaps, shares = (row.get(name) or [None] * len(row["better"]) for name in ("gap", "share"))
        for a, b, gap, share in zip(row["better"], row["worse"], gaps, shares, strict=True):
            known = [np.nan if value is None else value for value in (gap, share)]
            comparisons.append((indices[a], indices[b], r, *known))
        for name, pairs in _attribute_comparisons(row.get("attributes") or []).items():
            attributes.setdefault(name, []).extend((indices[a], indices[b], r) for a, b in pairs)
    if not comparisons:
        raise ConfigError(
            f"The data's {count_of(len(dataset), 'row')} for evaluation compare nothing: no completion is better than "
            "another one of its prompt. Give comparisons (`chosen` and `rejected`), or set `data/feedback=...` with "
            "the dataset type of the rows."
        )
    labeled = np.array([sides.get(place, np.nan) for place in range(len(completions))])
    return Annotations(
        prompts, completions, prompt_numbers, ratings, first_row, of_row, comparisons, columns, attributes, labeled
    )


def _attribute_comparisons(scores: list[dict[str, float | None]]) -> dict[str, list[tuple[int, int]]]:
    """Return by dimension the pairs of a row's completions of which the first has the higher score."""
    found = {}
    for name in scores[0] if scores else ():
        known = [(i, score) for i, each in enumerate(scores) if (score := each[name]) is not None]
        found[name] = [(i, j) for i, a in known for j, b in known if a > b]
    return found


def slices_of(
    annotations: Annotations, gaps_above: Sequence[float] | None, columns: Sequence[str] | None, like_length: float
) -> dict[str, np.ndarray]:
    """
    Return which comparisons are in each slice, shape (M,), by its name.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a column is missing, or has more values than a table can hold.
    """
    lengths = annotations.lengths[annotations.better], annotations.lengths[annotations.worse]
    if gaps_above is not None and np.isnan(annotations.rating_gap).all():
        raise ConfigError(
            "`stage.gaps_above` parts comparisons by how far apart people see the two, and the data doesn't say. Give "
            "it a column `gap`, or leave `stage.gaps_above` out."
        )
    return (
        length_slices(*lengths, like_length)
        | rating_gap_slices(annotations.rating_gap, gaps_above)
        | share_slices(annotations.share)
        | _column_slices(annotations, columns)
    )


def _column_slices(annotations: Annotations, columns: Sequence[str] | None) -> dict[str, np.ndarray]:
    # By the values that comparisons have
    compared = {name: [values[row] for row in annotations.row] for name, values in annotations.columns.items()}
    slices = {}
    for name, found in slice_columns(compared, columns).items():
        values = np.array(found, dtype=object)
        slices |= {f"{name}: {value}": values == value for value in sorted(set(found))}
    return slices
