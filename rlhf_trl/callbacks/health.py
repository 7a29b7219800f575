"""
Health monitor for PPO, RLOO and GRPO, which watches the metrics and names signs of trouble, each with a remedy.

The signs are in [`rlhf_trl.health.signs`]. They are computed from the texts and metrics that exist already: no forward
pass, no generation.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from rlhf_trl.callbacks.nonfinite import NonfiniteGuard
from rlhf_trl.callbacks.options import HEALTH
from rlhf_trl.config.ranges import check_values
from rlhf_trl.data.messages import as_text
from rlhf_trl.health.series import BASELINE, WINDOW, Series
from rlhf_trl.health.signs import LEVELS, SIGNS, all_limits, evaluate_signs, signs_seen
from rlhf_trl.health.text_statistics import rollout_measures
from rlhf_trl.runs.ranks import any_rank
from rlhf_trl.terminal import printable
from rlhf_trl.trainers.rollout_hook import RolloutHook, RolloutRecord
from rlhf_trl.trainers.steps import steps_per_rollout

STOP = LEVELS.index("stop")


class HealthMonitor(NonfiniteGuard):
    """
    Watch a run with rollouts and name signs of trouble, at the levels note, warn and stop.

    Every train log step gets `health/level` and `health/<sign>` (0 ok, 1 note, 2 warn, 3 stop), and the measures
    of the rollout that signs are made of. A sign is explained when it first reaches a level; a summary ends the run.
    At the level stop the run ends after its rollout as if it were done, with a checkpoint and a reason in its record.

    It is the [`NonfiniteGuard`] as well: an update with NaN or infinite gradients is withheld.

    A reward function with weight 0 is not learned from; it is watched, as the held-out judge of `over_optimization`.

    Args:
        trainer ([`PPOTrainer`], [`~trl.GRPOTrainer`] or [`~trl.RLOOTrainer`]): the trainer.
        signs (`dict`, *optional*): limits that differ from the defaults, `{sign: {"note", "warn", "stop"}}` with
            numbers, or `None` for never.
        baseline (`int`, defaults to `4`): log steps at the start that later ones are compared with.
        window (`int`, defaults to `3`): newest log steps that are averaged. Nothing but `nan` is said before log step
            `baseline + window`.

    Attributes:
        reason (`str` or `None`): why the monitor ended the training.

    Raises:
        ConfigError: at an unknown sign or limits that contradict each other.
    """

    trainer: RolloutHook

    def __init__(
        self,
        trainer: RolloutHook,
        signs: Mapping[str, Mapping[str, float | None]] | None = None,
        baseline: int = BASELINE,
        window: int = WINDOW,
    ):
        check_values(HEALTH, {"baseline": baseline, "window": window}, "health.")
        super().__init__(trainer)
        self.limits = all_limits(signs)
        self.baseline, self.window = baseline, window
        trainer.on_rollout(self._keep)
        self._rollout: RolloutRecord | None = None  # made in this step
        self._reported: dict[str, int] = {}  # highest level of each sign that was explained

    # ---- Measures of a rollout ----

    def _keep(self, rollout: RolloutRecord) -> None:
        if rollout.training:
            self._rollout = rollout

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        # The first callback, so that what it adds to the logs reaches every logger
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)
        weights = dict(zip(self.trainer.reward_func_names, self.trainer.reward_weights.tolist(), strict=True))
        self.series = Series(self.baseline, self.window, watched=[name for name, w in weights.items() if w == 0])
        for entry in state.log_history:  # of a resumed run
            self.series.add(entry)
            self.nonfinite_updates = int(entry.get("health/nonfinite_updates") or self.nonfinite_updates)
        self._reported = {found.sign: found.level for found in signs_seen(state.log_history)}
        self.reason = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._rollout is not None:
            self._measure(self._rollout)
            self._rollout = None
        if state.global_step % steps_per_rollout(args) == 0:
            self._end(state, control)

    def _measure(self, rollout: RolloutRecord) -> None:
        prompts, completions = ([as_text(text) for text in texts] for texts in (rollout.prompts, rollout.completions))
        rewards = rollout.rewards
        rewards = replace(rewards, values=rewards.values.cpu().double(), invalid=rewards.invalid.cpu())
        measures = rollout_measures(prompts, completions, rewards.scores().tolist())
        if rollout.kl is not None:
            measures["objective/kl_standard_error"] = rollout.kl_standard_error
        for name, value in measures.items():
            if math.isfinite(value):
                self.trainer._metrics["train"][name].append(value)

    # ---- Signs ----

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if "train_runtime" in logs:
            return
        evaluation = any(name.startswith("eval_") for name in logs)
        if not evaluation and self.nonfinite_updates:
            logs["health/nonfinite_updates"] = self.nonfinite_updates
        self.series.add(logs)
        if evaluation:
            return
        found = evaluate_signs(self.series, self.limits)
        if found:
            logs["health/level"] = max(finding.level for finding in found.values())
            logs |= {f"health/{name}": finding.level for name, finding in found.items()}
        # The trainer has kept its copy before it called its callbacks
        state.log_history[-1] |= {name: value for name, value in logs.items() if name.startswith("health/")}
        for name, finding in found.items():
            if finding.level > self._reported.get(name, 0):
                self._reported[name] = finding.level
                self._say(state, f"health {LEVELS[finding.level]} ({name}): {finding.text}")
            if finding.level == STOP and self.reason is None:
                self.reason = f"Health monitor: {name}: {finding.text}"
        if state.global_step % steps_per_rollout(args) == 0:
            self._end(state, control)

    def _end(self, state: TrainerState, control: TrainerControl) -> None:
        if any_rank(self.reason is not None, self.trainer.args.device) and self.stopped_at is None:
            self.reason = self.reason or "Health monitor: another rank saw the sign; its log has it."
            self.stop(state.global_step, control)
            self._say(
                state, f"health: training stops here, with a checkpoint of step {state.global_step}. {self.reason}"
            )

    def on_train_end(self, args, state, control, **kwargs):
        self._say(state, self.summary(state))
        super().on_train_end(args, state, control, **kwargs)

    def summary(self, state: TrainerState) -> str:
        """Return the summary of the signs over the whole run."""
        judged = sum(1 for entry in state.log_history if entry.get("health/level") is not None)
        if not judged:
            return (
                f"health: the run is too short to judge, which begins at log step {self.baseline + self.window} "
                "(`health.baseline` + `health.window`)."
            )
        seen = signs_seen(state.log_history)
        if not seen:
            return f"health: ok, none of {len(SIGNS)} signs in {judged} log steps."
        lines = [f"health: {len(seen)} of {len(SIGNS)} signs in {judged} log steps."]
        for found in seen:
            steps = f"steps {found.first} to {found.last}, {found.count} log steps"
            lines.append(f"  {LEVELS[found.level]} {found.sign} ({steps}): {SIGNS[found.sign].remedy}.")
        return "\n".join(lines)

    def _say(self, state: TrainerState, text: str) -> None:
        if state.is_world_process_zero:
            tqdm.write(printable(text))
