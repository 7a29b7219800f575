"""Machines as labelers: what they share, and rewards that answer (`labeler=reward`, `labeler=gold`)."""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm import tqdm

from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.rewards import score_members
from rlhf_trl.hints import names_of
from rlhf_trl.labels.candidates import Candidates
from rlhf_trl.labels.selection import member_scores
from rlhf_trl.labels.store import Label, LabelStore, now
from rlhf_trl.labels.tasks import Task, tasks_of
from rlhf_trl.rewards.base import Reward
from rlhf_trl.rewards.function import FunctionReward
from rlhf_trl.terminal import say

# Questions of which the answers are computed, and then saved, together
BATCH = 64


class MachineLabeler(ABC):
    """
    A labeler that answers each question once.

    Attributes:
        name (`str`): its name in the labels.
        forms (`tuple[str, ...]`): forms of answers that it gives.
        is_cached (`bool`): whether all that it was asked is at hand, so that a resumed labeling measures all of it.
        measures (`dict[str, float]`): what was measured of it, for `metrics.json`.
    """

    name: str
    forms: tuple[str, ...]
    is_cached = False

    def __init__(self, name: str):
        self.name = name
        self.measures: dict[str, float] = {}

    def __call__(
        self,
        rows: Sequence[Candidates],
        store: LabelStore,
        form: str,
        budget: int | None = None,
        overlap: int = 1,
        seed: int = 0,
    ) -> bool:
        """
        Answer the questions that it hasn't answered yet.

        Args:
            rows (`Sequence[Candidates]`), store ([`~rlhf_trl.labels.store.LabelStore`]), form (`str`):
                candidates with their questions, the file of labels, and the form of the answers.
            budget (`int`, *optional*): number of questions in all, the first ones.
            overlap (`int`): 1.
            seed (`int`): seeds what is drawn.

        Returns:
            `bool`: true: every question is answered or skipped.

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: for a form that it can't give, or if it can't be asked.
        """
        if form not in self.forms:
            raise ConfigError(
                f"`{self.name}` answers {names_of(f'stage.ask={each}' for each in self.forms)}, and `stage.ask` is "
                f"`{form}`. Set one of these, or another `labeler`."
            )
        if overlap != 1:
            raise ConfigError(
                f"`stage.overlap={overlap}` asks for several labelers, and `{self.name}` is one, which answers each "
                "question once. Set `stage.overlap=1`."
            )
        tasks = list(tasks_of(rows, form).values())[:budget]
        if not tasks:
            raise ConfigError("The candidates hold no `questions`. Make them with `stage=collect`.")
        mine = {label.key for label in store.read() if label.labeler == self.name}
        left = [task for task in tasks if self.is_cached or task.unit not in mine]
        with tqdm(total=len(tasks), initial=len(tasks) - len(left), unit="question") as bar:
            for start in range(0, len(left), BATCH):
                batch = left[start : start + BATCH]
                store.extend([label for label in self.answers(batch, form, seed) if label.key not in mine])
                bar.update(len(batch))
        self.sum_up(rows, store.read(), form)
        return True

    @abstractmethod
    def answers(self, tasks: Sequence[Task], form: str, seed: int) -> Iterator[Label]:
        """Yield a label for each task."""

    def sum_up(self, rows: Sequence[Candidates], labels: Sequence[Label], form: str) -> None:
        """Print what was answered."""
        mine = [label for label in labels if label.labeler == self.name and label.form == form]
        answered = [label for label in mine if label.answer is not None]
        say(f"{self.name}: {len(answered):,} answers, {len(mine) - len(answered):,} skipped")

    def label(self, task: Task, form: str, answer: Any = None, **more: Any) -> Label:
        """Return a label of a task by this labeler."""
        if answer is None and "skipped" not in more:
            more["skipped"] = "no answer"
        return Label(
            id=task.row.id,
            question=list(task.question),
            form=form,
            order=more.pop("order", None),
            answer=answer,
            labeler=self.name,
            time=now(),
            **more,
        )


class RewardLabeler(MachineLabeler):
    """
    A reward, or the weighted sum of several, as a labeler.

    Args:
        rewards (`Sequence[Reward]`): those of the group `reward`, such as a reward model or an ensemble.
        tie_margin (`float`): rewards no further apart than this are a tie.
        noise (`float`):
            0: the higher reward wins. Else the answer is drawn as by Bradley and Terry: candidate i is preferred to j
            with the probability sigmoid((r_i - r_j) / noise), as by a person who isn't sure. Drawn by the seed and the
            question, so that a resumed labeling draws the same.
        name (`str`): name in the labels.
    """

    forms = ("pair", "ranking", "rating")

    def __init__(self, rewards: Sequence[Reward], tie_margin: float = 0.0, noise: float = 0.0, name: str = "reward"):
        super().__init__(name)
        if not rewards:
            raise ConfigError("`labeler=reward` answers by the group `reward`, which is empty. Set `reward=model`.")
        self.rewards, self.tie_margin, self.noise = rewards, tie_margin, noise

    def answers(self, tasks: Sequence[Task], form: str, seed: int) -> Iterator[Label]:
        """See [`MachineLabeler.answers`]. The members of an ensemble that agree are the confidence in a pair."""
        scores = self._scores(tasks)
        for task, members in zip(tasks, scores, strict=True):
            if not np.isfinite(members).all():
                yield self.label(task, form, skipped="the reward doesn't apply")
                continue
            rng = random.Random(f"{seed}|{task.row.id}|{sorted(task.question)}")
            noisy = {
                i: value + self._draw(rng)
                for i, value in sorted(zip(task.question, members.mean(axis=0), strict=True))
            }
            values = [noisy[i] for i in task.question]
            if form == "rating":
                yield self.label(task, form, [float(value) for value in values])
            elif form == "ranking":
                yield self.label(task, form, ranks_of(values, self.tie_margin))
            else:
                gap = values[0] - values[1]
                is_tie = abs(gap) <= self.tie_margin
                yield self.label(
                    task,
                    form,
                    "tie" if is_tie else int(gap < 0),
                    confidence=None if is_tie or len(members) == 1 else agreeing(members, gap),
                )

    def _draw(self, rng: random.Random) -> float:
        """Return a draw of the Gumbel distribution: the difference of two has the logistic one."""
        return -self.noise * math.log(-math.log(max(rng.random(), 1e-300))) if self.noise else 0.0

    def _scores(self, tasks: Sequence[Task]) -> list[np.ndarray]:
        """Return for each task the scores of its candidates, shape (members, candidates)."""
        weights = {reward.__name__: reward.weight for reward in self.rewards}
        places = [(task, text) for task in tasks for text in task.texts]
        names = sorted({name for task, _ in places for name in task.row.extra})
        columns = {name: [task.row.extra.get(name) for task, _ in places] for name in names}
        prompts, texts = [task.row.prompt for task, _ in places], [text for _, text in places]
        scored = score_members(self.rewards, prompts, texts, [[] for _ in places], columns)
        found, start = [], 0
        for task in tasks:
            found.append(member_scores(scored[start : start + len(task.question)], weights))
            start += len(task.question)
        return found


class GoldLabeler(RewardLabeler):
    """
    A Python function as a labeler, such as the true reward of a simulation.

    Args:
        function (`str`), kwargs (`dict`, *optional*): as of [`~rlhf_trl.rewards.function.FunctionReward`].
        tie_margin, noise, name: see [`RewardLabeler`].
    """

    def __init__(
        self,
        function: str,
        kwargs: Mapping[str, Any] | None = None,
        tie_margin: float = 0.0,
        noise: float = 0.0,
        name: str = "gold",
    ):
        super().__init__([FunctionReward(function, dict(kwargs or {}), name=name)], tie_margin, noise, name)


def agreeing(members: np.ndarray, gap: float) -> float:
    """Return the share of the members, scores of shape (members, 2), that prefer the candidate which won by `gap`."""
    gaps = members[:, 0] - members[:, 1]
    return float((np.sign(gaps) == np.sign(gap)).mean())


def ranks_of(values: Sequence[float], tie_margin: float) -> list[int]:
    """
    Return ranks, 1 for the highest value. A value no more than `tie_margin` below the next higher one has its rank.
    """
    order = sorted(range(len(values)), key=lambda i: -values[i])
    ranks = [1] * len(values)
    for place, (before, i) in enumerate(pairwise(order), 2):
        ranks[i] = ranks[before] if values[before] - values[i] <= tie_margin else place
    return ranks
