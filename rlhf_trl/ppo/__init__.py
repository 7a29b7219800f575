"""PPO on TRL's engine: `PPOTrainer`, `PPOConfig`, and the pure functions in `rlhf_trl.ppo.advantages`."""

from rlhf_trl.ppo.config import PPOConfig
from rlhf_trl.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
