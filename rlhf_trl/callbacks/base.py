"""Base of callbacks that can end a training, and the progress of a run in rollouts."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl


def progress_counts(args: Any, step: int) -> dict[str, int]:
    """
    Return the progress of a run at an optimizer step, for the x-axis of its metrics.

    Returns:
        `dict[str, int]`: `train/global_step`; for trainers that generate also `train/rollout` and `train/episodes`,
        the rollouts begun so far and their completions.
    """
    counts = {"train/global_step": step}
    if hasattr(args, "steps_per_generation"):
        micro_batches = step * args.gradient_accumulation_steps
        counts["train/rollout"] = math.ceil(micro_batches / (args.steps_per_generation * args.num_iterations))
        counts["train/episodes"] = counts["train/rollout"] * args.generation_batch_size
    return counts


class SaveAndStop(TrainerCallback):
    """
    A callback that can end the training after the step it is at, with a checkpoint whatever `save_strategy` is.

    Attributes:
        reason (`str` or `None`): why it ended the training, for the run's record.
    """

    reason: str | None = None
    stopped_at: int | None = None  # step
    _saved: int | None = None  # step of the last checkpoint

    def stop(self, step: int, control: TrainerControl) -> None:
        """Save and stop. Call it in `on_step_end`, or in the `on_log` that follows."""
        self.stopped_at = step
        control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        self._saved = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped_at == state.global_step:
            # The epoch has not ended, and what has been saved needn't be saved again; `save_strategy=best` may have
            # kept it from being saved at all
            control.should_evaluate = False
            control.should_save = self._saved != state.global_step
