"""Checks that need the libraries: arguments of any callable, the rules of TRL's dataclasses, 4-bit loading."""

import contextlib
import functools
import inspect
import io
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token, is_offline_mode
from omegaconf import DictConfig, OmegaConf
from transformers import TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from rlhf_trl.callbacks.loggers import wandb_problem
from rlhf_trl.checks.names import dot_paths
from rlhf_trl.checks.sizes import size_problems
from rlhf_trl.config.argument_names import arguments
from rlhf_trl.config.dotpaths import find, not_taken, signature
from rlhf_trl.config.values import at, plain, section
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import did_you_mean
from rlhf_trl.models.adapters import NEUTRAL_INIT
from rlhf_trl.models.sizes import empty_model
from rlhf_trl.models.soup import soup_problem
from rlhf_trl.runs.paths import project_dir, resolve_path, soup_models

HEADS = ("lm_head", "embed_out", "score", "classifier")  # kept in full precision


def library_problems(cfg: DictConfig) -> list[str]:
    """Return all problems that can be found with the libraries imported, without loading a model."""
    values, _ = plain(cfg)
    problems = [
        *_callables(values),
        *_trainer_arguments(cfg),
        *_unquantizable(values),
        *_loading(values),
        *_sizes(values),
        *_adapter_layers(values),
        *_soup(values),
    ]
    if at(values, "logger.report_to") == "wandb":
        problems += [problem] if (problem := wandb_problem()) else []
    elif "wandb" in (at(values, "stage.args.report_to") or ()):
        problems.append("`stage.args.report_to` names wandb, which `logger` opens and closes. Set `logger=wandb`.")
    if at(values, "stage.args.push_to_hub") is True:
        problems += _hub_login("`stage.args.push_to_hub=true` writes to the hub")
        if (strategy := at(values, "stage.args.hub_strategy")) in ("checkpoint", "all_checkpoints"):
            problems.append(
                f"`stage.args.hub_strategy={strategy}` uploads checkpoints to resume from, and only models are "
                "uploaded here. Set it to `every_save` or `end`."
            )
        if at(values, "stage.args.hub_token") is not None:
            problems.append(
                "`stage.args.hub_token` would stand in the records of the run, for all who read them. Remove it, and "
                "log in with `hf auth login` or set `HF_TOKEN`."
            )
    elif at(values, "stage.repo") is not None:
        problems += _hub_login(f"`stage={at(values, 'stage.name')}` writes to the hub")
    return problems


def _soup(values: dict[str, Any]) -> list[str]:
    """Return why the models of a soup don't go together, or nothing."""
    if (models := at(values, "stage.models")) is None:
        return []
    try:
        paths = soup_models(models, project_dir(values))
        problem = soup_problem(
            paths, bool(at(values, "stage.assume_shared_start")), bool(at(values, "stage.trust_remote_code"))
        )
    except ConfigError as error:
        return [str(error)]
    return [f"`stage.models`: {problem}."] if problem else []


def _hub_login(why: str) -> list[str]:
    if is_offline_mode():
        return [f"{why}, and `HF_HUB_OFFLINE` keeps it from being reached. Unset that variable, or don't push."]
    if get_token() is None:
        return [f"{why}, and nobody is logged in. Log in with `hf auth login`, or set `HF_TOKEN`."]
    return []


def _callables(values: dict[str, Any]) -> list[str]:
    problems = []
    for path, key, node in dot_paths(values):
        if not isinstance(node[key], str):
            continue
        try:
            found = find(node[key])
        except ConfigError as error:
            problems.append(f"`{path}.{key}`: {error}")
            continue
        if key == "_target_" and arguments(node[key]) is None:
            problems += _signature(path, node, found)
        if key == "_target_" and path == "stage.run":
            problems += _stage(path, node, found)
        if key == "_target_" and path.startswith("callbacks."):
            problems += _callback(path, node, found)
    return problems or _reward_functions(values)


def _reward_functions(values: dict[str, Any]) -> list[str]:
    """Return the problems of the arguments of reward functions, by their signatures."""
    from rlhf_trl.build import instantiated

    problems = []
    for name, node in section(values, "reward").items():
        if isinstance(node, dict) and node.get("_target_") == "rlhf_trl.rewards.FunctionReward":
            try:
                instantiated(OmegaConf.create({key: node[key] for key in node if key != "when"}), name=name)
            except ConfigError as error:
                problems.append(str(error))
    return problems


def _stage(path: str, node: dict[str, Any], found: functools.partial) -> list[str]:
    """Return the problems of a stage of the user's own that can't be called with the config."""
    try:
        inspect.signature(found).bind({})
    except TypeError as error:
        return [f"`{path}._target_`: `{node['_target_']}` can't be called with the config ({error}). Let it take one."]
    return [] if node.get("_partial_") is True else [f"`{path}` needs `_partial_: true`: it gets the config."]


def _callback(path: str, node: dict[str, Any], found: functools.partial) -> list[str]:
    """Return the problems of a callback of the user's own: a wrong type, or missing arguments."""
    if isinstance(found.func, type) and not issubclass(found.func, TrainerCallback):
        return [
            f"`{path}._target_`: `{node['_target_']}` is no callback. Derive it from `transformers.TrainerCallback`."
        ]
    given = {*node, "trainer"} if node.get("_partial_") else {*node}
    return [
        f"`{path}` needs the argument `{p.name}` of `{node['_target_']}`. Set `+{path}.{p.name}=...`"
        + (", or `_partial_: true` for the trainer." if p.name == "trainer" else ".")
        for p in signature(found)
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given
    ]


def _signature(path: str, node: dict[str, Any], found: functools.partial) -> list[str]:
    parameters = signature(found)
    # `run` of a reward becomes its `path` before it is instantiated, and `when` is of the one around it
    replaced = {"run"} if any(p.name == "path" for p in parameters) else set()
    replaced |= {"when"} if path.startswith("reward.") else set()
    names = [key for key in node if key not in replaced and not key.startswith("_")]
    return [
        f"`{path}.{key}` is no argument of `{node['_target_']}`. {hint}"
        for key, hint in not_taken(found, names).items()
    ]


def _trainer_arguments(cfg: DictConfig) -> list[str]:
    if "args" not in cfg.stage:
        return []
    from rlhf_trl.build import training_arguments

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the same when the run starts
            args = training_arguments(cfg.stage.args)
    except ConfigError as error:
        return [str(error)]
    return _adapter_beside_reference(cfg) if hasattr(args, "sync_ref_model") else []


def _adapter_beside_reference(cfg: DictConfig) -> list[str]:
    """Return the problems of an adapter whose base, without it or with a copy of it, is the reference."""
    peft, problems = cfg.adapter.peft or {}, []
    if (bias := peft.get("bias", "none")) != "none":
        problems.append(
            f"`adapter.peft.bias` is {bias}, and `stage={cfg.stage.name}` has a reference on the same base, "
            "which would move with those biases. Set `adapter.peft.bias=none`, or `adapter=none`."
        )
    if (initial := peft.get("init_lora_weights", True)) not in NEUTRAL_INIT:
        problems.append(
            f"`adapter.peft.init_lora_weights` is {initial}, and the reference of "
            f"`stage={cfg.stage.name}` is the base without the adapter, which such a start isn't equal to. Remove it, "
            "or set it to gaussian."
        )
    return problems


def _unquantizable(values: dict[str, Any]) -> list[str]:
    if not at(values, "adapter.quantization"):
        return []
    model = values["model"]
    path, trusted = resolve_path(model["path"], model["run"], project_dir(values)), model["trust_remote_code"]
    try:
        empty = empty_model(path, values["stage"]["task_type"], bool(trusted), model["revision"])
    except ConfigError:
        return []  # reported with its sizes
    linear = [name for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    if any(name.rsplit(".", 1)[-1] not in HEADS for name in linear):
        return []
    return [
        f"`{path}` ({type(empty).__name__}) has no linear layer that `adapter.quantization` could quantize. "
        "Set `adapter=lora` or `adapter=none`."
    ]


def _adapter_layers(values: dict[str, Any]) -> list[str]:
    """Return the problems of layers that `adapter.peft` names and the model doesn't have."""
    peft, model = section(values, "adapter.peft"), section(values, "model")
    if not peft or not model:
        return []
    path = resolve_path(model["path"], model["run"], project_dir(values))
    task_type = at(values, "stage.task_type")
    try:
        empty = empty_model(path, task_type or "CAUSAL_LM", bool(model["trust_remote_code"]), model["revision"])
    except ConfigError:
        return []  # reported with its sizes
    names = [name for name, _ in empty.named_modules() if name]
    layers = {name.rsplit(".", 1)[-1] for name, module in empty.named_modules() if not list(module.children())}
    problems = []
    for key in ("target_modules", "modules_to_save"):
        given = peft.get(key)
        for wanted in given if isinstance(given, list) else ():
            if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                problems.append(
                    f"`adapter.peft.{key}` names `{wanted}`, and `{path}` ({type(empty).__name__}) has no such layer. "
                    f"{did_you_mean(str(wanted), {name for name in layers if not name.isdigit()})}"
                )
    return problems


def _loading(values: dict[str, Any]) -> list[str]:
    """Return the problems of the options of loading the model."""
    dtype, attention = at(values, "model.dtype"), at(values, "model.attn_implementation")
    problems = []
    if dtype is not None and dtype != "auto" and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        problems.append(f"`model.dtype` is {dtype!r}. Use `auto`, `float32`, `bfloat16` or `float16`.")
    model = section(values, "model")
    if model.get("revision") is not None and model.get("run") is None and model.get("path") is not None:
        path = resolve_path(model["path"], None, "")
        if Path(path).is_dir():
            problems.append(
                f"`model.revision` is {model['revision']}, and `{path}` is a folder of this machine, which has no "
                "revisions. Set `model.revision=null`, or give the hub id as `model.path`."
            )
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if attention is not None and "/" not in str(attention) and attention not in known:  # a kernel of the hub has a /
        problems.append(f"`model.attn_implementation` is {attention!r}. {did_you_mean(str(attention), known)}")
    return problems


def _sizes(values: dict[str, Any]) -> list[str]:
    try:
        return size_problems(values)
    except ConfigError as error:
        return [str(error)]
