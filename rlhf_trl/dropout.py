"""Dropout switched off for a whole training run, on every architecture."""

import functools
import types
from collections.abc import Callable

from accelerate.utils import is_peft_model
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def disable_dropout(model: PreTrainedModel | PeftModel) -> None:
    """
    Keep all modules below `model` in evaluation mode, whatever `model.train()` is told; `model.training` says what it
    was told. A second call changes nothing.

    TRL's `disable_dropout_in_model` sets the probability of `nn.Dropout` modules to 0. That misses dropout by
    functions (`nn.functional.dropout(p=self.dropout, training=self.training)` of OPT, XGLM, BioGPT, Falcon, ...), the
    attention's, layers that are skipped at random (`layerdrop`) and the noise of routers. They all ask
    `self.training`. What is added below `model` later, such as a critic, is covered as well.
    """
    policy = model.get_base_model() if is_peft_model(model) else model
    if "train" in vars(policy):
        return
    set_checkpointing = policy._set_gradient_checkpointing

    def train(self, mode: bool = True):
        self.training = mode
        for child in self.children():
            child.train(False)
        _let_layers_checkpoint(self)
        return self

    @functools.wraps(set_checkpointing)
    def set_gradient_checkpointing(*args, **kwargs):
        if "gradient_checkpointing_func" in kwargs:
            checkpoint = kwargs["gradient_checkpointing_func"]
            kwargs["gradient_checkpointing_func"] = functools.partial(_checkpoint_in_eval, checkpoint)
        set_checkpointing(*args, **kwargs)
        _let_layers_checkpoint(policy)

    policy.train = types.MethodType(train, policy)
    policy._set_gradient_checkpointing = set_gradient_checkpointing
    policy.train(policy.training)


def _let_layers_checkpoint(model: PreTrainedModel) -> None:
    """Layers checkpoint in training mode alone, so those that shall are in it, but for their forward."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = model.training and layer.gradient_checkpointing


def _checkpoint_in_eval(checkpoint: Callable, forward: functools.partial, *args, **kwargs):
    """Checkpoint the forward of a layer, `forward.args[0]`, in evaluation mode, also where the backward repeats it."""
    layer = forward.args[0]

    def in_eval(*args):
        layer.training = False
        try:
            return forward(*args)
        finally:
            layer.training = True

    return checkpoint(in_eval, *args, **kwargs)
