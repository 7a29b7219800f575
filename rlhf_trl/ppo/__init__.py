"""PPO on TRL's engine: `PPOTrainer`, `PPOConfig`, and the pure functions in `rlhf_trl.ppo.advantages`."""

from .config import PPOConfig
from .trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
