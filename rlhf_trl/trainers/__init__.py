"""TRL's trainers as the stages run them."""

from rlhf_trl.trainers.base import DPOTrainer, KTOTrainer
from rlhf_trl.trainers.packing import SFTTrainer
from rlhf_trl.trainers.rollouts import GRPOTrainer, RLOOTrainer

__all__ = ["DPOTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer", "SFTTrainer"]
