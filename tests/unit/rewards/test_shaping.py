"""Rewards for the shape of a completion, composed from the config group `reward`."""

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards import shaping
from rlhf_trl.rewards.shaping import length, pattern
from tests.helpers.tiny import make_tokenizer


def reward_of(compose, option, *words):
    (node,) = compose("stage=grpo", f"reward={option}", *words).reward.values()
    return instantiate({key: value for key, value in node.items() if key != "when"}, name=option)


def test_length_is_zero_within_the_limits_and_falls_outside(compose):
    reward = reward_of(compose, "length", "reward.length.kwargs.max_length=6", "reward.length.kwargs.min_length=2")
    ids = [[1] * n for n in (0, 1, 2, 6, 8, 16, 40)]
    found = reward(prompts=[""] * 7, completions=[""] * 7, completion_ids=ids)
    assert found == pytest.approx([-0.2, -0.1, 0, 0, -0.2, -1, -1])
    assert length(ids, min_length=2, margin=1) == [-1, -1, 0, 0, 0, 0, 0]
    for wrong in ({"max_length": 3, "min_length": 4}, {"max_length": 3, "margin": 0}):
        with pytest.raises(ConfigError, match="Set `min_length` no higher than `max_length`"):
            length(ids, **wrong)


def test_length_equals_the_soft_overlong_punishment_of_dapo():
    from trl.rewards import get_soft_overlong_punishment

    ids = [[1] * n for n in range(40)]
    assert length(ids, max_length=20, margin=10) == pytest.approx(get_soft_overlong_punishment(30, 10)(ids))


def test_format_matches_texts_and_chats(compose):
    reward = reward_of(compose, "format", "reward.format.kwargs.pattern='(?s)Reason: .+ Answer: \\d+'")
    texts = ["Reason: it\nis Answer: 12", "Reason: it is Answer: 12.", "Answer: 12"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (texts, chats):
        assert reward(prompts=["a"] * 3, completions=completions, completion_ids=[[]] * 3) == [1, 0, 0]
    assert pattern(texts, r"Answer: \d+", fullmatch=False) == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"'\(' of the reward `format` is no regular expression"):
        pattern(texts, "(")


def test_eos_needs_the_policys_tokenizer(compose):
    reward, tokenizer = reward_of(compose, "eos"), make_tokenizer()
    ids = [[5, tokenizer.eos_token_id], [5], [], [tokenizer.eos_token_id, 5]]
    rows = {"prompts": ["a"] * 4, "completions": ["a"] * 4, "completion_ids": ids}
    with pytest.raises(ConfigError, match="needs the end token of a policy's tokenizer"):
        reward(**rows)
    reward.bind(tokenizer)
    assert reward(**rows) == [1, 0, 0, 0]


def test_repetition_is_trls_penalty(compose):
    reward = reward_of(compose, "repetition", "reward.repetition.function.ngram_size=2")
    ids = [[1, 2, 3, 4], [5] * 5, [5]]
    assert reward(prompts=["a"] * 3, completions=["a"] * 3, completion_ids=ids) == [0.0, -0.75, 0.0]
    with pytest.raises(InstantiationException, match="max_penalty 2 should not be positive"):
        reward_of(compose, "repetition", "reward.repetition.function.max_penalty=2")


def test_pattern_that_backtracks_forever_is_an_error(monkeypatch):
    monkeypatch.setattr(shaping, "MATCH_TIMEOUT", 0.2)
    with pytest.raises(ConfigError, match="took more than 0.2 seconds on one completion"):
        shaping.pattern(["a" * 60 + "c"], pattern="(a|a)+b")
    assert shaping.pattern(["aab", "a"], pattern="(a|a)+b") == [1, 0]
