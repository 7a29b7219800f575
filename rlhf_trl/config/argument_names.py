"""
Names, types and defaults of the arguments of the classes in conf/, without importing them.

Importing TRL takes seconds; a misspelt key is reported in one. `python -m rlhf_trl.config.argument_names` writes
`argument_names.json` from the installed libraries, and a test compares the file with them.
"""

import dataclasses
import enum
import functools
import importlib
import inspect
import json
import types
import typing
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("argument_names.json")

BASE = "transformers.TrainingArguments"
CLASSES = (
    BASE,
    "trl.SFTConfig",
    "trl.RewardConfig",
    "trl.DPOConfig",
    "trl.experimental.orpo.ORPOConfig",
    "trl.KTOConfig",
    "trl.RLOOConfig",
    "trl.GRPOConfig",
    "rlhf_trl.trainers.modpo.MODPOConfig",
    "rlhf_trl.trainers.online_dpo.OnlineDPOConfig",
    "rlhf_trl.ppo.PPOConfig",
    "rlhf_trl.reward_modeling.RewardConfig",
    "peft.LoraConfig",
    "transformers.BitsAndBytesConfig",
)


@functools.cache
def arguments(target: str) -> dict[str, tuple[str, Any]] | None:
    """
    Return the arguments of a class, as `{name: (type, default)}`, or `None` for a class that isn't in the file.

    The type is `"int"`, `"float"`, `"bool"`, `"str"`, or the accepted strings as `"steps|epoch|no"`, followed by `?`
    where `None` is accepted; it is empty where nothing is checked. A default that JSON can't hold is `None`.
    """
    classes = _read()
    if target not in classes:
        return None
    entry = dict(classes[target])
    inherited = (arguments(entry.pop("_extends_")) if "_extends_" in entry else None) or {}
    return {**inherited, **{name: tuple(argument) for name, argument in entry.items()}}


@functools.cache
def _read() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def installed() -> dict[str, dict[str, Any]]:
    """Return the content of the file for the installed libraries. Imports them all."""
    inspected = {target: _arguments_of(_locate(target)) for target in CLASSES}
    base = inspected[BASE]
    classes: dict[str, dict[str, Any]] = {BASE: base}
    for target, names in inspected.items():
        if base.keys() <= names.keys() and target != BASE:
            own = {name: argument for name, argument in names.items() if base.get(name) != argument}
            classes[target] = {"_extends_": BASE, **own}
        else:
            classes[target] = names
    return classes


def _locate(target: str) -> type:
    module, name = target.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def _arguments_of(cls: type) -> dict[str, list[Any]]:
    hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # without self
    return {
        p.name: [_type_name(hints.get(p.name, p.annotation)), _plain(p.default)]
        for p in parameters
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _type_name(hint: Any) -> str:
    members = set(typing.get_args(hint)) if typing.get_origin(hint) in (types.UnionType, typing.Union) else {hint}
    optional = "?" if type(None) in members else ""
    members.discard(type(None))
    enums: list[type[enum.Enum]] = [m for m in members if isinstance(m, type) and issubclass(m, enum.Enum)]
    if enums and members <= {*enums, str}:
        return "|".join(sorted(member.value for cls in enums for member in cls)) + optional
    if len(members) == 1 and (member := members.pop()) in (int, float, bool, str):
        return member.__name__ + optional
    return ""


def _plain(default: Any) -> Any:
    if isinstance(default, enum.Enum):
        return default.value
    return default if isinstance(default, int | float | bool | str) else None


def write() -> None:
    """Write the file, one argument per line."""
    blocks = []
    for target, names in installed().items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(argument)}" for name, argument in names.items())
        blocks.append(f"  {json.dumps(target)}: {{\n{lines}\n  }}")
    FILE.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
