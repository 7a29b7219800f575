"""
Questions and answers as files of other tools have them.

A file shows the answers of a question in an order of its own, drawn at random, since the order of a question may tell
which answer is thought better. Beside the tool's own fields, each row holds an object `rlhf_trl` (in the place that
the tool leaves to its users): `id`, `question` and `shown`, by which the row is found again, and what the tool has no
field for: of each label the order it was shown in, its time, seconds, confidence and the reason of a skip.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf_trl.data.messages import as_text
from rlhf_trl.labels.candidates import Candidates, Text
from rlhf_trl.labels.store import Label

# Of each label, beside its answer
KEPT = ("labeler", "time", "order", "seconds", "confidence", "skipped")
OWN = "rlhf_trl"


@dataclass(frozen=True)
class Item:
    """
    A question with its labels.

    Args:
        row ([`~rlhf_trl.labels.candidates.Candidates`]): the candidates.
        question (`list[int]`), form (`str`): indices of the candidates asked about, and the form of the answers.
        labels (`list[Label]`): labels of the question.
    """

    row: Candidates
    question: list[int]
    form: str
    labels: list[Label]

    @property
    def shown(self) -> list[int]:
        """The candidates in the order of the file."""
        order = sorted(self.question)
        random.Random(f"{self.row.id}|{order}").shuffle(order)
        return order

    @property
    def completions(self) -> list[Text]:
        """The completions in the order of the file."""
        return [self.row.candidates[i].completion for i in self.shown]

    def own(self, labels: Iterable[Label] | None = None) -> dict[str, Any]:
        """Return the object that finds the row again, with what the tool has no field for."""
        kept = [
            {name: getattr(label, name) for name in KEPT}
            | ({} if label.question == self.question else {"question": label.question})
            for label in (self.labels if labels is None else labels)
        ]
        return {
            "id": self.row.id,
            "question": self.question,
            "form": self.form,
            "shown": self.shown,
            "labels": kept,
        }

    def answer(self, label: Label) -> Any:
        """Return the answer of a label in the order of the file."""
        return reordered(label.answer, self.form, label.question, self.shown)


def reordered(answer: Any, form: str, of: Sequence[int], to: Sequence[int]) -> Any:
    """Return an answer about candidates in the order `of` as one about them in the order `to`."""
    if form == "pair":
        return list(to).index(of[answer]) if isinstance(answer, int) else answer
    if form in ("ranking", "rating") and answer is not None:
        return [answer[list(of).index(candidate)] for candidate in to]
    return answer


def competition_ranks(groups: Sequence[Sequence[int]], count: int) -> list[int] | None:
    """
    Return the ranks of a ranking in groups of ties, best first: 1, 2, 2, 4; `None` if one of `count` is missing.

    Args:
        groups (`Sequence[Sequence[int]]`): places of the answers.
        count (`int`): number of the answers.
    """
    ranks = {place: 1 + sum(map(len, groups[:i])) for i, group in enumerate(groups) for place in group}
    return [ranks[i] for i in range(count)] if ranks.keys() == set(range(count)) else None


def tie_groups(ranks: Sequence[float]) -> list[list[int]]:
    """Return the places of the answers by rank, best first."""
    return [[i for i, rank in enumerate(ranks) if rank == value] for value in sorted(set(ranks))]


def rating_names(answer: Sequence[Any]) -> list[tuple[int, str | None]]:
    """Return place and attribute of every number of a rating, `None` for a rating as a whole."""
    names: list[tuple[int, str | None]] = []
    for i, rating in enumerate(answer):
        names += (
            [(i, name) for name in rating] if isinstance(rating, dict) else [(i, None)] if rating is not None else []
        )
    return names


def rating_field(place: int, attribute: str | None) -> str:
    """Return the name of a rating in a file: `rating-1`, `rating-2-honest`."""
    return f"rating-{place + 1}" + (f"-{attribute}" if attribute else "")


def read_ratings(fields: dict[str, float], count: int) -> list[Any]:
    """Return a rating from its numbers by name, see [`rating_field`]."""
    made: list[Any] = [None] * count
    for name, number in fields.items():
        _, place, *attribute = name.split("-", 2)
        i = int(place) - 1
        if not attribute:
            made[i] = number
        else:
            made[i] = {**(made[i] if isinstance(made[i], dict) else {}), attribute[0]: number}
    return made


@dataclass(kw_only=True)
class Response:
    """
    An answer in a file, in the file's order of the answers.

    Attributes:
        labeler (`str`, *optional*), time (`str`, *optional*), seconds (`float`, *optional*): as the file has them.
        answer (*optional*), skipped (`str`, *optional*): the answer, or why there is none.
        problem (`str`, *optional*): why it can't be used: it is half-filled, or isn't known.
    """

    labeler: str | None = None
    answer: Any = None
    skipped: str | None = None
    time: str | None = None
    seconds: float | None = None
    problem: str | None = None


@dataclass(kw_only=True)
class Parsed:
    """
    A row of a file.

    Attributes:
        prompt, completions: texts or messages, in the file's order; none where the file doesn't have them.
        form (`str`): form of the answers.
        own (`dict`): what [`Item.own`] returned, empty in a file that isn't ours.
        responses (`list[Response]`): the answers.
        policies (`list[str]`, *optional*): names of the policies.
        lost (`list[str]`): what the labels can't hold, such as the strength of a preference.
    """

    prompt: Text | None
    completions: list[Text]
    form: str
    own: dict[str, Any] = field(default_factory=dict)
    responses: list[Response] = field(default_factory=list)
    policies: list[str] | None = None
    lost: list[str] = field(default_factory=list)


class Format(Protocol):
    """A tool's files."""

    # Whether a file is JSON lines; else it is one list
    LINES: bool
    # Forms of answers that the tool has
    FORMS: tuple[str, ...]

    @staticmethod
    def write(item: Item, number: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of a question, the `number`-th of the file."""
        ...

    @staticmethod
    def read(row: dict[str, Any]) -> Parsed:
        """
        Return what a row says.

        Raises:
            [`~rlhf_trl.data.rows.RowError`]: if it is no row of the tool.
        """
        ...


def plain(value: Text) -> str:
    """Return a prompt or a completion as text, a single turn as its content."""
    if not isinstance(value, str) and len(value) == 1:
        return as_text([{**value[0], "role": "assistant"}])
    return as_text(value)
