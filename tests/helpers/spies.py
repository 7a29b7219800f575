"""Callbacks that look into a run, named in its config: `+callbacks.spy._target_=tests.helpers.spies.Spy`."""

import torch
from transformers import TrainerCallback

from rlhf_trl.errors import ConfigError

SPY = "+callbacks.spy._target_=tests.helpers.spies.Spy"
CRASH = "+callbacks.crash._target_=tests.helpers.spies.Crash"
# Ids of any tokenizer here, none of them a special one
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [20, 19, 18, 17, 16, 15, 14, 13]])


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


class Spy(TrainerCallback):
    """Keeps the model and the optimizer of the last run."""

    model = optimizer = None

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        Spy.model, Spy.optimizer = model, optimizer


class Crash(TrainerCallback):
    """Fails after the step that `at` names."""

    at = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == Crash.at:
            raise RuntimeError("crashed on purpose")


class Spoil(TrainerCallback):
    """Makes all gradients NaN in the steps that `steps` names, and a weight infinite after the step `weight`."""

    steps, weight = (), None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(
                    lambda grad: grad * float("nan") if state.global_step + 1 in Spoil.steps else grad
                )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == Spoil.weight:
            next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = float("inf")


class Wrong(TrainerCallback):
    """Finds the config wrong when the model is loaded."""

    def on_train_begin(self, args, state, control, **kwargs):
        raise ConfigError("wrong on purpose")
