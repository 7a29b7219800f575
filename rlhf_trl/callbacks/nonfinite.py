"""A guard against NaN and infinity in every stage: in each update, and at the end of training."""

import math

import torch
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import Trainer

from rlhf_trl.callbacks.base import SaveAndStop
from rlhf_trl.errors import DivergedError
from rlhf_trl.models.weights import local_part, nonfinite_weights
from rlhf_trl.runs.ranks import any_rank

# Consecutive updates, or log lines. A single one may be a bad batch, which costs only that update.
PATIENCE = 3


class NonfiniteGuard(SaveAndStop):
    """
    Skip each update with NaN or infinite gradients, and end a run that has diverged.

    No parameter moves in a skipped update. (With float16 the gradient scaler does that, and it is no sign of
    divergence; DeepSpeed updates within `backward`: there the loss of the log lines is watched instead.)

    Args:
        trainer (`transformers.Trainer`): the trainer, any of them.

    Attributes:
        nonfinite_updates (`int`): number of updates skipped so far.

    Raises:
        DivergedError: after three updates in a row with such gradients, after three log lines in a row with such a
            loss, and at the end of training if a weight is NaN or infinite or the last update was skipped.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.nonfinite_updates = 0
        self._in_a_row = self._losses_in_a_row = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._in_a_row = self._losses_in_a_row = 0

    def on_pre_optimizer_step(self, args, state, control, optimizer: Optimizer, **kwargs):
        if self.trainer.is_deepspeed_enabled or self.trainer.accelerator.scaler is not None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [local_part(p.grad) for p in parameters]
        if not any_rank(bool(grads) and not torch.nn.utils.get_total_norm(grads).isfinite().item(), args.device):
            self._in_a_row = 0
            return
        self.nonfinite_updates += 1
        self._in_a_row += 1
        for parameter in parameters:
            parameter.grad = None  # an optimizer skips parameters without a gradient
        if state.is_world_process_zero:
            tqdm.write(f"Step {state.global_step + 1} had NaN or infinite gradients: this update is skipped.")
        if self._in_a_row == PATIENCE:
            first = state.global_step + 2 - PATIENCE
            raise DivergedError(
                f"The updates {first} to {state.global_step + 1} had NaN or infinite gradients and were skipped: the "
                f"training has diverged. {_remedy(args)}"
            )

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs):
        if "loss" not in logs:
            return
        self._losses_in_a_row = 0 if math.isfinite(logs["loss"]) else self._losses_in_a_row + 1
        if self._losses_in_a_row == PATIENCE:
            raise DivergedError(
                f"The loss was NaN or infinite in {PATIENCE} log lines in a row, the last one at step "
                f"{state.global_step}: the training has diverged. {_remedy(args)}"
            )

    def on_train_end(self, args, state, control, model: torch.nn.Module, **kwargs):
        names = list(nonfinite_weights(model.named_parameters()))
        if any_rank(bool(names), args.device):
            raise DivergedError(
                f"The trained model has NaN or infinite weights{_such_as(names)}, so it was not saved. {_remedy(args)}"
            )
        if self._in_a_row and self.stopped_at is None:
            raise DivergedError(
                f"The training ended at step {state.global_step} with NaN or infinite gradients, so the model was not "
                f"saved. {_remedy(args)}"
            )


def _such_as(names: list[str]) -> str:
    return f", such as `{names[0]}`" if names else ""


def _remedy(args) -> str:
    return (
        f"Lower `stage.args.learning_rate` ({args.learning_rate:g}), lengthen `stage.args.warmup_steps`, or look for "
        "extreme rows or rewards. The last checkpoint, if there is one, is from before."
    )
