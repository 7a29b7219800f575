"""What only the libraries can tell: arguments of any callable, the rules of TRL's dataclasses, 4-bit loading."""

import contextlib
import inspect
import io
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from rlhf_trl.argument_names import arguments
from rlhf_trl.checks.names import DOT_PATHS, unknown_argument
from rlhf_trl.checks.places import project_dir
from rlhf_trl.checks.values import at, nodes, plain
from rlhf_trl.errors import ConfigError
from rlhf_trl.models import adapter_config, base_path
from rlhf_trl.paths import resolve_path

HEADS = ("lm_head", "embed_out", "score", "classifier")  # kept in full precision


def library_problems(cfg: DictConfig) -> list[str]:
    """Everything that can be found with the libraries imported, without loading a model."""
    values, _ = plain(cfg)
    return [*_callables(values), *_trainer_arguments(cfg), *_unquantizable(values)]


def _callables(values: dict[str, Any]) -> list[str]:
    problems = []
    for path, node in nodes(values):
        for key in DOT_PATHS:
            if not isinstance(node.get(key), str):
                continue
            try:
                found = get_object(node[key])
            except (ImportError, AttributeError) as error:
                problems.append(f"`{path}.{key}`: `{node[key]}` can't be imported. {' '.join(str(error).split())}")
                continue
            if key == "_target_" and arguments(node[key]) is None:
                problems += _signature(path, node, found)
    return problems


def _signature(path: str, node: dict[str, Any], target: Any) -> list[str]:
    parameters = inspect.signature(target).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    known = {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}
    # A reward's earlier run becomes its path before it is made
    known |= {"run"} if "path" in known else set()
    return [unknown_argument(path, key, node, known) for key in node if key not in known and not key.startswith("_")]


def _trainer_arguments(cfg: DictConfig) -> list[str]:
    if "args" not in cfg.stage:
        return []
    from rlhf_trl.run import training_arguments

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what it says, it says again when the run starts
            training_arguments(cfg.stage.args)
    except ConfigError as error:
        return [str(error)]
    return []


def _unquantizable(values: dict[str, Any]) -> list[str]:
    if not at(values, "adapter.quantization"):
        return []
    model = values["model"]
    path = resolve_path(model["path"], model["run"], str(project_dir(values)))
    adapter, trust = adapter_config(path, model["revision"]), {"trust_remote_code": bool(model["trust_remote_code"])}
    config = AutoConfig.from_pretrained(base_path(path, adapter) if adapter else path, **trust)
    scores = values["stage"]["task_type"] == "SEQ_CLS"
    with torch.device("meta"):
        empty = (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_config(config, **trust)
    linear = [name for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    if any(name.rsplit(".", 1)[-1] not in HEADS for name in linear):
        return []
    return [
        f"`{path}` ({type(empty).__name__}) has no linear layer that `adapter.quantization` could quantize. "
        "Type `adapter=lora` or `adapter=none`."
    ]
