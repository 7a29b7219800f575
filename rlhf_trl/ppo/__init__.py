"""PPO on TRL's engine: [`PPOTrainer`], [`PPOConfig`], and the pure functions of the algorithm."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_trl.ppo.config import PPOConfig
    from rlhf_trl.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]

_MODULES = {"PPOConfig": "config", "PPOTrainer": "trainer"}


def __getattr__(name: str):
    # The checks read `options` before torch is imported, so the classes are imported on first use
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
