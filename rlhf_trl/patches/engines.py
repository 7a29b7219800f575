"""FSDP and DeepSpeed: outputs in the type they were computed in, whole weights where no engine shards, CPU ranks."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import training_args
from transformers.integrations import deepspeed

EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"
# Attribute of a parameter of which ZeRO-3 has given each rank a part
DEALT_OUT = "ds_id"


def keep_output_types(plugin: FullyShardedDataParallelPlugin) -> None:
    """
    Make FSDP2 return what a model computed, in the type it was computed in.

    Accelerate sets `output_dtype` to the type of the mixed precision, so that FSDP2 casts the outputs too. Those of
    TRL's fused head are log-probabilities and those of a critic values, both computed in float32: in bfloat16 -5.342
    becomes -5.3125, and a ratio, a KL and a margin of DPO are made of such steps.

    (PyTorch can't keep them by `output_dtype=torch.float32` either: that breaks the output layer's own group.)

    Seen in: accelerate 1.15.
    Test: `test_fsdp_keeps_the_types_of_outputs`.

    Args:
        plugin (`accelerate.utils.FullyShardedDataParallelPlugin`):
            FSDP's options of an accelerator, before it wraps a model. FSDP1, which has no such option, is left alone.
    """
    if plugin.fsdp_version != 2:
        return
    set_mixed_precision = plugin.set_mixed_precision

    @functools.wraps(set_mixed_precision)
    def set_without_output_type(*args, **kwargs):
        set_mixed_precision(*args, **kwargs)
        _drop_output_type(plugin)

    plugin.set_mixed_precision = set_without_output_type  # which transformers calls again for a base in 4 bits
    _drop_output_type(plugin)


def _drop_output_type(plugin: FullyShardedDataParallelPlugin) -> None:
    if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):  # `None` without mixed precision
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


@contextmanager
def whole_weights() -> Iterator[None]:
    """
    Load models with all their weights on this rank, for what no engine will shard: a reward model, the start of a
    critic, the base of an adapter that is merged.

    Under ZeRO-3 every `from_pretrained` and `from_config` of transformers gives each rank a part of each weight, and
    with FSDP's `cpu_ram_efficient_loading` the ranks but the first get no storage for weights that a file lacks, such
    as a new score head.

    Seen in: transformers 5.23.
    Test: `test_models_are_loaded_whole_beside_a_sharded_policy`.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    efficient = os.environ.pop(EFFICIENT_LOADING, None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
        if efficient is not None:
            os.environ[EFFICIENT_LOADING] = efficient


def cast_to_shards(model: nn.Module) -> None:
    """
    Give all weights of a model the type of those that ZeRO-3 has dealt out to the ranks, if there are any.

    With ZeRO-2 DeepSpeed casts the whole model to the type of its mixed precision. With ZeRO-3 it takes the types as
    they are, and trained weights of several types (adapters in bfloat16 beside a critic or a score head in float32)
    end in an `AssertionError` of `defragment`. Its optimizer keeps trained weights in float32 besides, and
    [`~rlhf_trl.ppo.critic.ValueHead`] computes in float32 all the same.

    Seen in: DeepSpeed 0.19.8.
    Test: `test_weights_that_zero3_has_not_dealt_out_get_the_type_of_the_others`.

    Args:
        model (`nn.Module`):
            The model of a trainer, before DeepSpeed wraps it.
    """
    weights = list(model.parameters())
    types = [weight.dtype for weight in weights if hasattr(weight, DEALT_OUT) and weight.is_floating_point()]
    for weight in weights:
        if types and not hasattr(weight, DEALT_OUT) and weight.is_floating_point():
            weight.data = weight.data.to(types[0])


@contextmanager
def bf16_on_cpu_ranks() -> Iterator[None]:
    """
    Let a trainer's arguments ask for bfloat16 on CPU ranks of DeepSpeed, as a rehearsal of a run on several GPUs.

    Transformers takes it on a CPU with `use_cpu` alone, with which accelerate leaves DeepSpeed out.

    Seen in: transformers 5.23.
    Test: `test_bf16_on_cpu_ranks_of_deepspeed`.
    """
    available = training_args.is_torch_bf16_gpu_available
    training_args.is_torch_bf16_gpu_available = lambda: True
    try:
        yield
    finally:
        training_args.is_torch_bf16_gpu_available = available


@contextmanager
def fsdp_on_cpu_ranks() -> Iterator[None]:
    """
    Let an accelerator use FSDP2 on CPU ranks too, as a rehearsal of a run on several GPUs.

    PyTorch's `fully_shard` runs over gloo, but accelerate takes ranks of accelerators only, and runs DDP on others in
    silence.

    Seen in: accelerate 1.15.
    Test: `test_ppo_on_two_sharded_ranks_is_that_of_one_process_and_resumes_exactly`.
    """
    initialize = AcceleratorState.__init__

    @functools.wraps(initialize)
    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        on_cpu = self.distributed_type == DistributedType.MULTI_CPU
        if fsdp_plugin is None or fsdp_plugin.fsdp_version != 2 or not on_cpu:
            return
        self.distributed_type = DistributedType.FSDP
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = with_fsdp
    try:
        yield
    finally:
        AcceleratorState.__init__ = initialize
