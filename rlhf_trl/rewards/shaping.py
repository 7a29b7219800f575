"""
Rewards for the shape of a completion: its length, its format, its end (`reward=length|tokens|format|eos`).

`reward=repetition` is TRL's own `trl.rewards.get_repetition_penalty_reward`.
"""

import regex
from transformers import PreTrainedTokenizerBase

from rlhf_trl.data.messages import as_text
from rlhf_trl.data.tokenize import end_tokens
from rlhf_trl.errors import ConfigError

# Per completion: nested repetitions such as `(.+)+` backtrack exponentially, and Python's `re` has no timeout
MATCH_TIMEOUT = 10.0


def length(
    completion_ids: list[list[int]], max_length: int | None = None, min_length: int = 0, margin: int = 1
) -> list[float]:
    """
    Return 0 for completions of `min_length` to `max_length` tokens, and less outside, down to -1:

        -min(1, max(min_length - n, n - max_length, 0) / margin)

    With `min_length=0` it is DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).

    Args:
        completion_ids (`list[list[int]]`): generated tokens of each completion; EOS counts.
        max_length (`int`, *optional*): upper limit in tokens; none when unset.
        min_length (`int`): lower limit in tokens.
        margin (`int`): tokens beyond a limit that cost 1.

    Returns:
        `list[float]`: one reward per completion, in [-1, 0].

    Raises:
        ConfigError: if no length is within the limits, or `margin` is less than 1.
    """
    if margin < 1 or (max_length is not None and max_length < min_length):
        raise ConfigError(
            f"The reward `length` has min_length={min_length}, max_length={max_length}, margin={margin}. Set "
            "`min_length` no higher than `max_length`, and `margin` to 1 or more "
            "(`reward.length.kwargs.max_length=...`)."
        )
    beyond = [
        max(min_length - len(ids), 0 if max_length is None else len(ids) - max_length, 0) for ids in completion_ids
    ]
    return [-min(1.0, tokens / margin) for tokens in beyond]


def tokens(completion_ids: list[list[int]]) -> list[float]:
    """Return the number of generated tokens of each completion, EOS included."""
    return [float(len(ids)) for ids in completion_ids]


def pattern(completions: list, pattern: str, fullmatch: bool = True) -> list[float]:
    """
    Return 1 for each completion whose text matches a regular expression, else 0.

    Args:
        completions (`list`): texts or chat messages.
        pattern (`str`): regular expression of the package `regex`, which takes Python's `re`. A dot matches line
            breaks with `(?s)` in front.
        fullmatch (`bool`): whether the whole text must match; else a part of it is enough.

    Returns:
        `list[float]`: one reward per completion.

    Raises:
        ConfigError: for an invalid regular expression, or if matching takes longer than `MATCH_TIMEOUT` seconds.
    """
    try:
        match = regex.compile(pattern).fullmatch if fullmatch else regex.compile(pattern).search
    except regex.error as error:
        raise ConfigError(
            f"The pattern {pattern!r} of the reward `format` is no regular expression: {error}. Fix "
            "`reward.format.kwargs.pattern`; a backslash before a bracket takes it literally."
        ) from error
    try:
        return [float(match(as_text(completion), timeout=MATCH_TIMEOUT) is not None) for completion in completions]
    except TimeoutError as error:
        raise ConfigError(
            f"The pattern {pattern!r} of the reward `format` took more than {MATCH_TIMEOUT} seconds on one "
            "completion. Write it without nested repetitions such as `(.+)+`."
        ) from error


def eos(completion_ids: list[list[int]], tokenizer: PreTrainedTokenizerBase | None) -> list[float]:
    """
    Return 1 for each completion that ends with an end token of the policy, 0 for a truncated one.

    Args:
        completion_ids (`list[list[int]]`): generated tokens of each completion.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the policy, whose
            [`~rlhf_trl.data.tokenize.end_tokens`] count.

    Returns:
        `list[float]`: one reward per completion.

    Raises:
        ConfigError: without the tokenizer that made the ids (see [`~rlhf_trl.rewards.Reward.bind`]).
    """
    ends = [] if tokenizer is None else end_tokens(tokenizer)
    if not ends:
        raise ConfigError(
            "The reward `eos` needs the end token of a policy's tokenizer, and there is none. Use it in `stage=ppo`, "
            "`rloo` or `grpo`, with a tokenizer that has an `eos_token`."
        )
    return [float(len(ids) > 0 and ids[-1] in ends) for ids in completion_ids]
