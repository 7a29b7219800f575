"""The reference pages and the JSON schema: true of conf/ and of the installed dataclasses."""

import json

import pytest

from tests.helpers import config_keys, reference
from tests.helpers.config_schema import SCHEMA, rule_schema, schema
from tests.helpers.configs import CONF, GROUPS

STALE = "Write the reference again: `python -m tests.helpers.reference`."


def test_the_pages_are_those_of_the_config():
    written = {path.name: path.read_text(encoding="utf-8") for path in reference.FOLDER.iterdir()}
    assert written == reference.pages(), STALE


def test_the_schema_is_that_of_the_config():
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == schema(), STALE


def test_a_key_has_its_comment_type_and_defaults(tmp_path):
    lines = reference.stage_page("ppo").splitlines()
    assert "| `vf_coef` | `0.1` | `0.1` | [0, inf) | Weight of the value loss |" in lines
    assert [line for line in lines if line.startswith("| `loss_type` |")] == [
        f"| `loss_type` | {reference.REFUSED['loss_type'][1]} |"
    ]


def test_a_file_has_the_keys_of_its_base():
    keys = {key.path: key for key in config_keys.keys_of(CONF / "stage" / "ppo.yaml")}
    assert keys["stage.args.beta"].help.startswith("KL coefficient")
    assert keys["stage.args.beta"].target == "rlhf_trl.ppo.PPOConfig"
    assert keys["stage.starts_from"].value == "sft" and "stage.args.max_length" not in keys


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("int [1, inf)?", [{"type": "integer", "minimum": 1}, {"type": "null"}]),
        ("(0, 1]", [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}]),
        ("int -1 or [1, inf)", [{"type": "integer", "minimum": 1}, {"const": -1}]),
        ("bool", [{"type": "boolean"}]),
    ],
)
def test_a_rule_is_a_schema(rule, expected):
    assert rule_schema(rule) == expected


def test_the_config_tree_of_the_documentation_has_every_option():
    text = (CONF.parent / "docs" / "runs.md").read_text(encoding="utf-8")
    tree = text.split("## The config tree\n```\n")[1].split("```")[0]
    listed = {line.split()[0].removeprefix("conf/").strip("/"): set(line.split()[1:]) for line in tree.splitlines()}
    shown = {group: options for group, options in GROUPS.items() if group in listed and group != "experiment"}
    assert {"stage", "reward", "data/feedback"} <= set(shown)
    assert {group: missing for group, options in shown.items() if (missing := options - listed[group])} == {}
