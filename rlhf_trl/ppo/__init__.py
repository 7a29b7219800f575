"""PPO on TRL's engine: [`PPOTrainer`], [`PPOConfig`], and the pure functions of the algorithm."""

from typing import TYPE_CHECKING

from rlhf_trl.config.lazy import lazy_attributes

if TYPE_CHECKING:
    from rlhf_trl.ppo.config import PPOConfig
    from rlhf_trl.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]

__getattr__ = lazy_attributes(__name__, {"PPOConfig": "config", "PPOTrainer": "trainer"})
