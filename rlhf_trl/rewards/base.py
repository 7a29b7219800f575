"""What every reward is."""

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Reward:
    """
    What every reward has: a name for the logs, a weight in the sum, and `bind`.

    Args:
        name (`str`): the name under which the reward is logged.
        weight (`float`): its factor in the sum of all rewards.
    """

    def __init__(self, name: str, weight: float = 1.0):
        self.__name__ = name
        self.weight = float(weight)
        # `{"mean", "std"}` of the reference answers' rewards, where they were measured: for `reward_norm=reference`
        self.calibration: dict[str, float] | None = None

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Tell the reward which tokenizer made the `completion_ids` it will be given."""

    def attach(self, policy: PreTrainedModel | PeftModel) -> None:
        """Give the reward the policy whose base it shares, if it does. A second call changes nothing."""
