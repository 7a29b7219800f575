"""Reward functions as [`PPOTrainer`] calls them."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_callable_name, is_async_callable

from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.model import ModelReward

logger = logging.getLogger(__name__)


class CheckedReward:
    """
    A reward function that tells its invalid rewards, NaN and infinite ones, apart from None.

    TRL writes None as NaN. A checked function returns None for an invalid reward, too, and says which ones were.

    Args:
        function (callable): reward function with TRL's signature, sync; see [`AsyncCheckedReward`].

    Attributes:
        invalid (`list[bool]`): for each completion of the last call, whether its reward was NaN or infinite.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.__name__ = get_callable_name(function)
        self.calibration = getattr(function, "calibration", None)
        self.invalid: list[bool] = []

    def __call__(self, *args, **kwargs) -> list[float | None]:
        """Return the rewards of the completions."""
        return self._checked(self.function(*args, **kwargs))

    def _checked(self, rewards: list[float | None]) -> list[float | None]:
        self.invalid = [reward is not None and not math.isfinite(reward) for reward in rewards]
        return [None if invalid else reward for reward, invalid in zip(rewards, self.invalid, strict=True)]


class AsyncCheckedReward(CheckedReward):
    """A [`CheckedReward`] of an async function."""

    async def __call__(self, *args, **kwargs) -> list[float | None]:
        """Return the rewards of the completions."""
        return self._checked(await self.function(*args, **kwargs))


def checked_reward(
    reward: str | PreTrainedModel | Callable, tokenizer: PreTrainedTokenizerBase | None
) -> CheckedReward:
    """
    Return a reward as a [`CheckedReward`].

    Args:
        reward (`str`, `PreTrainedModel` or callable): a reward model becomes a [`~rlhf_trl.rewards.ModelReward`],
            which scores the generated ids.
        tokenizer (*optional*): the policy's.
    """
    if isinstance(reward, str | PreTrainedModel):
        reward = ModelReward(reward)
    if isinstance(reward, ModelReward) and tokenizer is not None:
        reward.bind(tokenizer)
    return (AsyncCheckedReward if is_async_callable(reward) else CheckedReward)(reward)


def invalid_rewards(functions: Sequence[CheckedReward], max_fraction: float, accelerator: Accelerator) -> Tensor:
    """
    Return where the last call of the reward functions gave NaN or infinity, and warn about it.

    Args:
        functions (`Sequence[CheckedReward]`): F reward functions.
        max_fraction (`float`): share of the completions that may have such a reward.
        accelerator (`Accelerator`): the trainer's.

    Returns:
        `Tensor` of shape (N, F), for the completions of all ranks.

    Raises:
        ConfigError: if more completions than that have such a reward.
    """
    columns = torch.tensor([function.invalid for function in functions], device=accelerator.device)  # (F, N of a rank)
    invalid: Any = accelerator.gather(columns.T.contiguous())
    dropped = invalid.any(dim=1)
    if not dropped.any():
        return invalid
    rows = invalid.nonzero()[:5].tolist()
    where = ", ".join(f"row {row} of `{functions[column].__name__}`" for row, column in rows)
    message = f"{int(dropped.sum())} of {len(invalid)} completions got a NaN or infinite reward ({where})."
    if dropped.float().mean() > max_fraction:
        raise ConfigError(
            f"{message} That is more than `max_invalid_fraction={max_fraction}`. Fix the reward function, or let it "
            "return None where it doesn't apply."
        )
    if accelerator.is_main_process:
        logger.warning("%s They are dropped from this update.", message)
    return invalid
