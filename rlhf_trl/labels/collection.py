"""Collection of candidates: the completions that were drawn so far, their merging by prompt, and what is asked."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_trl.data.messages import as_text
from rlhf_trl.errors import ConfigError
from rlhf_trl.labels.candidates import Candidate, Candidates, Text, prompt_id
from rlhf_trl.labels.lines import SyncedLines
from rlhf_trl.labels.selection import Pair, Pool, member_scores
from rlhf_trl.labels.store import Label

REPEATED_PROMPT = "rows dropped: their prompt is there already"
# Chooses the pairs: (pools, budget, pairs per prompt, random generator) -> pairs
Select = Callable[[Sequence[Pool], int | None, int, np.random.Generator], list[Pair]]


class Draws:
    """
    The batches of completions that a collection has drawn, one appended and synced line each, so that a resumed one
    draws none of them again.

    Args:
        path (`str` or `os.PathLike`): the file, which is made with the first batch.
        plan (`str`): a digest of what is drawn, in which order.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the file is of another plan.
    """

    def __init__(self, path: str | os.PathLike, plan: str):
        self._lines, self._plan = SyncedLines(path), plan
        before = self._lines.rows
        if before and before[0].get("plan") != plan:
            raise ConfigError(
                f"`{Path(path).parent}` was collecting from other prompts or policies, or with other settings or "
                "rewards, so it can't be resumed. Start again: `overwrite=true`."
            )
        self.batches: dict[int, list[dict[str, Any]]] = {row["batch"]: row["rows"] for row in before[1:]}

    def add(self, batch: int, rows: list[dict[str, Any]]) -> None:
        """Append the completions of a batch."""
        if self._lines.is_empty:
            self._lines.append({"plan": self._plan})
        self._lines.append({"batch": batch, "rows": rows})
        self.batches[batch] = rows

    def rows(self) -> list[dict[str, Any]]:
        """Return the completions of all batches, in the order of the plan."""
        return [row for number in sorted(self.batches) for row in self.batches[number]]

    def delete(self) -> None:
        """Delete the file: the candidates are written."""
        self._lines.path.unlink(missing_ok=True)


@dataclass
class Collected:
    """
    Candidates by prompt.

    Attributes:
        rows: one per prompt, in the order of the prompts.
        notes: counts of what was merged and left out.
    """

    rows: list[Candidates]
    notes: Counter = field(default_factory=Counter)


def merge_prompts(rows: Iterable[dict[str, Any]]) -> Collected:
    """
    Return the prompts of rows, each once, with the rows' other columns and without candidates.

    Args:
        rows (`Iterable[dict]`): `prompt` and other columns.
    """
    found = Collected([])
    seen = set()
    for row in rows:
        identity = prompt_id(row["prompt"])
        if identity in seen:
            found.notes[REPEATED_PROMPT] += 1
            continue
        seen.add(identity)
        extra = {name: value for name, value in row.items() if name not in ("prompt", "completion", "completions")}
        found.rows.append(Candidates(id=identity, prompt=row["prompt"], candidates=[], extra=extra))
    return found


def without_labeled(found: Collected, labels: Iterable[Label], overlap: int) -> Collected:
    """
    Leave out the prompts that are labeled already.

    Args:
        found ([`Collected`]): the prompts.
        labels (`Iterable[Label]`): answers of earlier collections.
        overlap (`int`): labelers that a prompt is to have; one that has fewer is asked about again.
    """
    answered: dict[str, set[str]] = {}
    for label in labels:
        if label.skipped is None:
            answered.setdefault(label.id, set()).add(label.labeler)
    kept = [row for row in found.rows if len(answered.get(row.id, ())) < overlap]
    found.notes["prompts left out: labeled already"] += len(found.rows) - len(kept)
    return Collected(kept, found.notes)


def add_candidates(found: Collected, drawn: Iterable[tuple[int, Candidate]]) -> None:
    """
    Add candidates to their prompts. One that a prompt has already is counted and, in `copies`, noted at the first.

    Args:
        found ([`Collected`]): the prompts, whose rows are changed.
        drawn (`Iterable[tuple[int, Candidate]]`): index of the prompt, and a candidate.
    """
    seen = [{completion_key(each.completion): each for each in row.candidates} for row in found.rows]
    for number, candidate in drawn:
        key = completion_key(candidate.completion)
        if (first := seen[number].get(key)) is not None:
            found.notes["candidates dropped: identical to another one of their prompt"] += 1
            first.extra["copies"] = first.extra.get("copies", 1) + 1
            continue
        seen[number][key] = candidate
        found.rows[number].candidates.append(candidate)


def completion_key(completion: Text) -> str:
    """Return a key by which completions are identical: their text without white space around it."""
    return as_text(completion).strip()


def ask(
    found: Collected,
    select: Select,
    budget: int | None,
    per_prompt: int,
    size: int,
    seed: int,
    weights: Mapping[str, float],
    features: Callable[[list[tuple[int, int]]], np.ndarray] | None = None,
) -> None:
    """
    Choose the questions, and write them into the rows. Candidates without text, and those that a reward doesn't apply
    to, are not asked about.

    Args:
        found ([`Collected`]): the candidates, whose rows are changed.
        select (`Callable`): of `rlhf_trl.labels.selection`.
        budget (`int`, *optional*): number of questions.
        per_prompt (`int`): largest number of pairs that are chosen of a prompt.
        size (`int`):
            Candidates of a question: the chosen pair and, above 2, others drawn at random. 1: each of the pair by
            itself.
        seed (`int`): seeds every draw.
        weights (`dict[str, float]`): of the rewards, by name; without one the selection gets no scores.
        features (`Callable`, *optional*): returns the features, shape (M, d), of M candidates (row, candidate).
    """
    rng = np.random.default_rng(seed)
    asked, pools = [], []
    usable = [_usable(row, weights, found.notes) for row in found.rows]
    numbers = [number for number, each in enumerate(usable) if len(each) >= max(size, 2)]
    found.notes[f"prompts not asked about: fewer than {max(size, 2)} different candidates"] += len(usable) - len(
        numbers
    )
    places = [(number, candidate) for number in numbers for candidate in usable[number]]
    known = features(places) if features is not None and places else None
    start = 0
    for number in numbers:
        own = usable[number]
        scores = [found.rows[number].candidates[i].scores for i in own]
        pools.append(
            Pool(
                size=len(own),
                scores=member_scores(scores, dict(weights)) if weights else None,
                features=None if known is None else known[start : start + len(own)],
            )
        )
        start += len(own)
    pairs = budget if budget is None or size > 1 else -(-budget // 2)
    for pair in select(pools, pairs, per_prompt, rng):
        number = numbers[pair.prompt]
        own = usable[number]
        asked.append((number, [own[pair.first], own[pair.second]]))
    for row in found.rows:
        row.questions = []
    left = len(asked) * 2 if budget is None else budget
    for number, question in asked:
        row, own = found.rows[number], usable[number]
        for each in _questions(question, own, size, rng):
            if sorted(each) in map(sorted, row.questions):
                found.notes["questions dropped: asked already"] += 1
            elif left > 0:
                row.questions.append(each)
                left -= 1


def _questions(pair: list[int], own: list[int], size: int, rng: np.random.Generator) -> Iterator[tuple[int, ...]]:
    if size == 1:
        yield from ((each,) for each in pair)
        return
    others = [each for each in own if each not in pair]
    more = rng.choice(len(others), size=size - 2, replace=False) if size > 2 else []
    yield tuple(pair + [others[i] for i in more])


def _usable(row: Candidates, weights: Mapping[str, float], notes: Counter) -> list[int]:
    """Return the indices of the candidates that can be asked about."""
    found = []
    for i, candidate in enumerate(row.candidates):
        values = [score for name in weights for score in candidate.scores.get(name, [None])]
        if not completion_key(candidate.completion):
            notes["candidates not asked about: empty"] += 1
        elif None in values:
            notes["candidates not asked about: a reward doesn't apply"] += 1
        else:
            found.append(i)
    return found
