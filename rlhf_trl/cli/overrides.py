"""
Overrides of a command line: all that don't fit the config, each with a suggestion.

Hydra stops at the first one, doesn't know TRL's arguments, and has no suggestions for misspelt words. Nothing heavy is
imported: it takes well under a second.
"""

import os
import re
import shlex
import tempfile
from argparse import Namespace
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.checks.renamed import renamed_key, renamed_problem
from rlhf_trl.cli.option_files import misplaced_header, option_file, shape_problem
from rlhf_trl.cli.unknown_keys import OPEN_NODES, deepest, new_key_problem, target_of, unknown_key_problem
from rlhf_trl.config.command_line import SPECIAL_CHARACTERS, is_text_key, parse_override
from rlhf_trl.config.groups import WHOLE_RUNS, is_helper, option_groups
from rlhf_trl.config.program import command_line
from rlhf_trl.config.values import as_dict, at, flatten
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import did_you_mean, names_of, nearest, suggestion
from rlhf_trl.runs.paths import conf_dir

SWEEP = "one run takes one value. For several runs use `{}`; a list is `{}`"

NO_OPTION = re.compile(r"Could not (?:find|load) '(.+)'")
TWICE = re.compile(r"Multiple values for (\S+?)\. To override a value use 'override ([^']+)'")
INTERPOLATION = re.compile(r"Error resolving interpolation")


def parse_command_line(argv: Sequence[str]) -> Namespace:
    """
    Parse a command line.

    Returns:
        `Namespace`: Hydra's options and `overrides`, and further `config_dirs` (`list[str]`), the config folders
            beside ours, and `is_checked` (`bool`), `False` for commands that only show something (`--help`,
            `--cfg job`) or name another config than ours.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: for an option that Hydra doesn't have: keys have no dashes.
    """
    args, unknown = get_args_parser().parse_known_args(argv)
    if unknown:
        name, _, value = unknown[0].lstrip("-").partition("=")
        raise ConfigError(f"`{unknown[0]}` is no option. Keys have no dashes: use `{name}={value or '...'}`.")
    args.config_dirs = [args.config_dir] if args.config_dir else []
    shows = args.help or args.hydra_help or args.cfg or args.info or args.shell_completion
    args.is_checked = not (shows or args.experimental_rerun or args.config_name or args.config_path)
    return args


def completed_options(config_dirs: Sequence[str]) -> list[str]:
    """
    Return the words that complete `experiment=...` or `pipeline=...` in the command line that a shell asks about.
    Hydra's completion doesn't look into the folders of a group.
    """
    group, sign, begun = os.environ.get("COMP_LINE", "").rpartition(" ")[2].partition("=")
    if not sign or group not in WHOLE_RUNS.values():
        return []
    options = option_groups([str(conf_dir()), *config_dirs])[group]
    return sorted(f"{group}={name}" for name in options if name.startswith(begun))


def compose(
    overrides: Sequence[str], config_dirs: Sequence[str] = (), config: str = "train"
) -> tuple[DictConfig | None, list[str]]:
    """
    Compose the config of a command line without the overrides that don't fit.

    There is no config (`None`) if one of those chooses an option of a group that is read: without it the others may
    mean something else.

    Args:
        overrides (`Sequence[str]`): such as `stage=ppo` and `+stage.args.x=1`.
        config_dirs (`Sequence[str]`): folders with options of the user's own, beside ours.
        config (`str`): name of the config: `train`, `sweep` or `pipeline`.

    Returns:
        `tuple`: the config, and the problem of each override that doesn't fit.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the config files themselves can't be composed.
    """
    for folder in config_dirs:
        if not Path(folder).is_dir():
            raise ConfigError(f"`--config-dir {folder}`: there is no such folder, seen from `{Path.cwd()}`.")
    left, wrong = list(overrides), []
    groups = option_groups([str(conf_dir()), *config_dirs])
    problems = _misread(left, groups)
    left = [word for word in left if word not in problems]
    group = WHOLE_RUNS[config]
    files = [file for name in _options(group, left) if (file := option_file(group, name, config_dirs))]
    misshapen = [
        problem
        for word in left
        for file in _files_of(word, groups, config_dirs)
        if (problem := misplaced_header(file))
    ]
    if misshapen := misshapen or [problem for file in files if (problem := shape_problem(file, group))]:
        raise ConfigError.join(misshapen)
    while True:
        try:
            cfg = composed(config, left, config_dirs)
            break
        except (HydraException, yaml.YAMLError) as error:
            word = _culprit(error, left)
            if word is None:
                raise ConfigError(_without_override(error, files) or _text(error)) from error
            left.remove(word)
            wrong.append((word, error))
    lost = [word for word, error in wrong if _key(word) in groups and "Could not override" not in str(error)]
    lost += [word for word in problems if _key(word) in groups]
    problems |= {word: _explain(word, error, cfg, groups) for word, error in wrong}
    unread = _unread(left, cfg, groups, config, config_dirs) | _removed(left, groups, config, config_dirs)
    if unread:  # so that their consequences aren't reported too
        left = [word for word in left if word not in unread]
        cfg = composed(config, left, config_dirs)
    found = list(dict.fromkeys([*problems.values(), *unread.values()]))
    for file in files:
        choices = [word for word in left if _key(word) in groups and _key(word) != group]
        found += _unread_of_file(file, cfg, _without_body(file, group, config, choices, config_dirs), groups)
    return None if lost else cfg, found


def compose_sweeper(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> DictConfig:
    """Return the node `hydra.sweeper` of a sweep's command line, whose overrides fit."""
    return composed("sweep", without_sweeps(overrides), config_dirs, with_hydra=True).hydra.sweeper


def composed(config: str, words: Sequence[str], folders: Sequence[str | Path], with_hydra: bool = False) -> DictConfig:
    """Return what Hydra composes of overrides and, beside ours, further config folders."""
    search = ",".join(f"file://{Path(folder).resolve()}" for folder in folders)
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        words = [*([f"hydra.searchpath=[{search}]"] if folders else []), *words]
        return hydra.compose(config, words, return_hydra_config=with_hydra)


def without_sweeps(words: Sequence[str]) -> list[str]:
    """Return the overrides of a multirun's first job, roughly: the first one of several values."""
    return [_first(word) for word in words]


def _first(word: str) -> str:
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return word
    if not override.is_sweep_override():
        return word
    values = override.value()
    first = values.start if isinstance(values, IntervalSweep) else next(override.sweep_string_iterator())
    return f"{word.partition('=')[0]}={first}"


def _text(error: Exception) -> str:
    cause = f" {error.__cause__}" if error.__cause__ else ""
    return " ".join(f"{error}{cause}".split("\nConfig search path:")[0].split())


def _key(word: str) -> str:
    """Return the key of an override, `stage.args.beta` of `+stage.args.beta=1`; empty if it can't be read."""
    try:
        return OverridesParser.create().parse_override(word).key_or_group
    except HydraException:
        return ""


def _culprit(error: Exception, words: list[str]) -> str | None:
    """Return the override that an error of Hydra is about, or `None`."""
    if isinstance(error, OverrideParseException):
        return error.override if error.override in words else None
    text = str(error)
    if match := TWICE.search(text):
        return next((w for w in words if w.startswith("+") and _key(w) == match.group(1)), None)
    if "appears more than once in the final defaults list" in text:
        return next((w for w in words if isinstance(_value(w), list) and "." not in _key(w)), None)
    if INTERPOLATION.search(text):  # of a defaults list, by the option of another group
        read = re.findall(r"\$\{([\w/]+)\}", text)
        return next((w for w in words if _key(w) in read and (w[0] == "~" or isinstance(_value(w), list))), None)
    if match := NO_OPTION.search(text):
        path = match.group(1)
        of_group = [w for w in reversed(words) if (key := _key(w)) and path.startswith(f"{key}/")]
        return next((w for w in of_group if path.removeprefix(f"{_key(w)}/") in w), None)
    quoted = re.findall(r"'([^']+)'", text) + re.findall(r"Error merging override (\S+)", text)
    quoted += [name.split("=")[0] for name in quoted]
    by_word = [w for w in words if w in quoted or any(f"'{w}'" in line for line in text.splitlines())]
    by_key = [w for w in words if _key(w) in quoted]
    return next(iter([*by_word, *by_key]), None)


def _explain(word: str, error: Exception, cfg: DictConfig, groups: dict[str, set[str]]) -> str:
    if isinstance(error, OverrideParseException):
        return _unreadable(word, groups)
    text, key, value = str(error), _key(word), word.partition("=")[2]
    if problem := _renamed(word, key):
        return problem
    if "requires --multirun" in text or "Ambiguous value" in text:
        name = word.partition("=")[0]
        ways = SWEEP.format(command_line("-m", word, app="sweep"), f"'{name}=[{value}]'")
        ways += f"; text with a comma is `{_as_text(name, value)}`" if is_text_key(key) else ""
        return f"`{word}` has several values, and {ways}."
    if match := NO_OPTION.search(text):
        option = match.group(1).removeprefix(f"{key}/")
        return (
            f"`{word}`: the group `{key}` has no option `{option}`. {_option_meant(word, option, groups.get(key, ()))}"
        )
    if INTERPOLATION.search(text) and word.startswith("~"):
        return f"`{word}` removes a key that is read. Keep the key, or choose another option: `{key}=...`."
    if "appears more than once in the final defaults list" in text or INTERPOLATION.search(text):
        return f"`{word}`: the group `{key}` takes one option. {did_you_mean('', groups.get(key, ()))}"
    if "An item is already at" in text or TWICE.search(text):
        return f"`{word}` adds a key that is there already. Use it without the plus: `{word.lstrip('+')}`."
    if "Could not override" in text and "steps" in cfg and key.split(".")[0] in groups:
        return f"`{word}` is a word for a step. For all steps of a pipeline set `'overrides=[\"{word}\"]'`."
    if "Could not override" in text and key.startswith("hydra."):
        return f"`{word}`: Hydra has no such key. `{command_line('--cfg', 'hydra')}` prints those that it has."
    given, node = _value(word), None if key in groups else OmegaConf.select(cfg, key)
    if isinstance(given, list) and isinstance(node, DictConfig):
        names = f" ({names_of(map(str, node))})" if node else ""
        return f"`{word}` is a list, and `{key}` holds keys{names}. Set one of them, or add one: `+{key}.NAME=...`."
    if (
        isinstance(given, dict)
        and isinstance(node, DictConfig)
        and (problem := new_key_problem(key, given, cfg, groups))
    ):
        return problem
    if "Could not override" in text:
        group = key if key in groups else key.partition(".")[0]  # `combine=min`, or `combine.floor=1`
        not_read = group in groups and group not in cfg
        return _group_not_read(word, group, cfg, groups[group]) if not_read else unknown_key_problem(word, cfg, groups)
    return f"`{word}`: {_text(error)}"


def _option_meant(word: str, option: str, options: Collection[str]) -> str:
    """Return a suggestion for an option; the whole word if only the separators differ (`reviews_tiny_sft`)."""
    for name in options:
        if re.split("[/_-]", name) == re.split("[/_-]", option):  # `reviews_tiny_sft`
            return f"Use `{word.replace(option, name)}`."
    if hint := did_you_mean(option, options):
        return hint
    return f"There are: {names_of(sorted({name.partition('/')[0] + '/...' for name in options}))}."


def _renamed(word: str, key: str) -> str | None:
    """Return the problem of a word with the former name of a key, `None` for any other."""
    if not (names := renamed_key(key)):
        return None
    old, new = names
    if new is None:
        return f"`{word}`: {renamed_problem(old, new)}"
    typed = "~" * word.startswith("~") + new + word.lstrip("+~").removeprefix(old)
    return f"`{word}`: `{old}` was renamed to `{new}`. Use `{typed}`."


def _unreadable(word: str, groups: dict[str, set[str]]) -> str:
    name, sign, value = word.partition("=")
    homes = [group for group, options in groups.items() if word in options]
    if homes or not sign:
        return f"`{word}` can't be read. {suggestion([f'{homes[0]}={word}']) if homes else 'Use `key=value`.'}"
    if not re.fullmatch(r"[+~]{0,2}[\w/@:-]+(\.[\w/@:-]+)*", name):
        return f"`{word}` can't be read: `{name}` is no key. Use `key=value`."
    if value[:1] in ("[", "{") and value.count(value[0]) != value.count({"[": "]", "{": "}"}[value[0]]):
        return f"`{word}` can't be read: `{value[0]}` isn't closed. Close it, or as text: `{_as_text(name, value)}`."
    found = SPECIAL_CHARACTERS.search(value)
    why = f": `{found.group()}` can't stand in bare text" if found else ""
    return f"`{word}` can't be read{why}. Put the text in quotes within the shell's: `{_as_text(name, value)}`."


def _as_text(name: str, value: str) -> str:
    """Return an override with any text as its value, quoted for a shell."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    inner = value.replace('"', '\\"')
    return shlex.quote(f'{name}="{inner}"')


def _group_not_read(word: str, group: str, cfg: DictConfig, options: set[str]) -> str:
    stage = OmegaConf.select(cfg, "stage.name")
    readers = [path.stem for path in sorted(conf_dir().glob("stage/*.yaml")) if f"- /{group}:" in path.read_text()]
    if stage in readers:
        named = ", ".join(sorted(options))
        return f"`{word}`: the chosen option of `{group}` has no keys. Set `{group}=...` as well: {named}."
    others = f" It is read by {', '.join(f'`stage={name}`' for name in readers)}." if readers else ""
    return f"`{word}` would do nothing: `stage={stage}` doesn't read the group `{group}`. Remove it.{others}"


def _misread(words: Sequence[str], groups: dict[str, set[str]]) -> dict[str, str]:
    """Return the problems of words that Hydra would misread, or end at with a traceback, by word."""
    problems = {}
    for i, word in enumerate(words):
        key, sign, value = word.partition("=")
        if word == "=" and 0 < i < len(words) - 1:
            problems[word] = f"There is a space around `=`. Use `{words[i - 1]}={words[i + 1]}`."
        elif not key:
            problems[word] = f"`{word}` has no key. Use `key=value`."
        elif sign and key in groups and not isinstance(_value(word), str | list):
            way = f"Set `{key}=none`." if "none" in groups[key] else "Remove it, or choose one."
            problems[word] = f"`{word}` names no option of the group `{key}`. {way} {did_you_mean('', groups[key])}"
        elif sign and key in groups and ".." in value.split("/"):
            problems[word] = f"`{word}` leads out of the group `{key}`. {did_you_mean('', groups[key])}"
        elif sign and key in groups and is_helper(value.split("/")):
            problems[word] = (
                f"`{word}` names a helper file, not an option of the group `{key}`. {did_you_mean('', groups[key])}"
            )
    if "=" in problems:  # nor are its neighbors overrides
        at = list(words).index("=")
        problems |= {words[at - 1]: problems["="], words[at + 1]: problems["="]}
    return problems


def _value(word: str) -> Any:
    """Return the value of an override, an empty string if it can't be read."""
    override = parse_override(word)
    return "" if override is None else override.value()


def _unread(
    words: Sequence[str], cfg: DictConfig, groups: dict[str, set[str]], config: str, folders: Sequence[str]
) -> dict[str, str]:
    """Return the problems of keys added with `+` that nothing reads, by override."""
    added = {key: word for word in words if word.startswith("+") and "@" not in (key := _key(word))}
    added = {key: word for key, word in added.items() if key not in groups and not key.startswith("hydra.")}
    if any(word.startswith("++") for word in added.values()):  # it may also change an existing key
        before = composed(config, [word for word in words if not word.startswith("++")], folders)
        added = {key: word for key, word in added.items() if word[:2] != "++" or _first_new(key, before) is not None}
    renamed = {word: problem for key, word in added.items() if (problem := _renamed(word, key))}
    return renamed | {
        word: f"`{word}` adds a key that nothing reads. {hint}"
        for key, word in added.items()
        if word not in renamed and (hint := _hint_if_unread(key, cfg, "=...")) is not None
    }


def _removed(words: Sequence[str], groups: dict[str, set[str]], config: str, folders: Sequence[str]) -> dict[str, str]:
    """Return the problems of keys removed with `~` that are read, by override. The user's own and arguments may go."""
    away = [word for word in words if word.startswith("~")]
    if not away:
        return {}
    before = composed(config, [word for word in words if word not in away], folders)
    if "stage" in before and not str(OmegaConf.select(before, "stage.run._target_")).startswith("rlhf_trl."):
        return {}  # a function of the user's own may read any key
    values, problems = as_dict(before, resolve=False), {}
    for word in away:
        key = _key(word)
        parent, name = key.rpartition(".")[::2]
        given = str(at(values, key))
        is_argument = isinstance(at(values, f"{parent}._target_"), str) and not name.startswith("_")
        if key in groups and "none" in groups[key]:
            problems[word] = f"`{word}` removes a group that is read. Set `{key}=none`."
        elif not (OPEN_NODES & set(parent.split(".")) or parent == "reward" or (is_argument and "${" not in given)):
            problems[word] = f"`{word}` removes a key that is read. Keep the key, or set it: `{key}=...`."
    return problems


def _hint_if_unread(key: str, cfg: DictConfig, value: str = "", known: Collection[str] = ()) -> str | None:
    """
    Return a suggestion for a key that the config didn't have before, `None` if something may read it, such as a key
    beside or below a `_target_`, which is checked with the arguments.
    """
    own_function = "stage" in cfg and not str(OmegaConf.select(cfg, "stage.run._target_")).startswith("rlhf_trl.")
    if own_function or cfg.get("program"):
        return None  # a function or program of the user's own may read any key
    names = key.split(".")
    parents = [".".join(names[:i]) for i in range(1, len(names))]
    if OPEN_NODES & set(names[:-1]) or any(target_of(OmegaConf.select(cfg, parent)) for parent in parents):
        return None
    if parents == ["reward"] and target_of(OmegaConf.select(cfg, key)):
        return None  # one more reward, of any number
    node = OmegaConf.select(cfg, parents[-1]) if parents else cfg
    others = {*known, *(str(name) for name in node)} - {names[-1]} if isinstance(node, DictConfig) else set()
    meant = [f"{'.'.join([*names[:-1], name])}{value}" for name in nearest(names[-1], others)]
    return suggestion(meant) if meant else "Remove it."


def _options(group: str, words: Sequence[str]) -> list[str]:
    """Return the options of a group that a command line chooses."""
    chosen: list[str] = []
    for word in words:
        if _key(word) == group:
            value = OverridesParser.create().parse_override(word).value()
            chosen = [str(name) for name in (value if isinstance(value, list) else [value]) if name is not None]
    return chosen


def _files_of(word: str, groups: dict[str, set[str]], folders: Sequence[str]) -> list[Path]:
    """Return the files of the options that an override chooses, of a group of any name."""
    group, value = _key(word), _value(word)
    names = value if isinstance(value, list) else [value]
    found = [option_file(group, name, folders) for name in names if isinstance(name, str)] if group in groups else []
    return [file for file in found if file is not None]


def _without_override(error: Exception, files: Sequence[Path]) -> str | None:
    """Return the problem of a `defaults` list that chooses an option again, or `None`."""
    if not (match := TWICE.search(str(error))) or not files:
        return None
    group, _, option = match.group(2).partition(": ")
    return (
        f"`{files[-1]}` chooses an option of `{group}` beside the one that is there. Write in its `defaults`: "
        f"`- override /{group}: {option}`."
    )


def _without_body(file: Path, group: str, config: str, choices: Sequence[str], folders: Sequence[str]) -> DictConfig:
    """Return the config with the same options, but only the `defaults` of a whole run's file."""
    with tempfile.TemporaryDirectory() as bare:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        text = yaml.safe_dump({"defaults": content.get("defaults", [])})
        Path(bare, group).mkdir()
        Path(bare, group, "bare.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")
        return composed(config, [*choices, f"{group}=bare"], [*folders, bare])


def _unread_of_file(file: Path, cfg: DictConfig, before: DictConfig, groups: dict[str, set[str]]) -> list[str]:
    """
    Return the problems of keys of a whole run's file that nothing reads: those that would need a `+`, and that no
    interpolation of the file names.
    """
    text = file.read_text(encoding="utf-8")
    content = yaml.safe_load(text) or {}
    named = {f"{name.rstrip('.')}." for name in re.findall(r"\$\{([\w.]+)", text)}
    for key in ("defaults", "hydra", "dry_run", "time_steps"):
        content.pop(key, None)
    # Former names are reported by the checks of the composed config
    keys = dict.fromkeys(_first_new(key, before) for key in flatten(content) if not renamed_key(key))
    return [
        f"`{key}` in `{file}` is a key that nothing reads. {hint}"
        for key in keys
        if key is not None
        and not any(name.startswith(f"{key}.") for name in named)
        and (hint := _hint_if_unread(key, cfg, known=groups if "." not in key else ())) is not None
    ]


def _first_new(key: str, cfg: DictConfig) -> str | None:
    """Return the first part of a key that the config doesn't have, `None` if it has all of it."""
    parent, node, name = deepest(key, cfg)
    # `in node` is false for keys without a value
    if not isinstance(node, DictConfig) or name in node.keys():  # noqa: SIM118
        return None
    return f"{parent}.{name}" if parent else name
