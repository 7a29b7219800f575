"""From rows as they stand in a file to checked rows of a dataset type, as Arrow tables."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from rlhf_trl.data.dataset_types import ANNOTATED, CONVERSIONS, SOURCES, annotated_of, choose_format, convert
from rlhf_trl.data.formats import (
    CANONICAL,
    FORMATS,
    PASSED_ON,
    alpaca,
    formats_in,
    kind_of,
    prompt_of,
    read_row,
    repeats_prompt,
    take_prompt_out,
)
from rlhf_trl.data.messages import (
    add_system_prompt,
    check_template,
    check_text_or_chat,
    is_chat,
    read_json_chats,
    to_chat,
    without_filled,
)
from rlhf_trl.data.rows import Problems, Row, RowError, ending, type_of
from rlhf_trl.data.splits import prompt_key
from rlhf_trl.data.tables import BATCH_ROWS, concatenate, make_table
from rlhf_trl.errors import DataError
from rlhf_trl.hints import did_you_mean, names_of, sentences

# Columns that prompts don't keep for reward functions: TRL tells chat from text by any of them
FOREIGN = ("completion", "chosen", "rejected", "messages", "text")
# Columns of a source that become those of the comparison itself in annotated rows
OF_COMPARISON = ("gap", "share")


class Reader:
    """
    Turns the rows of sources (files, splits) into Arrow tables in `dataset_type`.

    The options are those of `rlhf_trl.data.build`. Bad rows go to `problems`; `summary` says what was read.
    `keys` has for each row of the tables what it is split by: its prompt's key or, with `split_by=row`, its number.
    `known` has also the keys of rows that this stage has no use for, but others may have.
    """

    def __init__(
        self, dataset_type, problems: Problems, *, format, columns, system_prompt, to_chat, messages, split_by
    ):
        self.dataset_type, self.problems, self.format = dataset_type, problems, format
        self.split_by, self.keys, self.known = split_by, [], {}
        self.columns = {ours: theirs for ours, theirs in (columns or {}).items() if theirs is not None}
        self.system_prompt, self.to_chat, self.whole_messages = system_prompt, to_chat, messages == "whole"
        self.types = {}  # of extra columns: name -> (type, place of the first row that has it)
        self.kind = None  # (`kind_of` of the first row, its place)
        self.sources = {}  # format -> names of the sources that hold it
        self.rows, self.left_out, self.changes, self.unused = Counter(), Counter(), Counter(), {}

    def read(self, name: str, rows: Iterable[Row]):
        """`rows` of the source `name` as a `pyarrow.Table`; `None` if none can be used."""
        rows = iter(rows)
        head, found = self._head(name, rows)
        if not found:  # not one row could be read: there are no columns to speak of
            for place, row in chain(head, rows):
                if not row or isinstance(row, RowError):
                    self.problems.add(place, row or RowError(None, "is empty"))
            return None
        mapping = self._map_columns(name, found)
        format = self._choose_format(name, found, list(mapping))
        self.sources.setdefault(format, []).append(name)
        self.unused |= dict.fromkeys(self._unused(found, mapping, format))
        # One row may quote its prompt; where all do, as far as one can see, the answers are whole texts
        known = [named(row, mapping) for _, row in head if isinstance(row, dict)]
        self.whole_texts = all(map(repeats_prompt, known))
        tables, stream = [], self._convert(chain(head, rows), mapping, format)
        while batch := list(islice(stream, BATCH_ROWS)):
            tables.append(make_table(batch))
        return concatenate(tables) if tables else None

    def summary(self) -> list[str]:
        """Lines on what was read: formats, conversions and how many rows each change concerned."""
        lines = []
        for format, names in self.sources.items():
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            line = f"{names[0]}{more}: {self.rows[format]:,} rows of {format}"
            as_they_are = self.whole_messages and format == "messages" and self.dataset_type == "prompt_completion"
            if (format, self.dataset_type) in CONVERSIONS and not as_they_are:
                line += f" -> {self.dataset_type}: {CONVERSIONS[format, self.dataset_type]}"
            lines.append(line)
            if self.left_out[format]:
                lines.append(f"{self.left_out[format]:,} rows labelled false left out")
        lines += [f"{change} ({count:,} rows)" for change, count in self.changes.items() if count]
        return lines + ([f"columns left out: {', '.join(self.unused)}"] if self.unused else [])

    def _head(self, name: str, rows: Iterator[Row]) -> tuple[list[Row], list[str]]:
        """The first rows of a source, taken from `rows`, and the columns that they have."""
        head = list(islice(rows, BATCH_ROWS))
        if not head:
            raise DataError(f"{name} holds no rows. Give `data` a source that has some.")
        return head, list(dict.fromkeys(column for _, row in head if isinstance(row, dict) for column in row))

    def _map_columns(self, name: str, found: list[str]) -> dict[str, str]:
        """Our names of the columns -> theirs, as `columns` says; a column that isn't mapped keeps its name."""
        for ours, theirs in self.columns.items():
            if theirs not in found:
                raise DataError(
                    sentences(
                        f"`data.columns.{ours}={theirs}`: {name} has no column `{theirs}`, it has {names_of(found)}.",
                        did_you_mean(theirs, found, listed=True),
                        f"Set `data.columns.{ours}=NAME` to one of these.",
                    )
                )
            if self.dataset_type not in ("prompt", "annotated") and ours not in (*CANONICAL, *PASSED_ON, "margin"):
                raise DataError(
                    sentences(
                        f"`data.columns.{ours}` names no column of ours.",
                        did_you_mean(ours, CANONICAL, listed=True),
                        f"Use one of {names_of([*CANONICAL, 'margin'])}.",
                    )
                )
        mapped = set(self.columns.values())
        mapping = {column: column for column in found if column not in mapped}
        if "conversations" in mapping and "messages" not in mapping:
            mapping["messages"] = mapping.pop("conversations")
        mapping |= self.columns
        if "instruction" in mapping and "prompt" not in mapping:  # the columns of the data set Alpaca
            mapping["prompt"] = mapping.pop("instruction")
            if (
                "output" in mapping
                and "completion" not in mapping
                and self.dataset_type in ("prompt_completion", "unpaired")
            ):
                mapping["completion"] = mapping.pop("output")
        return mapping

    def _is_alpaca(self, mapping: dict[str, str]) -> bool:
        return mapping.get("prompt") == "instruction" and "prompt" not in self.columns

    def _choose_format(self, name: str, found: list[str], columns: list[str]) -> str:
        wanted = self.format
        accepted = SOURCES[self.dataset_type]
        if wanted is None:
            format = choose_format(self.dataset_type, columns)
        elif wanted not in accepted:
            raise DataError(
                f"`data.format={wanted}` can't give this stage its rows of the dataset type `{self.dataset_type}`. "
                f"Type one of {names_of(accepted)}, or `data.format=null` to have it recognized."
            )
        else:
            format = wanted if set(FORMATS[wanted]) <= set(columns) else None
        if format is None:
            raise DataError(self._explain_missing(name, found, columns, [wanted] if wanted else accepted))
        if format == "text" and self.to_chat:
            raise DataError(f"`data.to_chat=true`: {name} holds plain `text`, which has no turns. Leave it out.")
        return format

    def _explain_missing(self, name: str, found: list[str], columns: list[str], accepted) -> str:
        """Which columns there are, which are missing for the format that is nearest, and what to type."""
        nearest = max(accepted, key=lambda format: sum(column in columns for column in FORMATS[format]))
        missing = [column for column in FORMATS[nearest] if column not in columns]
        present = formats_in(columns)
        header = (
            ""
            if set(columns) & {*CANONICAL} or ending(name) not in (".csv", ".tsv")
            else (" If the file has no header, give it one: its first line is taken for the columns' names.")
        )
        holds = f", so it holds {names_of(present[:1])} rows" if present else ""
        typed = " ".join(f"data.columns.{column}=NAME" for column in missing)
        return (
            f"{name} can't give rows of the dataset type `{self.dataset_type}`: {names_of(missing)} missing. "
            f"It has the columns {names_of(found)}{holds}. Type `{typed}` to say which column is which.{header}"
        )

    def _convert(self, rows: Iterable[Row], mapping: dict, format: str) -> Iterator[tuple[str, dict]]:
        """(place, row in `self.dataset_type`) of every row, with bad ones noted."""
        for place, row in rows:
            self.rows[format] += 1
            key = None
            try:
                if isinstance(row, RowError):
                    raise row
                row = read_json_chats(named(row, mapping), self.changes)
                if self._is_alpaca(mapping):
                    row = alpaca(row, self.changes)
                if repeats_prompt(row):
                    done = "it is taken out of them" if self.whole_texts else "it stays there, since other rows' don't"
                    self.changes[f"the prompt is repeated at the beginning of the answers: {done}"] += 1
                    row = take_prompt_out(row) if self.whole_texts else row
                if "margin" in mapping:
                    row.setdefault("margin")  # all rows have one or none has: TRL looks at the first
                made = read_row(row, format, self.changes)
                key = self._know(prompt_of(made))
                made = to_chat(made, self.changes) if self.to_chat else made
                made = self._add_system_prompt(made, place) if self.system_prompt else made
                converted = convert(made, format, self.dataset_type, self.whole_messages)
                self._check_kind(made if not converted else converted[0], place)
                extra = self._extra(row, place)
                for new in converted:
                    check_template({**new, **extra})
                if self.dataset_type == "annotated":
                    extra, converted = {}, [annotated_of({**new, **extra}) for new in converted]
            except RowError as error:
                root = (error.field or "").split("[")[0]
                self.problems.add(place, error, mapping.get(root, root) + (error.field or "")[len(root) :])
                if key is None:
                    self._know_malformed(row)
                continue
            self.left_out[format] += not converted
            for new in converted:
                self.keys.append(key)
                yield place, {**new, **extra}

    def _know(self, prompt):
        """Note the key of the row that is being read, and return it."""
        key = prompt_key(prompt) if self.split_by == "prompt" else sum(self.rows.values())
        self.known[key] = None
        return key

    def _know_malformed(self, row) -> None:
        """Another stage may have a use for the row if its prompt is well-formed."""
        try:
            self._know(check_text_or_chat({} if isinstance(row, RowError) else row, "prompt"))
        except RowError:
            pass

    def _add_system_prompt(self, row: dict, place: str) -> dict:
        if not is_chat(row):
            raise DataError(
                f"`data.system_prompt` is given, but {place} holds text, which has no turns. "
                "Type `data.to_chat=true` to make chats of text."
            )
        return add_system_prompt(row, self.system_prompt, self.changes)

    def _extra(self, row: dict, place: str) -> dict:
        """
        Return the columns that are kept beside the dataset type's own: all of prompts (for rewards), texts and numbers
        of annotated rows (for slices), else those that a chat template reads.
        """
        if self.dataset_type == "prompt":
            extra = {key: value for key, value in row.items() if key not in FOREIGN and key != "prompt"}
        elif self.dataset_type == "annotated":
            extra = {key: value for key, value in row.items() if key in PASSED_ON or self._tells(key, value)}
        else:
            extra = {key: row[key] for key in PASSED_ON if row.get(key) is not None}
        for key, value in extra.items():
            kind = float if type(value) is int else type(value)
            first, where = self.types.setdefault(key, (kind, place)) if value is not None else (None, None)
            if value is not None and kind is not first:
                raise RowError(key, f"is {type_of(value)}, of another type than at {where}")
        return extra

    def _tells(self, key: str, value) -> bool:
        """Whether comparisons can be parted by this value of this column."""
        if key in (*CANONICAL, "margin") or key in ANNOTATED and key not in OF_COMPARISON or value is None:
            return False
        told = isinstance(value, str | int | float)
        self.changes[f"`{key}` is neither text nor number and left out"] += not told
        return told

    def _check_kind(self, row: dict, place: str) -> None:
        """TRL takes all rows for what the first one is, so a `RowError` where one is of another kind."""
        kind = kind_of(row)
        if self.kind is None:
            self.kind = (kind, place)
        first, where = self.kind
        if kind != first:
            hint = " (`data.to_chat=true` makes chats of text)" if "chat" in kind + first else ""
            raise RowError(None, f"holds {kind}, but {first} at {where}{hint}")

    def _unused(self, found: list[str], mapping: dict, format: str) -> list[str]:
        """The file's columns that nothing downstream will see."""
        used = {*FORMATS[format]} | ({"input"} if self._is_alpaca(mapping) else set())
        if format == "preference":
            used |= {"prompt", "margin"}
        if self.dataset_type == "prompt":
            used |= {ours for ours in mapping if ours not in FOREIGN}
        elif self.dataset_type == "annotated":
            used |= {ours for ours in mapping if ours in OF_COMPARISON or ours not in (*FOREIGN, *ANNOTATED)}
        else:
            used |= set(PASSED_ON)
        theirs = {mapping[ours] for ours in used if ours in mapping}
        return [column for column in found if column not in theirs]


def named(row: dict, mapping: dict[str, str]) -> dict:
    """A row by our names of its columns; in what a chat template reads, null stands for itself alone."""
    row = {ours: row[theirs] for ours, theirs in mapping.items() if theirs in row}
    return row | {key: without_filled(row[key]) for key in PASSED_ON if key in row}
