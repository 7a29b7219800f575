"""The embedded world: a tiny model and a synthetic instruction task whose true reward is known."""

from rlhf_trl.tasks.demo.data import load
from rlhf_trl.tasks.demo.gold import gold_attributes, gold_reward

__all__ = ["gold_attributes", "gold_reward", "load"]
