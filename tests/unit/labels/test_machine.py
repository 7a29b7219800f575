"""Rewards as labelers."""

import math

import numpy as np
import pytest

from rlhf_trl.errors import ConfigError
from rlhf_trl.labels.candidates import Candidate, Candidates
from rlhf_trl.labels.machine import GoldLabeler, RewardLabeler, agreeing, ranks_of
from rlhf_trl.labels.store import LabelStore
from rlhf_trl.rewards.function import FunctionReward


def value(completions, **columns):
    """Return the number that a completion is, `None` for another one."""
    return [float(text) if text.lstrip("-").replace(".", "").isdigit() else None for text in completions]


GOLD = f"{__name__}.value"


def rows(*texts: list[str], question=None) -> list[Candidates]:
    return [
        Candidates(
            id=f"p{i}",
            prompt="p",
            candidates=[Candidate(completion=text) for text in each],
            questions=[question or tuple(range(len(each)))],
        )
        for i, each in enumerate(texts)
    ]


def labels(labeler, given, tmp_path, form="pair", **options):
    store = LabelStore(tmp_path / "labels.jsonl")
    assert labeler(given, store, form, **options)
    return store.read()


def test_the_higher_value_wins_and_what_has_none_is_skipped(tmp_path):
    given = rows(["1", "2"], ["2", "1"], ["1", "1.5"], ["1", "what"])
    found = labels(GoldLabeler(GOLD, tie_margin=0.5), given, tmp_path)
    assert [label.answer for label in found] == [1, 0, "tie", None]
    assert found[3].skipped == "the reward doesn't apply"
    assert {(label.labeler, label.order) for label in found} == {("gold", None)} and all(label.time for label in found)


def test_rankings_and_ratings(tmp_path):
    given = rows(["1", "3", "2.9"])
    (label,) = labels(GoldLabeler(GOLD, tie_margin=0.5), given, tmp_path, form="ranking")
    assert label.answer == [3, 1, 1]
    _, label = labels(GoldLabeler(GOLD), given, tmp_path, form="rating")
    assert label.answer == [1.0, 3.0, 2.9]
    assert ranks_of([1.0, 1.4, 1.8, 9.0], 0.5) == [2, 2, 2, 1]


def test_a_labeler_resumes_and_keeps_to_the_budget(tmp_path):
    given = rows(["1", "2"], ["2", "1"], ["1", "3"])
    assert len(labels(GoldLabeler(GOLD), given, tmp_path, budget=1)) == 1
    assert [label.id for label in labels(GoldLabeler(GOLD), given, tmp_path)] == ["p0", "p1", "p2"]
    assert len(labels(GoldLabeler(GOLD), given, tmp_path)) == 3


def test_noise_is_that_of_bradley_and_terry_and_the_same_when_resumed(tmp_path):
    given = rows(*[["1", "0"]] * 2000)
    found = labels(GoldLabeler(GOLD, noise=0.5), given, tmp_path)
    share = np.mean([label.answer == 0 for label in found])
    assert share == pytest.approx(1 / (1 + math.exp(-2)), abs=0.025)  # three standard deviations
    turned = rows(*[["1", "0"]] * 50, question=(1, 0))
    again = labels(GoldLabeler(GOLD, noise=0.5), turned, tmp_path / "again")
    assert [label.question[label.answer] for label in again] == [label.answer for label in found[:50]]


def test_what_cannot_be_asked_is_one_clear_error(tmp_path):
    store = LabelStore(tmp_path / "labels.jsonl")
    with pytest.raises(ConfigError, match="`stage.ask` is `edit`"):
        GoldLabeler(GOLD)(rows(["1", "2"]), store, "edit")
    with pytest.raises(ConfigError, match="is one, which answers each question once"):
        GoldLabeler(GOLD)(rows(["1", "2"]), store, "pair", overlap=2)
    with pytest.raises(ConfigError, match="`stage.ask=pair` can't be asked"):
        GoldLabeler(GOLD)(rows(["1", "2", "3"]), store, "pair")
    with pytest.raises(ConfigError, match="Set `reward=model`"):
        RewardLabeler([])


def test_several_rewards_are_summed_and_members_are_the_confidence(tmp_path):
    rewards = [FunctionReward(value, weight=1.0, name="one"), FunctionReward(value, weight=-3.0, name="other")]
    (label,) = labels(RewardLabeler(rewards), rows(["1", "2"]), tmp_path)
    assert (label.answer, label.confidence) == (0, None)
    assert agreeing(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), gap=0.5) == pytest.approx(2 / 3)


def test_a_question_that_is_there_twice_is_answered_once(tmp_path):
    given = rows(["1", "2"])
    given[0].questions.append((1, 0))
    assert len(labels(GoldLabeler(GOLD), given, tmp_path)) == 1
