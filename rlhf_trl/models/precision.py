"""Types of the weights and of the computation: bfloat16 where the device supports it."""

from collections.abc import Iterable

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

# Half of the distance between two numbers of 8 and of 11 bits, at its least: a smaller change of a weight is lost
LEAST_UPDATE = {"bfloat16": "0.2 %", "float16": "0.02 %"}


def weights_dtype(dtype: str | None, is_trained: bool, bf16: bool | None = None) -> str:
    """
    Return the type in which weights are loaded.

    Weights that are trained are in float32, TRL's default, also under mixed precision: in bfloat16, with 8 bits of
    precision, updates of a learning rate such as 1e-6 would be rounded away. Those that are frozen or evaluated take
    half of the memory in bfloat16.

    Args:
        dtype (`str`, *optional*):
            What the config says, which wins.
        is_trained (`bool`):
            Whether the weights themselves are trained, as those of a base under an adapter are not.
        bf16 (`bool`, *optional*):
            Whether the run computes in bfloat16. Unset, whether the device supports it.
    """
    if dtype is not None:
        return dtype
    return "bfloat16" if not is_trained and (is_torch_bf16_gpu_available() if bf16 is None else bf16) else "float32"


def dtype_name(dtype: object) -> str:
    """Return the name of a type, or of what stands for one, without its module: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def computed_in(args: TrainingArguments) -> str | None:
    """Return the type of mixed precision, `None` without it."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else None


def precision_text(trained: str, frozen: str, args: TrainingArguments) -> str:
    """
    Return the types of the weights and of the computation, for the plan and the head of a run.

    Args:
        trained (`str`), frozen (`str`): types of the weights that are trained and of the others; empty without any.
        args (`transformers.TrainingArguments`): arguments of the trainer.
    """
    weights = f"trained weights in {trained}{f', frozen ones in {frozen}' if frozen else ''}"
    if mixed := computed_in(args):
        return f"{weights}; mixed precision, computed in {mixed}"
    has_none = "" if is_torch_bf16_gpu_available() else ": this machine has no accelerator with bfloat16"
    return f"{weights}; no mixed precision{has_none}"


def precision_line(model: torch.nn.Module, args: TrainingArguments) -> str:
    """Return a sentence on the types in which a model is trained and computed, for the head of a run."""
    line = f"Precision: {precision_text(trained_types(model), _types(_frozen(model)), args)}."
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(quantization, "load_in_4bit", False):
        dtype = getattr(quantization, "bnb_4bit_compute_dtype", None)
        line += f" Layers in 4 bits are computed in {dtype_name(dtype)}."
    return line


def rounding_problem(trained: str, keeps_float32: bool) -> str | None:
    """
    Return what is to be expected of training weights in 16 bits, `None` where nothing is lost.

    Args:
        trained (`str`): types of the weights that are trained.
        keeps_float32 (`bool`): whether the engine keeps them in float32 beside, as DeepSpeed's optimizers do, and
            accelerate's FSDP in mixed precision.
    """
    short = next((name for name in LEAST_UPDATE if name in trained), None)
    if keeps_float32 or short is None:
        return None
    return (
        f"weights are trained in {short}, which rounds away every update below {LEAST_UPDATE[short]} of a weight, and "
        "an update of AdamW is about the learning rate: small ones do nothing. Leave `model.dtype` (for a critic "
        "`stage.args.critic_dtype`) null, which is float32 with mixed precision where the device has it, or train an "
        "adapter (`adapter=lora`)."
    )


def trained_types(model: torch.nn.Module) -> str:
    """Return the types of the weights of a model that are trained."""
    return _types(parameter for parameter in model.parameters() if parameter.requires_grad)


def _frozen(model: torch.nn.Module) -> Iterable[torch.nn.Parameter]:
    return (parameter for parameter in model.parameters() if not parameter.requires_grad)


def _types(parameters: Iterable[torch.nn.Parameter]) -> str:
    """Return the types of parameters; those that bitsandbytes packs are in 4 or 8 bits."""
    packed = {"Params4bit": "4 bits", "Int8Params": "8 bits"}
    return " and ".join(sorted({packed.get(type(p).__name__, dtype_name(p.dtype)) for p in parameters}))
