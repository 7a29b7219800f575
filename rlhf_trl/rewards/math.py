"""Reward for answers to mathematical questions (`reward=math_answer`)."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

from trl.import_utils import is_math_verify_available
from trl.rewards import accuracy_reward

from rlhf_trl.data.messages import as_text
from rlhf_trl.errors import ConfigError

# Seconds for one answer, as in TRL's `accuracy_reward`
PARSING_TIMEOUT, VERIFY_TIMEOUT = 10, 5


def math_answer(
    completions: list, solution: Sequence[str], marker: str | None = None, formula: bool = False
) -> list[float | None]:
    r"""
    Return 1 for each completion whose final answer equals that of the solution, else 0.

    `math-verify` finds the answers and compares them as mathematics: 1/2 equals .5.

    Args:
        completions (`list`): texts or chat messages.
        solution (`Sequence[str]`): column of the data with a correct answer, or with a solution that ends with it.
        marker (`str`, *optional*): the answer is what follows the last of these in its line (GSM8K: `####`), in the
            completions and in the solutions that have one. A completion without it has no answer.
        formula (`bool`): whether the answer must be LaTeX, in `\boxed{...}` or between dollar signs
            (`trl.rewards.accuracy_reward`). Otherwise the last number of a completion will do.

    Returns:
        `list[float | None]`: one reward per completion; `None` where the solution holds no answer.

    Raises:
        ConfigError: without the package `math-verify`.
    """
    if not is_math_verify_available():
        raise ConfigError(
            "`reward=math_answer` needs the package `math-verify`, which is not installed. Run "
            "`pip install 'rlhf-trl[math]'`."
        )
    texts, golds = [as_text(each) for each in completions], [str(each) for each in solution]
    if marker is not None:
        texts = [_after(text, marker) or "" for text in texts]
        golds = [_after(gold, marker) or gold for gold in golds]
    if formula:
        return accuracy_reward([[{"role": "assistant", "content": text}] for text in texts], golds)
    return [_equal(gold, text) for gold, text in zip(golds, texts, strict=True)]


def _after(text: str, marker: str) -> str | None:
    """Return the rest of the line after the last marker; `None` if there is no marker."""
    _, found, after = text.rpartition(marker)
    return after.strip().split("\n")[0] if found else None


def _equal(gold: str, text: str) -> float | None:
    from math_verify import parse, verify

    # Its timeouts are signals, which only the main thread gets. `None`, no timeout, is missing in its annotations
    is_main = threading.current_thread() is threading.main_thread()
    parsing_timeout: Any = PARSING_TIMEOUT if is_main else None
    verify_timeout: Any = VERIFY_TIMEOUT if is_main else None
    if not is_main:
        for name in ("parser", "grader"):
            logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)
    wanted = parse(gold, parsing_timeout=parsing_timeout)
    if not wanted:
        return None
    found = parse(text, parsing_timeout=parsing_timeout)
    return float(verify(wanted, found, timeout_seconds=verify_timeout))
