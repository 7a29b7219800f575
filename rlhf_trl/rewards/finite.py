"""A guard against NaN and infinite rewards for TRL's trainers."""

import math
from typing import Any

from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.base import WrappedReward


class FiniteReward(WrappedReward):
    """
    A reward whose NaN and infinite values are errors.

    TRL's GRPO and RLOO write `None`, not applicable, as NaN: they would take an invalid reward for one that doesn't
    apply, and learn from an infinite one. `PPOTrainer` drops and counts such completions instead.

    Args:
        reward ([`Reward`]): the reward to guard.
    """

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """
        Return the rewards of the completions.

        Raises:
            ConfigError: if one of them is NaN or infinite.
        """
        values = list(self.reward(prompts, completions, **columns))
        for row, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                raise ConfigError(
                    f"The reward `{self.__name__}` is {value} for completion {row}: {str(completions[row])[:200]!r}. "
                    "Fix it, or let it return None where it doesn't apply."
                )
        return values
