"""Bytes of the weights of models, also of models without any (on the meta device)."""

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from rlhf_trl.models.dry_passes import without_adapter
from rlhf_trl.models.tracking import parameters_and_buffers

# Bytes per weight in NF4 and of its constants, one per 64 weights: a float32, or a byte and their share of another
NF4, CONSTANTS, CONSTANTS_TWICE = 0.5, 4 / 64, 1 / 64 + 4 / (64 * 256)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors, tied ones once."""
    return sum({id(tensor): tensor.numel() * tensor.itemsize for tensor in tensors}.values())


def weight_bytes(model: nn.Module, quantization: Any = None) -> float:
    """
    Return the bytes of a model's weights and buffers.

    Args:
        model (`nn.Module`): with or without weights.
        quantization (`transformers.BitsAndBytesConfig`, *optional*): of its linear layers, all but the output layer.
    """
    total = tensor_bytes(parameters_and_buffers(model))
    if quantization is None:
        return total
    for layer in quantized_layers(model):
        constants = CONSTANTS_TWICE if quantization.bnb_4bit_use_double_quant else CONSTANTS
        packed = NF4 + constants if quantization.load_in_4bit else 1.0
        total -= layer.weight.numel() * (layer.weight.itemsize - packed)
    return total


def quantized_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the layers that bitsandbytes quantizes: all linear ones but the output layer and those of adapters."""
    base: Any = without_adapter(model)
    output = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    own = {id(layer) for module in adapted for name in module.adapter_layer_names for layer in _layers(module, name)}
    heads = {id(output), *(id(module) for name, module in base.named_children() if name in ("score", "classifier"))}
    return [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in own | heads]


def _layers(module: Any, name: str) -> list[nn.Module]:
    layers = getattr(module, name)
    return list(layers.values()) if isinstance(layers, nn.ModuleDict) else []
