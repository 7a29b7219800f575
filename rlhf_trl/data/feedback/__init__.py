"""Feedback as people give it: pairs, rankings, edits, ratings, thumbs and attributes."""

from rlhf_trl.data.feedback.base import Attributes, Edits, Feedback, Pairs, Rankings, Ratings, Thumbs

__all__ = ["Attributes", "Edits", "Feedback", "Pairs", "Rankings", "Ratings", "Thumbs"]
