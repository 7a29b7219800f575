"""Training of reward models from rankings, ratings and attributes."""

from typing import TYPE_CHECKING

from rlhf_trl.config.lazy import lazy_attributes

if TYPE_CHECKING:
    from rlhf_trl.reward_modeling.config import RewardConfig
    from rlhf_trl.reward_modeling.trainer import RewardTrainer

__all__ = ["RewardConfig", "RewardTrainer"]

__getattr__ = lazy_attributes(__name__, {"RewardConfig": "config", "RewardTrainer": "trainer"})
