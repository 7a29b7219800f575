"""Types of the weights and of the computation: bfloat16 where the device supports it."""

from collections.abc import Iterable

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available


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


def precision_line(model: torch.nn.Module, args: TrainingArguments) -> str:
    """Return a sentence on the types in which a model is trained and computed, for the head of a run."""
    parts = [f"Trained weights are in {_types(p for p in model.parameters() if p.requires_grad)}"]
    if frozen := _types(p for p in model.parameters() if not p.requires_grad):
        parts.append(f"frozen ones in {frozen}")
    mixed = computed_in(args)
    computed = f"Mixed precision: computed in {mixed}." if mixed else "No mixed precision"
    if mixed is None:
        computed += "." if is_torch_bf16_gpu_available() else ": this machine has no accelerator with bfloat16."
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(quantization, "load_in_4bit", False):
        dtype = getattr(quantization, "bnb_4bit_compute_dtype", None)
        computed += f" Layers in 4 bits are computed in {dtype_name(dtype)}."
    return f"{', '.join(parts)}. {computed}"


def _types(parameters: Iterable[torch.nn.Parameter]) -> str:
    """Return the types of parameters; those that bitsandbytes packs are in 4 or 8 bits."""
    packed = {"Params4bit": "4 bits", "Int8Params": "8 bits"}
    return " and ".join(sorted({packed.get(type(p).__name__, dtype_name(p.dtype)) for p in parameters}))
