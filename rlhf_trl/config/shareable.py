"""Commands and configs as others may read them: without secrets and folders of this machine. Imports nothing heavy."""

import re

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


def shareable(text: str) -> str:
    """
    Return a command, or a config as YAML, with `HIDDEN` for the values of keys that hold secrets, and with absolute
    paths by their last names, `.../rows.jsonl`.
    """
    text = SECRET.sub(r"\g<key>HIDDEN", text)
    return FOLDERS.sub(".../", TOKEN.sub("HIDDEN", text))
