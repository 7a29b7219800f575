"""Commands and configs without secrets and folders of this machine."""

import pytest
import yaml

from rlhf_trl.config.shareable import hide_secrets, shareable, without_secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.py +reward.f.api_key=abc stage=ppo", "train.py +reward.f.api_key=HIDDEN stage=ppo"),
        ("'+reward.f={openai_api_key: ab}' x=1", "'+reward.f={openai_api_key: HIDDEN}' x=1"),
        ("password: 'a b'\ntoken: x\nnext: 1", "password: HIDDEN\ntoken: HIDDEN\nnext: 1"),
        ("headers: {Authorization: Bearer abc}", "headers: {Authorization: HIDDEN}"),
        ("hub_token: null\neos_token: </s>\napi_key_env: NAME", "hub_token: null\neos_token: </s>\napi_key_env: NAME"),
        ("mine=hf_" + "a" * 30, "mine=HIDDEN"),
        ("/home/me/venv/bin/python train.py data.paths=[/a/b/c.jsonl,d/e.jsonl]", None),
        ("pattern: <think>.*</think><answer>.*</answer>", "pattern: <think>.*</think><answer>.*</answer>"),
        ("url: http://host:8000/v1/chat\npath: owner/name", "url: http://host:8000/v1/chat\npath: owner/name"),
    ],
)
def test_a_shared_text_has_no_secrets_and_no_folders(text, expected):
    if expected is None:
        expected = ".../python train.py data.paths=[.../c.jsonl,d/e.jsonl]"
    assert shareable(text) == expected


def test_a_shared_config_is_still_a_config():
    config = {"reward": {"mine": {"api_key": "a: b", "weight": 1.0}}, "data": {"paths": ["/home/me/rows.jsonl"]}}
    assert yaml.safe_load(shareable(yaml.safe_dump(config))) == {
        "reward": {"mine": {"api_key": "HIDDEN", "weight": 1.0}},
        "data": {"paths": [".../rows.jsonl"]},
    }


def test_values_of_a_config_have_no_secrets():
    config = {"a": [{"password": 1234, "weight": 1.0}], "hub_token": None, "text": "use hf_" + "a" * 30, "n": 2}
    assert without_secrets(config) == {
        "a": [{"password": "HIDDEN", "weight": 1.0}],
        "hub_token": None,
        "text": "use HIDDEN",
        "n": 2,
    }
    assert hide_secrets("api_key=a data.paths=/a/b.jsonl") == "api_key=HIDDEN data.paths=/a/b.jsonl"
