"""Weights & Biases with the metrics' own sections and one x-axis."""

from typing import Any

from transformers import Trainer
from transformers.integrations import WandbCallback

from rlhf_trl.callbacks.base import progress_counts


class WandbSections(WandbCallback):
    """
    `transformers.integrations.WandbCallback` with the metrics' own sections, which it replaces in the trainer.

    The stock one puts all metrics into one section, `train`, over optimizer steps, of which a rollout has one or
    many. Here `objective/kl` is in the section `objective`, `eval_objective/kl` in `eval`, and what has no section in
    `train`; the x-axis of all is `train/rollout` for trainers that generate, else `train/global_step`. Both are logged
    with everything, and `train/episodes` (completions), to choose another axis.

    Args:
        trainer ([`~transformers.Trainer`]): the trainer.
    """

    _wandb: Any  # the module, which transformers imports where it is installed

    def __init__(self, trainer: Trainer):
        super().__init__()
        trainer.remove_callback(WandbCallback)

    def setup(self, args, state, model, **kwargs):
        """Set up W&B as `WandbCallback` does, and define the x-axis."""
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            axis = "train/rollout" if hasattr(args, "steps_per_generation") else "train/global_step"
            self._wandb.define_metric(axis)
            self._wandb.define_metric("*", step_metric=axis, step_sync=True, overwrite=True)

    def on_log(self, args, state, control, model, logs: dict[str, float], **kwargs):
        if not self._initialized:
            self.setup(args, state, model)
        if not state.is_world_process_zero:
            return
        if "train_runtime" in logs:  # logged once, at the end of training: no curves
            for name, value in logs.items():
                self._wandb.run.summary[sectioned(name)] = value
            return
        named = {sectioned(name): value for name, value in logs.items()}
        self._wandb.log({**named, **progress_counts(args, state.global_step)})


def sectioned(name: str) -> str:
    """Return the name of a logged metric in W&B, whose sections end at the first slash."""
    if name.startswith("eval_"):
        return f"eval/{name.removeprefix('eval_')}"
    return name if "/" in name else f"train/{name}"
