"""The true reward of the world of shapes: whether an answer is right."""

from typing import Any

from rlhf_trl.data.messages import as_text


def gold_reward(completions: list, answer: list[str], **columns: Any) -> list[float]:
    """
    Return 1 for each right answer and 0 for a wrong one.

    Args:
        completions (`list`): answers, as text or chat messages.
        answer (`list[str]`): column of the data with the right ones.
        **columns: the other columns.
    """
    return [float(as_text(said).strip() == right) for said, right in zip(completions, answer, strict=True)]
