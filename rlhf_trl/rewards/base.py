"""What every reward is."""

from collections.abc import Collection

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trl.config.ranges import REWARD, check_values

# What a reward gets besides the data's columns: of ours, and of TRL's trainers. No column may have such a name.
GIVEN = (
    *("prompts", "completions", "completion_ids", "tokenizer"),
    *("trainer_state", "log_extra", "log_metric", "environments"),
)


class Reward:
    """
    What every reward has: a name for the logs, a weight in the sum, and `bind`.

    Args:
        name (`str`): the name under which the reward is logged.
        weight (`float`): its factor in the sum of all rewards.

    Raises:
        ConfigError: for a weight that is no finite number.
    """

    def __init__(self, name: str, weight: float = 1.0):
        check_values(REWARD, {"weight": weight}, f"reward.{name}.")
        self.__name__ = name
        self.weight = float(weight)
        # `{"mean", "std"}` of the reference answers' rewards, where they were measured: for `reward_norm=reference`
        self.calibration: dict[str, float] | None = None

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Tell the reward which tokenizer made the `completion_ids` it will be given."""

    def check(self) -> None:
        """
        Ask what the reward needs from elsewhere whether it is there, before anything is sampled.

        Raises:
            ConfigError: if it isn't.
        """

    def column_problem(self, columns: Collection[str]) -> str | None:
        """Return what the reward misses among the data's columns, and what to type; `None` if nothing."""

    def attach(self, policy: PreTrainedModel | PeftModel) -> None:
        """Give the reward the policy whose base it shares, if it does. A second call changes nothing."""
