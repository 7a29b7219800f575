"""
Labels to and from the files of other tools.

Nothing is lost on the way: what can't be imported (half-filled answers, answers to texts that the candidates don't
have) is named, counted, and written to a file of its own; labels that contradict earlier ones of the same labeler, and
labels of questions that were never asked, are imported and named.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rlhf_trl.data.file_rows import read_file
from rlhf_trl.data.rows import RowError
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.hints import count_of, names_of
from rlhf_trl.labels.candidates import Candidate, Candidates, prompt_id
from rlhf_trl.labels.formats import arena, argilla, label_studio, potato, prodigy
from rlhf_trl.labels.formats.base import Format, Item, Parsed, Response, plain, reordered
from rlhf_trl.labels.store import Label, asked_about

FORMATS: dict[str, Format] = {
    "argilla": argilla,
    "label_studio": label_studio,
    "potato": potato,
    "arena": arena,
    "prodigy": prodigy,
}
# Notes of a kind that are named one by one
NAMED = 20


@dataclass
class Notes:
    """Noteworthy things by kind, each with its place."""

    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str) -> None:
        """Note a place."""
        self.places.setdefault(kind, []).append(place)

    def lines(self) -> list[str]:
        """Return the counts, and below each its places."""
        lines = []
        for kind, places in self.places.items():
            lines.append(f"  {kind}: {len(places):,}")
            lines += [f"    {place}" for place in places[:NAMED]]
            if len(places) > NAMED:
                lines.append(f"    ... and {len(places) - NAMED:,} more")
        return lines


def export_text(
    rows: Sequence[Candidates], labels: Sequence[Label], tool: str, form: str | None, notes: Notes
) -> tuple[str, int]:
    """
    Return the file of a tool with the questions of candidates and their labels, and the number of labels in it.

    Args:
        rows (`Sequence[Candidates]`), labels (`Sequence[Label]`): candidates with their questions, and labels.
        tool (`str`): one of `FORMATS`.
        form (`str`, *optional*): form of the answers; `None`: that of the labels, or pair.
        notes (`Notes`): takes what is left out.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the tool doesn't have the form, or there is nothing to write.
    """
    written = FORMATS[tool]
    form = form or max((label.form for label in labels), key=[label.form for label in labels].count, default="pair")
    if form not in written.FORMS:
        raise ConfigError(
            f"{tool} has no answers of the form `{form}`, only {names_of(written.FORMS)}. Choose another tool, or "
            "another `--form`."
        )
    items = list(_items(rows, labels, form, notes))
    made = [row for number, item in enumerate(items, 1) for row in written.write(item, number)]
    if not made:
        raise ConfigError(f"There is nothing to write: no question or label of the form `{form}`.")
    count = sum(len(item.labels) for item in items)
    if tool == "arena" and (skipped := sum(label.answer is None for item in items for label in item.labels)):
        notes.add("skipped questions, which a battle can't be", f"{skipped} labels")
        count -= skipped
    if written.LINES:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), count
    return json.dumps(made, ensure_ascii=False, indent=1) + "\n", count


def _items(rows: Sequence[Candidates], labels: Sequence[Label], form: str, notes: Notes) -> Iterator[Item]:
    """Yield the questions of the candidates and those of the labels."""
    of: dict[str, dict[Any, list[Label]]] = {}
    for label in labels:
        if label.form == form:
            of.setdefault(label.id, {}).setdefault(label.key, []).append(label)
        else:
            notes.add("labels of another form, which are not in this file (`--form`)", f"{label.id}: {label.form}")
    for row in rows:
        found = of.pop(row.id, {})
        for question in row.questions:
            if (asked := asked_about(question, form)) is None:
                notes.add(f"questions that don't fit the form {form}", f"{row.id}: {list(question)}")
                continue
            yield Item(row, asked, form, found.pop((row.id, tuple(sorted(asked)), form), []))
        for group in found.values():
            if max(group[0].question) < len(row.candidates):
                yield Item(row, group[0].question, form, group)
            else:
                notes.add("labels of candidates that the row doesn't have", f"{row.id}: {group[0].question}")
    for row_id, groups in of.items():
        for label in (label for group in groups.values() for label in group):
            notes.add("labels of prompts that the candidates don't have", f"{row_id}: {label.question}")


@dataclass
class Imported:
    """
    Content of a file.

    Attributes:
        labels (`list[Label]`): new labels, in the order of their times where all have one.
        rows (`list[Candidates]`): the candidates, with what the file added to them.
        added (`int`): number of prompts and completions that were added.
        rejected (`list[dict]`): rows that weren't imported: place, reason, and the row.
    """

    labels: list[Label] = field(default_factory=list)
    rows: list[Candidates] = field(default_factory=list)
    added: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)


def import_file(
    path: str,
    tool: str,
    rows: Sequence[Candidates],
    labels: Sequence[Label],
    notes: Notes,
    add: bool = False,
    labeler: str | None = None,
    withdrawn: Sequence[Label] = (),
) -> Imported:
    """
    Read the labels in the file of a tool.

    Args:
        path (`str`), tool (`str`): the file, and one of `FORMATS`.
        rows (`Sequence[Candidates]`): candidates that it is about.
        labels (`Sequence[Label]`): labels so far; what is among them isn't imported again.
        notes (`Notes`): takes what is noteworthy.
        add (`bool`): whether prompts and completions that the candidates don't have are added to them.
        labeler (`str`, *optional*): name for answers that name no labeler.
        withdrawn (`Sequence[Label]`): labels that were taken back, and aren't brought back by an older file.
    """
    made = Imported(rows=list(rows))
    places = Places(made, add)
    known, gone = {_same(label) for label in labels}, {_same(label) for label in withdrawn}
    answers = {(label.labeler, label.key): label for label in labels if label.answer is not None}
    for place, row in read_file(path):
        try:
            if isinstance(row, RowError):
                raise row
            parsed = FORMATS[tool].read(row)
            found = places.find(parsed)
        except (RowError, TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            reason = _reason(error)
            notes.add("rows that were not imported", f"{place}: {reason}")
            made.rejected.append({"place": place, "reason": reason, "row": None if isinstance(row, RowError) else row})
            continue
        if not parsed.responses:
            notes.add("questions without an answer", place)
        for what in parsed.lost:
            notes.add(f"{what}, which a label can't hold", place)
        kept = _kept(parsed)
        for response in parsed.responses:
            try:
                label = _label(found, parsed, response, kept, labeler)
            except (RowError, TypeError, ValueError, IndexError) as error:
                reason = f"`{response.labeler}` {_reason(error)}"
                notes.add("answers that were not imported", f"{place}: {reason}")
                made.rejected.append({"place": place, "reason": reason, "row": row})
                continue
            if _same(label) in known:
                notes.add("labels that are there already", place)
                continue
            if _same(label) in gone:
                reason = f"`{label.labeler}` took it back since: {label.id}, {label.question}"
                notes.add("labels that were taken back and are not imported", f"{place}: {reason}")
                made.rejected.append({"place": place, "reason": reason, "row": row})
                continue
            known.add(_same(label))
            if not found.is_asked:
                notes.add("labels of questions that were never asked", f"{place}: {label.id}, {label.question}")
            earlier = answers.setdefault((label.labeler, label.key), label) if label.answer is not None else label
            if _differ(earlier, label):
                what = f"{place}: `{label.labeler}` says {label.answer!r} of {label.id}, and said {earlier.answer!r}"
                notes.add("labels that contradict an earlier one of the labeler", what)
            made.labels.append(label)
    if all(label.time for label in made.labels):
        made.labels.sort(key=lambda label: datetime.fromisoformat(str(label.time)).timestamp())
    return made


@dataclass
class Found:
    """A row of a file among the candidates: the question, its order in the file, and whether it was asked."""

    id: str
    question: list[int]
    shown: list[int]
    is_asked: bool


class Places:
    """
    The candidates, found by what a file says of them.

    Args:
        made (`Imported`): has the candidates, which are added to if `add`.
        add (`bool`): whether prompts and completions that are missing are added.
    """

    def __init__(self, made: Imported, add: bool):
        self.made, self.add = made, add
        self.by_id = {row.id: row for row in made.rows}
        self.by_prompt = {plain(row.prompt): row for row in made.rows}

    def find(self, parsed: Parsed) -> Found:
        """
        Return where a row is.

        Raises:
            [`~rlhf_trl.data.rows.RowError`]: if it is nowhere, and isn't added.
        """
        row, shown = self._by_own(parsed)
        if row is None:
            row, shown = self._by_text(parsed)
        own = _mapped(parsed.own.get("question"), parsed, shown)
        asked = [asked_about(question, parsed.form) for question in row.questions]
        same = [question for question in asked if question and sorted(question) == sorted(shown)]
        question = own or (same[0] if same else shown)
        return Found(row.id, question, shown, bool(same))

    def _by_own(self, parsed: Parsed) -> tuple[Candidates | None, list[int]]:
        row, shown = self.by_id.get(str(parsed.own.get("id"))), parsed.own.get("shown")
        if row is None or not isinstance(shown, list) or not all(type(i) is int for i in shown):
            return None, []
        if len(shown) != len(parsed.completions) or not all(0 <= i < len(row.candidates) for i in shown):
            return None, []
        ours = [plain(row.candidates[i].completion) for i in shown]
        same = ours == [plain(completion) for completion in parsed.completions]
        return (row, shown) if same else (None, [])

    def _by_text(self, parsed: Parsed) -> tuple[Candidates, list[int]]:
        if not parsed.prompt or not parsed.completions:
            raise RowError("prompt", "or the answers are missing")
        completions = parsed.completions[:1] if parsed.form == "edit" else parsed.completions
        row = self.by_prompt.get(plain(parsed.prompt))
        texts = [] if row is None else [plain(each.completion) for each in row.candidates]
        missing = [plain(each) for each in completions if plain(each) not in texts]
        if (row is None or missing) and not self.add:
            what = (
                "the prompt is"
                if row is None
                else f"{count_of(len(missing), 'answer')} of it {'is' if len(missing) == 1 else 'are'}"
            )
            raise RowError(None, f"{what} not among the candidates (`--add` adds it to them)")
        if len({plain(each) for each in completions}) < len(completions):
            raise RowError(None, "holds an answer twice")
        if row is None:
            own = str(parsed.own.get("id") or "")
            name = own if own and own not in self.by_id else prompt_id(parsed.prompt)
            row = Candidates(id=name, prompt=parsed.prompt, candidates=[])
            self.made.rows.append(row)
            self.by_id[row.id] = self.by_prompt[plain(parsed.prompt)] = row
            self.made.added += 1
        shown = []
        for i, completion in enumerate(completions):
            if plain(completion) not in texts:
                policy = parsed.policies[i] if parsed.policies else None
                row.candidates.append(Candidate(completion=completion, policy=policy))
                texts.append(plain(completion))
                self.made.added += 1
            shown.append(texts.index(plain(completion)))
        if missing and tuple(shown) not in row.questions:
            row.questions.append(tuple(shown))
        return row, shown


def _mapped(own: Any, parsed: Parsed, shown: list[int]) -> list[int] | None:
    """
    Return indices of candidates that a row holds, in those of the candidates here; `None` where they are others.

    Args:
        own (`list[int]`, *optional*): indices as they were when the file was written.
        parsed (`Parsed`): the row, with its answers as they were then.
        shown (`list[int]`): its answers here.
    """
    mapping = dict(zip(parsed.own.get("shown") or [], shown, strict=False))
    if not isinstance(own, list) or sorted(map(str, own)) != sorted(map(str, mapping)) or len(own) != len(shown):
        return None
    return [mapping[i] for i in own]


def _kept(parsed: Parsed) -> dict[tuple[str, bool], list[dict[str, Any]]]:
    """Return what a row keeps of its labels, by labeler and whether they are skips, in order."""
    kept: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for one in parsed.own.get("labels") or []:
        kept.setdefault((str(one.get("labeler")), one.get("skipped") is not None), []).append(one)
    return kept


def _label(
    found: Found,
    parsed: Parsed,
    response: Response,
    kept: dict[tuple[str, bool], list[dict[str, Any]]],
    labeler: str | None,
) -> Label:
    """Return the label of a response."""
    if response.problem is not None:
        raise RowError(None, response.problem)
    name = response.labeler or labeler
    if name is None:
        raise RowError(None, "names no labeler. Name one with `--labeler`")
    entries = kept.get((name, response.skipped is not None), [])
    entry = entries.pop(0) if entries else {}
    if entry and not _is_same_time(entry.get("time"), response.time):
        entry = {}  # another answer of the same person, given in the tool
    question = _mapped(entry.get("question"), parsed, found.shown) or found.question
    order = found.shown
    if "order" in entry:
        order = None if entry["order"] is None else _mapped(entry["order"], parsed, found.shown) or found.shown
    return Label(
        id=found.id,
        question=question,
        form=parsed.form,
        order=order,
        answer=reordered(response.answer, parsed.form, found.shown, question),
        labeler=name,
        time=entry.get("time") or response.time,
        seconds=entry.get("seconds", response.seconds),
        confidence=entry.get("confidence"),
        skipped=entry.get("skipped") or response.skipped,
    )


def _is_same_time(ours: str | None, theirs: str | None) -> bool:
    if ours is None or theirs is None:
        return True
    try:
        return abs((datetime.fromisoformat(ours) - datetime.fromisoformat(theirs)).total_seconds()) < 1e-3
    except (TypeError, ValueError):
        return ours == theirs


def _same(label: Label) -> str:
    """Return what makes two labels the same one."""
    return json.dumps([label.labeler, label.id, label.question, label.form, label.answer, label.skipped, label.time])


def _differ(a: Label, b: Label) -> bool:
    return a.answer is not None and b.answer is not None and a.by_candidate != b.by_candidate


def _reason(error: Exception) -> str:
    if isinstance(error, RowError):
        return f"`{error.field}` {error.what}" if error.field else error.what
    return f"isn't as the tool writes it ({type(error).__name__}: {error})"


def check_tool(tool: str) -> None:
    """
    Check the name of a tool.

    Raises:
        [`~rlhf_trl.errors.DataError`]: if it is none.
    """
    if tool not in FORMATS:
        raise DataError(f"`{tool}` is no tool that is known. Use one of {names_of(FORMATS)}.")
