"""
Feedback as people give it: pairs, rankings, ratings, edits, thumbs, attributes (options of the group `data/feedback`).

Each form says which columns it reads, checks a row (`read`), and makes of all rows of a split what a stage trains on
(`convert`): rows of `comparisons` (reward models), `preference` (DPO, ORPO), `unpaired` (KTO), `prompt_completion`
(SFT), `prompt`, or `judged` (evaluation of rewards). Nothing here reads files: any source of the group `data` serves
every form.

The form `comparisons`: `prompt`, `completions` (a list), `better` and `worse` (indices of the completions of each
comparison) and, where the options ask for them, `margin`, `weights`, `label_smoothing` (a number a comparison), or
`targets` (a number a head for each completion).

The form `judged` holds what people said without any loss in mind: `prompt`, `completions`, `better` and `worse`, `gap`
(by how much, a number a comparison), `share` (of the raters who agree, a number a comparison, or null), `ratings` (the
raters' numbers, a list a completion) or `attributes` (a dict of dimension and mean score a completion), and every
other column of the source that holds text or numbers.
"""

import json
import math
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

from rlhf_trl.data.dataset_types import select_completions
from rlhf_trl.data.messages import as_chat, check_text_or_chat, check_turns
from rlhf_trl.data.rows import RowError, type_of
from rlhf_trl.data.validation import type_problems
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.hints import names_of

AGREEMENT = (None, "weights", "smoothing")
UP = {"true": True, "1": True, "1.0": True, "up": True, "\N{THUMBS UP SIGN}": True}
DOWN = {"false": False, "0": False, "0.0": False, "-1": False, "down": False, "\N{THUMBS DOWN SIGN}": False}


class Win(NamedTuple):
    """
    One comparison: indices of the better and the worse completion, by how much, and the share of raters who agree
    (`None` where it isn't asked for).
    """

    better: int
    worse: int
    distance: float = 1.0
    share: float | None = None


class Group(NamedTuple):
    """Completions of one prompt that become one row."""

    prompt: Any
    completions: list
    wins: list[Win]
    targets: list[dict[str, float | None]] | None = None
    votes: list | None = None  # of each completion: its ratings, or a dict of them
    columns: dict | None = None  # the source's other ones


def key_of(value) -> str:
    """What tells prompts and completions, text or chat, apart."""
    return value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Feedback(ABC):
    """
    What all forms have.

    Args:
        columns (`dict`, *optional*): our name of a column -> the file's; null for one that the file doesn't have.
        margin (`float`): margin of the reward model's loss for each unit by which one completion is better (of
            strength, rank, or rating), 0 for none (arXiv 2307.09288).
        max_pairs (`int`, *optional*): the most comparisons of one prompt, those with negatives too; a random choice
            beyond it.
        negatives (`int`): this many completions of other prompts a row, worse than the row's best.
        shuffle (`bool`): put the completions of a row into random order, so that none has its place for a reason.
        drop_duplicates (`bool`): leave out rows that repeat another one, of the same rater where rows name one. Rows
            on one completion that name no rater are never taken for duplicates: they may be another person's.
        pairwise_rows (`bool`): make a row of two completions of every comparison, instead of one a prompt.

    Raises:
        ConfigError: for a value that an option can't have.
    """

    NEEDED: ClassVar[tuple[str, ...]]
    OPTIONAL: ClassVar[tuple[str, ...]] = ("rater",)
    NULLABLE: ClassVar[tuple[str, ...]] = ()  # of the needed ones
    agreement: ClassVar[str | None] = None

    columns: dict[str, str | None] | None = None
    margin: float = 0.0
    max_pairs: int | None = None
    negatives: int = 0
    shuffle: bool = True
    drop_duplicates: bool = True
    pairwise_rows: bool = False

    def __post_init__(self):
        if wrong := type_problems(type(self), vars(self), "data.feedback"):
            raise ConfigError.join(wrong)
        problems = [
            f"`data.feedback.columns.{name}` is no column of this form. Use one of: {names_of(self.known)}."
            for name in self.columns or {}
            if name not in self.known
        ]
        problems += [
            f"`data.feedback.columns.{name}` is null, and this form can't do without it. Give the file's column."
            for name, theirs in (self.columns or {}).items()
            if theirs is None and name in self.NEEDED and name not in self.NULLABLE
        ]
        if self.agreement not in AGREEMENT:
            problems.append(f"`data.feedback.agreement` is {self.agreement!r}. Use weights, smoothing or null.")
        for name, least in (("margin", 0), ("negatives", 0), ("max_pairs", 1), *self._limits()):
            value = getattr(self, name)
            if value is not None and not value >= least:
                problems.append(f"`data.feedback.{name}` is {value}. Set it to {least} or more.")
        if problems:
            raise ConfigError.join(problems)

    def _limits(self) -> tuple[tuple[str, float], ...]:
        """(option, its least value) of a form's own options."""
        return ()

    @property
    def name(self) -> str:
        """The name of the form, as in the config."""
        return type(self).__name__.lower()

    @property
    def known(self) -> tuple[str, ...]:
        """Our names of the columns that the form reads."""
        return (*self.NEEDED, *self.OPTIONAL)

    def mapping(self, source: str, found: list[str]) -> dict[str, str]:
        """
        Our names of the columns -> the file's, of those that the source has.

        Raises:
            DataError: if one that is needed, or that was named, isn't there.
        """
        wanted = {name: name for name in self.known} | dict(self.columns or {})
        missing = {
            ours: theirs
            for ours, theirs in wanted.items()
            if theirs is not None and theirs not in found and (ours in self.NEEDED or ours != theirs)
        }
        if missing:
            typed = " ".join(f"data.feedback.columns.{ours}=NAME" for ours in missing)
            raise DataError(
                f"{source} can't be read as {self.name}: it has no column {names_of(missing.values())}, but "
                f"{names_of(found)}. Type `{typed}` to say which column is which."
            )
        if self.agreement and isinstance(self, Compared) and self.drop_duplicates and wanted["rater"] not in found:
            raise DataError(
                f"{source} doesn't say who gave the feedback, which `data.feedback.agreement={self.agreement}` needs. "
                "Type `data.feedback.columns.rater=NAME`, or `data.feedback.drop_duplicates=false` to take every row "
                "for another rater's."
            )
        return {ours: theirs for ours, theirs in wanted.items() if theirs is not None and theirs in found}

    @abstractmethod
    def read(self, row: dict, notes: Counter) -> dict:
        """A row's checked content, by our names of the columns; `RowError` where it is malformed. `notes` counts."""

    @abstractmethod
    def groups(self, rows: list[dict], form: str, rng: random.Random, notes: Counter) -> Iterator[Group]:
        """The rows as comparisons (or, for the form `comparisons`, as targets), those of a prompt or row together."""

    @abstractmethod
    def labelled(self, rows: list[dict], notes: Counter) -> Iterator[tuple[Any, Any, bool | None]]:
        """(prompt, completion, whether it is good; `None` if neither good nor bad) of each completion."""

    def convert(self, rows: list[dict], form: str, seed: str, notes: Counter) -> list[dict]:
        """
        Rows of one split (as `read` gave them) as rows of `form`.

        Args:
            rows (`list[dict]`): as `read` gave them.
            form (`str`): see the head of this module.
            seed (`str`): of every random choice.
            notes (`Counter`): counts what was made, left out and added.

        Raises:
            DataError: if nothing of use to the form is left.
        """
        rng = random.Random(f"{seed}-{self.name}")
        rows = self._without_duplicates(rows, notes) if self.drop_duplicates else rows
        if form == "prompt":
            return [{"prompt": prompt} for prompt in {key_of(row["prompt"]): row["prompt"] for row in rows}.values()]
        if form in ("unpaired", "prompt_completion"):
            made = self._labelled_rows(rows, form, notes)
        else:
            made = self._compared_rows(rows, form, rng, notes)
        if not made:
            counted = "; ".join(f"{what}: {count:,}" for what, count in notes.items() if count)
            reasons = f" ({counted})" if counted else ""
            raise DataError(
                f"{len(rows):,} rows of {self.name} give no row of the form `{form}`{reasons}. {self._needs(form)}"
            )
        return made

    def idle(self, form: str) -> list[str]:
        """Options that were set and change nothing in rows of `form`."""
        names = [] if form == "comparisons" else ["margin", "pairwise_rows"]
        names += [] if form in ("comparisons", "preference") else ["agreement", "negatives"]
        names += [] if form in ("comparisons", "preference", "judged") else ["max_pairs", "min_gap"]
        return [name for name in names if getattr(self, name, None)]

    def _needs(self, form: str) -> str:
        """A sentence on what rows of this form need for `form`."""
        return "Give rows of which some completion is better than another one of its prompt."

    def _without_duplicates(self, rows: list[dict], notes: Counter) -> list[dict]:
        seen, kept = set(), []
        for row in rows:
            key = json.dumps({name: value for name, value in row.items() if name != "columns"}, sort_keys=True)
            if isinstance(self, Rated) and "rater" not in row:
                kept.append(row)
                continue
            notes["rows left out: they repeat another one"] += key in seen
            kept += [] if key in seen else [row]
            seen.add(key)
        return kept

    def _labelled_rows(self, rows: list[dict], form: str, notes: Counter) -> list[dict]:
        made = []
        for prompt, completion, good in self.labelled(rows, notes):
            if good is None:
                notes["completions left out: neither good nor bad"] += 1
            elif form == "unpaired":
                made.append({"prompt": prompt, "completion": completion, "label": good})
            elif good:
                made.append({"prompt": prompt, "completion": completion})
            else:
                notes["completions left out: bad ones are no demonstrations"] += 1
        return made

    def _compared_rows(self, rows: list[dict], form: str, rng: random.Random, notes: Counter) -> list[dict]:
        groups = list(self.groups(rows, form, rng, notes))
        if self.negatives and form != "judged":
            groups = self._with_negatives(groups, rows, rng, notes)
        if self.max_pairs is not None:  # last: what is best shows in all pairs only, and negatives count too
            groups = self._capped(groups, rng, notes)
        made = []
        for group in groups:
            if not group.wins and group.targets is None and (form != "judged" or group.votes is None):
                continue
            if self.shuffle:
                group = _shuffled(group, rng)
            if form == "preference":
                made += [
                    {"prompt": group.prompt, "chosen": group.completions[a], "rejected": group.completions[b]}
                    for a, b, *_ in group.wins
                ]
            elif form == "judged":
                made.append(_judged_row(group))
            else:
                made += self._comparison_rows(group)
        if self.shuffle and form == "comparisons":
            notes["rows whose completions were shuffled"] = len(made)
        names = dict.fromkeys(name for row in made for name in row)  # every row has the columns of all
        return [{name: row.get(name) for name in names} for row in made] if form == "judged" else made

    def _comparison_rows(self, group: Group) -> list[dict]:
        row = {"prompt": group.prompt, "completions": group.completions}
        if group.targets is not None:
            return [{**row, "targets": group.targets}]
        row |= {"better": [win.better for win in group.wins], "worse": [win.worse for win in group.wins]}
        if self.margin:
            row["margin"] = [self.margin * win.distance for win in group.wins]
        if self.agreement == "weights":
            row["weights"] = [2 * win.share - 1 for win in group.wins]
        elif self.agreement == "smoothing":
            row["label_smoothing"] = [1 - win.share for win in group.wins]
        if self.pairwise_rows:
            lists = {name: row[name] for name in row if name not in ("prompt", "completions")}
            alone = [row | {name: [values[m]] for name, values in lists.items()} for m in range(len(group.wins))]
            return [select_completions(one, sorted([*one["better"], *one["worse"]])) for one in alone]
        judged = {*row["better"], *row["worse"]}
        return [select_completions(row, [i for i in range(len(group.completions)) if i in judged])]

    def _capped(self, groups: list[Group], rng: random.Random, notes: Counter) -> list[Group]:
        """At most `max_pairs` comparisons of each prompt, whatever number of groups it has."""
        by_prompt = {}
        for number, group in enumerate(groups):
            by_prompt.setdefault(key_of(group.prompt), []).extend((number, m) for m in range(len(group.wins)))
        kept = set()
        for pairs in by_prompt.values():
            kept.update(pairs if len(pairs) <= self.max_pairs else rng.sample(pairs, self.max_pairs))
            notes[f"pairs left out: more than `max_pairs={self.max_pairs}` of one prompt"] += max(
                0, len(pairs) - self.max_pairs
            )
        return [
            group._replace(wins=[win for m, win in enumerate(group.wins) if (number, m) in kept])
            for number, group in enumerate(groups)
        ]

    def _with_negatives(self, groups, rows, rng: random.Random, notes: Counter) -> list[Group]:
        """`negatives` completions of other prompts in each group, worse than those that nothing is better than."""
        pool, own = [], {}
        for row in rows:
            for completion in row.get("completions") or [row["completion"]]:
                pool.append((key_of(row["prompt"]), completion))
                own.setdefault(key_of(row["prompt"]), set()).add(key_of(completion))
        if len(own) < 2:
            raise DataError(
                f"`data.feedback.negatives={self.negatives}` takes completions of other prompts, and all rows have "
                "the same prompt. Set it to 0."
            )
        made = []
        for group in groups:
            prompt, wins, completions = key_of(group.prompt), list(group.wins), list(group.completions)
            best = {win.better for win in wins} - {win.worse for win in wins}
            taken = set(own[prompt])
            for _ in range(self.negatives if best else 0):
                others = (rng.choice(pool) for _ in range(20))  # answers may be alike in all of a small world
                found = next((text for key, text in others if key != prompt and key_of(text) not in taken), None)
                if found is None:
                    notes["negatives not found: other prompts have the same completions"] += 1
                    continue
                taken.add(key_of(found))
                share = None if self.agreement is None else 1.0
                wins += [Win(i, len(completions), 1.0, share) for i in sorted(best)]
                completions.append(found)
                notes["completions of other prompts added as negatives"] += 1
            made.append(group._replace(wins=wins, completions=completions, votes=None))  # nobody judged the negatives
        return made


class Compared(Feedback):
    """Forms of which a row holds several completions; `read` gives `completions`, `wins` (`Win`s as lists), `ties`."""

    def groups(self, rows, form, rng, notes):
        pooled = self.agreement or form == "judged" and any("rater" in row for row in rows)
        for row in self._pooled(rows, notes) if pooled else rows:
            notes["ties"] += len(row["ties"])
            wins = [Win(*win) for win in row["wins"]]
            if not wins:
                notes["rows left out: all completions tie"] += 1
                continue
            yield Group(row["prompt"], row["completions"], wins, columns=row.get("columns"))

    def labelled(self, rows, notes):
        for row in rows:
            better, worse = ({win[side] for win in row["wins"]} for side in (0, 1))
            for i, completion in enumerate(row["completions"]):
                good = None if (i in better) == (i in worse) else i in better
                yield row["prompt"], completion, good

    def _pooled(self, rows: list[dict], notes: Counter) -> Iterator[dict]:
        """One row of all that judge the same completions of the same prompt, its wins those of most raters."""
        pools = {}
        for row in rows:
            keys = [key_of(completion) for completion in row["completions"]]
            pools.setdefault((key_of(row["prompt"]), *sorted(keys)), []).append((keys, row))
        for judged in pools.values():
            keys, first = judged[0]
            votes = {pair: [] for pair in combinations(range(len(keys)), 2)}
            for theirs, row in judged:
                place = [keys.index(key) for key in theirs]
                for a, b, distance, _ in row["wins"]:
                    i, j = place[a], place[b]
                    votes[min(i, j), max(i, j)].append((1 if i < j else -1, distance))
                for a, b in row["ties"]:
                    i, j = sorted((place[a], place[b]))
                    votes[i, j].append((0, 0.0))
            wins, ties = [], []
            for (i, j), each in votes.items():  # (1 for the first, -1 for the second, 0 for a tie; by how much)
                ahead = sum(side for side, _ in each)
                if ahead == 0:
                    ties += [(i, j)] if each else []
                    continue
                share = 0.5 + abs(ahead) / (2 * len(each))
                distance = math.copysign(1, ahead) * sum(side * by for side, by in each) / len(each)
                distance = max(0.0, distance)  # few who are sure may outweigh it, and yet most decide
                wins.append(Win(*((i, j) if ahead > 0 else (j, i)), distance, share))
                notes["pairs on which raters disagree"] += share < 1
            notes["rows pooled with others on the same completions"] += len(judged) - 1
            yield {**first, "wins": wins, "ties": ties}


@dataclass(frozen=True, kw_only=True)
class Pairs(Compared):
    """
    Comparisons of two completions: `prompt`, `completion_a`, `completion_b`, `preferred` and, if there is one,
    `strength` (a number from 0: how much better; the unit of `margin`).

    Args:
        answers (`list`): the values of `preferred` for the first one, the second one, and a tie. With
            `columns.preferred: null` the first one is always preferred.
        agreement (`str`, *optional*): rows on the same two completions are pooled, the side with more raters wins, and
            the share p of raters who agree (a tie is half a vote for each) becomes the comparison's weight 2p - 1
            (`weights`), or its label smoothing 1 - p (`smoothing`).
        **options: see [`Feedback`].
    """

    NEEDED = ("prompt", "completion_a", "completion_b", "preferred")
    NULLABLE = ("preferred",)
    OPTIONAL = ("strength", "rater")

    answers: list = field(default_factory=lambda: ["a", "b", "tie"])
    agreement: str | None = None

    def __post_init__(self):
        super().__post_init__()
        known = {str(answer).strip().lower() for answer in self.answers}
        if len(self.answers) not in (2, 3) or len(known) < len(self.answers):
            raise ConfigError(
                f"`data.feedback.answers` is {list(self.answers)}. Give what `preferred` holds for the first one, the "
                "second one and, if there are any, a tie: three different values."
            )

    def read(self, row, notes):
        prompt, completions = _texts(row, ["completion_a", "completion_b"], notes)
        preferred = 0
        if "preferred" in row:
            known = [str(answer).strip().lower() for answer in self.answers]
            value = str(row["preferred"]).strip().lower()
            if value not in known:
                raise RowError("preferred", f"is {row['preferred']!r}, not one of {names_of(map(str, self.answers))}")
            preferred = known.index(value)
        distance = 1.0
        if row.get("strength") is not None:
            distance = _number(row["strength"], "strength")
            if distance < 0:
                raise RowError("strength", f"is {distance:g}, where a number from 0 should be")
        if preferred < 2 and key_of(completions[0]) == key_of(completions[1]):
            raise RowError("completion_b", "is the same as `completion_a`, and one is preferred")
        if preferred < 2:
            return _compared(row, prompt, completions, [Win(preferred, 1 - preferred, distance)], ties=[])
        if key_of(completions[0]) == key_of(completions[1]):
            return _compared(row, prompt, completions[:1], [], ties=[])
        return _compared(row, prompt, completions, [], ties=[(0, 1)])


@dataclass(frozen=True, kw_only=True)
class Rankings(Compared):
    """
    Rankings of two or more completions: `prompt`, `completions` and `ranks` (the smallest is best, equal ranks tie),
    or instead of ranks `better`: a list of pairs of indices, the first one's completion better than the second one's.
    So partial orders can be told; what follows from several pairs is added, what doesn't isn't compared.

    Args:
        agreement (`str`, *optional*): rows on the same completions are pooled, see [`Pairs`].
        **options: see [`Feedback`]. The unit of `margin` is a rank.
    """

    NEEDED = ("prompt", "completions", "ranks")
    NULLABLE = ("ranks",)
    OPTIONAL = ("better", "rater")

    agreement: str | None = None

    def __post_init__(self):
        super().__post_init__()
        columns = {"ranks": "ranks", **(self.columns or {})}
        if columns["ranks"] is None and columns.get("better") is None:
            raise ConfigError(
                "`data.feedback.columns.ranks` is null, so `data.feedback.columns.better` has to name the column with "
                "the pairs of indices."
            )

    def read(self, row, notes):
        texts = _list(row.get("completions"), "completions")
        if len(texts) < 2:
            raise RowError("completions", f"has {len(texts)}, and a ranking needs 2 or more")
        fields = {f"completions[{i}]": text for i, text in enumerate(texts)}
        prompt, completions = _texts({**row, **fields}, list(fields), notes)
        if "ranks" in row:
            wins, ties = self._by_ranks(row, completions)
        else:
            wins, ties = _closure(_list(row.get("better"), "better"), len(completions)), []
        keys = [key_of(completion) for completion in completions]
        for i, key in enumerate(keys):
            first = keys.index(key)
            if first < i and any({first, i} == {win.better, win.worse} for win in wins):
                raise RowError(f"completions[{i}]", f"is the same as `completions[{first}]`, and is ranked otherwise")
        keep = [i for i, key in enumerate(keys) if keys.index(key) == i]
        notes["completions left out: they are in their ranking twice"] += len(keys) - len(keep)
        place = {old: new for new, old in enumerate(keep)}
        wins = [
            win._replace(better=place[win.better], worse=place[win.worse]) for win in wins if {*win[:2]} <= {*keep}
        ]
        ties = [(place[i], place[j]) for i, j in ties if {i, j} <= {*keep}]
        return _compared(row, prompt, [completions[i] for i in keep], wins, ties)

    def _by_ranks(self, row: dict, completions: list) -> tuple[list[Win], list[tuple[int, int]]]:
        ranks = _list(row["ranks"], "ranks")
        if len(ranks) != len(completions):
            raise RowError("ranks", f"has {len(ranks)} for {len(completions)} completions")
        ranks = [_number(rank, f"ranks[{i}]") for i, rank in enumerate(ranks)]
        wins, ties = [], []
        for i, j in combinations(range(len(ranks)), 2):
            if ranks[i] == ranks[j]:
                ties.append((i, j))
            else:
                wins.append(Win(*((i, j) if ranks[i] < ranks[j] else (j, i)), abs(ranks[i] - ranks[j])))
        return wins, ties


@dataclass(frozen=True, kw_only=True)
class Edits(Compared):
    """
    Answers that a person mended: `prompt`, `original`, `edited`. The edited one is better, and a demonstration.

    Args:
        **options: see [`Feedback`].
    """

    NEEDED = ("prompt", "original", "edited")

    def read(self, row, notes):
        prompt, completions = _texts(row, ["original", "edited"], notes)
        if key_of(completions[0]) == key_of(completions[1]):
            raise RowError("edited", "is the same as `original`")
        return _compared(row, prompt, completions, [Win(1, 0)], ties=[])


@dataclass(frozen=True, kw_only=True)
class Rated(Feedback):
    """
    Forms of which a row judges one completion; rows of the same completion of the same prompt are pooled.

    Args:
        group_size (`int`, *optional*): the most completions of a prompt in one row (K): more are put into random
            groups of about equal size. Null: all together.
        rounds (`int`): how often each completion is put into a group.
        min_gap (`float`): completions that are less than this apart tie.
        **options: see [`Feedback`].
    """

    group_size: int | None = 4
    rounds: int = 1
    min_gap: float = 0.0

    def _limits(self):
        return (("group_size", 2), ("rounds", 1), ("min_gap", 0))

    def _needs(self, form):
        return "Give prompts with several completions that are judged differently, or lower `data.feedback.min_gap`."

    @abstractmethod
    def gap(self, a: dict, b: dict) -> float | None:
        """By how much one judged completion is better than another; `None` if they can't be compared."""

    @abstractmethod
    def level(self, item: dict) -> float:
        """How good a completion is, above 0 for a good one."""

    @abstractmethod
    def add(self, item: dict, row: dict) -> None:
        """Adds a row's judgement to those of the same completion."""

    def target(self, item: dict) -> dict[str, float | None] | None:
        """What regression is trained on, if it is."""
        return None

    def items(self, rows: list[dict], notes: Counter) -> list[list[dict]]:
        """The judged completions of each prompt."""
        prompts = {}
        for row in rows:
            items = prompts.setdefault(key_of(row["prompt"]), {})
            key = key_of(row["completion"])
            if key in items:
                notes["rows pooled with others on the same completion"] += 1
                self.add(items[key], row)
            else:
                items[key] = {**row, "votes": json.loads(json.dumps(row["votes"]))}
        return [list(items.values()) for items in prompts.values()]

    def groups(self, rows, form, rng, notes):
        for items in self.items(rows, notes):
            for _ in range(self.rounds):
                for group in _partition(items, self.group_size, rng):
                    yield self._group(group, form, notes)

    def labelled(self, rows, notes):
        for items in self.items(rows, notes):
            for item in items:
                level = self.level(item)
                yield item["prompt"], item["completion"], None if level == 0 else level > 0

    def _group(self, items: list[dict], form: str, notes: Counter) -> Group:
        prompt, completions = items[0]["prompt"], [item["completion"] for item in items]
        targets = [self.target(item) for item in items]
        if form == "comparisons" and targets[0] is not None:
            return Group(prompt, completions, [], targets)
        notes["completions left out: no other one of their prompt to compare with"] += len(items) == 1
        wins = []
        for i, j in combinations(range(len(items)), 2):
            gap = self.gap(items[i], items[j])
            if gap is None or gap == 0 or abs(gap) < self.min_gap:
                notes["ties" if gap is not None else "pairs left out: nothing that both were judged by"] += 1
                continue
            a, b = (i, j) if gap > 0 else (j, i)
            single = isinstance(items[a]["votes"], list)  # attributes have a share for each dimension, so none
            asked = self.agreement or form == "judged" and single
            share = share_of(items[a]["votes"], items[b]["votes"]) if asked else None
            if self.agreement and form != "judged" and share <= 0.5:
                notes["ties: the mean and most raters disagree"] += 1
                continue
            notes["pairs on which raters disagree"] += share is not None and share < 1
            wins.append(Win(a, b, abs(gap), share))
        columns = [item.get("columns") or {} for item in items]
        alike = {
            name: value for name, value in columns[0].items() if all(other.get(name) == value for other in columns)
        }
        for name in {name for other in columns for name in other} - alike.keys():
            notes[f"rows without `{name}`: their completions differ in it"] += 1
        return Group(prompt, completions, wins, votes=[item["votes"] for item in items], columns=alike)


@dataclass(frozen=True, kw_only=True)
class Scaled(Rated):
    """
    Judgements on a scale.

    Args:
        scale (`list`): the lowest and the highest value; one outside is an error.
        good_above (`float`, *optional*): completions above it are good ones (KTO's true, demonstrations for SFT),
            those below it are bad ones; null: the middle of the scale.
        use (`str`): what a reward model learns: `pairs` (comparisons) or `regression` (values, scaled to -1 to 1).
        **options: see [`Rated`].
    """

    scale: list[float] = field(default_factory=lambda: [1, 5])
    good_above: float | None = None
    use: str = "pairs"

    def __post_init__(self):
        super().__post_init__()
        if len(self.scale) != 2 or not self.scale[0] < self.scale[1]:
            raise ConfigError(f"`data.feedback.scale` is {list(self.scale)}. Give the lowest and the highest value.")
        if self.use not in ("pairs", "regression"):
            raise ConfigError(f"`data.feedback.use` is {self.use!r}. Use pairs or regression.")
        asked = [name for name in ("agreement", "margin", "negatives", "max_pairs") if getattr(self, name)]
        if self.use == "regression" and asked:
            idle = names_of(f"data.feedback.{name}" for name in asked)
            raise ConfigError(
                f"`data.feedback.use=regression` compares nothing, so {idle} would do nothing. Leave it out, or type "
                "`data.feedback.use=pairs`."
            )

    def level(self, item):
        middle = sum(self.scale) / 2 if self.good_above is None else self.good_above
        return self.value(item) - middle

    @abstractmethod
    def value(self, item: dict) -> float:
        """A completion's mean, on the scale."""

    def unit(self, value: float) -> float:
        """A value of the scale from -1 to 1."""
        low, high = self.scale
        return 2 * (value - low) / (high - low) - 1

    def on_scale(self, value, field: str) -> list[float]:
        """A number or a list of numbers (several raters), all on the scale, as a list; else a `RowError`."""
        values = _list(value, field) if isinstance(value, list) or str(value).strip().startswith("[") else [value]
        if not values:
            raise RowError(field, "is an empty list")
        numbers = [_number(each, f"{field}[{i}]" if len(values) > 1 else field) for i, each in enumerate(values)]
        for number in numbers:
            if not self.scale[0] <= number <= self.scale[1]:
                raise RowError(field, f"is {number:g}, outside the scale from {self.scale[0]} to {self.scale[1]}")
        return numbers


@dataclass(frozen=True, kw_only=True)
class Ratings(Scaled):
    """
    Stars or points for single completions: `prompt`, `completion`, `ratings` (a number, or a list with one a rater).

    Args:
        agreement (`str`, *optional*): `weights` or `smoothing` of a comparison from the share of pairs of raters (one
            of each completion) who agree, a tie half; see [`Pairs`].
        **options: see [`Scaled`]. The unit of `margin` and `min_gap` is one of the scale.
    """

    NEEDED = ("prompt", "completion", "ratings")

    agreement: str | None = None

    def read(self, row, notes):
        prompt, completions = _texts(row, ["completion"], notes)
        if "ratings" not in row:
            raise RowError("ratings", "is missing")
        votes = self.on_scale(row["ratings"], "ratings")
        return {"prompt": prompt, "completion": completions[0], "votes": votes, **_rater(row)}

    def add(self, item, row):
        item["votes"] += row["votes"]

    def value(self, item):
        return sum(item["votes"]) / len(item["votes"])

    def gap(self, a, b):
        return self.value(a) - self.value(b)

    def target(self, item):
        return {"score": self.unit(self.value(item))} if self.use == "regression" else None


@dataclass(frozen=True, kw_only=True)
class Thumbs(Rated):
    """
    Thumbs up and down for single completions: `prompt`, `completion`, `thumb` (true or false, 1 or 0, up or down).

    Several thumbs for one completion: most of them decide. Comparisons are of completions of one prompt of which one
    has the larger share of thumbs up.

    Args:
        agreement (`str`, *optional*): see [`Ratings`].
        **options: see [`Rated`]. The unit of `margin` and `min_gap` is the share of thumbs up.
    """

    NEEDED = ("prompt", "completion", "thumb")

    agreement: str | None = None

    def read(self, row, notes):
        prompt, completions = _texts(row, ["completion"], notes)
        known, value = UP | DOWN, row.get("thumb")
        if str(value).strip().lower() not in known:
            raise RowError("thumb", f"is {value!r}, where true or false, up or down should be")
        thumb = float(known[str(value).strip().lower()])
        return {"prompt": prompt, "completion": completions[0], "votes": [thumb], **_rater(row)}

    def add(self, item, row):
        item["votes"] += row["votes"]

    def level(self, item):
        return sum(item["votes"]) / len(item["votes"]) - 0.5

    def gap(self, a, b):
        return self.level(a) - self.level(b)

    def _needs(self, form):
        return "Give prompts with thumbs up and thumbs down, or train with `stage=kto`, which needs no pairs."


@dataclass(frozen=True, kw_only=True)
class Attributes(Scaled):
    """
    Scores by dimension for single completions: `prompt`, `completion` and a column for each dimension (a number, or a
    list with one a rater; null where it wasn't judged).

    `use: regression` trains a head a dimension. Where one value is needed (pairs, KTO, SFT) it is the weighted mean of
    the dimensions that were judged, in a comparison of those that both completions were judged by.

    Args:
        dimensions (`list[str]`): the dimensions, which are columns; `columns` renames them too.
        weights (`dict[str, float]`, *optional*): of the dimensions in the mean; 1 where it isn't named.
        **options: see [`Scaled`].
    """

    NEEDED = ("prompt", "completion")

    dimensions: list[str] = field(default_factory=lambda: ["helpful", "harmless", "honest", "clear"])
    weights: dict[str, float] | None = None
    scale: list[float] = field(default_factory=lambda: [-1, 1])
    use: str = "regression"

    def __post_init__(self):
        super().__post_init__()
        unknown = [name for name in self.weights or {} if name not in self.dimensions]
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
    def known(self):
        return (*self.NEEDED, *self.OPTIONAL, *self.dimensions)

    def mapping(self, source, found):
        mapping = super().mapping(source, found)
        if missing := [name for name in self.dimensions if name not in mapping]:
            raise DataError(
                f"{source} has no column {names_of(missing)}, but {names_of(found)}. Type "
                "`data.feedback.dimensions=[NAME,...]` with the columns that hold scores."
            )
        return mapping

    def read(self, row, notes):
        prompt, completions = _texts(row, ["completion"], notes)
        given = {name: row.get(name) for name in self.dimensions}
        given = {name: None if value is None or value == "" else value for name, value in given.items()}
        votes = {name: [] if value is None else self.on_scale(value, name) for name, value in given.items()}
        return {"prompt": prompt, "completion": completions[0], "votes": votes, **_rater(row)}

    def convert(self, rows, form, seed, notes):
        for name in self.dimensions if form != "prompt" else ():
            if not any(row["votes"][name] for row in rows):
                raise DataError(
                    f"no row has a score for the attribute `{name}`. Leave it out of `data.feedback.dimensions`, or "
                    "give data that has some."
                )
        judged = [row for row in rows if any(row["votes"].values())]
        notes["rows left out: judged by no dimension"] += len(rows) - len(judged)
        return super().convert(judged, form, seed, notes)

    def add(self, item, row):
        for name, values in row["votes"].items():
            item["votes"][name] += values

    def value(self, item):
        return self._mean(item, [name for name, values in item["votes"].items() if values])

    def gap(self, a, b):
        both = [name for name in self.dimensions if a["votes"][name] and b["votes"][name]]
        return self._mean(a, both) - self._mean(b, both) if both else None

    def target(self, item):
        if self.use != "regression":
            return None
        return {
            name: self.unit(sum(values) / len(values)) if values else None for name, values in item["votes"].items()
        }

    def _mean(self, item: dict, names: list[str]) -> float:
        weights = {name: (self.weights or {}).get(name, 1.0) for name in names}
        total = sum(weights[name] * sum(item["votes"][name]) / len(item["votes"][name]) for name in names)
        return total / sum(weights.values())


def _rater(row: dict) -> dict:
    return {"rater": row["rater"]} if row.get("rater") is not None else {}


def _compared(row: dict, prompt, completions: list, wins: list[Win], ties: list) -> dict:
    return {"prompt": prompt, "completions": completions, "wins": wins, "ties": ties, **_rater(row)}


def _texts(row: dict, fields: list[str], notes: Counter) -> tuple[Any, list]:
    """The checked prompt and completions of a row, all text or all chat, as in `pair_up`."""
    prompt = check_text_or_chat(row, "prompt")
    given = {field: check_text_or_chat(row, field) for field in fields}
    if isinstance(prompt, list) or any(isinstance(value, list) for value in given.values()):
        if any(isinstance(value, str) for value in (prompt, *given.values())):
            notes["text beside chat became turns"] += 1
        prompt, given = as_chat(prompt, "user"), {name: as_chat(value, "assistant") for name, value in given.items()}
    check_turns(prompt, given)
    return prompt, list(given.values())


def _list(value, field: str) -> list:
    """A list, or JSON text of one (a CSV file has no other way); else a `RowError`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass
    if not isinstance(value, list):
        raise RowError(field, "is missing" if value is None else f"is {type_of(value)}, where a list should be")
    return value


def _number(value, field: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        shown = "null" if value is None else repr(value)
        raise RowError(field, f"is {shown}, where a number should be") from None
    if not math.isfinite(number):
        raise RowError(field, f"is {value!r}, where a finite number should be")
    return number


def _closure(pairs: list, count: int) -> list[Win]:
    """All that follows from pairs of indices (better, worse); a `RowError` where they go round in a circle."""
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
    if circular := [i for i in range(count) if i in above[i]]:
        raise RowError("better", f"goes round in a circle: {circular[0]} would be better than itself")
    return [Win(i, j) for i in range(count) for j in sorted(above[i])]


def _partition(items: list, size: int | None, rng: random.Random) -> Iterator[list]:
    """`items` in random groups of at most `size` and about equal sizes."""
    groups = 1 if size is None else -(-len(items) // size)
    order = rng.sample(items, len(items))
    for i in range(groups):
        yield order[i::groups]


def share_of(better: list[float], worse: list[float]) -> float:
    """Share of pairs of a vote for each that prefer the first; a tie is half of one."""
    ahead = sum((a > b) + 0.5 * (a == b) for a in better for b in worse)
    return ahead / (len(better) * len(worse))


def _shuffled(group: Group, rng: random.Random) -> Group:
    order = rng.sample(range(len(group.completions)), len(group.completions))
    place = {old: new for new, old in enumerate(order)}
    return group._replace(
        completions=[group.completions[i] for i in order],
        wins=[win._replace(better=place[win.better], worse=place[win.worse]) for win in group.wins],
        targets=None if group.targets is None else [group.targets[i] for i in order],
        votes=None if group.votes is None else [group.votes[i] for i in order],
    )


def _judged_row(group: Group) -> dict:
    row = {
        **(group.columns or {}),
        "prompt": group.prompt,
        "completions": group.completions,
        "better": [win.better for win in group.wins],
        "worse": [win.worse for win in group.wins],
        "gap": [float(win.distance) for win in group.wins],
        "share": [win.share for win in group.wins],
    }
    if group.votes is None:
        return row
    if isinstance(group.votes[0], list):
        return {**row, "ratings": [[float(vote) for vote in votes] for votes in group.votes]}
    means = [{name: sum(v) / len(v) if v else None for name, v in votes.items()} for votes in group.votes]
    return {**row, "attributes": means}
