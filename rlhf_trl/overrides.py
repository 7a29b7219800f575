"""
What is wrong with a command line: every override that doesn't fit the config, and what was meant.

Hydra stops at the first one and knows neither TRL's arguments nor what a misspelt word was meant to be. Nothing heavy
is imported: the answer takes well under a second.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.argument_names import arguments
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import did_you_mean, nearest
from rlhf_trl.paths import conf_dir

SWEEP = "one run takes one value. For several runs type `python launch/sweep.py -m {}`; a list is `{}`"

NO_OPTION = re.compile(r"Could not (?:find|load) '(.+)/([^/']+)'")
# Their keys are names of the user's choice
OPEN_NODES = {"callbacks", "columns", "kwargs", "policies", "sources", "weights"}


def compose(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> tuple[DictConfig | None, list[str]]:
    """
    The config of a command line without the overrides that don't fit, and the problem of each of these.

    There is no config (`None`) if one of these chooses an option of a group that is read: without it the others may
    not mean the same.

    Args:
        overrides (`Sequence[str]`): words such as `stage=ppo` and `+stage.args.x=1`.
        config_dirs (`Sequence[str]`): folders with options of the user's own, beside ours.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the config files themselves can't be composed.
    """
    for folder in config_dirs:
        if not Path(folder).is_dir():
            raise ConfigError(f"`--config-dir {folder}`: there is no such folder, seen from `{Path.cwd()}`.")
    left, wrong = list(overrides), []
    search = [f"hydra.searchpath=[{','.join(f'file://{Path(folder).resolve()}' for folder in config_dirs)}]"]
    while True:
        try:
            with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
                cfg = hydra.compose("train", [*(search if config_dirs else []), *left])
            break
        except (HydraException, yaml.YAMLError) as error:
            word = _culprit(error, left)
            if word is None:
                raise ConfigError(_text(error)) from error
            left.remove(word)
            wrong.append((word, error))
    groups = _groups([str(conf_dir()), *config_dirs])
    problems = [_explain(word, error, cfg, groups) for word, error in wrong] + _unread(left, cfg, groups)
    lost = any(_key(word) in groups and "Could not override" not in str(error) for word, error in wrong)
    return None if lost else cfg, problems


def without_sweeps(words: Sequence[str]) -> list[str]:
    """The overrides of a multirun's first job, roughly: of several values the first."""
    return [_first(word) for word in words]


def _first(word: str) -> str:
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return word
    if not override.is_sweep_override():
        return word
    is_range = override.is_interval_sweep()
    return f"{word.partition('=')[0]}={override.value().start if is_range else next(override.sweep_string_iterator())}"


def _text(error: Exception) -> str:
    cause = f" {error.__cause__}" if error.__cause__ else ""
    return " ".join(f"{error}{cause}".split("\nConfig search path:")[0].split())


def _key(word: str) -> str:
    """`stage.args.beta` of `+stage.args.beta=1`; what can't be read has none."""
    try:
        return OverridesParser.create().parse_override(word).key_or_group
    except HydraException:
        return ""


def _culprit(error: Exception, words: list[str]) -> str | None:
    """The override that an error of Hydra's is about."""
    if isinstance(error, OverrideParseException):
        return error.override if error.override in words else None
    text = str(error)
    if match := NO_OPTION.search(text):
        group, option = match.groups()
        return next((w for w in reversed(words) if _key(w) == group and option in w), None)
    quoted = re.findall(r"'([^']+)'", text) + re.findall(r"Error merging override (\S+)", text)
    quoted += [name.split("=")[0] for name in quoted]
    by_word = [w for w in words if w in quoted or any(f"'{w}'" in line for line in text.splitlines())]
    by_key = [w for w in words if _key(w) in quoted]
    return next(iter([*by_word, *by_key]), None)


def _explain(word: str, error: Exception, cfg: DictConfig, groups: dict[str, set[str]]) -> str:
    if isinstance(error, OverrideParseException):
        homes = [group for group, options in groups.items() if word in options]
        hint = f"Did you mean `{homes[0]}={word}`?" if homes else "Type `key=value`, with quotes around spaces."
        return f"`{word}` can't be read. {hint}"
    text, key, value = str(error), _key(word), word.partition("=")[2]
    if "requires --multirun" in text or "Ambiguous value" in text:
        listed = f"'{word.partition('=')[0]}=[{value}]'"
        return f"`{word}` has several values, and " + SWEEP.format(word, listed) + "."
    if match := NO_OPTION.search(text):
        option = match.group(2)
        return f"`{word}`: the group `{key}` has no option `{option}`. {did_you_mean(option, groups.get(key, ()))}"
    if "An item is already at" in text:
        return f"`{word}` adds a key that is there already. Type it without the plus: `{word.lstrip('+')}`."
    if "Could not override" in text:
        return _group_not_read(word, cfg) if key in groups else _unknown_key(word, cfg, groups)
    return f"`{word}`: {_text(error)}"


def _group_not_read(word: str, cfg: DictConfig) -> str:
    group, stage = _key(word), OmegaConf.select(cfg, "stage.name")
    readers = [path.stem for path in sorted(conf_dir().glob("stage/*.yaml")) if f"- /{group}:" in path.read_text()]
    others = f" It is read by {', '.join(f'`stage={name}`' for name in readers)}." if readers else ""
    return f"`{word}` would do nothing: `stage={stage}` doesn't read the group `{group}`. Leave it out.{others}"


def _unknown_key(word: str, cfg: DictConfig, groups: dict[str, set[str]]) -> str:
    path, _, value = word.lstrip("+~").partition("=")
    parent, node, leaf = _deepest(path, cfg)
    prefix = f"{parent}." if parent else ""
    declared = {str(name) for name in node if not str(name).startswith("_")} if isinstance(node, DictConfig) else set()
    undeclared = set(arguments(str(_target(node))) or ()) - declared
    if f"{prefix}{leaf}" == path and leaf in undeclared:
        return f"`{word}`: `{leaf}` is an argument of `{_target(node)}` that isn't listed. Type `+{path}={value}`."
    rest = path.removeprefix(f"{prefix}{leaf}")
    near = nearest(leaf, declared | undeclared | (set() if parent else groups.keys()))
    if near:
        meant = [f"`{'+' * (name in undeclared)}{prefix}{name}{rest}={value}`" for name in near]
        return f"`{word}`: there is no key `{prefix}{leaf}`. Did you mean {' or '.join(meant)}?"
    where = f"in `{parent}`" if parent else "at the top"
    return (
        f"`{word}`: there is no key `{prefix}{leaf}`. Keys {where}: {', '.join(f'`{n}`' for n in sorted(declared))}."
    )


def _target(node: Any) -> str | None:
    return node.get("_target_") if isinstance(node, DictConfig) else None


def _deepest(path: str, cfg: DictConfig) -> tuple[str, Any, str]:
    """The last node on a path that exists (its path and itself), and the name that it doesn't have."""
    names, node = path.split("."), cfg
    for i, name in enumerate(names):
        if not isinstance(node, DictConfig) or name not in node or OmegaConf.is_missing(node, name):
            return ".".join(names[:i]), node, name
        if i + 1 < len(names):
            node = node[name]
    return ".".join(names[:-1]), node, names[-1]


def _unread(words: Sequence[str], cfg: DictConfig, groups: dict[str, set[str]]) -> list[str]:
    """Keys added with `+` that nothing reads. Those beside or below a `_target_` are checked with its arguments."""
    if not str(OmegaConf.select(cfg, "stage.run._target_")).startswith("rlhf_trl."):
        return []  # a function of the user's own may read any key
    problems = []
    for word in words:
        key = _key(word)
        names = key.split(".")
        if not word.startswith("+") or key in groups or "@" in key or names[0] == "hydra":
            continue
        parents = [".".join(names[:i]) for i in range(1, len(names))]
        if OPEN_NODES & set(names[:-1]) or any(_target(OmegaConf.select(cfg, parent)) for parent in parents):
            continue
        if parents == ["reward"] and _target(OmegaConf.select(cfg, key)):
            continue  # one more reward, of which a group has as many as one likes
        node = OmegaConf.select(cfg, parents[-1]) if parents else cfg
        others = {str(name) for name in node} - {names[-1]} if isinstance(node, DictConfig) else set()
        meant = [f"`{'.'.join([*names[:-1], name])}=...`" for name in nearest(names[-1], others)]
        hint = f"Did you mean {' or '.join(meant)}?" if meant else "Leave it out."
        problems.append(f"`{word}` adds a key that nothing reads. {hint}")
    return problems


def _groups(folders: Sequence[str]) -> dict[str, set[str]]:
    """The options of each group in the config folders."""
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for path in Path(folder).glob("*/**/*.yaml"):
            groups.setdefault(str(path.parent.relative_to(folder)), set()).add(path.stem)
    return groups
