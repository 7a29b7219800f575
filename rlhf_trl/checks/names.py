"""Dot paths and arguments that don't exist, and values of the wrong type."""

from collections.abc import Iterator
from typing import Any

from rlhf_trl.checks.renamed import dot_path_problem, renamed_key, renamed_problem
from rlhf_trl.config import dotpaths
from rlhf_trl.config.argument_names import arguments
from rlhf_trl.config.command_line import is_text_key
from rlhf_trl.config.values import at, flatten, nodes, section
from rlhf_trl.hints import did_you_mean

SECTIONS = (
    *("stage", "stage.args", "model", "model.init_kwargs", "data", "adapter", "adapter.peft", "adapter.quantization"),
    *("callbacks", "reward", "reward_norm", "combine", "critic", "kl", "judge", "select", "labeler", "health"),
    "health.signs",
)
TYPES = {"int": int, "float": int | float, "bool": bool, "str": str}
TYPE_NAMES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string"}


def text_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of text in a file that YAML reads as a number or a boolean; the command line keeps it."""
    return [
        f'`{path}` is {value!r}, which YAML doesn\'t read as text. Put it in quotes: `{path.split(".")[-1]}: "..."`.'
        for path, value in flatten(values).items()
        if isinstance(value, int | float) and is_text_key(path)
    ]


def section_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of sections that were replaced by a value, as by `stage.args=3`."""
    wrong = [path for path in SECTIONS if not isinstance(at(values, path), dict | None)]
    return [f"`{path}` is {at(values, path)!r} and must hold keys. Set `{path}.KEY=...`." for path in wrong]


def dot_paths(values: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield path, key and node of all keys that hold a dot path. In other nodes `function` may be a reward's name."""
    for path, node in nodes(values):
        found = [key for key in ("_target_", "function") if "_target_" in node and key in node]
        yield from ((path, key, node) for key in found)
    if "privacy" in (stage := section(values, "stage")):
        yield "stage", "privacy", stage


def target_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of all `_target_` and `function`."""
    callbacks = section(values, "callbacks")
    problems = [
        f"`callbacks.{name}` has no `_target_`. Set `+callbacks.{name}._target_=my_module.MyCallback`."
        for name, node in callbacks.items()
        if not isinstance(node, dict) or "_target_" not in node
    ]
    for path, key, node in dot_paths(values):
        if "_target_" in node and isinstance(node[key], int | float):
            problems.append(f"`{path}.{key}` is {node[key]!r} and must be a dot path such as `my_module.my_name`.")
        if isinstance(node[key], str) and (problem := dot_path_problem(node[key]) or dotpaths.problem(node[key])):
            problems.append(f"`{path}.{key}`: {problem}")
    return problems


def argument_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of all nodes whose class is in `argument_names.json`."""
    problems = []
    for path, node in nodes(values):
        known = (arguments(node["_target_"]) if isinstance(node.get("_target_"), str) else None) or {}
        for key, value in node.items() if known else ():
            if key in known:
                problems += type_problem(f"{path}.{key}", value, known[key][0])
            elif not key.startswith("_"):
                problems.append(unknown_argument(path, key, node, known))
    return problems


def unknown_argument(path: str, key: str, node: dict[str, Any], known: Any) -> str:
    """Return the problem of a key that the node's target doesn't take."""
    if names := renamed_key(f"{path}.{key}"):
        return renamed_problem(*names)
    hint = did_you_mean(key, known)
    return f"`{path}.{key}` is no argument of `{node['_target_']}`. {hint or 'Remove it.'}"


def type_problem(path: str, value: Any, expected: str) -> list[str]:
    """Return the problem of a value of another type than `expected`, see [`arguments`], or none."""
    kind = expected.removesuffix("?")
    if not kind or value is None:
        return []
    if "|" in kind:
        return _choice_problem(path, value, kind.split("|"))
    if isinstance(value, TYPES[kind]) and (kind == "bool" or not isinstance(value, bool)):
        return []
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return [f"`{path}` is {value!r} and must be an integer. Set `{path}={int(value)}`."]
    way = {"bool": f"`{path}=true` or `{path}=false`", "str": f"`'{path}=\"{value}\"'`"}
    return [
        f"`{path}` is {value!r} and must be {TYPE_NAMES[kind]}. Set "
        f"{way.get(kind, f'`{path}=...` with such a value')}."
    ]


def _choice_problem(path: str, value: Any, choices: list[str]) -> list[str]:
    if value in choices:
        return []
    if value is False and "no" in choices:
        return [f"`{path}` is false, which is how YAML reads a bare no. Set `'{path}=\"no\"'`, with both quotes."]
    return [f"`{path}` is {value!r}. {did_you_mean(str(value), choices) or 'Use one of: ' + ', '.join(choices)}"]
