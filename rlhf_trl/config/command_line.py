"""The words of a command line as Hydra reads them, and as the user typed them. Imports nothing heavy."""

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

# Keys of text, where what looks like a number is meant as it was typed; all below the first ones
TEXT_NODES = {"columns", "policies", "sweeps", "tags"}
TEXT = {
    *("project", "run_name", "run", "policy", "stage.baseline", "stage.gold", "objective", "runs_dir", "run_dir"),
    *("path", "paths", "eval_paths", "output", "name", "split", "eval_split", "revision", "tokenizer", "url"),
    *("chat_template", "system_prompt", "prompt", "template", "pattern", "group", "entity"),
}


def is_text_key(path: str) -> bool:
    """Whether the value at a dotted path is text (or null), whatever it looks like."""
    names = path.split(".")
    return bool({names[-1], path} & TEXT or TEXT_NODES & set(names))


def config_dirs() -> list[str]:
    """`--config-dir` as it was given to this Hydra app, for the command lines of its steps."""
    from hydra.core.hydra_config import HydraConfig

    sources = HydraConfig.get().runtime.config_sources
    return [part for source in sources if source.provider == "command-line" for part in ("--config-dir", source.path)]


# Signs that have a meaning of their own in a value, or none
SIGNS = re.compile(r"""[^\w\s.:/@$%|?*+\\-]|[^\x00-\x7f]|[\n*]""")
TYPED: dict[str, str] = {}  # by what `as_meant` made of it


def as_meant(argv: Sequence[str]) -> list[str]:
    """
    The words of a command line, with quotes around values that Hydra's grammar would read as something else than text
    or not at all: a run called `2024` or `1_1`, a path with `=`, brackets or letters beyond ASCII, a regular
    expression. [`as_typed`] takes them off again.
    """
    words = [_quoted(word) for word in argv]
    TYPED.update({word: typed for word, typed in zip(words, argv, strict=True) if word != typed})
    return words


def as_typed(words: Sequence[str]) -> list[str]:
    """The words of a command line as they were before [`as_meant`]."""
    return [TYPED.get(word, word) for word in words]


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
        return word  # it was meant as grammar
    else:
        quoted = f"{key}={_quote(value)}"
    return quoted if parse_override(quoted) is not None else word


def _quote(text: str) -> str:
    # In quotes a backslash means itself, but before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + "\\'" * bool(found[2]), text) + "'"


def parse_override(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _has_numbers(override: Override) -> bool:
    if override.is_delete() or override.is_sweep_override():
        return False
    value = override.value()
    return any(isinstance(item, int | float) for item in (value if isinstance(value, list) else [value]))
