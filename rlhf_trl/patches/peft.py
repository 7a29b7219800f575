"""PEFT: several adapters of one model that are trained, recomputed and saved each for itself."""

# Methods of instances are replaced, and a PeftModel forwards attributes: no types say so
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel


class TokensWrapper(TrainableTokensWrapper):
    """
    PEFT's wrapper of a layer with trainable tokens (`trainable_token_indices`), with two repairs.

    - `bias`: TRL's fused output layer reads `lm_head.bias`, and the wrapper of a tied one forwards `weight` only.
    - The two methods return nothing for an adapter that trains no tokens. PEFT asks every wrapper for the weights of
      every adapter, and this one raises a `KeyError`.

    Seen in: PEFT 0.21, TRL 1.16.
    Test: `test_roles_of_any_kind_share_a_base`.
    """

    @property
    def bias(self):
        """Bias of the wrapped layer."""
        return self.original_module.bias

    def adapter_state_dict(self, adapter_name, state_dict):
        """See `peft.utils.other.AuxiliaryTrainingWrapper.adapter_state_dict`."""
        return super().adapter_state_dict(adapter_name, state_dict) if adapter_name in self._adapters else {}

    def adapter_state_dict_load_map(self, adapter_name):
        """See `peft.utils.other.AuxiliaryTrainingWrapper.adapter_state_dict_load_map`."""
        return super().adapter_state_dict_load_map(adapter_name) if adapter_name in self._adapters else {}


def repair_token_wrappers(model: nn.Module) -> None:
    """
    Make the wrappers of layers with trainable tokens [`TokensWrapper`]s.

    PEFT makes them itself, without an option for their class.

    Args:
        model (`nn.Module`):
            Model to repair in place. A second call changes nothing.
    """
    for module in model.modules():
        if type(module) is TrainableTokensWrapper:
            module.__class__ = TokensWrapper


def cast_head_inputs(head: nn.Linear) -> None:
    """
    Cast the inputs of a score head to the type of its weight.

    PEFT trains a head (`modules_to_save`) in float32, whatever the type of the base whose hidden states it reads. The
    hook is copied with the layer.

    Seen in: PEFT 0.21.
    Test: `test_a_score_head_in_float32_reads_a_bfloat16_base`.

    Args:
        head (`nn.Linear`):
            Score head.
    """
    head.register_forward_pre_hook(_cast_to_weight)


def _cast_to_weight(module: nn.Linear, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].to(module.weight.dtype),)


@contextmanager
def active_adapter(layers: Sequence[nn.Module], name: str) -> Iterator[None]:
    """
    Activate one adapter of some layers.

    PEFT's `set_adapter` also changes `requires_grad`. Here it stays, so that several adapters can be trained in turn.

    Seen in: PEFT 0.21.
    Test: `test_one_update_with_a_critic_adapter_equals_plain_pytorch`.

    Args:
        layers (`Sequence[nn.Module]`):
            Layers with adapters.
        name (`str`):
            Adapter to activate.
    """
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        # TrainableTokensLayer, unlike all other layers, fails on an adapter that it doesn't have
        lacking = isinstance(layer, TrainableTokensLayer) and name not in layer.token_indices
        layer._active_adapter = [] if lacking else [name]
    try:
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer._active_adapter = names


def recompute_with_the_same_adapter(model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
    """
    Make gradient checkpointing recompute each layer under the adapter of its first pass.

    The recomputation happens in the backward, when another adapter may be active: its gradients would be those of
    another network. (PyTorch's own `context_fn` can't do it: TRL makes checkpointing reentrant under ZeRO-3, which has
    none.)

    Seen in: transformers 5.23, PEFT 0.21.
    Test: `test_one_update_with_a_critic_adapter_equals_plain_pytorch`.

    Args:
        model (`PreTrainedModel`):
            Model whose gradient checkpointing is changed.
        layers (`Sequence[nn.Module]`):
            Its layers with adapters.
    """
    set_checkpointing = model._set_gradient_checkpointing

    def with_adapter(checkpoint, function, *args, **kwargs):
        name = layers[0].active_adapters[0]

        def same_adapter(*args):
            with active_adapter(layers, name):
                return function(*args)

        return checkpoint(same_adapter, *args, **kwargs)

    @functools.wraps(set_checkpointing)
    def with_adapters(enable=True, gradient_checkpointing_func=torch.utils.checkpoint.checkpoint, **kwargs):
        if enable:
            gradient_checkpointing_func = functools.partial(with_adapter, gradient_checkpointing_func)
        set_checkpointing(enable=enable, gradient_checkpointing_func=gradient_checkpointing_func, **kwargs)

    model._set_gradient_checkpointing = with_adapters


def save_only(model: PeftModel, adapters: Sequence[str]) -> None:
    """
    Make `save_pretrained` write some adapters only.

    PEFT has the argument `selected_adapters`, but the Trainer and TRL call `save_pretrained` without it.

    Seen in: transformers 5.23, TRL 1.16.
    Test: `test_the_policys_files_hold_the_policy_alone`.

    Args:
        model (`PeftModel`):
            Model whose `save_pretrained` is changed. A second call changes nothing.
        adapters (`Sequence[str]`):
            Names of the adapters to write.
    """
    if not isinstance(model.save_pretrained, functools.partial):
        model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=list(adapters))
