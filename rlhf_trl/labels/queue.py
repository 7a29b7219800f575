"""
Questions for people: what a labeler is asked next, and what of it is done.

What is asked follows from the candidates and the labels alone, so a server that was killed asks what it would have
asked. Of two labelers at a time, each has a question of the other's only if both are to answer it.
"""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rlhf_trl.errors import ConfigError
from rlhf_trl.labels.agreement import Unit
from rlhf_trl.labels.candidates import Candidates
from rlhf_trl.labels.store import Label
from rlhf_trl.labels.tasks import Task, tasks_of

# After this time without an answer, a question that one labeler was shown may be another's
RESERVED_SECONDS = 600.0
# A question is asked again after this many others at the earliest
REPEAT_DISTANCE = 5


@dataclass(frozen=True)
class Progress:
    """
    Progress of the labeling.

    Attributes:
        done (`int`), total (`int`): answers, and how many there are to be; without gold questions and repeats.
        mine (`int`): answers of the labeler, all of them.
    """

    done: int
    total: int
    mine: int

    @property
    def left(self) -> int:
        """Answers that are still to be given."""
        return max(self.total - self.done, 0)


class Queue:
    """
    The questions of a file of candidates and their labels.

    Args:
        rows (`Sequence[Candidates]`): candidates, with their questions.
        form (`str`): form of the answers.
        labels (`Iterable[Label]`): labels so far.
        overlap (`int`): number of labelers who answer each question.
        budget (`int`, *optional*): number of answers in all, without gold questions and repeats.
        gold (`Iterable[Label]`): labels with the known answers of some of the candidates.
        gold_every (`int`), repeat_every (`int`):
            a gold question, or an earlier question again, after each so many answers of a labeler; 0: never.
        labelers (`Sequence[str]`, *optional*): all who answer; `None`: anybody may come.
        seed (`int`): seeds the order in which the candidates of a question are shown.
        clock (`Callable`): clock of reservations, in seconds.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there is no question, or one doesn't fit the form.
    """

    def __init__(
        self,
        rows: Sequence[Candidates],
        form: str,
        labels: Iterable[Label] = (),
        *,
        overlap: int = 1,
        budget: int | None = None,
        gold: Iterable[Label] = (),
        gold_every: int = 0,
        repeat_every: int = 0,
        labelers: Sequence[str] | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.rows = {row.id: row for row in rows}
        self.form, self.overlap, self.seed, self.clock = form, overlap, seed, clock
        self.gold_every, self.repeat_every, self.labelers = gold_every, repeat_every, labelers
        self.gold = {label.key: label for label in gold if label.answer is not None and label.form == form}
        self._check_gold()
        self.tasks = {unit: task for unit, task in tasks_of(rows, form).items() if unit not in self.gold}
        if not self.tasks:
            raise ConfigError(
                "The candidates hold no `questions`, so there is nothing to ask. Make them with `stage=collect`."
            )
        self.gold_tasks = {
            label.key: Task(self.rows[label.id], tuple(label.question), form, kind="gold")
            for label in self.gold.values()
        }
        most = len(self.tasks) * overlap
        self.total = most if budget is None else min(budget, most)
        self.labels: list[Label] = []
        self.answered: dict[Unit, set[str]] = {unit: set() for unit in self.tasks}  # by whom
        self.mine: dict[str, list[Label]] = {}
        self.taken_back: dict[str, Unit] = {}
        self.reserved: dict[str, tuple[Unit, float]] = {}
        for label in labels:
            self.add(label)

    def _check_gold(self) -> None:
        for label in self.gold.values():
            row = self.rows.get(label.id)
            if row is None or max(label.question) >= len(row.candidates):
                raise ConfigError(
                    f"`labeler.gold` has a label of `{label.id}`, candidates {label.question}, which the candidates "
                    "to be labeled don't have. Give labels of these candidates."
                )

    def add(self, label: Label) -> None:
        """Take up a label that was saved."""
        self.labels.append(label)
        self.mine.setdefault(label.labeler, []).append(label)
        self.taken_back.pop(label.labeler, None)
        if label.key in self.answered and label.answer is not None:
            self.answered[label.key].add(label.labeler)

    def remove(self, label: Label) -> None:
        """Drop a label that was withdrawn; its question is the next one of its labeler."""
        self.labels.remove(label)
        mine = self.mine[label.labeler]
        mine.remove(label)
        if label.key in self.answered and not any(each.key == label.key and each.answer is not None for each in mine):
            self.answered[label.key].discard(label.labeler)
        if label.form == self.form:
            self.taken_back[label.labeler] = label.key

    def times_answered(self, labeler: str, unit: Unit) -> int:
        """Return how often a labeler has answered or skipped a question."""
        return sum(label.key == unit for label in self.mine.get(labeler, ()))

    def last(self, labeler: str) -> Label | None:
        """Return the last label of a labeler, if its candidates are here."""
        mine = self.mine.get(labeler, [])
        return mine[-1] if mine and mine[-1].id in self.rows else None

    @property
    def is_filled(self) -> bool:
        """Whether every answer that was to be given has been given, or else none of the `labelers` has one to give."""
        return self.done >= self.total or (bool(self.labelers) and not self.open_to(self.labelers))

    def open_to(self, labelers: Iterable[str]) -> list[Unit]:
        """Return the questions that lack an answer, and that one of the labelers has neither answered nor skipped."""
        seen = [{label.key for label in self._own(name)} for name in labelers]
        return [
            unit
            for unit, names in self.answered.items()
            if len(names) < self.overlap and not all(unit in units for units in seen)
        ]

    @property
    def done(self) -> int:
        """Number of answers, without gold questions and repeats."""
        return sum(min(len(labelers), self.overlap) for labelers in self.answered.values())

    def progress(self, labeler: str) -> Progress:
        """Return what is done."""
        mine = sum(label.answer is not None and label.form == self.form for label in self.mine.get(labeler, ()))
        return Progress(self.done, self.total, mine)

    def next(self, labeler: str) -> Task | None:
        """Return the next question of a labeler and reserve it, `None` where there is none for now."""
        self.reserved.pop(labeler, None)
        if self.is_filled:
            return None
        task = self._taken_back(labeler) or self._gold(labeler) or self._repeat(labeler) or self._open(labeler)
        if task is not None:
            self.reserved[labeler] = (task.unit, self.clock())
        return task

    def find(self, key: str) -> Task | None:
        """Return the task of a key, `None` where there is none."""
        row_id, _, rest = key.rpartition("|")[0].rpartition("|")
        try:
            question, turn = tuple(int(i) for i in rest.split("-")), int(key.rpartition("|")[2])
        except ValueError:
            return None
        unit = (row_id, tuple(sorted(question)), self.form)
        task = self.tasks.get(unit) or self.gold_tasks.get(unit)
        if task is None or task.question != question:
            return None
        return Task(task.row, task.question, task.form, turn, task.kind if not turn else "repeat")

    def order(self, task: Task, labeler: str) -> list[int]:
        """Return the candidates of a task in the order in which a labeler sees them, always the same one."""
        order = list(task.question)
        random.Random(f"{self.seed}|{labeler}|{task.key}").shuffle(order)
        return order

    def _taken_back(self, labeler: str) -> Task | None:
        unit = self.taken_back.get(labeler, ())
        task = self.tasks.get(unit) or self.gold_tasks.get(unit)
        return self._again(task, labeler) if task else None

    def _gold(self, labeler: str) -> Task | None:
        mine = self._own(labeler)
        known = sum(label.key in self.gold for label in mine)
        if not self.gold_every or (len(mine) - known) // self.gold_every <= known:
            return None
        seen = {label.key for label in mine}
        return next((task for unit, task in self.gold_tasks.items() if unit not in seen), None)

    def _repeat(self, labeler: str) -> Task | None:
        mine = [label for label in self._own(labeler) if label.key not in self.gold]
        once = len({label.key for label in mine})
        if not self.repeat_every or once // self.repeat_every <= len(mine) - once:
            return None
        keys = [label.key for label in mine]
        for label in mine[:-REPEAT_DISTANCE]:
            if label.answer is not None and keys.count(label.key) == 1 and label.key in self.tasks:
                return self._again(self.tasks[label.key], labeler)
        return None

    def _open(self, labeler: str) -> Task | None:
        now = self.clock()
        others: dict[Unit, int] = {}
        for name, (unit, since) in self.reserved.items():
            if name != labeler and now - since < RESERVED_SECONDS and name not in self.answered.get(unit, ()):
                others[unit] = others.get(unit, 0) + 1
        if self.done + sum(others.values()) >= self.total:  # theirs will fill the budget
            return None
        seen = {label.key for label in self._own(labeler)}
        for unit, task in self.tasks.items():
            if unit not in seen and len(self.answered[unit]) + others.get(unit, 0) < self.overlap:
                return task
        return None

    def _own(self, labeler: str) -> list[Label]:
        return [label for label in self.mine.get(labeler, []) if label.form == self.form]

    def _again(self, task: Task, labeler: str) -> Task:
        turn = self.times_answered(labeler, task.unit)
        return Task(task.row, task.question, task.form, turn, "repeat" if turn else task.kind)
