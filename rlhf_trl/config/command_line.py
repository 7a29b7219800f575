"""Overrides of a command line: text in them, and the quotes that Hydra needs around it. Imports nothing heavy."""

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

# Keys of text, where a value that looks like a number is text; of the first ones all keys below them
TEXT_NODES = {"columns", "models", "policies", "sweeps", "tags"}
TEXT = {
    *("project", "run_name", "run", "policy", "stage.baseline", "stage.gold", "objective", "runs_dir", "run_dir"),
    *("path", "paths", "eval_paths", "output", "name", "split", "eval_split", "revision", "tokenizer", "url"),
    *("chat_template", "system_prompt", "prompt", "template", "pattern", "group", "entity"),
}


def is_text_key(path: str) -> bool:
    """Return whether the value at a dotted path is text (or null), even if it looks like a number."""
    names = path.split(".")
    return bool({names[-1], path} & TEXT or TEXT_NODES & set(names))


def config_dirs() -> list[str]:
    """Return the `--config-dir` of this Hydra app and its value, for the command lines of its steps."""
    from hydra.core.hydra_config import HydraConfig

    sources = HydraConfig.get().runtime.config_sources
    return [part for source in sources if source.provider == "command-line" for part in ("--config-dir", source.path)]


# Characters with a meaning in Hydra's grammar of values, or outside of it
SPECIAL_CHARACTERS = re.compile(r"""[^\w\s.:/@$%|?*+\\-]|[^\x00-\x7f]|[\n*]""")
UNQUOTED: dict[str, str] = {}  # by the override that `quote_text` returned


def quote_text(argv: Sequence[str]) -> list[str]:
    """
    Put quotes around those values of a command line that are text and that Hydra's grammar would read as something
    else or not at all: a run called `2024` or `1_1`, a path with `=`, brackets or non-ASCII letters, a regular
    expression. [`unquote_text`] removes them.
    """
    words = [_quoted(word) for word in argv]
    UNQUOTED.update({word: typed for word, typed in zip(words, argv, strict=True) if word != typed})
    return words


def unquote_text(words: Sequence[str]) -> list[str]:
    """Return overrides as they were before [`quote_text`]."""
    return [UNQUOTED.get(word, word) for word in words]


def _quoted(word: str) -> str:
    key, _, value = word.partition("=")
    names = key.lstrip("+").split("@")[0].split(".")
    is_text = is_text_key(".".join(names))
    override = parse_override(word)
    if word.startswith("-") or not value or (override is not None and not (is_text and _has_numbers(override))):
        return word
    items = re.fullmatch(r"\[([^][{}'\"]+)\]", value) if is_text else None
    if items:
        quoted = f"{key}=[{','.join(_quote(item.strip()) for item in items.group(1).split(','))}]"
    elif value[0] in "[{'\"" or "${" in value:
        return word  # grammar on purpose
    else:
        quoted = f"{key}={_quote(value)}"
    return quoted if parse_override(quoted) is not None else word


def _quote(text: str) -> str:
    # Within quotes a backslash is literal, except before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + "\\'" * bool(found[2]), text) + "'"


def parse_override(word: str) -> Override | None:
    """Return an override as Hydra reads it, `None` for one that it can't read."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _has_numbers(override: Override) -> bool:
    if override.is_delete() or override.is_sweep_override():
        return False
    value = override.value()
    return any(isinstance(item, int | float) for item in (value if isinstance(value, list) else [value]))
