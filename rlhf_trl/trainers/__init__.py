"""TRL's trainers as the stages run them."""

from typing import TYPE_CHECKING

from rlhf_trl.config.lazy import lazy_attributes

if TYPE_CHECKING:
    from rlhf_trl.trainers.base import DPOTrainer, KTOTrainer
    from rlhf_trl.trainers.packing import SFTTrainer
    from rlhf_trl.trainers.rollouts import GRPOTrainer, RLOOTrainer

__all__ = ["DPOTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer", "SFTTrainer"]

__getattr__ = lazy_attributes(
    __name__,
    {
        "DPOTrainer": "base",
        "KTOTrainer": "base",
        "SFTTrainer": "packing",
        "GRPOTrainer": "rollouts",
        "RLOOTrainer": "rollouts",
    },
)
