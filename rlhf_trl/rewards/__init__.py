"""Rewards from functions, reward models and servers, their shaping and their combination."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_trl.rewards.adapter import AdapterReward
    from rlhf_trl.rewards.base import BaseReward, Reward
    from rlhf_trl.rewards.finite import FiniteReward
    from rlhf_trl.rewards.function import FunctionReward
    from rlhf_trl.rewards.http import HttpReward
    from rlhf_trl.rewards.model import ModelReward

__all__ = ["AdapterReward", "BaseReward", "FiniteReward", "FunctionReward", "HttpReward", "ModelReward", "Reward"]

_MODULES = {
    "AdapterReward": "adapter",
    "BaseReward": "base",
    "FiniteReward": "finite",
    "FunctionReward": "function",
    "HttpReward": "http",
    "ModelReward": "model",
    "Reward": "base",
}


def __getattr__(name: str):
    # The checks read `options` before torch is imported, so the classes are imported on first use
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
