"""The composed config as plain values, for the checks."""

import re
from collections.abc import Iterator
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException


def plain(cfg: DictConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the resolved config as nested dicts and lists, and the problems of keys without a value."""
    problems: dict[str, str] = {}  # by cause: a value that several keys read is reported once

    def convert(node: Any, path: str) -> Any:
        if isinstance(node, DictConfig):
            return {key: value(node, key, f"{path}.{key}" if path else str(key)) for key in node}
        if isinstance(node, ListConfig):
            return [value(node, i, f"{path}[{i}]") for i in range(len(node))]
        return node

    def value(node: DictConfig | ListConfig, key: Any, path: str) -> Any:
        if OmegaConf.is_missing(node, key):
            problems[path] = f"`{path}` has no value. Set `{path}=...`."
            return None
        try:
            return convert(node[key], path)
        except InterpolationToMissingValueError:
            return None  # the missing value itself is reported
        except OmegaConfBaseException as error:
            cause, problem = _unresolved(path, str(error).splitlines()[0])
            problems.setdefault(cause, problem)
            return None

    return convert(cfg, ""), list(problems.values())


def as_dict(cfg: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """
    Return the config as nested dicts and lists.

    Args:
        resolve (`bool`): whether interpolations are replaced by their values.
    """
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=resolve))


def _unresolved(path: str, message: str) -> tuple[str, str]:
    if match := re.search(r"Environment variable '(.+?)' not found", message):
        name = match.group(1)
        way = f"Set `{path}=...`, or set it permanently: `export {name}=...`."
        return name, f"`{path}` is read from the environment variable `{name}`, which is not set. {way}"
    return (
        message,
        f"`{path}` can't be resolved: {message.rstrip('.')}. Set `{path}=...`, or fix the file it comes from.",
    )


def sources(cfg: DictConfig) -> dict[str, str]:
    """Return the arguments whose value is an interpolation of another key, `${seed}`, and that key."""
    raw = flatten(as_dict(cfg, resolve=False).get("stage", {}).get("args") or {}, "stage.args")
    found = {path: re.fullmatch(r"\$\{(\w[\w.]*)\}", value) for path, value in raw.items() if isinstance(value, str)}
    return {path: match.group(1) for path, match in found.items() if match}


def nodes(values: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield all dicts of the config with their path."""
    if isinstance(values, dict):
        yield path, values
        for key, child in values.items():
            yield from nodes(child, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for i, child in enumerate(values):
            yield from nodes(child, f"{path}[{i}]")


def texts(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield all strings of the config with their path."""
    if isinstance(values, str):
        yield path, values
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, child in items:
        yield from texts(child, f"{path}[{key}]" if isinstance(values, list) else f"{path}.{key}".removeprefix("."))


def at(values: dict[str, Any], path: str) -> Any:
    """Return the value at a dotted path, `None` where there is none."""
    node: Any = values
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def section(values: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the dict at a dotted path, empty where there is none."""
    node = at(values, path)
    return node if isinstance(node, dict) else {}


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return `{"a": {"b": 1}}` as `{"a.b": 1}`; lists and empty dicts are values."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {k: v for key, child in value.items() for k, v in flatten(child, f"{path}.{key}" if path else key).items()}
