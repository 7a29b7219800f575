"""Training of reward models from rankings, ratings and attributes."""

from rlhf_trl.reward_modeling.config import RewardConfig
from rlhf_trl.reward_modeling.trainer import RewardTrainer

__all__ = ["RewardConfig", "RewardTrainer"]
