"""The keys of the files in conf/ with comments, types and defaults, for the reference pages and the JSON schema."""

import dataclasses
import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_trl.checks.ranges import RULES, RUN
from rlhf_trl.config.argument_names import CLASSES, arguments
from rlhf_trl.config.groups import is_helper
from tests.helpers.configs import CONF

# Of Hydra's `instantiate`, the same in each node
HYDRA_KEYS = {"_partial_", "_convert_"}
MISSING = "???"


@dataclass(frozen=True)
class Key:
    """
    A key of a config file.

    Args:
        path (`str`): as it is typed on the command line.
        value (`Any`): what the file sets.
        text (`str`): the same as the file has it.
        help (`str`): the comment above the key.
        target (`str`, *optional*): `_target_` of the node that has the key.
    """

    path: str
    value: Any
    text: str
    help: str
    target: str | None

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


# ---- Files ----


def files_of(file: Path) -> list[Path]:
    """Return a file and the files of its folder that it is based on, those first."""
    based = []
    for entry in (yaml.safe_load(file.read_text()) or {}).get("defaults", []):
        if isinstance(entry, str) and entry != "_self_" and not entry.startswith(("/", "override")):
            base = file.parent / f"{entry}.yaml"
            based += files_of(base) if base.is_file() else []
    return [*based, file]


def package_of(file: Path) -> str:
    """Return the path in the config that the keys of a file have."""
    if file.parent == CONF or file.read_text(encoding="utf-8").startswith("# @package _global_"):
        return ""
    return ".".join(name for name in file.relative_to(CONF).parent.parts if not is_helper([name]))


def groups_of(file: Path) -> dict[str, str]:
    """Return the groups that a file and its bases choose options of, with those options."""
    found: dict[str, str] = {}
    for each in files_of(file):
        for entry in (yaml.safe_load(each.read_text()) or {}).get("defaults", []):
            if isinstance(entry, dict):
                ((group, option),) = entry.items()
                if str(group).startswith("optional "):
                    continue  # a helper file
                found[str(group).removeprefix("override ").removeprefix("/")] = str(option)
    return found


def brought_files(file: Path) -> list[Path]:
    """Return the files with the values that an option of a group brings to the stages, by `optional _x: ${stage}`."""
    found = []
    for entry in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("defaults", []):
        for group, option in entry.items() if isinstance(entry, dict) else ():
            if option == "${stage}":
                folder = file.parent / group.removeprefix("optional ").partition("@")[0]
                found += [each for each in sorted(folder.glob("*.yaml")) if not is_helper([each.name])]
    return found


def keys_of(file: Path) -> list[Key]:
    """Return the keys of a file and of its bases. A key of both is the file's, with either's comment."""
    found: dict[str, Key] = {}
    for each in files_of(file):
        for key in own_keys(each):
            if key.path in found and not key.help:
                key = dataclasses.replace(key, help=found[key.path].help)
            found[key.path] = key
    # a base leaves the class of its arguments to the files on it
    targets = {key.path.removesuffix("._target_"): key.value for key in found.values() if key.name == "_target_"}
    return [dataclasses.replace(key, target=targets.get(key.path.rpartition(".")[0])) for key in found.values()]


def own_keys(file: Path) -> list[Key]:
    text = file.read_text(encoding="utf-8")
    root, lines = yaml.compose(text), text.splitlines()
    if not isinstance(root, yaml.MappingNode):
        return []
    root.value = [(name, value) for name, value in root.value if name.value not in ("defaults", "hydra")]
    return list(_keys(root, package_of(file), text, lines))


def _keys(node: yaml.MappingNode, path: str, text: str, lines: list[str]) -> Iterator[Key]:
    names = {name.value: value for name, value in node.value}
    target = getattr(names.get("_target_"), "value", None)
    for name, value in node.value:
        if name.value in HYDRA_KEYS:
            continue
        place = f"{path}.{name.value}".removeprefix(".")
        note = _comment(lines, name.start_mark.line) if not node.flow_style else ""
        inner = [each.value for each, _ in value.value] if isinstance(value, yaml.MappingNode) else []
        if inner and (not value.flow_style or "_target_" in inner):
            if note:
                yield Key(place, None, "", note, target)
            yield from _keys(value, place, text, lines)
        else:
            raw = text[value.start_mark.index : value.end_mark.index].strip()
            if isinstance(value, yaml.SequenceNode) and not value.flow_style:
                raw = f"[{', '.join(re.findall(r'(?m)^ *- (.*)$', raw))}]"
            yield Key(place, yaml.safe_load(yaml.serialize(value)), raw, note, target)


def _comment(lines: list[str], line: int) -> str:
    """Return the comment above a line, as one paragraph; that at the top of the file is the file's."""
    found = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        found.insert(0, lines[line].lstrip().removeprefix("#").strip())
    return "" if line == 0 else " ".join(found)


# ---- Types ----


def rule_of(key: Key) -> str:
    """Return the range or type of a key, as `rlhf_trl.config.ranges` writes it; empty where nothing is checked."""
    declared = (arguments(key.target) or {}).get(key.name, ("", None))[0] if key.target else ""
    return RULES.get(key.target or "", {}).get(key.name) or RUN.get(key.path) or declared


def type_of(key: Key) -> str:
    """Return the type of a key for readers: its rule, its annotation, or the type of its value."""
    if rule := rule_of(key):
        return shown_rule(rule)
    if hint := hints(key.target).get(key.name) if key.target else None:
        return shown_hint(hint)
    return {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "dict"}.get(type(key.value), "")


def shown_rule(rule: str) -> str:
    optional, rule = rule.endswith("?"), rule.removesuffix("?")
    rule = {"text": "str", "numbers": "list of numbers"}.get(rule, rule)
    if "|" in rule:
        rule = ", ".join(f"`{choice}`" for choice in rule.split("|"))
    return rule + (" or null" if optional else "")


def shown_hint(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = [shown_hint(each) for each in typing.get_args(hint) if each is not type(None)]
        return " or ".join(dict.fromkeys([*members, *(["null"] if type(None) in typing.get_args(hint) else [])]))
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if origin is not None and getattr(origin, "__module__", "") != "builtins":
        return getattr(origin, "__name__", str(origin))
    return re.sub(r"\b[\w.]+\.(\w+)", r"\1", str(hint)) if origin else getattr(hint, "__name__", "")


@functools.cache
def hints(target: str) -> dict[str, Any]:
    """Return the annotations of what a `_target_` is called with."""
    found = located(target)
    called = found.__init__ if isinstance(found, type) else found
    try:
        known = typing.get_type_hints(found if dataclasses.is_dataclass(found) else called)
    except (NameError, TypeError):
        return {}
    return {name: known[name] for name in inspect.signature(called).parameters if name in known}


@functools.cache
def located(target: str) -> Any:
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:  # a method of a class
        return getattr(located(module), name)


def class_default(target: str | None, name: str) -> str:
    """Return the default of an argument of a dataclass, as YAML; empty where the class is none or requires a value."""
    if target not in CLASSES or not dataclasses.is_dataclass(located(target)):
        return ""
    field = {field.name: field for field in dataclasses.fields(located(target))}.get(name)
    if field is None or (field.default is field.default_factory is dataclasses.MISSING):
        return ""
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return as_yaml(getattr(default, "value", default))


def field_help(target: str | None, name: str) -> str:
    """Return what a dataclass says of one of its arguments."""
    found = located(target) if target else None
    fields = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
    return next((each.metadata.get("help", "") for each in fields if each.name == name), "")


def as_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return yaml.safe_dump(value, width=1000).removesuffix("\n...\n").strip()
    if isinstance(value, list | tuple | set | dict):
        return yaml.safe_dump(value if isinstance(value, dict) else list(value), default_flow_style=True).strip()
    return str(value)
