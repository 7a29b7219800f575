"""Samples of what a policy writes while it learns: a file, and a table in the logger."""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from rlhf_trl.callbacks.base import progress_counts
from rlhf_trl.data.messages import as_text
from rlhf_trl.data.multimodal import beside
from rlhf_trl.runs.record import SAMPLES_FILE
from rlhf_trl.trainers.rollout_hook import RolloutRecord, RolloutTrainer
from rlhf_trl.trainers.steps import steps_per_rollout


class Sample(NamedTuple):
    """
    A completion, and what each reward function gave it: NaN where it doesn't apply. `images` are thumbnails of the
    prompt's, as data URIs.
    """

    prompt: str | list[dict]
    completion: str | list[dict]
    rewards: list[float]
    images: list[str] | None


class SampleLog(TrainerCallback):
    """
    Write prompts, completions and rewards of the newest rollout at each log step, for trainers that generate.

    Rows go to `samples.jsonl` in the run directory, to a table `samples` that grows over the steps where W&B is on,
    and to TensorBoard's text where that is, there without images. Only rank 0 writes.

    Args:
        trainer ([`~rlhf_trl.trainers.rollout_hook.RolloutHook`]):
            The trainer: PPO, GRPO or RLOO.
        run_dir (`str`):
            Directory of the run.
        max_rows (`int`, *optional*, defaults to `8`):
            Rows per log step, spread evenly over the rollout. Of an evaluation, over its first batches.
    """

    def __init__(self, trainer: RolloutTrainer, run_dir: str, max_rows: int = 8):
        self.trainer = trainer
        self.path = Path(run_dir, SAMPLES_FILE)
        self.max_rows = max_rows
        self._rollout: list[Sample] = []  # of the newest rollout, until they are written
        self._held_out: list[Sample] = []  # of an evaluation
        self._table = None
        trainer.on_rollout(self._keep)
        trainer.show_images(self._choose)

    def _choose(self, training: bool, count: int) -> list[int]:
        """Return which of `count` completions are written."""
        rows = min(count, self.max_rows if training else self.max_rows - len(self._held_out))
        return [i * count // rows for i in range(rows)]

    def _keep(self, rollout: RolloutRecord) -> None:
        samples = [
            Sample(
                rollout.prompts[i],
                rollout.completions[i],
                rollout.rewards.values[i].tolist(),
                None if rollout.images is None else rollout.images[i],
            )
            for i in self._choose(rollout.training, rollout.rows)
        ]
        if rollout.training:
            self._rollout = samples
        else:
            self._held_out += samples

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed run makes the steps after its checkpoint again
        if state.is_world_process_zero and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, self.path)

    def on_log(self, args, state, control, logs: dict[str, Any], **kwargs):
        evaluation = any(key.startswith("eval_") for key in logs)
        kept = self._held_out if evaluation else self._rollout
        rows = list(map(self._row, kept))
        kept.clear()  # on every rank, since all choose the same rows
        if not rows or not state.is_world_process_zero:
            return
        where = {
            "step": state.global_step,
            "rollout": math.ceil(state.global_step / steps_per_rollout(args)),
            "split": "eval" if evaluation else "train",
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({**where, **row}, ensure_ascii=False) + "\n" for row in rows)
        self._log_table([{**where, **row} for row in rows], progress_counts(args, state.global_step))

    def _row(self, sample: Sample) -> dict:
        rewards = dict(zip(self.trainer.reward_func_names, sample.rewards, strict=True))
        return {
            "prompt": as_text(sample.prompt),
            **({} if sample.images is None else {"images": sample.images}),
            "completion": as_text(sample.completion),
            "rewards": {name: _rounded(value) for name, value in rewards.items()},
        }

    def _log_table(self, rows: list[dict], counts: dict[str, int]) -> None:
        flat = [{**{k: v for k, v in row.items() if k != "rewards"}, **row["rewards"]} for row in rows]
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, WandbCallback):
                self._log_wandb(flat, counts)
            elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                flat = [{name: value for name, value in row.items() if name != "images"} for row in flat]
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
            if "images" in row:
                # One picture a cell: a table shows no lists of them
                row = row | {"images": wandb.Image(beside(row["images"])) if row["images"] else None}
            self._table.add_data(*row.values())
        wandb.log({"samples": self._table, **counts})


def _rounded(value: float) -> float | None:
    # TRL writes a reward of None, that is not applicable, as NaN; and six digits are what float32 holds
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _cell(value) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
