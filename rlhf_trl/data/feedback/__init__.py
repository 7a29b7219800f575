"""Feedback as people give it: pairs, rankings, edits, ratings, thumbs and attributes."""

from rlhf_trl.data.feedback.base import Feedback
from rlhf_trl.data.feedback.pairwise import Edits, Pairs, Rankings
from rlhf_trl.data.feedback.rated import Attributes, Ratings, Thumbs

__all__ = ["Attributes", "Edits", "Feedback", "Pairs", "Rankings", "Ratings", "Thumbs"]
