"""The trial call of reward functions on rows of the data, and the scales of rewards."""

import json
import math

import pytest

from rlhf_trl.checks.reward_calls import (
    COMPLETION,
    moments_of,
    recorded_moments,
    sample_of,
    scale_problem,
    trial_call,
)
from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards import BaseReward, FiniteReward, FunctionReward
from tests.helpers.tiny import make_tokenizer

ROWS = [{"prompt": f"a {word}", "answer": word} for word in "b c d e f".split()]
ANSWERED = [{"prompt": "a  C", "completion": " c d"}, {"prompt": "a e", "completion": " e f"}]


def chat(text: str, role: str = "user") -> list[dict]:
    return [{"role": role, "content": text}]


def test_the_sample_has_the_datas_own_completions():
    tokenizer = make_tokenizer()
    sample = sample_of(ROWS, ANSWERED, tokenizer)
    assert (sample.prompts, sample.completions) == (["a c", "a e"], [" c d", " e f"])
    assert sample.columns == {"answer": ["c", "e"]} and sample.is_real
    assert [tokenizer.decode(ids) for ids in sample.completion_ids] == ["c d <eos>", "e f <eos>"]
    for made in (sample_of(ROWS, [], tokenizer), sample_of(ROWS, [{"prompt": "o", "completion": " o"}], tokenizer)):
        assert len(made.prompts) == 4 and made.completions == [f" {COMPLETION}"] * 4 and not made.is_real
    chats = sample_of([{"prompt": chat("a b")}], [], tokenizer)
    assert chats.completions == [chat(COMPLETION, "assistant")] and chats.completion_ids[0][-1] == 1
    assert sample_of(ROWS, [], None).completion_ids == [[]] * 4


def test_a_function_gets_what_a_trainer_gives():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, tokenizer, trainer_state, log_metric, log_extra):
        seen.update(locals())
        log_metric("name", trainer_state.global_step)
        log_extra("column", completions)
        return [len(ids) for ids in completion_ids]

    function = FunctionReward(reward)
    function.bind(tokenizer := make_tokenizer())
    assert trial_call(function, sample_of(ROWS, ANSWERED, tokenizer)) == [3.0, 3.0]
    assert seen["answer"] == ["c", "e"] and seen["tokenizer"] is tokenizer
    assert trial_call(FiniteReward(function), sample_of(ROWS, [], tokenizer)) is not None

    async def later(completions):
        return [1.0] * len(completions)

    assert trial_call(FunctionReward(later), sample_of(ROWS, [], tokenizer)) == [1.0] * 4


def fails_at_d(answer):
    return [1 / ("abcd".find(word) - 3) for word in answer]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails_at_d, r"(?s)raised ZeroDivisionError.*in fails_at_d.*Row 3 of them:\n    prompt: 'a d'.*answer: 'd'"),
        (lambda completions: [1.0], "returned 1 values for 4 completions.*\n.*called on 4 rows of the data. Row 1"),
        (lambda completions: ["good"] * len(completions), "returned 'good' for completion 0.*\n.*Row 1 of them"),
        (
            lambda answer: [math.nan if a == "c" else 1.0 for a in answer],
            "returned nan,.*no finite.*\n.*Row 2 of them",
        ),
        (lambda answer: [math.inf] * len(answer), "returned inf"),
        (lambda completions: exit(3), "sys.exit|SystemExit"),
    ],
)
def test_what_a_function_does_wrong_is_shown_with_the_row(function, message):
    sample = sample_of(ROWS, [], make_tokenizer())
    with pytest.raises(ConfigError, match=message) as error:
        trial_call(FunctionReward(function, name="own"), sample)
    assert "reward.own" in str(error.value) and "made up, since the data has none" in str(error.value)


def test_some_rewards_are_not_called():
    def with_environments(environments):
        raise AssertionError

    sample = sample_of(ROWS, [], make_tokenizer())
    assert trial_call(FunctionReward(with_environments), sample) is None
    assert trial_call(BaseReward("model"), sample) is None
    assert trial_call(FunctionReward(lambda answer: [math.nan] * 4), sample, finite=False)


def test_scales(tmp_path):
    assert moments_of([None, None]) is None and moments_of([1.0, None, 3.0]) == (2.0, 1.0)
    assert recorded_moments(str(tmp_path), None) is None
    (tmp_path / "calibration.json").write_text(json.dumps({"mean": 0.5, "std": 2.0}))
    assert recorded_moments(str(tmp_path), None) == (0.5, 2.0)
    heads = {"mean": [1, 2], "std": [3, 4], "heads": ["a", "b"], "covariance": [[9, 0], [0, 16]]}
    (tmp_path / "calibration.json").write_text(json.dumps(heads))
    assert recorded_moments(str(tmp_path), {"a": 1.0, "b": 1.0}) == (3.0, 5.0)

    assert scale_problem({"a": 1.0}, {"a": 1.0, "b": 1.0}) is None
    assert scale_problem({"a": 1.0, "b": 0.1}, {"a": 1.0, "b": 1.0}) is None
    found = scale_problem({"a": 5.0, "b": 0.1}, {"a": 1.0, "b": 1.0})
    assert "`reward.b` varies by 0.1" in str(found) and "reward_norm=running" in str(found)
    assert scale_problem({"a": 5.0, "b": 0.1}, {"a": 1.0, "b": 50.0}) is None
    assert scale_problem({"a": 5.0, "b": 0.1}, {"a": 1.0, "b": 0.0}) is None  # logged alone
    assert scale_problem({"a": 5.0, "b": 0.0}, {"a": 1.0, "b": 1.0}) is None  # the same on four rows says nothing
