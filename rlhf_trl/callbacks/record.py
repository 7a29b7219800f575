"""`metrics.json` of a run in progress."""

import math
import time

from transformers import TrainerCallback

from rlhf_trl.runs.directory import delete_backup
from rlhf_trl.runs.record import write_metrics

# A long history is not rewritten at every log step
SECONDS_BETWEEN_WRITES = 5.0


class RunRecord(TrainerCallback):
    """
    Keep `metrics.json` up to date, and delete the run that this one overwrites after the first step.

    Args:
        run_dir (`str`):
            Directory of the run, which is the trainer's `output_dir`.
    """

    def __init__(self, run_dir: str):
        self.run_dir = run_dir
        self._written = -math.inf

    def on_train_end(self, args, state, control, **kwargs):
        self._write(state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            delete_backup(self.run_dir)

    def on_log(self, args, state, control, **kwargs):
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self._write(state)

    def on_evaluate(self, args, state, control, **kwargs):
        self._write(state)

    def on_save(self, args, state, control, **kwargs):
        self._write(state)

    def _write(self, state) -> None:
        if state.is_world_process_zero:
            write_metrics(self.run_dir, state.log_history)
            self._written = time.monotonic()
