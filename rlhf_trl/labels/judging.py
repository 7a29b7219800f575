"""Language models as labelers: pairs in both orders, rubrics, critiques with revisions (`labeler=judge` and kin)."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_trl.data.messages import as_text
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.judges import Reply, TextJudge, verdict
from rlhf_trl.labels.candidates import Candidates
from rlhf_trl.labels.machine import MachineLabeler, ranks_of
from rlhf_trl.labels.replies import Asker, ReplyCache, read_number, read_object
from rlhf_trl.labels.store import Label
from rlhf_trl.labels.tasks import Task
from rlhf_trl.terminal import say

VERDICT_SCHEMA = {
    "type": "object",
    "properties": {"verdict": {"type": "string", "enum": ["A", "B", "tie"]}},
    "required": ["verdict"],
    "additionalProperties": False,
}


class AskingLabeler(MachineLabeler):
    """
    Base of labelers that ask a language model.

    Args:
        name (`str`), asker ([`~rlhf_trl.labels.replies.Asker`]): its name in the labels, and the model.
    """

    is_cached = True

    def __init__(self, name: str, asker: Asker):
        super().__init__(name)
        self.asker = asker

    def sum_up(self, rows: Sequence[Candidates], labels: Sequence[Label], form: str) -> None:
        """See [`MachineLabeler.sum_up`]; with what the replies were."""
        super().sum_up(rows, labels, form)
        counts = self.asker.counts
        self.measures |= {f"eval_judge/{name}": float(count) for name, count in counts.items()}
        parts = [
            f"{counts[name]:,} {name.replace('_', ' ')}"
            for name in ("with_thoughts", "refused", "cut", "unreadable", "too_long")
        ]
        say(f"  {counts['replies']:,} replies: {', '.join(parts)}")


class JudgeLabeler(AskingLabeler):
    """
    A language model that compares two candidates, in both orders.

    Args:
        judge ([`~rlhf_trl.evaluation.judges.TextJudge`]): the model, with the template of the question.
        cache (`str`): file of its replies.
        samples (`int`), temperature (`float`): replies per order, and how they are sampled.
        inconsistent (`str`): `tie` or `skip`: where both orders have other winners.
        schema (`bool`): whether to ask for JSON, of servers that can keep to a schema.
        max_tokens (`int`, *optional*): limit of a reply; `None`: the judge's own.
        name (`str`, *optional*): name in the labels; `None`: of the model.
    """

    forms = ("pair",)

    def __init__(
        self,
        judge: TextJudge,
        cache: str,
        samples: int = 1,
        temperature: float = 0.0,
        inconsistent: str = "tie",
        schema: bool = True,
        max_tokens: int | None = None,
        name: str | None = None,
    ):
        asker = Asker(judge, ReplyCache(cache), temperature, samples, max_tokens)
        super().__init__(name or f"judge {judge.settings['model']}", asker)
        self.judge, self.inconsistent, self.schema = judge, inconsistent, VERDICT_SCHEMA if schema else None
        self.verdicts: Counter[str] = Counter()

    def answers(self, tasks: Sequence[Task], form: str, seed: int) -> Iterator[Label]:
        """See [`MachineLabeler.answers`]. The confidence in the winner is its share of the verdicts."""
        questions = []
        for task in tasks:
            prompt, texts = as_text(task.row.prompt), [as_text(text) for text in task.texts]
            questions += [self.judge.question(prompt, *texts), self.judge.question(prompt, *reversed(texts))]
        replies = self.asker.ask(questions, self.schema, seed)
        for number, task in enumerate(tasks):
            orders = [self._worth(each) for each in replies[2 * number : 2 * number + 2]]
            if reasons := [reason for values, reason in orders if not values]:
                yield self.label(task, form, skipped=reasons[0] or "no verdict")
                continue
            first, second = (sum(values) / len(values) for values, _ in orders)
            self._count_orders(first, 1 - second)
            share = (first + 1 - second) / 2  # of the first candidate of the question
            if self.inconsistent == "skip" and (first - 0.5) * (0.5 - second) < 0:
                yield self.label(task, form, skipped="the judge's verdicts differ by the order")
            else:
                answer = "tie" if share == 0.5 else int(share < 0.5)
                yield self.label(task, form, answer, confidence=max(share, 1 - share))

    def _worth(self, replies: Sequence[Reply]) -> tuple[list[float], str | None]:
        """Return the worth of the answer shown first by each reply, 1, 0.5 or 0, and why one has none."""
        values, reason = [], None
        for reply in replies:
            text = self.asker.read(reply)
            found = None if text is None else _verdict(text)
            if found is None:
                reason = self.asker.unread(reply)
            else:
                self.verdicts[found] += 1
                values.append({"A": 1.0, "B": 0.0, "tie": 0.5}[found])
        if len(values) > 1:
            self.verdicts["repeated"] += len(values)
            self.verdicts["same"] += max(values.count(value) for value in values)
        return values, reason

    def _count_orders(self, first: float, second: float) -> None:
        """Count a question by the worth of its first candidate in both orders."""
        self.verdicts["both orders"] += 1
        self.verdicts["orders agree"] += (first > 0.5) == (second > 0.5) and (first < 0.5) == (second < 0.5)

    def sum_up(self, rows: Sequence[Candidates], labels: Sequence[Label], form: str) -> None:
        """See [`MachineLabeler.sum_up`]; with the position bias, and how consistent the verdicts are."""
        super().sum_up(rows, labels, form)
        named, counts = self.verdicts["A"] + self.verdicts["B"], self.verdicts
        shares = {
            "position_bias": (counts["A"], named, "of the verdicts name the answer shown first (0.5: no bias)"),
            "order_agreement": (
                counts["orders agree"],
                counts["both orders"],
                "of the pairs have one winner in both orders",
            ),
            "self_consistency": (counts["same"], counts["repeated"], "of repeated replies say what most of them say"),
        }
        for name, (count, total, what) in shares.items():
            if total:
                self.measures[f"eval_judge/{name}"] = count / total
                say(f"  {count / total:.3f} {what} ({total:,})")


def _verdict(text: str) -> str | None:
    given = read_object(text).get("verdict")
    return verdict(given if isinstance(given, str) else text)


class RubricLabeler(AskingLabeler):
    """
    A language model that scores each candidate by each principle of a rubric. The scores are ratings of attributes
    (`stage.ask=rating`), or decide about pairs and rankings by their weighted mean.

    Args:
        judge ([`~rlhf_trl.evaluation.judges.TextJudge`]): the model.
        principles (`dict`): name -> `{weight, text}`.
        scale (`Sequence[int]`): lowest and highest score.
        template (`str`): question, with `{principle}`, `{low}`, `{high}`, `{prompt}` and `{answer}`.
        cache (`str`), samples (`int`), temperature (`float`), schema (`bool`), max_tokens (`int`, *optional*), name:
            see [`JudgeLabeler`]. The score of several samples is their mean.
        tie_margin (`float`): weighted means no further apart than this are a tie.
    """

    forms = ("rating", "pair", "ranking")

    def __init__(
        self,
        judge: TextJudge,
        principles: Mapping[str, Mapping[str, Any]],
        scale: Sequence[int],
        template: str,
        cache: str,
        samples: int = 1,
        temperature: float = 0.0,
        schema: bool = True,
        max_tokens: int | None = None,
        tie_margin: float = 0.0,
        name: str | None = None,
    ):
        asker = Asker(judge, ReplyCache(cache), temperature, samples, max_tokens)
        super().__init__(name or f"rubric {judge.settings['model']}", asker)
        self.principles = checked_principles(principles)
        check_template(template, ("{principle}", "{prompt}", "{answer}"))
        if len(scale) != 2 or not scale[0] < scale[1]:
            raise ConfigError(f"`labeler.scale` is {list(scale)}. Set it to the lowest and the highest score.")
        self.low, self.high, self.template, self.tie_margin = *scale, template, tie_margin
        score = {"type": "integer", "minimum": self.low, "maximum": self.high}
        wanted = {"type": "object", "properties": {"score": score}, "required": ["score"]}
        self.schema = wanted | {"additionalProperties": False} if schema else None

    def answers(self, tasks: Sequence[Task], form: str, seed: int) -> Iterator[Label]:
        """See [`MachineLabeler.answers`]."""
        questions = [
            fill(
                self.template,
                principle=principle["text"],
                low=self.low,
                high=self.high,
                prompt=as_text(task.row.prompt),
                answer=as_text(text),
            )
            for task in tasks
            for text in task.texts
            for principle in self.principles.values()
        ]
        replies = iter(self.asker.ask(questions, self.schema, seed))
        for task in tasks:
            reasons: list[str] = []
            ratings = [{name: self._score(next(replies), reasons) for name in self.principles} for _ in task.texts]
            known = [{name: score for name, score in each.items() if score is not None} for each in ratings]
            shared = [name for name in self.principles if all(name in each for each in known)]
            if not (any(known) if form == "rating" else shared):
                yield self.label(task, form, skipped=reasons[0])
            elif form == "rating":
                yield self.label(task, form, [each or None for each in known])
            else:
                values = [self._mean(each, shared) for each in known]
                if form == "ranking":
                    yield self.label(task, form, ranks_of(values, self.tie_margin))
                else:
                    gap = values[0] - values[1]
                    yield self.label(task, form, "tie" if abs(gap) <= self.tie_margin else int(gap < 0))

    def _score(self, replies: Sequence[Reply], reasons: list[str]) -> float | None:
        values = []
        for reply in replies:
            text = self.asker.read(reply)
            value = None if text is None else read_number(text, "score", self.low, self.high)
            if value is None:
                reasons.append(self.asker.unread(reply))
            else:
                values.append(value)
        return sum(values) / len(values) if values else None

    def _mean(self, scores: Mapping[str, float], names: Sequence[str]) -> float:
        weights = {name: self.principles[name]["weight"] for name in names}
        return sum(weights[name] * scores[name] for name in names) / sum(weights.values())


class RevisionLabeler(AskingLabeler):
    """
    A language model that criticizes a candidate by a principle, and writes it anew (Constitutional AI, Bai et al.,
    arXiv 2212.08073, section 3.1). The revision is an edit, which is preferred to the original.

    Args:
        judge ([`~rlhf_trl.evaluation.judges.TextJudge`]): the model.
        principles (`dict`): name -> `{weight, text}`; one is drawn for each candidate, by the weights.
        critique (`str`): first question, with `{principle}`, `{prompt}` and `{answer}`.
        revision (`str`): second question, with these and `{critique}`.
        cache (`str`), temperature (`float`), name: see [`JudgeLabeler`].
        max_tokens (`int`): limit of a critique, and of a revision.
    """

    forms = ("edit",)

    def __init__(
        self,
        judge: TextJudge,
        principles: Mapping[str, Mapping[str, Any]],
        critique: str,
        revision: str,
        cache: str,
        temperature: float = 0.0,
        max_tokens: int = 512,
        name: str | None = None,
    ):
        asker = Asker(judge, ReplyCache(cache), temperature, 1, max_tokens)
        super().__init__(name or f"revision {judge.settings['model']}", asker)
        self.principles = checked_principles(principles)
        check_template(critique, ("{principle}", "{prompt}", "{answer}"))
        check_template(revision, ("{critique}", "{prompt}", "{answer}"))
        self.critique, self.revision = critique, revision

    def answers(self, tasks: Sequence[Task], form: str, seed: int) -> Iterator[Label]:
        """See [`MachineLabeler.answers`]."""
        given = [self._parts(task, seed) for task in tasks]
        critiques = self.asker.ask([fill(self.critique, **parts) for parts in given], seed=seed)
        texts = [self._text(replies[0]) for replies in critiques]
        asked = [i for i, (text, _) in enumerate(texts) if text]
        questions = [fill(self.revision, critique=texts[i][0] or "", **given[i]) for i in asked]
        revisions = dict(zip(asked, self.asker.ask(questions, seed=seed), strict=True))
        for i, task in enumerate(tasks):
            text, reason = texts[i]
            if text:
                text, reason = self._text(revisions[i][0])
            if not text:
                yield self.label(task, form, skipped=reason or "the judge wrote nothing")
            elif text == given[i]["answer"].strip():
                yield self.label(task, form, skipped="the revision is the original")
            else:
                yield self.label(task, form, text)

    def _parts(self, task: Task, seed: int) -> dict[str, str]:
        weights = [principle["weight"] for principle in self.principles.values()]
        rng = random.Random(f"{seed}|{task.row.id}|{list(task.question)}")
        (principle,) = rng.choices(list(self.principles.values()), weights)
        return {
            "principle": principle["text"],
            "prompt": as_text(task.row.prompt),
            "answer": as_text(task.texts[0]),
        }

    def _text(self, reply: Reply) -> tuple[str | None, str | None]:
        """Return a whole text that was written, else why there is none. A refusal may be what a revision should be."""
        text = self.asker.read(reply)
        return (text, None) if text and not (reply.is_cut or reply.is_refused) else (None, self.asker.unread(reply))


def checked_principles(principles: Any) -> dict[str, dict[str, Any]]:
    """
    Return principles with their weights, 1 where none is given.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: for one without a text, or a weight that isn't above 0.
    """
    if not isinstance(principles, Mapping) or not principles:
        raise ConfigError("`labeler.principles` is empty. Name principles: `{helpful: {weight: 1, text: ...}}`.")
    found = {}
    for name, given in principles.items():
        text = given.get("text") if isinstance(given, Mapping) else None
        weight = given.get("weight", 1) if isinstance(given, Mapping) else None
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"`labeler.principles.{name}` has no `text`. Say there what is asked of an answer.")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise ConfigError(f"`labeler.principles.{name}.weight` is {weight!r}. Set it above 0.")
        found[str(name)] = {"text": text, "weight": weight}
    return found


def check_template(template: str, fields: Sequence[str]) -> None:
    """Raise a [`~rlhf_trl.errors.ConfigError`] for a template that lacks one of its fields."""
    if missing := [field for field in fields if field not in template]:
        raise ConfigError(f"A template of `labeler` has no `{missing[0]}`, so the judge wouldn't see it. Add it.")


def fill(template: str, **parts: Any) -> str:
    """Fill in the fields of a template. Braces in the texts, and other braces of the template, are kept."""
    return re.sub(r"\{(\w+)\}", lambda match: str(parts.get(match.group(1), match.group())), template)
