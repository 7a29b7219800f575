"""Training of reward models from rankings, ratings and attributes."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_trl.reward_modeling.config import RewardConfig
    from rlhf_trl.reward_modeling.trainer import RewardTrainer

__all__ = ["RewardConfig", "RewardTrainer"]

_MODULES = {"RewardConfig": "config", "RewardTrainer": "trainer"}


def __getattr__(name: str):
    # The checks read `options` before torch is imported, so the classes are imported on first use
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
