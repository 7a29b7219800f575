"""Types of options, checked against the annotations of the function that takes them."""

import math
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text in quotes", list: "a list"}
TYPE_NAMES |= {dict: "names and values", NoneType: "null"}


def type_problems(function: Callable, given: Mapping[str, Any], prefix: str) -> list[str]:
    """Return the problem of each given argument that isn't of the type which `function` (or a class) declares."""
    hints = get_type_hints(function)
    found = [_mismatch(f"{prefix}.{name}", value, hints[name]) for name, value in given.items()]
    return [problem for problem in found if problem]


def _mismatch(key: str, value, hint: Any) -> str | None:
    options = get_args(hint) if get_origin(hint) not in (list, dict, None) else (hint,)
    for option in options:
        kind = get_origin(option) or option
        if kind is Any or _is(value, kind):
            parts = get_args(option)
            if kind is list and parts:
                items = ((f"{key}[{i}]", item, parts[0]) for i, item in enumerate(value))
            elif kind is dict and parts:
                items = ((f"{key}.{name}", item, parts[1]) for name, item in value.items())
            else:
                return None
            return next(filter(None, (_mismatch(*item) for item in items)), None)
    named = [option for option in options if not (option is int and float in options)]
    wanted = " or ".join(TYPE_NAMES[get_origin(option) or option] for option in named)
    return f"`{key}` is {value!r} and must be {wanted}."


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) and kind is not bool:
        return False
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)
