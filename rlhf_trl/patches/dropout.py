"""Transformers: dropout disabled for a whole training run, on every architecture."""

# Methods of instances are replaced, and a PeftModel forwards attributes: no types say so
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import functools
import types
from collections.abc import Callable

from accelerate.utils import is_peft_model
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def disable_dropout(model: PreTrainedModel | PeftModel) -> None:
    """
    Keep all modules below `model` in evaluation mode, whatever `model.train()` is told.

    `model.training` still says what it was told. A second call changes nothing.

    TRL's `disable_dropout_in_model` sets the probability of `nn.Dropout` modules to 0. That misses functional dropout
    (`nn.functional.dropout(p=self.dropout, training=self.training)` of OPT, XGLM, BioGPT, Falcon, ...), the dropout of
    attention, randomly skipped layers (`layerdrop`) and router noise. All of these ask `self.training`. Modules added
    below `model` later, such as a critic, are covered as well.

    Seen in: TRL 1.16, transformers 5.23.
    Test: `test_other_stages_train_without_dropout`.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model to train, with or without adapters.
    """
    policy = model.get_base_model() if is_peft_model(model) else model
    if "train" in vars(policy):
        return
    set_checkpointing = policy._set_gradient_checkpointing

    def train(self, mode: bool = True):
        self.training = mode
        _keep_in_eval(self)
        return self

    @functools.wraps(set_checkpointing)
    def set_gradient_checkpointing(*args, **kwargs):
        if "gradient_checkpointing_func" in kwargs:
            checkpoint = kwargs["gradient_checkpointing_func"]
            kwargs["gradient_checkpointing_func"] = functools.partial(_checkpoint_in_eval, checkpoint)
        set_checkpointing(*args, **kwargs)
        _keep_in_eval(policy)

    policy.train = types.MethodType(train, policy)
    policy._set_gradient_checkpointing = set_gradient_checkpointing
    policy.train(policy.training)


def _keep_in_eval(model: PreTrainedModel) -> None:
    """
    Set evaluation mode on all modules below a model, but for the layers to checkpoint: `GradientCheckpointingLayer`
    checkpoints in training mode only.

    The Trainer calls `train` at each step. Only modules in another mode are set: to set every module, as torch does,
    takes three times as long (5 ms for the 2,000 modules of LoRA on 24 layers).
    """
    modules = list(model.children())
    while modules:
        module = modules.pop()
        is_layer = isinstance(module, GradientCheckpointingLayer)
        checkpoints = model.training and is_layer and module.gradient_checkpointing
        if module.training and not checkpoints:
            module.train(False)
        elif checkpoints:
            module.training = True
        modules.extend(module.children())


def _checkpoint_in_eval(checkpoint: Callable, forward: functools.partial, *args, **kwargs):
    """Checkpoint the forward of a layer, `forward.args[0]`, in evaluation mode, recomputation included."""
    layer = forward.args[0]

    def in_eval(*args):
        layer.training = False
        try:
            return forward(*args)
        finally:
            layer.training = True

    return checkpoint(in_eval, *args, **kwargs)
