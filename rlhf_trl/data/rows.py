"""Rows as they are read: their places, and what is wrong with malformed ones."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

SHOWN_PROBLEMS = 5


class RowError(Exception):
    """
    Error of one row: the field, and a sentence about it.

    Args:
        field (`str`, *optional*): the field, or `None` for the row as a whole.
        what (`str`): a sentence about it, without its subject.
        fatal (`bool`): whether the rest of the file can't be read: dropping the row would lose rows uncounted.
    """

    def __init__(self, field: str | None, what: str, fatal: bool = False):
        super().__init__(what)
        self.field, self.what, self.fatal = field, what, fatal


# Place of a row ("pairs.jsonl, line 3"), and its columns or what kept it from being read
Row = tuple[str, dict | RowError]
# Name of a source, and its rows
Source = tuple[str, Iterable[Row]]


class Problems:
    """Malformed rows of all sources of one dataset: the first few as text, and their number."""

    def __init__(self):
        self.count, self.first, self.fatal = 0, [], False

    def add(self, place: str, error: RowError, column: str | None = None) -> None:
        """Note a malformed row at `place`; `column` is the field's name in the file, if that is another one."""
        self.count += 1
        self.fatal |= error.fatal
        if len(self.first) < SHOWN_PROBLEMS:
            field = column or error.field
            self.first.append(f"{place}: `{field}` {error.what}" if field else f"{place} {error.what}")

    def text(self) -> str:
        """Return the problems, one per line."""
        more = [f"  ... and {self.count - len(self.first):,} more"] if self.count > len(self.first) else []
        return "\n".join([f"  {line}" for line in self.first] + more)


class Struct(dict):
    """
    Object of a source with typed columns (parquet, a dataset), which holds null for every field that it lacks and
    other rows have.
    """


def typed_row(row: dict, features: Mapping, decode: Callable = lambda value: value) -> Struct:
    """
    Return a row with a [`Struct`] for each object that has typed fields.

    Args:
        row (`dict`): columns and values.
        features (`Mapping`): type of each column, as `datasets.Features`.
        decode (`Callable`): parses the values of columns of JSON.
    """
    return Struct({name: _typed(value, features[name], decode) for name, value in row.items()})


def _typed(value, feature, decode: Callable):
    if value is None:
        return None
    if isinstance(feature, dict):
        return typed_row(value, feature, decode)
    if type(feature).__name__ in ("Json", "ExactJson"):
        return decode(value)
    if hasattr(feature, "feature") and isinstance(value, list):
        return [_typed(item, feature.feature, decode) for item in value]
    return value


def type_of(value) -> str:
    """Return what a value is, for messages."""
    names = {"dict": "an object", "list": "a list", "str": "text", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, f"a number ({value})" if isinstance(value, (int, float)) else f"{value!r}")


def ending(path: str) -> str:
    """Return the ending of a file's name, without `.gz` and in lower case: `.jsonl`."""
    return Path(path.removesuffix(".gz")).suffix.lower()
