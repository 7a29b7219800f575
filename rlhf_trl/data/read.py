"""
Rows of local files, one at a time, each with its place (file and line), so that a bad one can be named.

Light on purpose: `resolve_paths` is called by the checks before anything heavy is imported.
"""

import csv
import glob
import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf_trl.errors import DataError


class RowError(Exception):
    """
    What is wrong with one row: the field (or `None` for the row as a whole) and one sentence about it.

    `fatal` where it keeps the rest of the file from being read: leaving the row out would lose rows uncounted.
    """

    def __init__(self, field: str | None, what: str, fatal: bool = False):
        super().__init__(what)
        self.field, self.what, self.fatal = field, what, fatal


class Struct(dict):
    """
    An object of a file with typed columns (parquet, a dataset), which holds null for every field that other rows have
    and it doesn't.
    """


# A row as it is read: where it stands ("pairs.jsonl, line 3"), and its columns or what kept it from being read.
Row = tuple[str, dict | RowError]


def resolve_paths(paths: str | list[str], key: str = "data.paths") -> list[str]:
    """
    The files that `paths` (files and globs, relative to where the user stands) name, each once.

    Raises a `DataError` that lists every path that names no file, or names one in a format that can't be read.
    """
    files, problems = [], []
    for path in [paths] if isinstance(paths, str) else paths:
        matches = sorted(glob.glob(str(Path(path).expanduser()), recursive=True))
        folders = [match for match in matches if Path(match).is_dir()]
        if not matches:
            problems.append(f"`{key}`: `{path}` names no file, seen from {Path.cwd()}. Type `{key}=[FILE,...]`.")
        elif folders:
            problems.append(f"`{key}`: `{folders[0]}` is a folder. Name its files: `{key}='{folders[0]}/*.jsonl'`.")
        problems += [
            f"`{key}`: `{match}` has an ending that isn't known. Give it one of {', '.join(READERS)}."
            for match in matches
            if match not in folders and _ending(match) not in READERS
        ]
        files += [match for match in matches if match not in files]
    if not files and not problems:
        problems.append(f"`{key}` is empty. Type `{key}=[FILE,...]`.")
    if problems:
        raise DataError.join(problems)
    return files


def read_file(path: str) -> Iterator[Row]:
    """Rows of a .jsonl, .json, .csv or .parquet file (the first three also as .gz), streamed where possible."""
    return READERS[_ending(path)](path)


def _ending(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix.lower()


def _open(path: str):
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _read_json_lines(path: str) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():  # a blank line is no row
                continue
            yield f"{path}, line {number}", _parse_line(line)


def _parse_line(line: bytes) -> dict | RowError:
    try:
        row = json.loads(
            line.decode("utf-8-sig").rstrip()
        )  # -sig: Windows editors put a byte order mark before the first line
    except UnicodeDecodeError as error:
        return RowError(None, f"isn't UTF-8 text (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        return RowError(None, f"isn't valid JSON ({error.msg}, column {error.colno})")
    return row if isinstance(row, dict) else RowError(None, f"is a JSON {type(row).__name__}, not an object")


def _read_json(path: str) -> Iterator[Row]:
    with _open(path) as file:
        content = file.read()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):  # .json files that hold JSON lines are common
        yield from _read_json_lines(path)
        return
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        what = f"isn't valid JSON ({error.msg}, column {error.colno})"
        yield f"{path}, line {error.lineno}", RowError(None, what, fatal=True)
        return
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        yield f"{path}, line {line}", RowError(None, "isn't UTF-8 text", fatal=True)
        return
    for number, row in enumerate(rows, 1):
        is_object = isinstance(row, dict)
        yield (
            f"{path}, row {number}",
            row if is_object else RowError(None, f"is a JSON {type(row).__name__}, not an object"),
        )


def _read_csv(path: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long answer
    with _open(path) as file:
        lines = (line.decode("utf-8-sig") for line in file)
        reader = csv.reader(lines, strict=True)
        header, line = None, 1
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                # What follows can't be told from the broken row, so reading ends here.
                yield f"{path}, line {line}", RowError(None, f"can't be read as CSV ({error})", fatal=True)
                return
            # A quoted value may span lines: a row's place is its first line.
            place, line = f"{path}, line {line}", reader.line_num + 1
            if not values:
                continue
            if header is None:
                header = values
            elif len(values) != len(header):
                yield place, RowError(None, f"has {len(values)} values where the header names {len(header)} columns")
            else:
                yield place, dict(zip(header, values, strict=True))


def _read_parquet(path: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet
    from datasets import Features

    try:
        number, file = 0, pyarrow.parquet.ParquetFile(path)
        features = Features.from_arrow_schema(file.schema_arrow)
        for batch in file.iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", typed_row(row, features, json.loads)
    except (pa.ArrowInvalid, OSError) as error:
        yield path, RowError(None, f"can't be read as parquet ({error})", fatal=True)


def typed_row(row: dict, features: dict, decode: Callable = lambda value: value) -> Struct:
    """`row` with a [`Struct`] for each object whose type in `features` has fields; `decode` reads columns of JSON."""
    return Struct({name: _typed(value, features[name], decode) for name, value in row.items()})


def _typed(value, feature, decode: Callable):
    if value is None:
        return None
    if isinstance(feature, dict):
        return typed_row(value, feature, decode)
    if type(feature).__name__ == "Json":
        return decode(value)
    if hasattr(feature, "feature") and isinstance(value, list):
        return [_typed(item, feature.feature, decode) for item in value]
    return value


READERS = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
