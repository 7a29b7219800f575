"""Feedback that compares completions of one prompt: pairs, rankings, edits."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import ClassVar

from rlhf_trl.data.feedback.base import (
    ComparedRow,
    Comparison,
    Feedback,
    Group,
    Text,
    add_rater,
    certainty,
    check_flag,
    check_list,
    check_number,
    check_texts,
    confidence_in,
    key_of,
)
from rlhf_trl.data.messages import check_text_or_chat
from rlhf_trl.data.row_types import shared_prompt
from rlhf_trl.data.rows import RowError, type_of
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import names_of


@dataclass(frozen=True, kw_only=True)
class Pairs(Feedback):
    """
    Comparisons of two completions: `prompt`, `completion_a`, `completion_b`, `preferred` and, if there is one,
    `strength` (a number from 0: how much better; the unit of `margin`) and `safe_a`, `safe_b` (true or false: whether
    a completion is safe; a reward model then learns a score whose zero is the border).

    With `columns.prompt: null` the completions are whole conversations (or texts): the prompt is what both begin with.
    With `columns.preferred: null` the first one is always preferred. `columns.preferred` may be a list of columns, one
    per answer, of which one is true.

    Args:
        answers (`list`): the values of `preferred` for the first one, the second one, a tie, and two bad ones, which
            are no tie: KTO learns from both that they are bad, no other stage learns anything. The last two may be
            missing.
        turns (`bool`): prompt and completions are lists of turns as text, of the user and of the assistant.
        min_strength (`float`): a comparison below this strength is a tie.
        agreement (`str`, *optional*): rows on the same two completions are pooled, the side with more raters wins, and
            the share p of raters who agree (a tie is half a vote for each) becomes the comparison's weight 2p - 1
            (`weights`), or its label smoothing 1 - p (`smoothing`). A row with a `confidence` c, from 1/2 (a guess)
            to 1 (sure), is c of a vote for what it says and 1 - c of one for the other.
        **options: see [`Feedback`].
    """

    NEEDED: ClassVar[tuple[str, ...]] = ("prompt", "completion_a", "completion_b", "preferred")
    NULLABLE: ClassVar[tuple[str, ...]] = ("prompt", "preferred")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("strength", "safe_a", "safe_b", "rater", "confidence")
    ROWS_ARE_VOTES: ClassVar[bool] = True

    answers: list = field(default_factory=lambda: ["a", "b", "tie", "both_bad"])
    turns: bool = False
    min_strength: float = 0.0
    agreement: str | None = None

    def __post_init__(self):
        super().__post_init__()
        known = {str(answer).strip().lower() for answer in self.answers}
        if not 2 <= len(self.answers) <= 4 or len(known) < len(self.answers):
            raise ConfigError(
                f"`data.feedback.answers` is {list(self.answers)}. Set it to what `preferred` holds for the first "
                "one, the second one and, if there are any, a tie and two bad ones: different values."
            )
        preferred = (self.columns or {}).get("preferred")
        if isinstance(preferred, list) and not 2 <= len(preferred) <= len(self.answers):
            raise ConfigError(
                f"`data.feedback.columns.preferred` names {len(preferred)} columns for {len(self.answers)} answers. "
                "Name a column for each of `data.feedback.answers`; the last two may be missing."
            )
        if self.turns and (self.columns or {}).get("prompt", "prompt") is None:
            raise ConfigError(
                "`data.feedback.turns=true` joins the user's turns, the prompt, with the assistant's. Set "
                "`data.feedback.columns.prompt=NAME`."
            )

    def _minimums(self):
        return (("min_strength", 0),)

    def read(self, row: dict, notes: Counter) -> ComparedRow:
        fields = ("completion_a", "completion_b")
        if self.turns:
            row = join_turns(row, fields)
        elif "prompt" not in row and (self.columns or {}).get("prompt", "prompt") is None:
            row = take_prompt_out(row, fields, notes)
        prompt, completions = check_texts(row, list(fields), notes)
        preferred = 0 if "preferred" not in row else self._answer(row["preferred"])
        strength = 1.0
        if row.get("strength") is not None:
            strength = check_number(row["strength"], "strength")
            if strength < 0:
                raise RowError("strength", f"is {strength:g}, where a number from 0 should be")
        if preferred < 2 and strength < self.min_strength:
            notes["ties: weaker than `min_strength`"] += 1
            preferred = 2
        flags = [check_flag(row.get(name), name) for name in ("safe_a", "safe_b")]
        sides = [None if flag is None else 1.0 if flag else -1.0 for flag in flags]
        same = key_of(completions[0]) == key_of(completions[1])
        if preferred < 2 and same:
            raise RowError("completion_b", "is the same as `completion_a`, and one is preferred")
        if same and None not in sides and sides[0] != sides[1]:
            raise RowError("safe_b", "is another label than `safe_a`, and the completions are the same")
        if preferred < 2:
            made = compared_row(row, prompt, completions, [Comparison(preferred, 1 - preferred, strength)], ties=[])
        else:
            ties = [] if same or preferred == 3 else [(0, 1)]
            made = compared_row(row, prompt, completions[: 2 - same], [], ties)
        if preferred == 3:
            made["both_bad"] = True
        if any(side is not None for side in sides):
            made["safe"] = [sides[0] if sides[0] is not None else sides[1]] if same else sides
        return made

    def _answer(self, value) -> int:
        """Return which of `answers` a row gives."""
        known = [str(answer).strip().lower() for answer in self.answers]
        if isinstance(value, list):
            flags = [float(str(each).strip().lower() in ("true", "1", "1.0")) for each in value]
            if sum(flags) != 1:
                raise RowError("preferred", f"holds {value}, where one should be true (or 1)")
            return flags.index(1)
        if str(value).strip().lower() not in known:
            raise RowError("preferred", f"is {value!r}, not one of {names_of(map(str, self.answers))}")
        return known.index(str(value).strip().lower())


@dataclass(frozen=True, kw_only=True)
class Rankings(Feedback):
    """
    Rankings of two or more completions: `prompt`, `completions` and `ranks` (the smallest is best, equal ranks tie),
    or instead of ranks `better`: a list of pairs of indices, the first one's completion better than the second one's.
    Pairs may give a partial order; comparisons that follow from several pairs are added.

    Args:
        highest_is_best (`bool`): `ranks` are scores: the largest is best.
        agreement (`str`, *optional*): rows on the same completions are pooled, see [`Pairs`].
        **options: see [`Feedback`]. The unit of `margin` is a rank.
    """

    NEEDED: ClassVar[tuple[str, ...]] = ("prompt", "completions", "ranks")
    NULLABLE: ClassVar[tuple[str, ...]] = ("ranks",)
    OPTIONAL: ClassVar[tuple[str, ...]] = ("better", "rater", "confidence")
    ROWS_ARE_VOTES: ClassVar[bool] = True

    highest_is_best: bool = False
    agreement: str | None = None

    def __post_init__(self):
        super().__post_init__()
        columns = {"ranks": "ranks", **(self.columns or {})}
        if columns["ranks"] is None and columns.get("better") is None:
            raise ConfigError(
                "`data.feedback.columns.ranks` is null, so `data.feedback.columns.better` has to name the column with "
                "the pairs of indices."
            )

    def read(self, row: dict, notes: Counter) -> ComparedRow:
        texts = check_list(row.get("completions"), "completions")
        if len(texts) < 2:
            raise RowError("completions", f"has {len(texts)}, and a ranking needs 2 or more")
        fields = {f"completions[{i}]": text for i, text in enumerate(texts)}
        prompt, completions = check_texts({**row, **fields}, list(fields), notes)
        if "ranks" in row:
            wins, ties = compare_ranks(row["ranks"], len(completions), self.highest_is_best)
        else:
            wins, ties = transitive_closure(check_list(row.get("better"), "better"), len(completions)), []
        keys = [key_of(completion) for completion in completions]
        for i, key in enumerate(keys):
            first = keys.index(key)
            if first < i and any({first, i} == {win.better, win.worse} for win in wins):
                raise RowError(f"completions[{i}]", f"is the same as `completions[{first}]`, and is ranked otherwise")
        keep = [i for i, key in enumerate(keys) if keys.index(key) == i]
        notes["completions dropped: they are in their ranking twice"] += len(keys) - len(keep)
        place = {old: new for new, old in enumerate(keep)}
        wins = [
            win._replace(better=place[win.better], worse=place[win.worse]) for win in wins if {*win[:2]} <= {*keep}
        ]
        ties = [(place[i], place[j]) for i, j in ties if {i, j} <= {*keep}]
        return compared_row(row, prompt, [completions[i] for i in keep], wins, ties)


@dataclass(frozen=True, kw_only=True)
class Edits(Feedback):
    """
    Answers that a person edited: `prompt`, `original`, `edited`. The edited one is better, and a demonstration.

    Args:
        **options: see [`Feedback`].
    """

    NEEDED: ClassVar[tuple[str, ...]] = ("prompt", "original", "edited")

    def read(self, row: dict, notes: Counter) -> ComparedRow:
        prompt, completions = check_texts(row, ["original", "edited"], notes)
        if key_of(completions[0]) == key_of(completions[1]):
            raise RowError("edited", "is the same as `original`")
        return compared_row(row, prompt, completions, [Comparison(1, 0)], ties=[])


def compared_row(row: dict, prompt: Text, completions: list[Text], wins: list[Comparison], ties: list) -> ComparedRow:
    """Return what a reader makes of `row`."""
    made: ComparedRow = {"prompt": prompt, "completions": completions, "wins": wins, "ties": ties}
    if (confidence := confidence_in(row)) is not None:
        made["confidence"] = confidence
    return add_rater(made, row)


def join_turns(row: dict, fields: Sequence[str]) -> dict:
    """
    Return a row of lists of turns as chats: the prompt is the first user turn, a completion all that follows.

    Args:
        row (`dict`): `prompt` with the user's turns, `fields` with the assistant's, one for each; lists, or JSON text.
        fields (`Sequence[str]`): the completions.
    """
    turns = {name: check_list(row.get(name), name) for name in ("prompt", *fields)}
    for name, texts in turns.items():
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                what = "empty" if isinstance(text, str) else type_of(text)
                raise RowError(f"{name}[{i}]", f"is {what}, where text should be")
        if len(texts) != len(turns["prompt"]) or not texts:
            raise RowError(name, f"has {len(texts)} turns for {len(turns['prompt'])} of `prompt`")
    users = [{"role": "user", "content": text} for text in turns["prompt"]]
    made = {**row, "prompt": users[:1]}
    for name in fields:
        answers = [{"role": "assistant", "content": text} for text in turns[name]]
        made[name] = [turn for pair in zip(users, answers, strict=True) for turn in pair][1:]
    return made


def take_prompt_out(row: dict, fields: Sequence[str], notes: Counter) -> dict:
    """Return a row of whole conversations, or texts, with the prompt that both begin with taken out of them."""
    a, b = (check_text_or_chat(row, name) for name in fields)
    if type(a) is not type(b):
        raise RowError(fields[1], f"is {type_of(b)}, and `{fields[0]}` is {type_of(a)}")
    length = shared_prompt(a, b)
    if not length or (isinstance(a, str) and not a[:length].strip()):
        raise RowError(fields[1], f"shares no prompt with `{fields[0]}`")
    notes[f"the prompt is what `{fields[0]}` and `{fields[1]}` begin with"] += 1
    return {**row, "prompt": a[:length], fields[0]: a[length:], fields[1]: b[length:]}


def compare_ranks(ranks, count: int, highest_is_best: bool) -> tuple[list[Comparison], list[tuple[int, int]]]:
    """Return the comparisons and the ties of `count` completions by their ranks, or by their scores."""
    ranks = check_list(ranks, "ranks")
    if len(ranks) != count:
        raise RowError("ranks", f"has {len(ranks)} for {count} completions")
    ranks = [check_number(rank, f"ranks[{i}]") for i, rank in enumerate(ranks)]
    wins, ties = [], []
    for i, j in combinations(range(count), 2):
        if ranks[i] == ranks[j]:
            ties.append((i, j))
        else:
            first = (ranks[i] < ranks[j]) is not highest_is_best
            wins.append(Comparison(*((i, j) if first else (j, i)), abs(ranks[i] - ranks[j])))
    return wins, ties


def transitive_closure(pairs: list, count: int) -> list[Comparison]:
    """
    Return all comparisons that follow from pairs of indices (better, worse) of `count` completions.

    Raises:
        RowError: if a pair isn't one, or if the pairs contain a cycle.
    """
    above = [set() for _ in range(count)]  # of each: what it is better than
    for m, pair in enumerate(pairs):
        at = f"better[{m}]"
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(i) is int for i in pair):
            raise RowError(at, f"is {pair!r}, where two indices should be")
        if not all(0 <= i < count for i in pair):
            raise RowError(at, f"is {pair!r}, and the completions are 0 to {count - 1}")
        above[pair[0]].add(pair[1])
    for middle in range(count):
        for first in range(count):
            if middle in above[first]:
                above[first] |= above[middle]
    if cycle := [i for i in range(count) if i in above[i]]:
        raise RowError("better", f"contains a cycle: {cycle[0]} would be better than itself")
    return [Comparison(i, j) for i in range(count) for j in sorted(above[i])]


def compare(feedback: Feedback, rows: list[ComparedRow], dataset_type: str, notes: Counter) -> Iterator[Group]:
    """
    Group the comparisons of each row.

    Args:
        feedback (`Feedback`): the options. With `agreement` the rows on the same completions are pooled.
        rows (`list[ComparedRow]`): checked rows.
        dataset_type (`str`): what they become.
        notes (`Counter`): counts ties and what is dropped.
    """
    pooled = feedback.agreement or (dataset_type == "annotated" and any("rater" in row for row in rows))
    for row in pool_raters(rows, notes) if pooled else rows:
        notes["ties"] += len(row["ties"])
        wins = [Comparison(*win) for win in row["wins"]]
        if not wins and not (dataset_type == "comparisons" and row.get("safe")):
            notes[f"rows dropped: {'both are bad' if row.get('both_bad') else 'all completions tie'}"] += 1
            continue
        yield Group(row["prompt"], row["completions"], wins, columns=row.get("columns"), safe=row.get("safe"))


def label(rows: list[ComparedRow]) -> Iterator[tuple[Text, Text, bool | None]]:
    """
    Yield (prompt, completion, label): true for one that only wins, false for one that only loses and for two bad ones,
    else `None`.
    """
    for row in rows:
        if row.get("both_bad"):
            yield from ((row["prompt"], completion, False) for completion in row["completions"])
            continue
        better, worse = ({win[side] for win in row["wins"]} for side in (0, 1))
        for i, completion in enumerate(row["completions"]):
            yield row["prompt"], completion, None if (i in better) == (i in worse) else i in better


def pool_raters(rows: list[ComparedRow], notes: Counter) -> Iterator[ComparedRow]:
    """
    Yield one row per prompt and set of completions: a comparison is won by the majority of its raters, and a
    completion is safe or unsafe as most of them say.
    """
    pools: dict[tuple, list[tuple[list[str], ComparedRow]]] = {}
    for row in rows:
        keys = [key_of(completion) for completion in row["completions"]]
        pools.setdefault((key_of(row["prompt"]), *sorted(keys)), []).append((keys, row))
    for pool in pools.values():
        keys, first = pool[0]
        # Of each pair (i < j): (1 if the rater prefers i, -1 if j, 0 for a tie; certainty; gap)
        votes: dict[tuple[int, int], list[tuple[int, float, float]]] = {
            pair: [] for pair in combinations(range(len(keys)), 2)
        }
        for theirs, row in pool:
            place, sure = [keys.index(key) for key in theirs], certainty(row.get("confidence", 1.0))
            for a, b, gap, *_ in row["wins"]:
                i, j = place[a], place[b]
                votes[min(i, j), max(i, j)].append((1 if i < j else -1, sure, gap))
            for a, b in row["ties"]:
                i, j = sorted((place[a], place[b]))
                votes[i, j].append((0, sure, 0.0))
        wins, ties = [], []
        for (i, j), each in votes.items():
            majority = sum(side * sure for side, sure, _ in each)
            if majority == 0:
                ties += [(i, j)] if each else []
                continue
            share = 0.5 + abs(majority) / (2 * len(each))
            total = sum(sure for _, sure, _ in each)
            gap = math.copysign(1, majority) * sum(side * sure * by for side, sure, by in each) / total
            gap = max(0.0, gap)  # a minority that prefers strongly may outweigh it, and yet the majority decides
            wins.append(Comparison(*((i, j) if majority > 0 else (j, i)), gap, share))
            notes["pairs on which raters disagree"] += len({side for side, _, _ in each}) > 1
            notes["pairs on which a rater is not sure"] += any(sure < 1 for _, sure, _ in each)
        notes["rows pooled with others on the same completions"] += len(pool) - 1
        both_bad = all(row.get("both_bad", False) for _, row in pool)
        pooled: ComparedRow = {**first, "wins": wins, "ties": ties, "both_bad": both_bad}
        if any("safe" in row for _, row in pool):
            sides = [dict(zip(theirs, row.get("safe") or [], strict=False)) for theirs, row in pool]
            sums = [sum(each.get(key) or 0.0 for each in sides) for key in keys]
            pooled["safe"] = [math.copysign(1.0, total) if total else None for total in sums]
        yield pooled
