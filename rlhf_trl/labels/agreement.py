"""
Agreement of labelers: Krippendorff's alpha, Cohen's kappa, and how a labeler's answers stand beside known ones.

Labels become values of units: of a pair which of its two candidates is better, or that they tie; of a ranking and a
rating the rank or the rating of each candidate (and attribute). Edits have no agreement.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, cast

import numpy as np

from rlhf_trl.labels.store import Label

Level = Literal["nominal", "ordinal", "interval", "ratio"]
# The level of measurement of each form's values
LEVELS: dict[str, Level] = {"pair": "nominal", "ranking": "ordinal", "rating": "ordinal"}
Unit = tuple[Hashable, ...]


def krippendorff_alpha(units: Iterable[Sequence[Hashable]], level: Level = "nominal") -> float:
    """
    Return Krippendorff's alpha: 1 for perfect agreement, 0 for that of chance (Krippendorff, Computing Krippendorff's
    Alpha-Reliability, 2011: 1 - D_o / D_e of the coincidence matrix).

    Args:
        units (`Iterable[Sequence]`): the values that each unit was given, in any order, without missing ones. Units
            with fewer than two values tell nothing. Numbers, unless the level is nominal.
        level (`str`): nominal, ordinal, interval or ratio.

    Returns:
        `float`: alpha; NaN where no unit has two values, or where all values are the same.
    """
    pairable = [list(values) for values in units if len(values) > 1]
    values = list(dict.fromkeys(value for unit in pairable for value in unit))
    if level != "nominal":
        values.sort(key=cast(Callable, float))
    if len(values) < 2:
        return math.nan
    place = {value: i for i, value in enumerate(values)}
    coincidences = np.zeros((len(values), len(values)))
    for unit in pairable:
        counts = np.bincount([place[value] for value in unit], minlength=len(values)).astype(float)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    totals = coincidences.sum(axis=0)
    distances = _distances(values, totals, level)
    expected = (np.outer(totals, totals) * distances).sum()
    return float(1 - (totals.sum() - 1) * (coincidences * distances).sum() / expected)


def _distances(values: list, totals: np.ndarray, level: Level) -> np.ndarray:
    """Return the squared distance of each two values, shape (values, values)."""
    if level == "nominal":
        return 1 - np.eye(len(values))
    if level == "ordinal":
        cumulative = np.cumsum(totals) - totals / 2  # the middle of the ranks of each value
        return (cumulative[:, None] - cumulative[None, :]) ** 2
    numbers = np.array(values, dtype=float)
    difference, total = numbers[:, None] - numbers[None, :], numbers[:, None] + numbers[None, :]
    if level == "interval":
        return difference**2
    return np.divide(difference, total, out=np.zeros_like(total), where=total != 0) ** 2


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """
    Return Cohen's kappa of two labelers: the agreement beyond that of chance (Cohen, 1960).

    Args:
        first, second (`Sequence`): their values of the same units.

    Returns:
        `float`: kappa; NaN where there is no unit, or where both gave one and the same value to all.
    """
    count = len(first)
    if not count:
        return math.nan
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / count
    kinds = {*first, *second}
    expected = sum(list(first).count(kind) * list(second).count(kind) for kind in kinds) / count**2
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)


def values_of(label: Label) -> dict[Unit, Hashable]:
    """Return the values that a label gives to units, none for a skipped one or an edit."""
    if label.answer is None or label.form == "edit":
        return {}
    if label.form == "pair":
        answer = label.answer
        # The place among the two, not the candidate's own index: all pairs share their categories, or the agreement of
        # chance would count answers that a pair doesn't have, and chance itself would look like agreement
        return {label.key: sorted(label.question).index(label.question[answer]) if answer in (0, 1) else answer}
    found: dict[Unit, Hashable] = {}
    for candidate, value in zip(label.question, label.answer, strict=True):
        if isinstance(value, dict):
            found |= {(*label.key, candidate, name): number for name, number in value.items()}
        elif value is not None:
            # Ranks 1, 1, 3 and 1, 1, 2 are the same ranking
            rank = 1 + sum(other < value for other in label.answer) if label.form == "ranking" else value
            found[(*label.key, candidate)] = rank
    return found


def first_answers(labels: Iterable[Label]) -> dict[str, dict[Unit, Hashable]]:
    """Return the values of each unit by labeler; of a question that was asked twice those of the first answer."""
    found: dict[str, dict[Unit, Hashable]] = {}
    for label in labels:
        of_labeler = found.setdefault(label.labeler, {})
        for unit, value in values_of(label).items():
            of_labeler.setdefault(unit, value)
    return found


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """
    Agreement of all labelers on the questions of one form.

    Attributes:
        form (`str`), level (`str`): the form, and the level of measurement of its values.
        alpha (`float`): Krippendorff's alpha, NaN where nothing was labeled twice.
        units (`int`): number of units with values of two or more labelers.
        pairs (`dict`): by two labelers: number of shared units, share of equal values, and Cohen's kappa.
    """

    form: str
    level: Level
    alpha: float
    units: int
    pairs: dict[tuple[str, str], tuple[int, float, float]] = field(default_factory=dict)


def agreement(labels: Sequence[Label], form: str) -> Agreement:
    """Return how well the labelers agree on the questions of a form."""
    answers = first_answers(label for label in labels if label.form == form)
    units: dict[Unit, list[Hashable]] = {}
    for of_labeler in answers.values():
        for unit, value in of_labeler.items():
            units.setdefault(unit, []).append(value)
    pairs = {}
    for a, b in combinations(sorted(answers), 2):
        if shared := [unit for unit in answers[a] if unit in answers[b]]:
            first, second = [answers[a][unit] for unit in shared], [answers[b][unit] for unit in shared]
            same = sum(x == y for x, y in zip(first, second, strict=True)) / len(shared)
            pairs[a, b] = (len(shared), same, cohen_kappa(first, second))
    return Agreement(
        form=form,
        level=LEVELS.get(form, "nominal"),
        alpha=krippendorff_alpha(units.values(), LEVELS.get(form, "nominal")),
        units=sum(len(values) > 1 for values in units.values()),
        pairs=pairs,
    )


def match(label: Label, known: Label) -> float | None:
    """
    Return to what share a label says the same as another one of its question: of a pair 0 or 1, of a ranking the share
    of pairs that it orders alike, of a rating the share of equal numbers; `None` where they can't be compared.
    """
    if label.key != known.key or label.answer is None or known.answer is None:
        return None
    own, other = values_of(label), values_of(known)
    if label.form == "ranking":
        wins = [
            (_sign(own[a], own[b]), _sign(other[a], other[b]))
            for a, b in combinations([u for u in own if u in other], 2)
        ]
        return sum(a == b for a, b in wins) / len(wins)
    shared = [unit for unit in own if unit in other]
    return sum(own[unit] == other[unit] for unit in shared) / len(shared) if shared else None


def _sign(a, b) -> int:
    return (a > b) - (a < b)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """
    A labeler's answers beside known ones and beside the own earlier ones.

    Attributes:
        labels (`int`), skipped (`int`): answers, and questions that were skipped.
        gold (`int`), accuracy (`float`): questions with a known answer, and the mean share that was the same.
        repeats (`int`), consistency (`float`): questions that were asked again, and the mean share that was the same.
        first_shown (`float`): share of pairs where the one shown first was better, of those with a better one.
        seconds (`float`): median time per answer.
    """

    labels: int
    skipped: int
    gold: int
    accuracy: float
    repeats: int
    consistency: float
    first_shown: float
    seconds: float


def quality(labels: Sequence[Label], gold: Mapping[Unit, Label] | None = None) -> dict[str, Quality]:
    """
    Return the quality of each labeler's answers.

    Args:
        labels (`Sequence[Label]`): labels in force.
        gold (`Mapping`, *optional*): labels with the known answers, by their keys.
    """
    found = {}
    for name in sorted({label.labeler for label in labels}):
        own = [label for label in labels if label.labeler == name]
        answered = [label for label in own if label.answer is not None]
        firsts: dict[Unit, Label] = {}
        hits, repeats = [], []
        for label in answered:
            if label.key in firsts:
                repeats.append(match(label, firsts[label.key]))
                continue
            firsts[label.key] = label
            if gold and label.key in gold:
                hits.append(match(label, gold[label.key]))
        first = [
            label.question[label.answer] == label.order[0]
            for label in answered
            if label.form == "pair" and isinstance(label.answer, int) and label.order
        ]
        times = [label.seconds for label in answered if label.seconds is not None]
        found[name] = Quality(
            labels=len(answered),
            skipped=len(own) - len(answered),
            gold=len(_known(hits)),
            accuracy=_mean(_known(hits)),
            repeats=len(_known(repeats)),
            consistency=_mean(_known(repeats)),
            first_shown=_mean(first),
            seconds=float(np.median(times)) if times else math.nan,
        )
    return found


def _known(shares: list[float | None]) -> list[float]:
    return [share for share in shares if share is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
