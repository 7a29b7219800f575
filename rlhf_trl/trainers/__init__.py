"""TRL's trainers with complete checkpoints, exact evaluation, and models patched for training."""

from rlhf_trl.trainers.base import DPOTrainer, KTOTrainer

__all__ = ["DPOTrainer", "KTOTrainer"]
