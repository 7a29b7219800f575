"""
Rewards for the shape of a completion, for `reward=length|format|eos` (`reward=repetition` is TRL's own
`trl.rewards.get_repetition_penalty_reward`). Each returns one number a completion.
"""

import regex
from transformers import PreTrainedTokenizerBase

from rlhf_trl.data.messages import as_text
from rlhf_trl.data.tokenize import end_tokens
from rlhf_trl.errors import ConfigError

# On one completion: a repetition inside of a repetition may take for ever. Python's `re` knows no limit
SECONDS_TO_MATCH = 10.0


def length(completion_ids: list[list[int]], most: int | None = None, least: int = 0, margin: int = 1) -> list[float]:
    """
    0 for a completion of `least` to `most` tokens (EOS counts); outside it falls by 1/margin a token, down to -1:

        -min(1, max(least - n, n - most, 0) / margin)

    With `least=0` it is DAPO's soft punishment of overlong completions (arXiv 2503.14476, eq. 13).

    Args:
        most (`int`, *optional*): no upper limit when unset. least, margin (`int`): in tokens.

    Raises:
        ConfigError: if no length is within the limits, or `margin` is less than 1.
    """
    if margin < 1 or (most is not None and most < least):
        raise ConfigError(
            f"The reward `length` has least={least}, most={most}, margin={margin}. Set `least` no higher than `most`, "
            "and `margin` to 1 or more (`reward.length.kwargs.most=...`)."
        )
    over = [max(least - len(ids), 0 if most is None else len(ids) - most, 0) for ids in completion_ids]
    return [-min(1.0, tokens / margin) for tokens in over]


def pattern(completions: list, pattern: str, whole: bool = True) -> list[float]:
    """
    1 for a completion whose text matches a regular expression (of the package `regex`, which takes Python's `re`).

    Args:
        whole (`bool`): the whole text must match, else a part of it is enough. A dot matches line breaks with `(?s)`
            in front.

    Raises:
        ConfigError: if it is no regular expression, or matching takes more than ten seconds.
    """
    try:
        match = regex.compile(pattern).fullmatch if whole else regex.compile(pattern).search
    except regex.error as error:
        raise ConfigError(
            f"The pattern {pattern!r} of the reward `format` is no regular expression: {error}. Mend "
            "`reward.format.kwargs.pattern`; a backslash before a bracket takes it literally."
        ) from error
    try:
        return [float(match(as_text(completion), timeout=SECONDS_TO_MATCH) is not None) for completion in completions]
    except TimeoutError as error:
        raise ConfigError(
            f"The pattern {pattern!r} of the reward `format` took more than {SECONDS_TO_MATCH} seconds on one "
            "completion. Write it without a repetition inside of a repetition, such as `(.+)+`."
        ) from error


def eos(completion_ids: list[list[int]], tokenizer: PreTrainedTokenizerBase | None) -> list[float]:
    """
    1 for a completion that ends by itself, with one of the policy's [`~rlhf_trl.data.tokenize.end_tokens`], 0 for one
    that was cut off.

    Raises:
        ConfigError: without the tokenizer that made the ids (see [`Reward.bind`]).
    """
    ends = [] if tokenizer is None else end_tokens(tokenizer)
    if not ends:
        raise ConfigError(
            "The reward `eos` looks for the end token of a policy's tokenizer, and there is none. Use it in "
            "`stage=ppo`, `rloo` or `grpo`, with a tokenizer that has an `eos_token`."
        )
    return [float(len(ids) > 0 and ids[-1] in ends) for ids in completion_ids]
