"""
Rows of local files, one at a time, each with its place (file and line), for messages.

Imports nothing heavy: the checks of a config call `resolve_paths`.
"""

import csv
import glob
import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from rlhf_trl.data.rows import Problems, Row, RowError, ending, typed_row
from rlhf_trl.errors import DataError
from rlhf_trl.hints import names_of
from rlhf_trl.terminal import say

T = TypeVar("T")
# A JSON object with one of these is a row, whatever lists it holds.
COLUMNS = {"prompt", "completion", "chosen", "rejected", "messages", "conversations", "text", "instruction"}
DEEPEST = 100  # objects and lists in each other


def resolve_paths(paths: str | list[str], key: str = "data.paths") -> list[str]:
    """
    Return the files that paths and globs name, each once.

    Args:
        paths (`str` or `list[str]`): files and globs, relative to the working directory.
        key (`str`): key of the config, for the message.

    Raises:
        DataError: that lists every path that names no file, or one in a format that can't be read.
    """
    files, problems = [], []
    listed = [paths] if isinstance(paths, str) else paths
    if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
        raise DataError(
            f"`{key}` is {paths}, where files should be. Set `{key}=[FILE,...]`, with quotes around numbers."
        )
    for path in listed:
        here = Path(path).expanduser()
        # The name of a file may hold brackets, which mean something else in a glob
        matches = [str(here)] if here.exists() else sorted(glob.glob(str(here), recursive=True))
        folders = [match for match in matches if Path(match).is_dir()]
        if not matches:
            problems.append(f"`{key}`: `{path}` names no file, seen from {Path.cwd()}. Set `{key}=[FILE,...]`.")
        elif folders:
            problems.append(f"`{key}`: `{folders[0]}` is a folder. Name its files: `{key}='{folders[0]}/*.jsonl'`.")
        problems += [
            f"`{key}`: `{match}` has an ending that isn't known. Give it one of {', '.join(READERS)}."
            for match in matches
            if match not in folders and ending(match) not in READERS
        ]
        problems += [
            f"`{key}`: `{match}` "
            + ("may not be read by you. Change its permissions." if Path(match).exists() else "is a link to no file.")
            for match in matches
            if not os.access(match, os.R_OK)
        ]
        files += [match for match in matches if match not in files]
    if not files and not problems:
        problems.append(f"`{key}` is empty. Set `{key}=[FILE,...]`.")
    if problems:
        raise DataError.join(problems)
    return files


def read_file(path: str) -> Iterator[Row]:
    """
    Yield the rows of a .jsonl, .json, .csv, .tsv or .parquet file (also .gz but for parquet), streamed if possible.
    """
    try:
        yield from READERS[ending(path)](path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield path, RowError(None, f"is a damaged gzip file ({error})", fatal=True)


def checked_rows(path: str, check: Callable[[dict], T], problems: Problems) -> Iterator[T]:
    """
    Yield what `check` makes of each row of a file.

    Args:
        path (`str`): the file.
        check (callable): function that returns what a row says, or raises a [`~rlhf_trl.data.rows.RowError`].
        problems ([`~rlhf_trl.data.rows.Problems`]): gets the errors of rows, with their places.
    """
    for place, row in read_file(path):
        try:
            if isinstance(row, RowError):
                raise row
            made = check(row)
        except RowError as error:
            problems.add(place, error)
        else:
            yield made


def _open(path: str):
    """Open a file for reading, compressed if its first bytes say so."""
    with open(path, "rb") as file:
        start = file.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is text in UTF-16, and UTF-8 is read. Save it as UTF-8.")
    return gzip.open(path, "rb") if start == b"\x1f\x8b" else open(path, "rb")


def _read_json(path: str) -> Iterator[Row]:
    """Yield rows of JSON lines, or of one JSON value: people use both endings for both, so the first lines decide."""
    with _open(path) as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())  # a blank line is no row
        head = list(islice(lines, 2))
        if len(head) == 2 and any(isinstance(_parse_line(line), dict) for _, line in head):
            for number, line in chain(head, lines):
                yield f"{path}, line {number}", _parse_line(line)
            return
        file.seek(0)
        content = file.read()
    try:
        values = _parse_values(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        rows = [
            (f"{path}, line {number}", _parse_line(line))
            for number, line in enumerate(content.split(b"\n"), 1)
            if line.strip()
        ]
        if any(isinstance(row, dict) for _, row in rows):
            yield from rows
        else:
            start = content[: error.start] if isinstance(error, UnicodeDecodeError) else b""
            line = getattr(error, "lineno", start.count(b"\n") + 1)
            yield f"{path}, line {line}", RowError(None, _what(error), fatal=True)
        return
    rows = _rows_in(path, values[0]) if len(values) == 1 else values
    for number, row in enumerate(rows, 1):
        yield f"{path}, {'line' if rows == values else 'row'} {number}", _checked(row)


def _parse_line(line: bytes) -> dict | RowError:
    try:  # -sig: Windows editors put a byte order mark before the first line
        return _checked(json.loads(line.decode("utf-8-sig").rstrip(), object_pairs_hook=_object))
    except (ValueError, RecursionError) as error:
        return RowError(None, _what(error))


def _parse_values(text: str) -> list:
    """Return the JSON values of a text, one after another."""
    decoder, values = json.JSONDecoder(object_pairs_hook=_object), []
    at = _skip_space(text, 0)
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values.append(value)
        at = _skip_space(text, at)
    return values


def _skip_space(text: str, at: int) -> int:
    """Return the index of the first character from `at` on that isn't white space of JSON."""
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _what(error: ValueError | RecursionError) -> str:
    """Return what is wrong with text that isn't JSON, from the exception it caused."""
    if isinstance(error, UnicodeDecodeError):
        return f"isn't UTF-8 text (byte {error.start + 1})"
    if isinstance(error, json.JSONDecodeError):
        return f"isn't valid JSON ({error.msg}, column {error.colno})"
    # Python reads no number of more than 4,300 digits
    return "holds a number of too many digits" if isinstance(error, ValueError) else "is nested too deeply"


class _Twice(dict):
    """JSON object with a duplicate key."""

    key: str


def _object(pairs: list[tuple]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        made = _Twice(made)
        names = [name for name, _ in pairs]
        made.key = next(name for name in names if names.count(name) > 1)
    return made


def _checked(row) -> dict | RowError:
    """Return a JSON value as a row, or what keeps it from being one."""
    if not isinstance(row, dict):
        return RowError(None, f"is a JSON {type(row).__name__}, not an object")
    if isinstance(row, _Twice):
        return RowError(row.key, "is there twice. Give one of the two another name")
    faults = ((key, _fault(value)) for key, value in row.items())
    return next((RowError(key, fault) for key, fault in faults if fault), row)


def _fault(value, depth: int = 1) -> str | None:
    """Return what is wrong with a value that is valid JSON all the same."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "holds half of a surrogate pair, which is no text"
        return None
    if isinstance(value, _Twice):
        return f"holds an object with the key `{value.key}` twice"
    if not isinstance(value, dict | list):
        return None
    if depth > DEEPEST:
        return f"is nested more than {DEEPEST} deep"
    parts = chain(value, value.values()) if isinstance(value, dict) else value
    return next(filter(None, (_fault(part, depth + 1) for part in parts)), None)


def _rows_in(path: str, value) -> list:
    """
    Return the rows of a file that holds one JSON value.

    That is a list, an object with a list of rows beside other keys, an object of columns, or one row.
    """
    if not isinstance(value, dict) or isinstance(value, _Twice):
        return value if isinstance(value, list) else [value]
    lists = [name for name, rows in value.items() if _are_objects(rows) and not _is_chat(rows)]
    if lists and not COLUMNS & value.keys():
        if len(lists) > 1:
            raise DataError(
                f"{path} holds several lists of rows, {names_of(lists)}. Save each as a file of its own, and type "
                "`data.paths=[FILE,...]`."
            )
        say(f"data: the rows of {path} are those of `{lists[0]}` in it")
        return value[lists[0]]
    columns = list(value.values())
    if all(isinstance(column, dict) and column for column in columns) and len({*map(tuple, columns)}) == 1:
        columns = [list(column.values()) for column in columns]  # as pandas writes them: by the row's number
    chats = [column for name, column in value.items() if name in COLUMNS and _are_objects(column)]
    if (
        not all(isinstance(column, list) and len(column) > 1 for column in columns)
        or chats
        or any(map(_is_chat, columns))
    ):
        return [value]
    if len({*map(len, columns)}) > 1:
        sizes = ", ".join(f"`{name}` {len(column):,}" for name, column in zip(value, columns, strict=True))
        raise DataError(f"{path} holds columns as lists, and they differ in length: {sizes}. Give each a value a row.")
    say(f"data: {path} holds columns as lists, of which rows were made")
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _are_objects(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_chat(value) -> bool:
    return _are_objects(value) and not {"role", "from"}.isdisjoint(value[0])


def _read_csv(path: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long answer
    with _open(path) as file:
        first = next((line for line in file if line.strip()), b"")
        file.seek(0)
        lines = (line.decode("utf-8-sig") for line in file)
        separator = _separator(first.decode("utf-8-sig", errors="replace"))
        if separator != ",":
            name = "tabs" if separator == "\t" else f"`{separator}`"
            say(f"data: the values of {path} are separated by {name}, as its first line is")
        reader = csv.reader(lines, strict=True, delimiter=separator)
        header, line = None, 1
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                # What follows can't be separated from the broken row, so reading ends here.
                yield f"{path}, line {line}", RowError(None, f"can't be read as CSV ({error})", fatal=True)
                return
            # A quoted value may span lines: a row's place is its first line.
            place, line = f"{path}, line {line}", reader.line_num + 1
            if not values:
                continue
            if header is None:
                header = [name.strip() for name in values]
                twice = [name for name in header if name and header.count(name) > 1]
                if twice:
                    what = "is the name of two columns. Give one of them another name"
                    yield place, RowError(twice[0], what, fatal=True)
                    return
            elif len(values) != len(header):
                yield place, RowError(None, f"has {len(values)} values where the header names {len(header)} columns")
            else:  # spreadsheets add columns without a name or a value
                yield place, {name: value for name, value in zip(header, values, strict=True) if name or value}


def _separator(header: str) -> str:
    """Return the separator of a header: a comma, or else the more frequent of a semicolon and a tab."""

    def names(separator: str) -> int:
        try:
            return len(next(csv.reader([header], strict=True, delimiter=separator), []))
        except csv.Error:
            return 1

    return "," if names(",") > 1 else max(",;\t", key=names)


def _read_parquet(path: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet
    from datasets import Features

    try:
        number, file = 0, pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            what = "is the name of two columns. Give one of them another name"
            yield path, RowError(twice[0], what, fatal=True)
            return
        features = Features.from_arrow_schema(file.schema_arrow)
        for batch in file.iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", typed_row(row, features, json.loads)
    except (pa.ArrowInvalid, OSError) as error:
        yield path, RowError(None, f"can't be read as parquet ({error})", fatal=True)


READERS = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
