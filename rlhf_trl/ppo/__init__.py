"""PPO on TRL's engine: [`PPOTrainer`], [`PPOConfig`], and the pure functions of the algorithm."""

from rlhf_trl.ppo.config import PPOConfig
from rlhf_trl.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
