"""Progress bars, and one line of metrics per log step."""

import sys
from datetime import timedelta

from tqdm.auto import tqdm
from transformers import ProgressCallback
from transformers.trainer_utils import has_length

from rlhf_trl.health.signs import verdict
from rlhf_trl.report.text import compact_number
from rlhf_trl.terminal import keep_output_above_bars, printable

# Metrics of a terminal line, {logged name: label}, about eight per trainer, by a metric that only this trainer logs.
# All metrics go to metrics.json and to the logger.
COLUMNS = {
    "pairs/ties": {  # online DPO
        "reward": "reward",
        "objective/kl": "kl",
        "rewards/margins": "margin",
        "rewards/accuracies": "accuracy",
        "pairs/ties": "ties",
        "completions/mean_length": "len",
        "completions/clipped_ratio": "truncated",
        "loss": "loss",
        "grad_norm": "grad",
    },
    "frac_reward_zero_std": {  # GRPO, RLOO
        "reward": "reward",
        "reward_std": "std",
        "objective/kl": "kl",
        "objective/kl_coef": "beta",
        "entropy": "entropy",
        "completions/mean_length": "len",
        "completions/clipped_ratio": "truncated",
        "frac_reward_zero_std": "no_signal",
        "grad_norm": "grad",
    },
    "objective/scores": {  # PPO
        "objective/scores": "score",
        "objective/kl": "kl",
        "objective/kl_coef": "beta",
        "policy/approxkl": "approxkl",
        "policy/clipfrac": "clip",
        "policy/entropy": "entropy",
        "value/explained_variance": "expl_var",
        "completions/mean_length": "len",
        "completions/eos_rate": "eos",
    },
    "completions/clipped_ratio": {  # online DPO, held out
        "reward": "reward",
        "win_rate": "win_rate",
        "objective/kl": "kl",
        "completions/mean_length": "len",
        "completions/clipped_ratio": "truncated",
    },
    "rewards/margins": {  # DPO, ORPO, KTO
        "rewards/margins": "margin",
        "loss": "loss",
        "rewards/accuracies": "accuracy",
        "rewards/chosen": "chosen",
        "rewards/rejected": "rejected",
        "nll_loss": "nll",
        "kl": "kl",
        "grad_norm": "grad",
        "learning_rate": "lr",
    },
    "mean_reward": {  # Reward
        "mean_reward": "reward",
        "loss": "loss",
        "accuracy": "accuracy",
        "margin": "margin",
        "mse": "mse",
        "grad_norm": "grad",
        "learning_rate": "lr",
    },
    "loss": {  # SFT, and any other
        "loss": "loss",
        "mean_token_accuracy": "accuracy",
        "entropy": "entropy",
        "num_tokens": "tokens",
        "grad_norm": "grad",
        "learning_rate": "lr",
    },
}


# Nats below which a KL is rounding: two passes of one model in float32 differ by up to 1e-6 per token
NO_KL = 1e-4


def choose_columns(logs: dict) -> dict[str, str]:
    """Return the metrics to show of lines like `logs`, {logged name: label}, the most important ones first."""
    for trainers_own, columns in COLUMNS.items():
        if trainers_own in logs:
            return {name: label for name, label in columns.items() if name in logs}
    return {name: name for name in list(logs)[:8]}


def metrics_line(logs: dict, columns: dict[str, str], step: int, max_steps: int) -> str:
    """
    Format one call of `Trainer.log` as a line, with cells of constant width, so that the lines of a run align.

    Args:
        logs (`dict`):
            Logged numbers; `None` where there was nothing to average.
        columns (`dict`):
            The metrics to show, {logged name: label}.
        step (`int`):
            Optimizer steps done.
        max_steps (`int`):
            Optimizer steps of the whole run.

    Returns:
        `str`: the line. A metric without a value, such as the reward at a step without a rollout, is a dash, and a KL
            below `NO_KL` is 0.
    """
    cells = []
    for name, label in columns.items():
        value = logs.get(name)
        if label == "kl" and isinstance(value, float) and abs(value) < NO_KL:
            value = 0
        text = "-" if value is None else compact_number(value) if isinstance(value, (int, float)) else str(value)
        cells.append(f"{label} {text:<7}")
    return f"{step:>{len(str(max_steps))}}/{max_steps}  {' '.join(cells)}".rstrip()


class ProgressLine(ProgressCallback):
    """
    Progress bars of training and evaluation, and one aligned line of the main metrics per log step.

    Replaces `transformers.ProgressCallback` and `transformers.PrinterCallback`. Only rank 0 prints. With
    `disable_tqdm=True` there are lines but no bars; outside of a terminal, the bar of training is updated every 30
    seconds, and evaluations have none.
    """

    def __init__(self):
        super().__init__()
        self.columns = None  # those of the first step, for the whole run

    def _bar(self, args, **kwargs):
        interval = 0.1 if sys.stderr.isatty() else 30
        options = {"dynamic_ncols": True, "delay": 0, "mininterval": interval, "disable": args.disable_tqdm}
        return tqdm(**options | kwargs)

    def on_train_begin(self, args, state, control, **kwargs):
        # The speed must not count the steps before a resume
        self.current_step = self.first_step = state.global_step
        if state.is_world_process_zero:
            keep_output_above_bars()  # of the libraries that were imported since
            self.training_bar = self._bar(args, total=state.max_steps, initial=state.global_step, leave=True)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.prediction_bar is None:
                hidden = args.disable_tqdm or not sys.stderr.isatty()  # below another bar: escape codes in a file
                total = len(eval_dataloader)
                self.prediction_bar = self._bar(args, total=total, leave=False, desc="eval", disable=hidden)
            self.prediction_bar.update(1)

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs):
        if not state.is_world_process_zero:
            return
        if "train_runtime" in logs:  # the summary at the end
            duration = timedelta(seconds=round(logs["train_runtime"]))
            line = f"trained {state.global_step} steps in {duration}, mean loss {compact_number(logs['train_loss'])}"
            if state.global_step == self.first_step:
                line = f"all {state.global_step} steps were trained before"
        elif any(name.startswith("eval_") for name in logs):
            logs = {name.removeprefix("eval_"): value for name, value in logs.items()}
            line = "eval  " + metrics_line(logs, choose_columns(logs), state.global_step, state.max_steps)
        else:
            self.columns = self.columns or choose_columns(logs)
            line = "train " + metrics_line(logs, self.columns, state.global_step, state.max_steps)
            if told := verdict(logs):
                line += f"  {told}"
        tqdm.write(printable(line))  # above the bars
