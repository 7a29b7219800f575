"""Rewards from functions, reward models and servers, their shaping and their combination."""

from typing import TYPE_CHECKING

from rlhf_trl.config.lazy import lazy_attributes

if TYPE_CHECKING:
    from rlhf_trl.rewards.adapter import AdapterReward
    from rlhf_trl.rewards.base import BaseReward, Reward
    from rlhf_trl.rewards.classifier import ClassifierReward
    from rlhf_trl.rewards.conditioned import ConditionedReward
    from rlhf_trl.rewards.finite import FiniteReward
    from rlhf_trl.rewards.function import FunctionReward
    from rlhf_trl.rewards.http import HttpReward
    from rlhf_trl.rewards.model import ModelReward

__all__ = [
    "AdapterReward",
    "BaseReward",
    "ClassifierReward",
    "ConditionedReward",
    "FiniteReward",
    "FunctionReward",
    "HttpReward",
    "ModelReward",
    "Reward",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "AdapterReward": "adapter",
        "BaseReward": "base",
        "ClassifierReward": "classifier",
        "ConditionedReward": "conditioned",
        "FiniteReward": "finite",
        "FunctionReward": "function",
        "HttpReward": "http",
        "ModelReward": "model",
        "Reward": "base",
    },
)
