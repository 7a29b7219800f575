"""
Columns of a source by our names: a column, a path into one (`answers.text`), or a list of those.

A path goes on from a column with the fields of its objects, and the numbers of items of its lists: `info.post`,
`summaries.0.text`. A field of a list of objects gives a list: `answers.text` is the text of each answer. A column
whose name has the dots itself comes first.
"""

from collections.abc import Collection
from typing import Any

from rlhf_trl.data.messages import without_filled

# One name, or a list of names whose values become one list
Theirs = str | list[str]


def roots_of(theirs: Theirs, found: Collection[str]) -> list[str]:
    """Return the columns, among those that were `found` where it is one, that `theirs` reads from."""
    if isinstance(theirs, list):
        return [root for each in theirs for root in roots_of(each, found)]
    return [theirs if theirs in found else theirs.split(".")[0]]


def shown(theirs: Theirs) -> str:
    """Return the names of columns for a message."""
    return ", ".join(theirs) if isinstance(theirs, list) else theirs


def rename_columns(row: dict, mapping: dict[str, Any], passed_on: Collection[str] = ()) -> dict:
    """
    Return a row by our names of its columns; what a row lacks is missing in it.

    Args:
        row (`dict`): a row by the file's names.
        mapping (`dict`): our names -> the file's, see the head of this module.
        passed_on (`Collection[str]`): columns of objects, of which null fields are removed.
    """
    made = {}
    for ours, theirs in mapping.items():
        found, value = _look_up(row, theirs)
        if found:
            made[ours] = value
    return made | {key: without_filled(made[key]) for key in passed_on if key in made}


def _look_up(row: dict, theirs: Theirs) -> tuple[bool, Any]:
    """Return whether a row has what `theirs` names, and its value."""
    if isinstance(theirs, list):
        each = [_look_up(row, name) for name in theirs]
        return all(found for found, _ in each), [value for _, value in each]
    if theirs in row:
        return True, row[theirs]
    root, *fields = theirs.split(".")
    return _descend(row[root], fields) if fields and root in row else (False, None)


def _descend(value: Any, fields: list[str]) -> tuple[bool, Any]:
    if not fields:
        return True, value
    name, rest = fields[0], fields[1:]
    if isinstance(value, dict):
        return _descend(value[name], rest) if name in value else (False, None)
    if isinstance(value, list) and name.isdigit():
        return _descend(value[int(name)], rest) if int(name) < len(value) else (False, None)
    if isinstance(value, list):
        each = [_descend(item, fields) for item in value]
        return all(found for found, _ in each), [item for _, item in each]
    return False, None
