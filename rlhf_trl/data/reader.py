"""From rows as they stand in a file to checked rows of a form, as Arrow tables."""

import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from itertools import chain, islice

from rlhf_trl.data import forms
from rlhf_trl.data.read import Row, RowError, ending
from rlhf_trl.data.splits import prompt_key
from rlhf_trl.data.words import did_you_mean, names_of
from rlhf_trl.errors import DataError

BATCH_ROWS = 1000
SHOWN_PROBLEMS = 5
# In the form `prompt`, all other columns go to the reward functions but these: TRL tells chat from text by any of
# them.
FOREIGN = ("completion", "chosen", "rejected", "messages", "text")
# What stands for a column that a row doesn't have, where it isn't null: TRL passes this one on with `**`.
ABSENT = {"chat_template_kwargs": {}}
# In the form `judged` comparisons are parted by the other columns. These two are of the comparison itself.
OF_COMPARISON = ("gap", "share")


class Problems:
    """Malformed rows of everything one run loads: the first few in words, all of them counted."""

    def __init__(self):
        self.count, self.first, self.fatal = 0, [], False

    def add(self, place: str, error: RowError, column: str | None = None) -> None:
        """Note a bad row at `place`; `column` is the name of the field in the user's file where that is another."""
        self.count += 1
        self.fatal |= error.fatal
        if len(self.first) < SHOWN_PROBLEMS:
            field = column or error.field
            self.first.append(f"{place}: `{field}` {error.what}" if field else f"{place} {error.what}")

    def text(self) -> str:
        """All that was noted, a line each."""
        more = [f"  ... and {self.count - len(self.first):,} more"] if self.count > len(self.first) else []
        return "\n".join([f"  {line}" for line in self.first] + more)


class Reader:
    """
    Turns the rows of sources (files, splits) into Arrow tables in `form`.

    The options are those of `rlhf_trl.data.load.build`. Bad rows go to `problems`; `summary` says what was read.
    `keys` has for each row of the tables what it is split by: its prompt's key or, with `split_by=row`, its number.
    `known` has also the keys of rows that this stage has no use for, but others may have.
    """

    def __init__(self, form, problems: Problems, *, format, columns, system_prompt, to_chat, messages, split_by):
        self.form, self.problems, self.format = form, problems, format
        self.split_by, self.keys, self.known = split_by, [], {}
        self.columns = {ours: theirs for ours, theirs in (columns or {}).items() if theirs is not None}
        self.system_prompt, self.to_chat, self.whole_messages = system_prompt, to_chat, messages == "whole"
        self.types = {}  # of extra columns: name -> (type, place of the first row that has it)
        self.kind = None  # (`forms.kind_of` of the first row, its place)
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
        known = [_named(row, mapping) for _, row in head if isinstance(row, dict)]
        self.whole_texts = all(map(forms.repeats_prompt, known))
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
            as_they_are = self.whole_messages and format == "messages" and self.form == "prompt_completion"
            if (format, self.form) in forms.CONVERSIONS and not as_they_are:
                line += f" -> {self.form}: {forms.CONVERSIONS[format, self.form]}"
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
                    f"`data.columns.{ours}={theirs}`: {name} has no column `{theirs}`, it has {names_of(found)}."
                    f"{did_you_mean(theirs, found)} Type `data.columns.{ours}=NAME` with one of these."
                )
            if self.form not in ("prompt", "judged") and ours not in (*forms.CANONICAL, *forms.PASSED_ON, "margin"):
                raise DataError(
                    f"`data.columns.{ours}` names no column of ours.{did_you_mean(ours, forms.CANONICAL)} "
                    f"Type one of {names_of([*forms.CANONICAL, 'margin'])}."
                )
        mapped = set(self.columns.values())
        mapping = {column: column for column in found if column not in mapped}
        if "conversations" in mapping and "messages" not in mapping:
            mapping["messages"] = mapping.pop("conversations")
        mapping |= self.columns
        if "instruction" in mapping and "prompt" not in mapping:  # the columns of the data set Alpaca
            mapping["prompt"] = mapping.pop("instruction")
            if "output" in mapping and "completion" not in mapping and self.form in ("prompt_completion", "unpaired"):
                mapping["completion"] = mapping.pop("output")
        return mapping

    def _is_alpaca(self, mapping: dict[str, str]) -> bool:
        return mapping.get("prompt") == "instruction" and "prompt" not in self.columns

    def _choose_format(self, name: str, found: list[str], columns: list[str]) -> str:
        wanted = self.format
        accepted = forms.SOURCES[self.form]
        if wanted is None:
            format = forms.choose_format(self.form, columns)
        elif wanted not in accepted:
            raise DataError(
                f"`data.format={wanted}` can't give this stage its rows of the form `{self.form}`. "
                f"Type one of {names_of(accepted)}, or `data.format=null` to have it recognized."
            )
        else:
            format = wanted if set(forms.FORMATS[wanted]) <= set(columns) else None
        if format is None:
            raise DataError(self._explain_missing(name, found, columns, [wanted] if wanted else accepted))
        if format == "text" and self.to_chat:
            raise DataError(f"`data.to_chat=true`: {name} holds plain `text`, which has no turns. Leave it out.")
        return format

    def _explain_missing(self, name: str, found: list[str], columns: list[str], accepted) -> str:
        """Which columns there are, which are missing for the format that is nearest, and what to type."""
        nearest = max(accepted, key=lambda format: sum(column in columns for column in forms.FORMATS[format]))
        missing = [column for column in forms.FORMATS[nearest] if column not in columns]
        present = forms.formats_in(columns)
        header = (
            ""
            if set(columns) & {*forms.CANONICAL} or ending(name) not in (".csv", ".tsv")
            else (" If the file has no header, give it one: its first line is taken for the columns' names.")
        )
        holds = f", so it holds {names_of(present[:1])} rows" if present else ""
        typed = " ".join(f"data.columns.{column}=NAME" for column in missing)
        return (
            f"{name} can't give rows of the form `{self.form}`: {names_of(missing)} missing. "
            f"It has the columns {names_of(found)}{holds}. Type `{typed}` to say which column is which.{header}"
        )

    def _convert(self, rows: Iterable[Row], mapping: dict, format: str) -> Iterator[tuple[str, dict]]:
        """(place, row in `self.form`) of every row, with bad ones noted."""
        for place, row in rows:
            self.rows[format] += 1
            key = None
            try:
                if isinstance(row, RowError):
                    raise row
                row = forms.read_json_chats(_named(row, mapping), self.changes)
                if self._is_alpaca(mapping):
                    row = forms.alpaca(row, self.changes)
                if forms.repeats_prompt(row):
                    done = "it is taken out of them" if self.whole_texts else "it stays there, since other rows' don't"
                    self.changes[f"the prompt is repeated at the beginning of the answers: {done}"] += 1
                    row = forms.take_prompt_out(row) if self.whole_texts else row
                if "margin" in mapping:
                    row.setdefault("margin")  # all rows have one or none has: TRL looks at the first
                made = forms.read_row(row, format, self.changes)
                key = self._know(forms.prompt_of(made))
                made = forms.to_chat(made, self.changes) if self.to_chat else made
                made = self._add_system_prompt(made, place) if self.system_prompt else made
                converted = forms.convert(made, format, self.form, self.whole_messages)
                self._check_kind(made if not converted else converted[0], place)
                extra = self._extra(row, place)
                for new in converted:
                    forms.check_template({**new, **extra})
                if self.form == "judged":
                    extra, converted = {}, [forms.judged_of({**new, **extra}) for new in converted]
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
            self._know(forms.check_text_or_chat({} if isinstance(row, RowError) else row, "prompt"))
        except RowError:
            pass

    def _add_system_prompt(self, row: dict, place: str) -> dict:
        if not forms.is_chat(row):
            raise DataError(
                f"`data.system_prompt` is given, but {place} holds text, which has no turns. "
                "Type `data.to_chat=true` to make chats of text."
            )
        return forms.add_system_prompt(row, self.system_prompt, self.changes)

    def _extra(self, row: dict, place: str) -> dict:
        """
        Columns beside the form's own: all in the form `prompt` (for rewards), texts and numbers in the form `judged`
        (for slices), else those a template reads.
        """
        if self.form == "prompt":
            extra = {key: value for key, value in row.items() if key not in FOREIGN and key != "prompt"}
        elif self.form == "judged":
            extra = {key: value for key, value in row.items() if key in forms.PASSED_ON or self._tells(key, value)}
        else:
            extra = {key: row[key] for key in forms.PASSED_ON if row.get(key) is not None}
        for key, value in extra.items():
            kind = float if type(value) is int else type(value)
            first, where = self.types.setdefault(key, (kind, place)) if value is not None else (None, None)
            if value is not None and kind is not first:
                raise RowError(key, f"is {forms.type_of(value)}, of another type than at {where}")
        return extra

    def _tells(self, key: str, value) -> bool:
        """Whether comparisons can be parted by this value of this column."""
        if key in (*forms.CANONICAL, "margin") or key in forms.JUDGED and key not in OF_COMPARISON or value is None:
            return False
        told = isinstance(value, str | int | float)
        self.changes[f"`{key}` is neither text nor number and left out"] += not told
        return told

    def _check_kind(self, row: dict, place: str) -> None:
        """TRL takes all rows for what the first one is, so a `RowError` where one is of another kind."""
        kind = forms.kind_of(row)
        if self.kind is None:
            self.kind = (kind, place)
        first, where = self.kind
        if kind != first:
            hint = " (`data.to_chat=true` makes chats of text)" if "chat" in kind + first else ""
            raise RowError(None, f"holds {kind}, but {first} at {where}{hint}")

    def _unused(self, found: list[str], mapping: dict, format: str) -> list[str]:
        """The file's columns that nothing downstream will see."""
        used = {*forms.FORMATS[format]} | ({"input"} if self._is_alpaca(mapping) else set())
        if format == "preference":
            used |= {"prompt", "margin"}
        if self.form == "prompt":
            used |= {ours for ours in mapping if ours not in FOREIGN}
        elif self.form == "judged":
            used |= {ours for ours in mapping if ours in OF_COMPARISON or ours not in (*FOREIGN, *forms.JUDGED)}
        else:
            used |= set(forms.PASSED_ON)
        theirs = {mapping[ours] for ours in used if ours in mapping}
        return [column for column in found if column not in theirs]


class FeedbackReader(Reader):
    """
    Reads feedback (pairs, rankings, ...), of which rows are checked one by one and converted a split at a time.

    Args:
        feedback (`rlhf_trl.data.feedback.Feedback`): the form of the rows.
        form, problems, system_prompt, to_chat, split_by: as in [`Reader`].
    """

    def __init__(self, feedback, form, problems: Problems, **options):
        super().__init__(form, problems, format=None, columns=None, messages="last_turn", **options)
        self.feedback = feedback

    def read(self, name: str, rows: Iterable[Row]):
        """Checked rows of the source `name`, each with its `prompt` and as JSON; `None` if none can be used."""
        import pyarrow as pa

        rows = iter(rows)
        head, found = self._head(name, rows)
        mapping = self.feedback.mapping(name, found) if found else {}
        self.sources.setdefault(self.feedback.name, []).append(name)
        if self.form != "judged":
            self.unused |= dict.fromkeys(column for column in found if column not in mapping.values())
        stream = self._checked(chain(head, rows), mapping)
        tables = []
        while batch := list(islice(stream, BATCH_ROWS)):
            tables.append(
                pa.table(
                    {
                        "prompt": _array("prompt", [row["prompt"] for _, row in batch], batch),
                        "row": _array("row", [json.dumps(row) for _, row in batch], batch),
                    }
                )
            )
        return concatenate(tables) if tables else None

    def _checked(self, rows: Iterable[Row], mapping: dict[str, str]) -> Iterator[tuple[str, dict]]:
        for place, row in rows:
            self.rows[self.feedback.name] += 1
            try:
                if isinstance(row, RowError):
                    raise row
                others = {name: value for name, value in row.items() if name not in (*mapping.values(), *forms.JUDGED)}
                row = forms.read_json_chats(_named(row, mapping), self.changes)
                made = self.feedback.read(row, self.changes)
                repeated = (
                    "the prompt is repeated at the beginning of the completions, and stays there: leave it out of them"
                )
                self.changes[repeated] += forms.repeats_prompt(made)
                if self.form == "judged":
                    made["columns"] = self._extra(others, place)
                made = forms.to_chat(made, self.changes) if self.to_chat else made
                made = self._add_system_prompt(made, place) if self.system_prompt else made
                self._check_kind(made, place)
                forms.check_template(made)
            except RowError as error:
                root = (error.field or "").split("[")[0]
                self.problems.add(place, error, mapping.get(root, root) + (error.field or "")[len(root) :])
                self._know_malformed(row)
                continue
            self.keys.append(self._know(made["prompt"]))
            yield place, made

    def summary(self) -> list[str]:
        """As of [`Reader`], and which options of the form this stage has no use for."""
        idle = [f"`data.feedback.{name}`" for name in self.feedback.idle(self.form)]
        note = [f"note: {', '.join(idle)} changes nothing in rows of {self.form}"] if idle else []
        return super().summary() + note

    def convert(self, side: str, rows, seed: int, notes: list[str]):
        """The rows of a split as a `Dataset` of the stage's form; what was made of them goes to `notes`."""
        from datasets import Dataset

        counts = Counter()
        try:
            made = self.feedback.convert([json.loads(row) for row in rows["row"]], self.form, f"{seed}-{side}", counts)
        except DataError as error:
            raise DataError(f"{side}: {error}") from None
        notes.append(f"{side}: {len(rows):,} rows of {self.feedback.name} -> {forms.contents(made, self.form)}")
        if any(counts.values()):
            notes.append("  " + "; ".join(f"{what}: {count:,}" for what, count in counts.items() if count))
        return Dataset(make_table([(side, row) for row in made], (*forms.CHATS, *forms.PASSED_ON)))


def _named(row: dict, mapping: dict[str, str]) -> dict:
    """A row by our names of its columns; in what a chat template reads, null stands for itself alone."""
    row = {ours: row[theirs] for ours, theirs in mapping.items() if theirs in row}
    return row | {key: forms.without_filled(row[key]) for key in forms.PASSED_ON if key in row}


def make_table(rows: list[tuple[str, dict]], of_objects: Container[str] | None = None):
    """
    (place, row)s as an Arrow table. A column with objects of any fields becomes a column of JSON: Arrow's own objects
    all have the same fields, and null in those that a row doesn't have, which templates would render. So does one with
    integers of more than 64 bits. `of_objects` names the columns that may be such ones, if not all.
    """
    import pyarrow as pa

    columns = {}
    for key in dict.fromkeys(key for _, row in rows for key in row):
        values = [row.get(key, ABSENT.get(key)) for _, row in rows]
        json_column = (of_objects is None or key in of_objects) and any(map(forms.needs_json, values))
        columns[key] = _as_json(values) if json_column else _array(key, values, rows)
    return pa.table(columns)


def concatenate(tables: list):
    """Arrow tables one below the other, null where one lacks a column; a `DataError` where types clash."""
    import pyarrow as pa

    names = {name for table in tables for name in table.column_names if table.schema.field(name).type == pa.json_()}
    tables = [table.replace_schema_metadata(None) for table in tables]
    for name in names:
        for i, table in enumerate(tables):
            at = table.schema.get_field_index(name)
            values = table[name].to_pylist() if at >= 0 else [ABSENT.get(name)] * len(table)
            if at < 0:
                tables[i] = table.append_column(name, _as_json(values))
            elif table.schema.field(name).type != pa.json_():
                tables[i] = table.set_column(at, name, _as_json(values))
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"a column holds values of several types ({error}). Give it one type in every row.") from None


def _as_json(values: list):
    import datasets.features.features
    import datasets.utils.json
    import pyarrow as pa

    # Columns of JSON go through pandas' parser (datasets 5.2), which reads 55.290184 as 55.290183999999996 and writes
    # ten digits. Python's is exact.
    for module in (datasets.features.features, datasets.utils.json):
        module.ujson_loads, module.ujson_dumps = json.loads, json.dumps
    texts = pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
    return pa.ExtensionArray.from_storage(pa.json_(), texts)


def _array(key: str, values: list, batch: list[tuple[str, dict]]):
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"{batch[0][0]} and the rows after it: `{key}` holds values of several types ({error}). Give it one."
        ) from None
