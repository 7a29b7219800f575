"""
The file of labels, `labels.jsonl`: one answer a line, appended and synced, nothing ever deleted or changed.

A line is a [`Label`]. An answer that was taken back stays in the file, and a later line withdraws it. Several
processes may append to one file. The part of a line that a killed process left is moved to `labels.jsonl.torn` by the
next one that appends.
"""

import fcntl
import json
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_trl.data.rows import RowError, type_of
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.hints import names_of
from rlhf_trl.terminal import say

FORMS = ("pair", "ranking", "rating", "edit")
# Candidates of a question by the form of its answer, at least and at most
SIZES = {"pair": (2, 2), "ranking": (2, math.inf), "rating": (1, math.inf), "edit": (1, 1)}
# An index into the question, a tie, or two bad ones, which are no tie
PAIR_ANSWERS = (0, 1, "tie", "both_bad")


def now() -> str:
    """Return the time of now as labels have it: ISO 8601 in UTC, with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


@dataclass(frozen=True, kw_only=True)
class Label:
    """
    One answer to one question.

    Args:
        id (`str`): id of the row of candidates.
        question (`list[int]`): indices of the candidates asked about, in the candidates' order; one for `form=edit`.
        form (`str`): pair, ranking, rating or edit.
        order (`list[int]`, *optional*): the same indices in the order in which they were shown; `None`: not known.
        answer (*optional*):
            pair: 0 or 1 (an index into `question`), `"tie"` or `"both_bad"`. ranking: a rank for each entry of
            `question`, 1 for the best, equal ranks tie. rating: for each entry of `question` a number or
            `{attribute: number}`, `None` where it wasn't rated. edit: the edited text. `None` where it was skipped.
        labeler (`str`): name of the person, the reward, or the judge.
        time (`str`, *optional*): when, ISO 8601 in UTC.
        seconds (`float`, *optional*): time it took.
        confidence (`float`, *optional*): how sure the labeler was.
        skipped (`str`, *optional*): why there is no answer.
        withdraws (`str`, *optional*): `time` of the earlier label of this labeler and question that this row takes
            back; it has no answer then.

    Raises:
        [`~rlhf_trl.data.rows.RowError`]: for a value that a field can't have.
    """

    id: str
    question: list[int]
    form: str
    order: list[int] | None = None
    answer: Any = None
    labeler: str
    time: str | None = None
    seconds: float | None = None
    confidence: float | None = None
    skipped: str | None = None
    withdraws: str | None = None

    def __post_init__(self):
        for name in ("question", "order"):
            if isinstance(value := getattr(self, name), tuple):
                object.__setattr__(self, name, list(value))
        for name in ("id", "labeler"):
            if not isinstance(value := getattr(self, name), str) or not value.strip():
                raise RowError(name, f"is {type_of(value)}, where text should be" if value != "" else "is empty")
        for name in ("time", "skipped", "withdraws"):
            if not isinstance(value := getattr(self, name), str | None):
                raise RowError(name, f"is {type_of(value)}, where text or null should be")
        if self.time is not None:
            try:
                datetime.fromisoformat(self.time)
            except ValueError:
                raise RowError("time", f"is {self.time!r}, where a time as ISO 8601 has it should be") from None
        for name in ("seconds", "confidence"):
            if (value := getattr(self, name)) is not None:
                _check_number(value, name)
        _check_question(self.question, self.form)
        if self.order is not None and (
            not isinstance(self.order, list) or sorted(map(str, self.order)) != sorted(map(str, self.question))
        ):
            raise RowError("order", f"is {self.order!r}, and the question is {self.question}")
        if (self.answer is not None) + (self.skipped is not None) + (self.withdraws is not None) != 1:
            raise RowError("answer", "must be given, or else `skipped` says why there is none")
        if self.answer is not None:
            CHECKS[self.form](self.answer, len(self.question))

    @property
    def key(self) -> tuple[Hashable, ...]:
        """The question: id, candidates and form. The same candidates in another order are the same question."""
        return self.id, tuple(sorted(self.question)), self.form

    @property
    def by_candidate(self) -> Any:
        """The answer independently of the order of the question: of a pair the better candidate."""
        if self.form == "pair":
            return self.question[self.answer] if self.answer in (0, 1) else str(self.answer)
        if self.form in ("ranking", "rating"):
            return dict(zip(self.question, self.answer, strict=True))
        return self.answer

    @classmethod
    def from_row(cls, row: Any) -> "Label":
        """
        Return a row of the file as a label.

        Raises:
            [`~rlhf_trl.data.rows.RowError`]: if it is none.
        """
        if not isinstance(row, dict):
            raise RowError(None, f"is {type_of(row)}, where an object should be")
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in row if name not in known]:
            raise RowError(unknown[0], f"is no field of a label, which has {names_of(known)}")
        if missing := [name for name in ("id", "question", "form", "labeler") if name not in row]:
            raise RowError(missing[0], "is missing")
        return cls(**row)

    def to_row(self) -> dict[str, Any]:
        """Return the row of the file."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.withdraws is None:
            del row["withdraws"]
        return row

    def withdrawal(self) -> "Label":
        """Return the row that takes this label back."""
        return replace(
            self, answer=None, skipped=None, confidence=None, seconds=None, time=now(), withdraws=self.time or ""
        )


def asked_about(question: Sequence[int], form: str) -> list[int] | None:
    """
    Return the candidates of a question that an answer of a form is about, of an edit the first one; `None` where the
    form doesn't fit the question.
    """
    chosen = list(question[:1] if form == "edit" else question)
    least, most = SIZES[form]
    return chosen if least <= len(chosen) <= most else None


def size_in_words(form: str) -> str:
    """Return how many candidates a question has."""
    least, most = SIZES[form]
    return f"{least}" if least == most else f"{least} or more"


def _check_question(question: Any, form: Any) -> None:
    if form not in FORMS:
        raise RowError("form", f"is {form!r}, not one of {names_of(FORMS)}")
    if not isinstance(question, list) or not all(type(i) is int and i >= 0 for i in question):
        raise RowError("question", f"is {question!r}, where a list of indices of candidates should be")
    if len({*question}) < len(question):
        raise RowError("question", f"is {question!r}, which holds a candidate twice")
    least, most = SIZES[form]
    if not least <= len(question) <= most:
        raise RowError("question", f"has {len(question)} candidates, and `form={form}` needs {size_in_words(form)}")


def _check_number(value: Any, field: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(field, f"is {value!r}, where a finite number should be")


def _check_pair(answer: Any, count: int) -> None:
    if not any(type(answer) is type(each) and answer == each for each in PAIR_ANSWERS):
        raise RowError("answer", f"is {answer!r}, and that of a pair is 0, 1, `tie` or `both_bad`")


def _check_ranking(answer: Any, count: int) -> None:
    if not isinstance(answer, list) or len(answer) != count:
        raise RowError("answer", f"is {answer!r}, where {count} ranks should be")
    for i, rank in enumerate(answer):
        _check_number(rank, f"answer[{i}]")


def _check_rating(answer: Any, count: int) -> None:
    if not isinstance(answer, list) or len(answer) != count:
        raise RowError("answer", f"is {answer!r}, where {count} ratings should be, one for each candidate")
    for i, rating in enumerate(answer):
        if isinstance(rating, dict):
            for name, number in rating.items():
                _check_number(number, f"answer[{i}].{name}")
        elif rating is not None:
            _check_number(rating, f"answer[{i}]")
    if not any(rating is not None and rating != {} for rating in answer):
        raise RowError("answer", "rates no candidate")


def _check_edit(answer: Any, count: int) -> None:
    if not isinstance(answer, str) or not answer.strip():
        raise RowError("answer", "is empty" if isinstance(answer, str) else f"is {type_of(answer)}, not text")


CHECKS = {"pair": _check_pair, "ranking": _check_ranking, "rating": _check_rating, "edit": _check_edit}


class LabelStore:
    """
    A file of labels that is appended to.

    Args:
        path (`str` or `os.PathLike`): the file, which is made at the first label.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def create(self) -> None:
        """
        Make the file, if there is none.

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: if it can't be written.
        """
        self.extend([])

    def append(self, label: Label) -> None:
        """
        Append a label. When this returns, it is on the disk, whatever happens to the process or the machine.

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: if it can't be written; then the file is as it was.
        """
        self.extend([label])

    def extend(self, labels: Iterable[Label]) -> None:
        """
        Append labels, all or none of them, see [`append`].

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: if they can't be written; then the file is as it was.
        """
        lines = [json.dumps(label.to_row(), ensure_ascii=False, allow_nan=False) + "\n" for label in labels]
        # A lone surrogate, which UTF-8 lacks, is written as JSON's own escape of it
        data = "".join(lines).encode(errors="backslashreplace")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                with _locked(descriptor, fcntl.LOCK_EX, self.path):
                    _set_torn_aside(descriptor, self.path)
                    _write(descriptor, data)
                if is_new:
                    _sync_folder(self.path.parent)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ConfigError(
                f"The label can't be written to `{self.path}`: {error.strerror}. Make room, or let the folder be "
                "written to; nothing that was saved is lost."
            ) from error

    def read(self) -> list[Label]:
        """Return the labels in force, see [`read`]."""
        return read(self.path)


def read(path: str | os.PathLike) -> list[Label]:
    """
    Return the labels in force, in the order in which they were given: those that no later row withdraws.

    Args:
        path (`str` or `os.PathLike`): the file; without one there are no labels.

    Raises:
        [`~rlhf_trl.errors.DataError`]: with file and line, if a line is no label.
    """
    return in_force(label for _, label in read_rows(path))


def in_force(rows: Iterable[Label]) -> list[Label]:
    """Return the labels that no later row withdraws."""
    return _sorted(rows)[0]


def withdrawn(path: str | os.PathLike) -> list[Label]:
    """Return the labels of a file that a later row withdraws."""
    return _sorted(label for _, label in read_rows(path))[1]


def _sorted(rows: Iterable[Label]) -> tuple[list[Label], list[Label]]:
    """Return the labels that are in force, and those that a later row withdraws."""
    found: dict[int, Label] = {}
    gone = []
    for number, row in enumerate(rows):
        if row.withdraws is None:
            found[number] = row
            continue
        same = [
            n
            for n, each in found.items()
            if (each.key, each.labeler, each.time or "") == (row.key, row.labeler, row.withdraws)
        ]
        if same:
            gone.append(found.pop(same[-1]))
    return list(found.values()), gone


def read_rows(path: str | os.PathLike) -> list[tuple[int, Label]]:
    """
    Return every row of a file of labels with the number of its line, withdrawn ones and withdrawals included.

    A last line that a killed process left without its end is said, and is no row; it stays in the file.

    Raises:
        [`~rlhf_trl.errors.DataError`]: with file and line, if a line is no label.
    """
    path = Path(path)
    if not path.exists():
        return []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _locked(descriptor, fcntl.LOCK_SH, path):
            content = path.read_bytes()
    except OSError as error:
        raise DataError(f"`{path}` can't be read: {error.strerror}.") from error
    finally:
        os.close(descriptor)
    *lines, torn = content.split(b"\n")
    if torn:
        if _whole(torn) is None:
            say(f"`{path}`, line {len(lines) + 1} is torn: its writer was killed before the answer was saved.")
        else:
            lines.append(torn)
    return [(number, _parse(line, path, number)) for number, line in enumerate(lines, 1) if line.strip()]


def _parse(line: bytes, path: Path, number: int) -> Label:
    try:
        return Label.from_row(json.loads(line))
    except RowError as error:
        what = f"`{error.field}` {error.what}" if error.field else error.what
        raise DataError(f"`{path}`, line {number}: {what}. Correct the line, or delete it.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"`{path}`, line {number} isn't valid JSON ({error}). Correct the line, or delete it."
        ) from error


def _whole(line: bytes) -> Label | None:
    """Return the label of a last line that lacks nothing but its end, else `None`."""
    with suppress(RowError, ValueError, RecursionError):
        return Label.from_row(json.loads(line))
    return None


@contextmanager
def _locked(descriptor: int, kind: int, path: Path) -> Iterator[None]:
    """Lock an open file, for as long as this takes."""
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        say(f"`{path}` can't be locked ({error.strerror}): let a single process write to it.")
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def _write(descriptor: int, data: bytes) -> None:
    """Append and sync, or leave the file as it was."""
    size = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _set_torn_aside(descriptor: int, path: Path) -> None:
    """Move what stands behind the last whole line to a file of its own; a label that lacks only its end is kept."""
    size = os.fstat(descriptor).st_size
    tail, start = b"", size
    while start and b"\n" not in tail:
        start = max(start - 65536, 0)
        tail = os.pread(descriptor, size - start, start)
    torn = tail[tail.rfind(b"\n") + 1 :]
    if not torn:
        return
    if _whole(torn) is not None:
        return _write(descriptor, b"\n")
    aside = path.with_name(f"{path.name}.torn")
    with open(aside, "ab") as file:
        file.write(torn + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.ftruncate(descriptor, size - len(torn))
    os.fsync(descriptor)
    say(f"`{path}` ended in a torn line: its writer was killed before the answer was saved. It is in `{aside}` now.")


def _sync_folder(folder: Path) -> None:
    """Make a new file's name as lasting as its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
