"""The reward for mathematical answers, with math-verify installed and without."""

import importlib.util
import threading

import pytest

from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards import math as math_rewards
from rlhf_trl.rewards.math import math_answer


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        ("6 * 7 = 42, so #### 42", "She has 6 * 7 = <<6*7=42>>42.\n#### 42", 1.0),
        ("#### $1,000 \nI hope this helps 7", "#### 1000", 1.0),
        ("#### 41", "#### 42", 0.0),
        ("42", "#### 42", 0.0),
        ("#### 3.0 dollars", "3", 1.0),
        ("#### 42", "no answer given", None),
    ],
)
def test_answers_after_a_marker(completion, solution, reward):
    assert math_answer([completion], [solution], marker="####") == [reward]


@pytest.mark.parametrize(
    ("completion", "any_answer", "formula"),
    [
        (r"Thus \boxed{0.5}", 1.0, 1.0),
        (r"The final answer is $\frac{1}{2}$.", 1.0, 1.0),
        ("So the answer is 0.5.", 1.0, 0.0),
        ("I don't know.", 0.0, 0.0),
    ],
)
def test_answers_anywhere_or_as_a_formula(completion, any_answer, formula):
    chat = [{"role": "assistant", "content": completion}]
    assert math_answer([chat], [r"\frac{1}{2}"]) == [any_answer]
    assert math_answer([chat], [r"\frac{1}{2}"], formula=True) == [formula]


def test_it_works_in_another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(math_answer(["5"], ["5"])))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_without_math_verify_the_extra_is_named(compose, monkeypatch, tmp_path):
    from rlhf_trl.checks import find_problems

    monkeypatch.chdir(tmp_path)
    find_spec = importlib.util.find_spec
    assert find_problems(compose("stage=grpo", "reward=math_answer")) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find_spec(name))
    (problem,) = find_problems(compose("stage=grpo", "reward=math_answer"))
    assert "`reward=math_answer`" in problem and "pip install 'rlhf-trl[math]'" in problem
    monkeypatch.setattr(math_rewards, "is_math_verify_available", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-trl\[math\]'"):
        math_answer(["5"], ["5"])
