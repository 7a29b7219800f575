"""The embedded world of images: colored shapes, questions on them, and a tiny model that reads both."""

from rlhf_trl.tasks.shapes.data import load
from rlhf_trl.tasks.shapes.gold import gold_reward

__all__ = ["gold_reward", "load"]
