"""Keys of a command line that the config doesn't have, each with the keys that may be meant. Imports nothing heavy."""

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_trl.config.argument_names import arguments
from rlhf_trl.config.values import as_dict, nodes
from rlhf_trl.hints import nearest, suggestion

# Nodes whose keys the user chooses
OPEN_NODES = {
    "callbacks",
    "columns",
    "each_round",
    "kwargs",
    "models",
    "policies",
    "principles",
    "published",
    "sampling",
    "sources",
    "steps",
    "weights",
}
# Names that other trainers and papers have for a key, and the name of it here
SYNONYMS = {
    "lr": "learning_rate",
    "bs": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "episodes": "total_episodes",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "scheduler": "lr_scheduler_type",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "seq_len": "max_length",
    "max_new_tokens": "max_completion_length",
    "response_length": "max_completion_length",
    "kl_coef": "beta",
    "init_kl_coef": "beta",
    "cliprange": "epsilon",
    "ppo_epochs": "num_iterations",
    "num_ppo_epochs": "num_iterations",
    "group_size": "num_generations",
    "lambda": "lam",
    "gae_lambda": "lam",
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "model_name": "path",
    "model_name_or_path": "path",
}


def unknown_key_problem(word: str, cfg: DictConfig, groups: dict[str, set[str]]) -> str:
    """
    Return the problem of an override of a key that the config doesn't have, with the keys that may be meant: those
    beside it, those of the same or of a similar name anywhere, and what other trainers call so.
    """
    path, _, value = word.lstrip("+~").partition("=")
    parent, node, leaf = deepest(path, cfg)
    if not isinstance(node, DictConfig):
        return f"`{word}`: `{parent}` is {node!r} and holds no keys. Use `{parent}={value}`."
    prefix = f"{parent}." if parent else ""
    declared = {str(name) for name in node if not str(name).startswith("_")}
    undeclared = set(arguments(str(target_of(node))) or ()) - declared
    if f"{prefix}{leaf}" == path and leaf in undeclared:
        return f"`{word}`: `{leaf}` is an argument of `{target_of(node)}` that isn't listed. Use `+{path}={value}`."
    rest = path.removeprefix(f"{prefix}{leaf}")
    if (meant := _same_name(path, leaf, cfg)) or (not parent and (meant := _of_group(path, value, groups))):
        where = "" if parent else " at the top"
        return f"`{word}`: there is no key `{prefix}{leaf}`{where}. {suggestion([_override(m, value) for m in meant])}"
    near = nearest(leaf, declared | undeclared | (set() if parent else groups.keys()))
    if near:
        meant = [f"{'+' * (name in undeclared)}{prefix}{name}{rest}={value}" for name in near]
        return f"`{word}`: there is no key `{prefix}{leaf}`. {suggestion(meant)}"
    group = parent.replace(".", "/")
    if not declared and group in groups:
        options = f"Set `{group}=...` as well: {', '.join(sorted(groups[group]))}."
        return f"`{word}`: there is no key `{prefix}{leaf}`. `{parent}` has none here. {options}"
    if meant := _similar_name(path if not parent else leaf, cfg):
        return f"`{word}`: there is no key `{prefix}{leaf}`. {suggestion([_override(m, value) for m in meant])}"
    if not declared:
        return f"`{word}`: there is no key `{prefix}{leaf}`. `{parent}` has none here."
    where = f"in `{parent}`" if parent else "at the top"
    return (
        f"`{word}`: there is no key `{prefix}{leaf}`. Keys {where}: {', '.join(f'`{n}`' for n in sorted(declared))}."
    )


def new_key_problem(path: str, given: dict[str, Any], cfg: DictConfig, groups: dict[str, set[str]]) -> str | None:
    """Return the problem of the first key of a dict that the node at a path doesn't have, `None` if it has all."""
    node = OmegaConf.select(cfg, path)
    for name, value in given.items():
        inner = f"{path}.{name}"
        if name not in node.keys():  # noqa: SIM118  # `in node` is false for keys without a value
            if OPEN_NODES & set(path.split(".")):
                return f"`{inner}` is a new key. Add it by itself: `+{inner}={value}`."
            return unknown_key_problem(f"{inner}={value}", cfg, groups)
        is_node = isinstance(value, dict) and isinstance(OmegaConf.select(cfg, inner), DictConfig)
        if is_node and (problem := new_key_problem(inner, value, cfg, groups)):
            return problem
    return None


def target_of(node: Any) -> str | None:
    """Return the `_target_` of a node of the config, `None` where it has none."""
    return node.get("_target_") if isinstance(node, DictConfig) else None


def deepest(path: str, cfg: DictConfig) -> tuple[str, Any, str]:
    """Return the last node on a path that exists, its path first, and the name that it doesn't have."""
    names, node = path.split("."), cfg
    for i, name in enumerate(names):
        if not isinstance(node, DictConfig) or name not in node or OmegaConf.is_missing(node, name):
            return ".".join(names[:i]), node, name
        if i + 1 < len(names):
            node = node[name]
    return ".".join(names[:-1]), node, names[-1]


def _override(meant: str, value: str) -> str:
    return meant if "=" in meant else f"{meant}={value}"


def _known(cfg: DictConfig) -> dict[str, bool]:
    """Return all keys below the top, and whether each is listed: the others are arguments, which need a `+`."""
    known = {}
    for parent, node in nodes(as_dict(cfg, resolve=False)):
        names = [str(name) for name in node if not str(name).startswith("_")]
        known |= {f"{parent}.{name}": True for name in names}
        unlisted = set(arguments(str(node.get("_target_"))) or ()) - set(names)
        known |= {f"{parent}.{name}": False for name in sorted(unlisted)}
    return known


def _shown(found: Collection[str], known: dict[str, bool]) -> list[str]:
    """Return up to three keys, listed ones first, the others with their `+`."""
    ordered = sorted(found, key=lambda key: not known[key])
    return [key if known[key] else f"+{key}" for key in ordered][:3]


def _same_name(path: str, leaf: str, cfg: DictConfig) -> list[str]:
    """Return keys that end with a path, have its last name, or are what others call so; also `model_path`."""
    known = _known(cfg)
    name = path.rpartition(".")[2]
    for fits in (
        lambda key: key.endswith((f".{path}", f".{SYNONYMS.get(name)}")),
        lambda key: key.replace(".", "_") == path,
        lambda key: key.endswith(f".{name}") and leaf == name,
    ):
        if found := [key for key in known if fits(key)]:
            return _shown(found, known)
    return []


def _of_group(path: str, value: str, groups: dict[str, set[str]]) -> list[str]:
    """Return overrides that choose an option: `adapter=lora` for `lora=true`."""
    if value.lower() not in ("true", "", "1", "yes"):
        return []
    return [f"{group}={path}" for group, options in groups.items() if path in options][:3]


def _similar_name(name: str, cfg: DictConfig) -> list[str]:
    """Return keys anywhere with a similar name, or with all words of it."""
    known = _known(cfg)
    last = {key: key.rpartition(".")[2] for key in known}
    if near := get_close_matches(
        name, set(last.values()), n=1, cutoff=0.75
    ):  # among hundreds, stricter than `nearest`
        return _shown([key for key in known if last[key] == near[0]], known)
    words = set(name.split("_"))
    return _shown([key for key in known if known[key] and words <= set(last[key].split("_"))], known)
