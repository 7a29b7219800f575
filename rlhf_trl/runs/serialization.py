"""Dataclasses that are written to JSON and read back."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class JsonDataclass:
    """
    Base of dataclasses that stand in JSON files under the names of their fields.

    A field's metadata may hold `key`, its key in the file where that isn't its name, and `without`, the name of a
    field: while that one is `None` or an empty mapping this one is not written.
    """

    def to_json(self) -> dict[str, Any]:
        """Return the content of a JSON file. NaN and infinity, which JSON lacks, become `None`."""
        return {
            one.metadata.get("key", one.name): encode(getattr(self, one.name))
            for one in fields(self)
            if "without" not in one.metadata or getattr(self, one.metadata["without"]) not in (None, {})
        }

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """
        Build the object from the content of a JSON file. Keys that are no field are ignored, fields with a default may
        be missing; `None` is NaN where a number must be.

        Raises:
            ValueError: if a key is missing or its value is of another type; the message names the key.
        """
        if not isinstance(content, Mapping):
            raise ValueError("it holds no object")
        hints, given = get_type_hints(cls), {}
        for one in fields(cls):
            key = one.metadata.get("key", one.name)
            if key in content:
                given[one.name] = decode(hints[one.name], content[key], key)
            elif one.default is MISSING and one.default_factory is MISSING:
                raise ValueError(f"it holds no `{key}`")
        return cls(**given)


def encode(value: Any) -> Any:
    """Return a value as JSON has it."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode(kind: Any, value: Any, key: str) -> Any:
    """
    Return a value of JSON as the type `kind` has it.

    Raises:
        ValueError: if the value, which stands at `key`, is of another type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        (only,) = set(arguments) - {NoneType}
        return None if value is None else decode(only, value, key)
    if hasattr(kind, "from_json"):
        return kind.from_json(value)
    if kind is float and value is None:
        return math.nan
    if not isinstance(value, (int, float) if kind is float else origin or kind):
        raise ValueError(f"it holds no `{key}`")
    if origin is dict:
        return {name: decode(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    return [decode(arguments[0], item, key) for item in value] if origin is list else value
