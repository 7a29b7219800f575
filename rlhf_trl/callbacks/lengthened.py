"""The note on a resumed run that trains for longer than it was started for."""

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from rlhf_trl.report.text import compact_number
from rlhf_trl.runs.checkpoints import STATE_FILE
from rlhf_trl.runs.record import read_json
from rlhf_trl.terminal import say


class Lengthened(TrainerCallback):
    """
    Say what a longer training means for the learning rate: from the checkpoint on it follows the schedule of the
    longer run, which for all but constant schedules is higher there than it was.

    Args:
        checkpoint (`str`): path of the checkpoint that the run is resumed from.
    """

    def __init__(self, checkpoint: str):
        self.steps = (read_json(f"{checkpoint}/{STATE_FILE}") or {}).get("max_steps")

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        if self.steps is None or state.max_steps <= self.steps:
            return
        said = f"Lengthened from {self.steps:,} to {state.max_steps:,} steps; step {state.global_step:,} is done."
        if isinstance(lr_scheduler, LambdaLR):  # all of transformers' but those that follow a metric
            before = float(lr_scheduler.get_last_lr()[0])
            now = float(lr_scheduler.base_lrs[0]) * lr_scheduler.lr_lambdas[0](lr_scheduler.last_epoch)
            said += (
                f" The learning rate follows the {args.lr_scheduler_type.value} schedule of the longer run: "
                f"{compact_number(now)} from here, where it was {compact_number(before)}."
            )
        say(said)
