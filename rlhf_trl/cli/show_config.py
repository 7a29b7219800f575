"""The composed config as YAML (`--cfg job`), each value with a comment that names the file it comes from."""

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_trl.cli.overrides import composed, without_sweeps
from rlhf_trl.config.command_line import parse_override
from rlhf_trl.config.groups import option_groups
from rlhf_trl.config.values import as_dict, at, flatten
from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.paths import conf_dir

COMMAND_LINE = "command line"


def annotated_config(args: Namespace, config: str) -> str:
    """
    Return the config of a command line, of a multirun's first job, as YAML. The comment after a value names the file
    that set it last, or the command line; that after a reference to another key has the value and where that one
    comes from.

    Args:
        args (`Namespace`): see [`~rlhf_trl.cli.overrides.parse_command_line`].
        config (`str`): name of the config: `train`, `sweep` or `pipeline`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if `--package` names no node.
    """
    words = without_sweeps(args.overrides) if args.multirun else args.overrides
    cfg = composed(config, words, args.config_dirs)
    found = origins(words, args.config_dirs, config)
    package = "" if args.package in (None, "_global_") else args.package
    shown = OmegaConf.select(cfg, package) if package else cfg
    if not OmegaConf.is_config(shown):
        if shown is None:
            raise ConfigError(f"`--package {package}` names no node of the config.")
        return f"{shown}\n"
    if args.resolve:
        OmegaConf.resolve(shown)
    text, raw = OmegaConf.to_yaml(shown), as_dict(cfg, resolve=False)
    lines = text.splitlines()
    for path, node in leaves(yaml.compose(text), package):
        comment = ", ".join(filter(None, [value_of(node, cfg, path), origin_of(source_of(path, raw), found)]))
        # That of a list or a text of several lines stands behind its key
        line = node.end_mark.line if isinstance(node, yaml.ScalarNode) and node.style != "|" else node.start_mark.line
        if isinstance(node, yaml.SequenceNode) and not node.flow_style:
            line -= 1
        lines[line] += f"  # {comment}" if comment else ""
    return "\n".join([*([f"# @package {package}"] if package else []), *lines, ""])


def origins(words: Sequence[str], folders: Sequence[str | Path], config: str) -> dict[str, str]:
    """Return where the keys of a composed config come from, by their dotted path, the latest last."""
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        search = ",".join(f"file://{Path(folder).resolve()}" for folder in folders)
        given = [*([f"hydra.searchpath=[{search}]"] if folders else []), *words]
        defaults = loader.compute_defaults_list(config, given, RunMode.RUN).defaults
    found: dict[str, str] = {}
    for default in defaults:
        name = f"{default.config_path}.yaml"
        places = {conf_dir() / name: f"conf/{name}"} | {Path(each, name): f"{each}/{name}" for each in folders}
        file = next((file for file in places if file.is_file()), None)
        if file is None:
            continue  # Hydra's own
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        content.pop("defaults", None)
        for path in flatten(content, default.package or ""):
            found.pop(path, None)
            found[path] = places[file]
    groups = option_groups([str(conf_dir()), *map(str, folders)])
    for override in filter(None, map(parse_override, words)):
        if override.key_or_group not in groups and not override.is_sweep_override():
            for path in flatten(override.value(), override.key_or_group):
                found.pop(path, None)
                found[path] = COMMAND_LINE
    return found


def source_of(path: str, values: dict[str, Any]) -> str:
    """Return the key that a reference, `${seed}` or `${table.${row}}`, takes its value from; else the key itself."""
    text = at(values, path)
    if not isinstance(text, str):
        return path
    while (inner := re.search(r"\$\{([\w.]+)\}", text)) and inner.group() != text:
        text = f"{text[: inner.start()]}{at(values, inner[1])}{text[inner.end() :]}"
    named = re.fullmatch(r"\$\{([\w.]+)\}", text)
    return source_of(named[1], values) if named else path


def origin_of(path: str, found: dict[str, str]) -> str | None:
    """Return where a key comes from: what set it, or a node above it as a whole, last."""
    above = [name for name in found if path == name or path.startswith(f"{name}.")]
    return found[above[-1]] if above else None


def leaves(node: yaml.Node, path: str) -> Iterator[tuple[str, yaml.Node]]:
    """Yield the nodes of all values that are no mappings, with their dotted paths."""
    if not isinstance(node, yaml.MappingNode) or not node.value:
        yield path, node
        return
    for name, value in node.value:
        yield from leaves(value, f"{path}.{name.value}".removeprefix("."))


def value_of(node: yaml.Node, cfg: DictConfig, path: str) -> str | None:
    """Return the value of an interpolation, as YAML; `None` for anything else, or where it can't be resolved."""
    if not isinstance(node, yaml.ScalarNode) or "${" not in node.value:
        return None
    try:
        value = OmegaConf.select(cfg, path)
    except OmegaConfBaseException:
        return None
    if OmegaConf.is_config(value) or "\n" in str(value):
        return None
    return yaml.safe_dump(value, width=10_000).removesuffix("\n...\n").strip()
