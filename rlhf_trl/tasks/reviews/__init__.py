"""Controlled sentiment generation on review sentences that people rated."""

from rlhf_trl.tasks.reviews.data import load

__all__ = ["load"]
