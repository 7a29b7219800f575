"""conf/schema.json: a JSON schema (draft 7) of the composed config of `train.py` and of experiments, for editors."""

from typing import Any

from rlhf_trl.config.argument_names import arguments
from rlhf_trl.config.ranges import INTERVAL
from tests.helpers.config_keys import MISSING, Key, field_help, keys_of, rule_of
from tests.helpers.configs import CONF, GROUPS, STAGES

SCHEMA = CONF / "schema.json"
# Groups that `train.py` doesn't have, or whose options are lists of overrides
FOREIGN = ("pipeline", "sweep", "experiment", "debug")
# `${...}`, or a value that is still to be given
OPEN = {"type": "string", "pattern": r"^\?\?\?$|\$\{"}


def schema() -> dict[str, Any]:
    """Return the schema."""
    root = node()
    for key in keys_of(CONF / "train.yaml"):
        add(root, key)
    # A stage says the types of its arguments, which other options set as well
    groups = sorted((group for group in GROUPS if group not in FOREIGN), key=lambda group: group != "stage")
    for group in groups:
        for option in sorted(GROUPS[group]):
            for key in keys_of(CONF / group / f"{option}.yaml"):
                # An adapter's reference to its learning rate says nothing of what the stage's key takes
                if group == "stage" or not (key.path.startswith("stage.") and "${" in key.text):
                    add(root, key)
    top = root["properties"]
    close(root)
    stage = top["stage"]
    stage["properties"]["args"] = arguments_schema(stage["properties"]["args"])
    # several rewards of one kind have names of their own
    top["reward"]["additionalProperties"] = {"type": ["object", "null"]}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "rlhf_trl: the composed config of train.py, and experiments",
        "definitions": {"open": OPEN},
        **root,
        "properties": {
            "defaults": defaults_schema(groups),
            **top,
            "ptx_data": {"$ref": "#/properties/data"},
            "dry_run": {"type": "boolean"},
            "time_steps": {"type": "boolean"},
            "callbacks": {"type": "object"},
            "hydra": {"type": "object"},
        },
    }


def node() -> dict[str, Any]:
    return {"type": "object", "properties": {}}


def add(root: dict[str, Any], key: Key) -> None:
    """Add a key, in the place of its path. What options of a group say differently is allowed either way."""
    *parents, name = key.path.split(".")
    for parent in parents:
        below = root["properties"].setdefault(parent, node())
        if "properties" not in below:  # null in another option of the group
            below.update(node() | {"type": ["object", "null"]})
            below.pop("anyOf", None)
        root = below
    own = value_schema(key)
    known = root["properties"].setdefault(name, own)
    if "properties" in known:
        if key.help and not known.get("description"):
            known["description"] = key.help
        if key.text and key.value is None:
            known["type"] = ["object", "null"]
        return
    if known is not own and not (isinstance(key.value, str) and "${" in key.value):
        types = [each for each in own.get("anyOf", []) if each not in known.get("anyOf", [])]
        if "anyOf" in known and "anyOf" in own:
            known["anyOf"] += types
        else:
            known.pop("anyOf", None)
        if known.get("default", key.value) != key.value:
            known.pop("default", None)
        if own.get("description") and known.setdefault("description", own["description"]) != own["description"]:
            del known["description"]


def value_schema(key: Key) -> dict[str, Any]:
    """Return the schema of a value."""
    found: dict[str, Any] = {"description": key.help} if key.help else {}
    if key.text == "":
        return {**node(), **found}
    if key.value != MISSING and not (isinstance(key.value, str) and "${" in key.value):
        found["default"] = key.value
    if key.name == "_target_":
        return {"type": "string"}
    allowed = rule_schema(rule_of(key)) if rule_of(key) else by_value(key.value)
    return {**found, "anyOf": [*allowed, {"$ref": "#/definitions/open"}]} if allowed else found


def by_value(value: Any) -> list[dict[str, Any]]:
    """Return the types that a key without a rule takes, by its value: a flag stays one, all else is free."""
    return [{"type": "boolean"}] if isinstance(value, bool) else []


def rule_schema(rule: str) -> list[dict[str, Any]]:
    """Return the alternatives of a rule in the notation of `rlhf_trl.config.ranges`, or of a type."""
    null = [{"type": "null"}] if rule.endswith("?") else []
    rule = rule.removesuffix("?")
    if rule == "numbers":
        return [{"type": "array", "items": {"type": "number"}}, *null]
    if interval := INTERVAL.fullmatch(rule):
        whole, unset, opens, low, high, closes = interval.groups()
        bounds: dict[str, Any] = {"type": "integer" if whole else "number"}
        if low != "-inf":
            bounds["minimum" if opens == "[" else "exclusiveMinimum"] = number(low)
        if high != "inf":
            bounds["maximum" if closes == "]" else "exclusiveMaximum"] = number(high)
        return [bounds, *([{"const": -1}] if unset else []), *null]
    kinds = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "text": "string"}
    if rule in kinds:
        return [{"type": kinds[rule]}, *null]
    choices = {"enum": [{"true": True, "false": False}.get(choice, choice) for choice in rule.split("|")]}
    return [choices, {"type": "array", "items": choices}, *null]  # `loss_type: [sigmoid, sft]`


def number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def arguments_schema(listed: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of `stage.args`: the fields of all dataclasses. Those of a user's own class are free."""
    targets = {}
    for stage in STAGES:
        for key in keys_of(CONF / "stage" / f"{stage}.yaml"):
            if key.path == "stage.args._target_":
                targets[stage] = key.value
    properties = dict(listed["properties"])
    for target in targets.values():
        for name, (_, default) in (arguments(target) or {}).items():
            key = Key(f"stage.args.{name}", default, "null", field_help(target, name), target)
            if name not in properties:
                properties[name] = value_schema(key)
                properties[name].pop("default", None)
            properties[name].setdefault("description", field_help(target, name))
    known = {"enum": sorted(set(targets.values()))}
    return {
        "type": "object",
        "properties": dict(sorted(properties.items())),
        "if": {"properties": {"_target_": known}},
        "then": {"propertyNames": {"enum": sorted([*properties, "_convert_"])}},
    }


def defaults_schema(groups: list[str]) -> dict[str, Any]:
    """Return the schema of an experiment's defaults: options of the groups by name, or others."""
    choices = {}
    for group in sorted([*groups, "experiment", "debug"]):
        one = {"anyOf": [{"enum": sorted(GROUPS[group])}, {"type": ["string", "null"]}]}
        choices[f"override /{group}"] = {"anyOf": [one, {"type": "array", "items": one}]}
    return {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object", "properties": choices}]}}


def close(root: dict[str, Any]) -> None:
    """Refuse unknown keys, except beside or below a `_target_`, which may be a user's own class."""
    if "_target_" in root["properties"]:
        return
    root["additionalProperties"] = False
    for child in root["properties"].values():
        if child.get("properties"):
            close(child)
