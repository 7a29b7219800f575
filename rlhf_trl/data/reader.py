"""Reading of rows: recognition of their type, checks, and conversion to a dataset type."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from rlhf_trl.data.columns import Theirs, rename_columns, roots_of, shown
from rlhf_trl.data.dataset_types import ANNOTATED, CONVERSIONS, SOURCES, annotated_of, choose_row_type, convert
from rlhf_trl.data.images import IMAGE_COLUMNS, ImageStore, has_images, place_images
from rlhf_trl.data.messages import (
    add_system_prompt,
    check_template,
    check_text_or_chat,
    check_words,
    is_chat,
    read_json_chats,
    to_chat,
)
from rlhf_trl.data.options import LoadOptions
from rlhf_trl.data.row_types import (
    CANONICAL,
    PASSED_ON,
    ROW_TYPES,
    alpaca,
    kind_of,
    prompt_of,
    read_row,
    repeats_prompt,
    row_types_in,
    take_prompt_out,
)
from rlhf_trl.data.rows import Problems, Row, RowError, Source, ending, type_of
from rlhf_trl.data.splits import prompt_key
from rlhf_trl.data.tables import BATCH_ROWS, concatenate, make_table
from rlhf_trl.errors import DataError
from rlhf_trl.hints import did_you_mean, names_of, sentences

# Columns that prompts don't keep for reward functions: TRL distinguishes chat from text by any of them
FOREIGN = ("completion", "chosen", "rejected", "messages", "text")
# Columns of a file of candidates (`stage=collect`), whose prompts a policy is trained on
COLLECTED = {"candidates", "questions"}
# Columns of a source that become those of the comparison itself in annotated rows
OF_COMPARISON = ("gap", "share")


@dataclass
class Side:
    """
    Rows of one side of a split.

    Args:
        tables (`list[pyarrow.Table]`): the converted rows.
        keys (`list`): what each of them is split by: its prompt's key or, with `split_by=row`, its number.
        known (`dict`): those keys, and the keys of rows that this stage has no use for, but others may have.
        ends (`list[int]`): number of `known` up to the end of each source.
    """

    tables: list = field(default_factory=list)
    keys: list = field(default_factory=list)
    known: dict = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)


class Reader:
    """
    Reader of rows in one of the `ROW_TYPES`: converts them to a dataset type, as Arrow tables.

    Args:
        dataset_type (`str`): what the stage trains on.
        options (`LoadOptions`): options of the source.
        problems (`Problems`): gets malformed rows.
    """

    def __init__(self, dataset_type: str, options: LoadOptions, problems: Problems):
        self.dataset_type, self.options, self.problems = dataset_type, options, problems
        self.columns = {ours: theirs for ours, theirs in (options.columns or {}).items() if theirs is not None}
        self.whole_messages = options.messages == "whole"
        self.side = Side()  # being read
        self.types: dict[str, tuple] = {}  # of extra columns: name -> (type, place of the first row that has it)
        self.kind: tuple[str, str] | None = None  # `kind_of` the first row, and its place
        self.sources: dict[str, list[str]] = {}  # row type -> names of the sources that hold it
        self.rows, self.dropped, self.changes = Counter(), Counter(), Counter()
        self.unused: dict[str, None] = {}
        self.images, self.folder = ImageStore(options.image_urls), Path()

    def read(self, sources: Iterable[Source]) -> Side:
        """
        Read the rows of all sources of one side.

        Raises:
            DataError: if a source has no rows, or not the columns that are needed.
        """
        self.side = Side()
        for name, rows in sources:
            self.folder = Path(name).parent if Path(name).is_file() else Path()
            if (table := self._read_source(name, rows)) is not None:
                self.side.tables.append(table)
            self.side.ends.append(len(self.side.known))
        return self.side

    def _read_source(self, name: str, rows: Iterable[Row]):
        """Return the rows of a source as a `pyarrow.Table`; `None` if none can be used."""
        rows = iter(rows)
        head, found = self._head(name, rows)
        if not found:  # no row could be read, so there are no columns
            for place, row in chain(head, rows):
                if isinstance(row, RowError):
                    self.problems.add(place, row)
                elif not row:
                    self.problems.add(place, RowError(None, "is empty"))
            return None
        mapping = self._map_columns(name, found)
        row_type = self._choose_row_type(name, found, list(mapping))
        self.sources.setdefault(row_type, []).append(name)
        self.unused |= dict.fromkeys(self._unused(found, mapping, row_type))
        # A single row may quote its prompt; if all of the first rows do, their completions are whole texts
        known = [rename_columns(row, mapping, PASSED_ON) for _, row in head if isinstance(row, dict)]
        whole_texts = all(map(repeats_prompt, known))
        tables, stream = [], self._convert(chain(head, rows), mapping, row_type, whole_texts)
        while batch := list(islice(stream, BATCH_ROWS)):
            tables.append(make_table(batch))
        return concatenate(tables) if tables else None

    def summary(self) -> list[str]:
        """Return lines on what was read: row types, conversions, and the number of rows of each change."""
        lines = []
        for row_type, names in self.sources.items():
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            line = f"{names[0]}{more}: {self.rows[row_type]:,} rows of {row_type}"
            as_they_are = self.whole_messages and row_type == "messages" and self.dataset_type == "prompt_completion"
            if (row_type, self.dataset_type) in CONVERSIONS and not as_they_are:
                line += f" -> {self.dataset_type}: {CONVERSIONS[row_type, self.dataset_type]}"
            lines.append(line)
            if self.dropped[row_type]:
                lines.append(f"{self.dropped[row_type]:,} rows labelled false dropped")
        lines += [f"{change} ({count:,} rows)" for change, count in self.changes.items() if count]
        return lines + ([f"columns dropped: {', '.join(self.unused)}"] if self.unused else [])

    def _head(self, name: str, rows: Iterator[Row]) -> tuple[list[Row], list[str]]:
        """Return the first rows of a source, taken from `rows`, and the columns that they have."""
        head = list(islice(rows, BATCH_ROWS))
        if not head:
            raise DataError(f"{name} holds no rows. Give `data` a source that has some.")
        return head, list(dict.fromkeys(column for _, row in head if isinstance(row, dict) for column in row))

    def _map_columns(self, name: str, found: list[str]) -> dict[str, Theirs]:
        """Map our names of the columns to the file's; a column that `columns` doesn't name keeps its name."""
        for ours, theirs in self.columns.items():
            missing = [root for root in roots_of(theirs, found) if root not in found]
            if missing:
                raise DataError(
                    sentences(
                        f"`data.columns.{ours}={shown(theirs)}`: {name} has no column `{missing[0]}`, it has "
                        f"{names_of(found)}.",
                        did_you_mean(missing[0], found, listed=True),
                        f"Set `data.columns.{ours}=NAME` to one of these.",
                    )
                )
            if self.dataset_type not in ("prompt", "annotated") and ours not in (
                *CANONICAL,
                *PASSED_ON,
                *IMAGE_COLUMNS,
                "margin",
            ):
                raise DataError(
                    sentences(
                        f"`data.columns.{ours}` names no column of ours.",
                        did_you_mean(ours, CANONICAL, listed=True),
                        f"Use one of {names_of([*CANONICAL, 'margin'])}.",
                    )
                )
        mapped = {root for theirs in self.columns.values() for root in roots_of(theirs, found)}
        mapping: dict = {column: column for column in found if column not in mapped}
        if "conversations" in mapping and "messages" not in mapping:
            mapping["messages"] = mapping.pop("conversations")
        mapping |= self.columns
        if "instruction" in mapping and "prompt" not in mapping:  # the columns of the dataset Alpaca
            mapping["prompt"] = mapping.pop("instruction")
            if (
                "output" in mapping
                and "completion" not in mapping
                and self.dataset_type in ("prompt_completion", "unpaired")
            ):
                mapping["completion"] = mapping.pop("output")
        return mapping

    def _is_alpaca(self, mapping: dict[str, Theirs]) -> bool:
        return mapping.get("prompt") == "instruction" and "prompt" not in self.columns

    def _choose_row_type(self, name: str, found: list[str], columns: list[str]) -> str:
        wanted = self.options.row_type
        accepted = SOURCES[self.dataset_type]
        if wanted is None:
            row_type = choose_row_type(self.dataset_type, columns)
        elif wanted not in accepted:
            raise DataError(
                f"`data.row_type={wanted}` can't give this stage its rows of the dataset type `{self.dataset_type}`. "
                f"Set it to one of {names_of(accepted)}, or to null to have it recognized."
            )
        else:
            row_type = wanted if set(ROW_TYPES[wanted]) <= set(columns) else None
        if row_type is None:
            raise DataError(self._explain_missing(name, found, columns, [wanted] if wanted else accepted))
        if row_type == "text" and self.options.to_chat:
            raise DataError(f"`data.to_chat=true`: {name} holds plain `text`, which has no turns. Remove it.")
        return row_type

    def _explain_missing(self, name: str, found: list[str], columns: list[str], accepted) -> str:
        """Return which columns there are, which are missing for the nearest row type, and what to set."""
        nearest = max(accepted, key=lambda row_type: sum(column in columns for column in ROW_TYPES[row_type]))
        missing = [column for column in ROW_TYPES[nearest] if column not in columns]
        present = row_types_in(columns)
        header = (
            ""
            if set(columns) & {*CANONICAL} or ending(name) not in (".csv", ".tsv")
            else (" If the file has no header, give it one: its first line is read as the columns' names.")
        )
        holds = f", so it holds {names_of(present[:1])} rows" if present else ""
        typed = " ".join(f"data.columns.{column}=NAME" for column in missing)
        return (
            f"{name} can't give rows of the dataset type `{self.dataset_type}`: {names_of(missing)} missing. "
            f"It has the columns {names_of(found)}{holds}. Set `{typed}` to say which column is which.{header}"
        )

    def _convert(
        self, rows: Iterable[Row], mapping: dict, row_type: str, whole_texts: bool
    ) -> Iterator[tuple[str, dict]]:
        """Yield place and converted row of every row, and note malformed ones."""
        for place, row in rows:
            self.rows[row_type] += 1
            key = None
            try:
                if isinstance(row, RowError):
                    raise row
                row = read_json_chats(rename_columns(row, mapping, PASSED_ON), self.changes)
                if self._is_alpaca(mapping):
                    row = alpaca(row, self.changes)
                if repeats_prompt(row):
                    done = "it is taken out of them" if whole_texts else "it stays there, since other rows' don't"
                    self.changes[f"the prompt is repeated at the beginning of the answers: {done}"] += 1
                    row = take_prompt_out(row) if whole_texts else row
                if "margin" in mapping:
                    row.setdefault("margin")  # all rows have one or none has: TRL looks at the first
                made = self._with_images(read_row(row, row_type, self.changes), row, place)
                key = self._note_key(prompt_of(made))
                made = self._apply_chat_options(made, place)
                check_words(made)
                converted = convert(made, row_type, self.dataset_type, self.whole_messages)
                self._check_kind(made if not converted else converted[0], place)
                extra = self._extra(row, place)
                for new in converted:
                    check_template({**new, **extra})
                if self.dataset_type == "annotated":
                    extra, converted = {}, [annotated_of({**new, **extra}) for new in converted]
            except RowError as error:
                self._note_malformed(place, row, error, mapping, keyed=key is not None)
                continue
            self.dropped[row_type] += not converted
            for new in converted:
                self.side.keys.append(key)
                yield place, self.images.take({**new, **extra})

    def _note_key(self, prompt) -> bytes | int:
        """Note the key of the row that is being read, and return it."""
        key = prompt_key(prompt) if self.options.split_by == "prompt" else sum(self.rows.values())
        self.side.known[key] = None
        return key

    def _note_malformed(
        self, place: str, row, error: RowError, mapping: dict[str, Theirs], keyed: bool = False
    ) -> None:
        """Note a malformed row; another stage may have a use for it if its prompt is well-formed."""
        root = (error.field or "").split("[")[0]
        self.problems.add(place, error, shown(mapping.get(root, root)) + (error.field or "")[len(root) :])
        if keyed:
            return
        with contextlib.suppress(RowError):
            self._note_key(check_text_or_chat({} if isinstance(row, RowError) else row, "prompt"))

    def _with_images(self, made: dict, row: dict, place: str) -> dict:
        """Return a checked row with the images of `row` in its chat, which text with images becomes."""
        field = "messages" if "messages" in made else "prompt"
        keys = self.images.columns_of(row, self.folder)
        if not keys and not has_images(made.get(field)):
            return made
        if field not in made or self.options.to_chat is False:
            raise RowError(None, "has images, which are read in chats alone (remove `data.to_chat=false`)")
        made = to_chat(made, self.changes, True, place)
        return {**made, field: place_images(made[field], keys, self.images, self.folder)}

    def _apply_chat_options(self, row: dict, place: str) -> dict:
        """Apply `to_chat` and `system_prompt`."""
        row = to_chat(row, self.changes, self.options.to_chat, place)
        if not self.options.system_prompt:
            return row
        if not is_chat(row):
            raise DataError(
                f"`data.system_prompt` is set, but {place} holds text, which has no turns. "
                "Set `data.to_chat=true` to make chats of text."
            )
        return add_system_prompt(row, self.options.system_prompt, self.changes)

    def _extra(self, row: dict, place: str) -> dict:
        """
        Return the columns that are kept beside the dataset type's own: all of prompts (for rewards), texts and numbers
        of annotated rows (for slices), else those that a chat template reads.
        """
        passed_on = [key for key in PASSED_ON if key != "images"]  # which `ImageStore.take` adds
        if self.dataset_type == "prompt":
            dropped = {"prompt", *FOREIGN, *IMAGE_COLUMNS, *(COLLECTED if row.keys() >= COLLECTED else ())}
            extra = {key: value for key, value in row.items() if key not in dropped}
        elif self.dataset_type == "annotated":
            extra = {key: value for key, value in row.items() if key in passed_on or self._can_slice(key, value)}
        else:
            extra = {key: row[key] for key in passed_on if row.get(key) is not None}
        for key, value in extra.items():
            kind = float if type(value) is int else type(value)
            first, where = self.types.setdefault(key, (kind, place)) if value is not None else (None, None)
            if value is not None and kind is not first:
                raise RowError(key, f"is {type_of(value)}, of another type than at {where}")
        return extra

    def _can_slice(self, key: str, value) -> bool:
        """Return whether comparisons can be sliced by this value of this column."""
        if (
            key in (*CANONICAL, *IMAGE_COLUMNS, "margin")
            or (key in ANNOTATED and key not in OF_COMPARISON)
            or value is None
        ):
            return False
        plain = isinstance(value, str | int | float)
        self.changes[f"`{key}` is neither text nor number and dropped"] += not plain
        return plain

    def _check_kind(self, row: dict, place: str) -> None:
        """Raise a `RowError` for a row of another kind than the first: TRL looks at the first row only."""
        kind = kind_of(row)
        if self.kind is None:
            self.kind = (kind, place)
        first, where = self.kind
        if kind != first:
            hint = " (`data.to_chat=true` makes chats of text)" if "chat" in kind + first else ""
            raise RowError(None, f"holds {kind}, but {first} at {where}{hint}")

    def _unused(self, found: list[str], mapping: dict, row_type: str) -> list[str]:
        """Return the file's columns that nothing reads."""
        used = {*ROW_TYPES[row_type]} | ({"input"} if self._is_alpaca(mapping) else set())
        if row_type == "preference":
            used |= {"prompt", "margin"}
        if self.dataset_type == "prompt":
            used |= {ours for ours in mapping if ours not in FOREIGN}
        elif self.dataset_type == "annotated":
            used |= {ours for ours in mapping if ours in OF_COMPARISON or ours not in (*FOREIGN, *ANNOTATED)}
        else:
            used |= {*PASSED_ON, *IMAGE_COLUMNS}
        theirs = {root for ours in used if ours in mapping for root in roots_of(mapping[ours], found)}
        return [column for column in found if column not in theirs]
