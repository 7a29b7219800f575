"""Interface and base class of rewards."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trl.config.ranges import check_values
from rlhf_trl.models.calibration import Moments
from rlhf_trl.rewards.options import REWARD

# Arguments of a reward that aren't columns of the data: ours and those of TRL's trainers. Columns have other names
RESERVED_COLUMNS = (
    *("prompts", "completions", "completion_ids", "tokenizer"),
    *("trainer_state", "log_extra", "log_metric", "environments"),
)


@runtime_checkable
class Reward(Protocol):
    """
    Interface of a reward, for trainers, evaluation and the reward server.

    Attributes:
        __name__ (`str`): name under which the reward is logged.
        weight (`float`): factor in the sum of all rewards.
        calibration (`Moments`, *optional*): mean and std of the rewards of reference answers where they were measured,
            for `reward_norm=reference`.
    """

    __name__: str
    weight: float
    calibration: Moments | None

    def __call__(
        self, prompts: list, completions: list, *, completion_ids: list[list[int]], **columns: Any
    ) -> Sequence[float | None]:
        """
        Return one reward per completion, `None` where it doesn't apply.

        Args:
            prompts (`list`), completions (`list`): texts or chat messages.
            completion_ids (`list[list[int]]`): generated tokens of each completion.
            **columns: further columns of the data, and what TRL's trainers pass.
        """
        ...

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Set the tokenizer that makes the `completion_ids` of the calls to come."""

    def check(self) -> None:
        """
        Check that what the reward needs from elsewhere, such as a server, can be reached.

        Raises:
            ConfigError: if it can't.
        """

    def column_problem(self, columns: Collection[str]) -> str | None:
        """Return the problem of a reward that needs a column which the data doesn't have, `None` if there is none."""

    def attach(self, policy: PreTrainedModel | PeftModel) -> None:
        """Share the base of the policy, if the reward is an adapter on it. A second call changes nothing."""


class BaseReward:
    """
    Name and weight of a [`Reward`], with methods for a reward that needs nothing from elsewhere.

    Args:
        name (`str`): name under which the reward is logged.
        weight (`float`): factor in the sum of all rewards.

    Attributes:
        loads_model (`bool`): whether it loads a model's weights when it is made; a dry run makes none that does.

    Raises:
        ConfigError: if the weight isn't a finite number.
    """

    loads_model = False

    def __init__(self, name: str, weight: float = 1.0):
        check_values(REWARD, {"weight": weight}, f"reward.{name}.")
        self.__name__ = name
        self.weight = float(weight)
        self.calibration: Moments | None = None

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """See [`Reward.bind`]."""

    def check(self) -> None:
        """See [`Reward.check`]."""

    def column_problem(self, columns: Collection[str]) -> str | None:
        """See [`Reward.column_problem`]."""

    def attach(self, policy: PreTrainedModel | PeftModel) -> None:
        """See [`Reward.attach`]."""


class WrappedReward(BaseReward):
    """
    A reward that changes when or how another one is called, and leaves the rest to it.

    Args:
        reward ([`Reward`]): the other one.
    """

    def __init__(self, reward: Reward):
        super().__init__(reward.__name__, reward.weight)
        self.reward, self.calibration = reward, reward.calibration

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """See [`Reward.bind`]."""
        self.reward.bind(tokenizer)

    def check(self) -> None:
        """See [`Reward.check`]."""
        self.reward.check()

    def column_problem(self, columns: Collection[str]) -> str | None:
        """See [`Reward.column_problem`]."""
        return self.reward.column_problem(columns)

    def attach(self, policy: PreTrainedModel | PeftModel) -> None:
        """See [`Reward.attach`]."""
        self.reward.attach(policy)
