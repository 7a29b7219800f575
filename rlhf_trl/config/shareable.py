"""Commands and configs as others may read them: without secrets and folders of this machine. Imports nothing heavy."""

import re
from typing import Any

# Keys that hold a secret, in YAML or an override; not `eos_token`, nor `api_key_env`, which names a variable
SECRET = re.compile(
    r"""(?P<key>(?:\b|_)(?:api_?key|password|passwd|secret(?:_key)?|(?<!_)token|(?:hub|hf|auth|access|api)_token"""
    r"""|authorization)["']?\s*[:=][^\S\n]*)(?!null\b)(?:"[^"\n]*"|'[^'\n]*'|(?:Bearer )?[^\s,}\]"']+)""",
    re.I,
)
# Tokens that are known by their form, wherever they stand
TOKEN = re.compile(r"\b(?:hf_|sk-|ghp_)[\w-]{16,}")
# Absolute paths of two names or more; no URL, and no end tag
FOLDERS = re.compile(r"(?<![\w.~:/<])/(?:[\w.@+-]+/)+(?=[\w.@+-])")


def hide_secrets(text: str) -> str:
    """Return a command, or a config as YAML, with `HIDDEN` for the values of keys that hold secrets."""
    return TOKEN.sub("HIDDEN", SECRET.sub(r"\g<key>HIDDEN", text))


def without_secrets(values: Any, key: str = "") -> Any:
    """
    Return a config of dicts and lists with `HIDDEN` for the values of keys that hold secrets.

    Args:
        values (`Any`): the config, or a value of it.
        key (`str`): the key of that value.
    """
    if isinstance(values, dict):
        return {name: without_secrets(value, str(name)) for name, value in values.items()}
    if isinstance(values, list):
        return [without_secrets(value, key) for value in values]
    if values is not None and SECRET.match(f"{key}: value"):
        return "HIDDEN"
    return hide_secrets(values) if isinstance(values, str) else values


def shareable(text: str) -> str:
    """Return a text as [`hide_secrets`] does, with absolute paths by their last names, `.../rows.jsonl`."""
    return FOLDERS.sub(".../", hide_secrets(text))
