"""Samples of what a policy writes while it learns: a file, and a table in the logger."""

import json
import math
import os
from pathlib import Path

from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from rlhf_trl.callbacks.base import progress_counts, steps_per_rollout
from rlhf_trl.data.messages import as_text
from rlhf_trl.runs.record import SAMPLES_FILE


# The trainers' deques have no counter. But each reward in them is an object of its own: identity tells new rows.
def newest_row(trainer: Trainer) -> float | None:
    """A mark of the newest row in `trainer._logs`, for [`rows_after`]; `None` where there is none yet."""
    rewards = next(iter(trainer._logs["rewards"].values()), None)
    return rewards[-1] if rewards else None


def rows_after(trainer: Trainer, mark: float | None) -> list[int]:
    """Indices of the rows of `trainer._logs` that came after the one marked by `mark`; all where it is gone."""
    rewards = list(next(iter(trainer._logs["rewards"].values()), ()))
    start = next((i + 1 for i, value in enumerate(rewards) if value is mark), 0)
    return list(range(start, len(rewards)))


class SampleLog(TrainerCallback):
    """
    Writes prompts, completions and rewards of the newest rollout at each log step, for trainers that generate.

    Rows go to `samples.jsonl` in the run directory, to a table `samples` that grows over the steps where W&B is on,
    and to TensorBoard's text where that is. Only rank 0 writes.

    Args:
        trainer ([`~trl.GRPOTrainer`], [`~trl.RLOOTrainer`] or a subclass):
            The trainer, which keeps prompts, completions and rewards of its last rollout.
        run_dir (`str`):
            Directory of the run.
        max_rows (`int`, *optional*, defaults to `8`):
            Rows a log step, spread evenly over the rollout.
    """

    def __init__(self, trainer: Trainer, run_dir: str, max_rows: int = 8):
        self.trainer = trainer
        self.path = Path(run_dir, SAMPLES_FILE)
        self.max_rows = max_rows
        self._written = None  # newest row that has been written
        self._stepped = None  # newest row when the last step or evaluation ended
        self._table = None

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed run makes the steps after its checkpoint again
        if state.is_world_process_zero and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, self.path)

    def on_step_end(self, args, state, control, **kwargs):
        self._stepped = newest_row(self.trainer)

    def on_evaluate(self, args, state, control, **kwargs):
        self._stepped = newest_row(self.trainer)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        evaluation = any(key.startswith("eval_") for key in logs)
        indices = rows_after(self.trainer, self._stepped if evaluation else self._written)
        self._written = newest_row(self.trainer)
        if not indices:
            return
        count = min(self.max_rows, len(indices))
        rows = [self._row(indices[i * len(indices) // count]) for i in range(count)]
        where = {
            "step": state.global_step,
            "rollout": math.ceil(state.global_step / steps_per_rollout(args)),
            "split": "eval" if evaluation else "train",
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({**where, **row}, ensure_ascii=False) + "\n" for row in rows)
        self._log_table([{**where, **row} for row in rows], progress_counts(args, state.global_step))

    def _row(self, index: int) -> dict:
        logs = self.trainer._logs
        rewards = {name: values[index] for name, values in logs["rewards"].items()}
        return {
            "prompt": as_text(logs["prompt"][index]),
            "completion": as_text(logs["completion"][index]),
            "rewards": {name: _rounded(value) for name, value in rewards.items()},
        }

    def _log_table(self, rows: list[dict], counts: dict[str, int]) -> None:
        flat = [{**{k: v for k, v in row.items() if k != "rewards"}, **row["rewards"]} for row in rows]
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, WandbCallback):
                self._log_wandb(flat, counts)
            elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                lines = ["|" + "|".join(flat[0]) + "|", "|" + "---|" * len(flat[0])]
                lines += ["|" + "|".join(_cell(value) for value in row.values()) + "|" for row in flat]
                callback.tb_writer.add_text("samples", "\n".join(lines), counts["train/global_step"])

    def _log_wandb(self, rows: list[dict], counts: dict[str, int]) -> None:
        import wandb

        if wandb.run is None:
            return
        if self._table is None:
            # Incremental: each step uploads its own rows, and the interface shows them all
            self._table = wandb.Table(columns=list(rows[0]), log_mode="INCREMENTAL")
        for row in rows:
            self._table.add_data(*row.values())
        wandb.log({"samples": self._table, **counts})


def _rounded(value: float) -> float | None:
    # The trainer keeps a reward of None, that is not applicable, as NaN; and six digits are what float32 holds
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _cell(value) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
