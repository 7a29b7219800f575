"""Guard against rewards that are None for every completion, from which a run learns nothing."""

from tqdm.auto import tqdm
from transformers import TrainerCallback

from rlhf_trl.errors import ConfigError
from rlhf_trl.trainers.rollout_hook import RolloutRecord, RolloutTrainer

# Rollouts in a row. A single one may hold only prompts of a kind that no reward is for.
PATIENCE = 3


class UnrewardedGuard(TrainerCallback):
    """
    Warn of completions and rollouts without any reward and of a reward that never applies, and end a run that learns
    nothing.

    Args:
        trainer (`transformers.Trainer`): one that takes reward functions: PPO, GRPO, RLOO.

    Raises:
        ConfigError: after three rollouts in a row in which every reward is None for every completion, and at the end
            of a shorter run without any other.
    """

    def __init__(self, trainer: RolloutTrainer):
        self.trainer = trainer
        trainer.on_rollout(self._count)
        self._rollouts = self._in_a_row = 0
        self._said = False  # that some completions have no reward
        self._silent = [0] * len(trainer.reward_func_names)  # rollouts in a row, of each function

    def _count(self, rollout: RolloutRecord) -> None:
        if not rollout.training:
            return
        missing = rollout.rewards.values.isnan()
        nothing = missing.all(dim=0).tolist()
        self._rollouts += 1
        self._in_a_row = self._in_a_row + 1 if all(nothing) else 0
        self._silent = [count + 1 if none else 0 for count, none in zip(self._silent, nothing, strict=True)]
        self._report(len(rollout.completions), int(missing.all(dim=1).sum()), all(nothing))

    def _report(self, completions: int, unrewarded: int, nothing: bool) -> None:
        step = self.trainer.state.global_step + 1
        if self._in_a_row == PATIENCE:
            raise ConfigError(self._problem(f"in {PATIENCE} rollouts in a row, the last one at step {step}"))
        if not self.trainer.is_world_process_zero():
            return
        if nothing:
            tqdm.write(f"Step {step}: every reward is None for all {completions} completions: nothing to learn from.")
        elif unrewarded and not self._said:
            self._said = True
            tqdm.write(
                f"Step {step}: every reward is None for {unrewarded} of {completions} completions, which are not "
                "learned from. (This is said once.)"
            )
        for name, count in zip(self.trainer.reward_func_names, self._silent, strict=True):
            if count == PATIENCE:
                tqdm.write(f"Step {step}: the reward `{name}` was None for every completion of {PATIENCE} rollouts.")

    def on_train_end(self, args, state, control, **kwargs):
        if self._rollouts and self._in_a_row == self._rollouts:
            raise ConfigError(self._problem(f"in all {self._rollouts} rollouts"))

    def _problem(self, when: str) -> str:
        names = ", ".join(f"`{name}`" for name in self.trainer.reward_func_names)
        return (
            f"No reward applies: {names} gave None for every completion {when}, so nothing was learned. Let it return "
            "a number where it applies, or give it the columns that it looks for."
        )
