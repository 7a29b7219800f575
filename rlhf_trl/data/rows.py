"""Rows as they are read: their places, and what is wrong with malformed ones."""

from collections.abc import Callable
from pathlib import Path


def type_of(value) -> str:
    names = {"dict": "an object", "list": "a list", "str": "text", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, f"a number ({value})" if isinstance(value, (int, float)) else f"{value!r}")


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


SHOWN_PROBLEMS = 5


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


def ending(path: str) -> str:
    """Return the ending of a file's name, without `.gz` and in lower case: `.jsonl`."""
    return Path(path.removesuffix(".gz")).suffix.lower()
