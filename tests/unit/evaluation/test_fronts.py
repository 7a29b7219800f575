"""Fronts of policies by several rewards."""

import numpy as np
import pytest

from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.fronts import front_rewards, policy_front
from rlhf_trl.evaluation.judges import Answers
from rlhf_trl.report.fronts import FrontOptions, front_blocks, front_of
from rlhf_trl.report.options import front_problems
from rlhf_trl.report.text import comparison_text
from rlhf_trl.rewards.function import FunctionReward
from rlhf_trl.runs.results import Comparison, ConstraintResult, Estimate, Front, PolicyResult

# Means by gold and length of four policies; of three of a sweep one is dominated
MEANS = {"sft": (0.0, 10.0), "ppo a": (3.0, 8.0), "ppo b": (2.0, 9.0), "short": (2.5, 2.0)}
REWARDS = {"gold": 1.0, "length": -0.1}


def front_by(*given) -> Front:
    """Return the front, which there is."""
    front = policy_front(*given)
    assert front is not None
    return front


def answers(spread: float = 0.0, prompts: int = 40) -> dict[str, Answers]:
    """Return answers whose rewards have the means of `MEANS`."""
    noise = np.linspace(-spread, spread, prompts)
    return {
        name: Answers([""] * prompts, {"gold": gold + noise, "length": length - noise})
        for name, (gold, length) in MEANS.items()
    }


def results(**constraints: float) -> dict[str, PolicyResult]:
    """Return results of the policies, with how far each is from a constraint."""
    found = {}
    for name in MEANS:
        excess = constraints.get(name.replace(" ", "_"))
        bound = ConstraintResult(
            bound="", value=None, violation_rate=None, excess=excess, excess_low=None, excess_high=None
        )
        found[name] = PolicyResult(
            path=name,
            family="ppo_sweep" if name.startswith("ppo") else name,
            completion_length=1,
            eos_rate=1,
            constraints={"length": bound} if constraints else {},
        )
    return found


def test_front_of_a_reward_to_maximize_and_one_to_minimize():
    front = front_by(answers(), results(), REWARDS, FrontOptions())
    assert front.policies == ["ppo a", "short"] and front.minimized == ["length"]
    assert front.reference_point == {"gold": 0, "length": 10}  # the worst of each
    # Boxes by hand: short 2.5 x 8, and ppo a 0.5 x 2 beside it
    assert {name: each.mean for name, each in front.hypervolumes.items()} == pytest.approx(
        {"": 21, "sft": 0, "ppo_sweep": 6, "short": 20}
    )
    # Of two ends neither is a knee; weights choose one
    assert front.chosen is None and "no knee" in front.rule
    weighted = front_by(answers(), results(), REWARDS, FrontOptions(choose={"gold": 1, "length": -0.01}))
    assert weighted.chosen == "ppo a" and weighted.rule == "the highest 1 x gold + -0.01 x length"


def test_policies_that_differ_by_rounding_are_equal():
    means = np.array([[0.1 + 0.2, 1.0], [0.3, 1.0], [0.0, 2.0]])
    assert front_of(means, "abc", ["gold", "brief"], [], FrontOptions()).policies == ["a", "b", "c"]


def test_the_chosen_policy_satisfies_the_constraints():
    options = FrontOptions(choose={"gold": 1})
    bound = {"sft": 2.0, "ppo_a": 0.1, "ppo_b": -1.0, "short": -3.0}
    front = front_by(answers(), results(**bound), REWARDS, options)
    assert (
        front.chosen == "short"
        and front.rule == "the highest 1 x gold of those that satisfy the constraints by their means"
    )
    front = front_by(answers(), results(**dict.fromkeys(bound, 1.0)), REWARDS, options)
    assert front.chosen is None and front.rule == "no policy satisfies the constraints by its means"


def test_hypervolume_has_an_interval_over_prompts_and_a_given_reference_point():
    options = FrontOptions(reference_point={"gold": 1, "length": 12})
    front = front_by(answers(spread=2.0), results(), REWARDS, options)
    volume = front.hypervolumes["short"]
    assert volume.mean == pytest.approx(1.5 * 10)
    # Both rewards move by the same noise: d(1.5 + n)(10 + n) at a standard error of 2 / sqrt(3) / sqrt(40)
    error = 11.5 * 2 / 3**0.5 / 40**0.5
    assert volume.low == pytest.approx(15 - 1.96 * error, abs=0.6)
    assert volume.high == pytest.approx(15 + 1.96 * error, abs=0.6)
    assert front.reference_point == {"gold": 1, "length": 12}


def test_rewards_that_do_not_apply_to_a_prompt_are_no_zeros():
    given = answers()
    given["short"].rewards["gold"][:20] = np.nan
    given["sft"].rewards["gold"][:] = np.nan
    front = front_by(given, results(), REWARDS, FrontOptions())
    assert front.missing == {"sft": "no reward"} and front.reference_point == {"gold": 2, "length": 9}
    assert front.hypervolumes["short"].mean == pytest.approx(0.5 * 7)


def test_there_is_no_front_of_a_reward_without_values(capsys):
    given = answers()
    for each in given.values():
        each.rewards["length"][:] = np.nan
    assert policy_front(given, results(), REWARDS, FrontOptions()) is None
    assert "no front of `gold`, `length`: `length` has no value" in capsys.readouterr().out


def test_front_of_the_rewards_that_count():
    rewards = [
        FunctionReward("rlhf_trl.rewards.shaping.pattern", name=name, weight=weight, kwargs={"pattern": "a"})
        for name, weight in (("a", 1), ("b", -2), ("proxy", 0))
    ]
    assert front_rewards(rewards, FrontOptions()) == {"a": 1, "b": -2}
    assert front_rewards(rewards[1:], FrontOptions()) == {}
    assert front_rewards(rewards, FrontOptions(rewards=["a", "proxy"])) == {"a": 1, "proxy": 0}
    with pytest.raises(ConfigError, match="names `prox`, and the rewards are `a`, `b`, `proxy`. Did you mean `proxy`"):
        front_rewards(rewards, FrontOptions(rewards=["a", "prox"]))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ((None, None, "best"), "`stage.choose` is `best`. Set it to `knee`"),
        ((["a"], None, "knee"), "`stage.front` names 1 of the rewards"),
        (("a", None, "knee"), "must be a list"),
        ((["a", "b"], {"a": 0}, "knee"), "`stage.reference_point` lacks `b`"),
        ((None, {"a": 0}, "knee"), "`stage.reference_point` lacks `b`"),
        ((["a", "b"], 3, "knee"), "must name rewards"),
        ((None, None, {"c": 1}), "`stage.choose` names `c`, and the rewards are `a`, `b`."),
    ],
)
def test_wrong_options_of_a_front(options, problem):
    assert problem in "".join(front_problems(*options, measured=["a", "b"], counted=["a", "b"]))
    assert front_problems(["a", "b"], {"a": 0, "b": 1}, {"b": 1}, ["a", "b"], ["a"]) == []
    assert front_problems(None, {"a": 0, "b": 1}, "knee", ["a", "b", "watched"], ["a", "b"]) == []


def test_a_page_shows_each_pair_of_rewards():
    rewards = ("gold", "length", "third")
    given = {name: each.rewards | {"third": each.rewards["gold"] ** 2} for name, each in answers(1.0).items()}
    given = {name: Answers([""] * 40, each) for name, each in given.items()}
    weights = {name: -1.0 if name == "length" else 1.0 for name in rewards}
    front = front_by(given, results(), weights, FrontOptions())
    means = {
        name: {reward: Estimate(float(np.mean(each.rewards[reward])), -1, 1) for reward in rewards}
        for name, each in given.items()
    }
    policies = {
        name: PolicyResult(**{**vars(each), "reward_intervals": means[name]}) for name, each in results().items()
    }
    comparison = Comparison(
        baseline="sft", prompts=40, dropped=0, weights=weights, policies=policies, front=front, samples=[]
    )
    assert Comparison.from_json(comparison.to_json()).front == front
    blocks = front_blocks(comparison)
    assert [block.kind for block in blocks] == ["figure"] * 3 + ["table"] * 2
    assert "length (less is better)" in blocks[0].svg
    text = comparison_text(comparison)
    assert "Front of gold, length" in text and "Hypervolume over the reference point gold 0" in text
    # Without a front its section is absent, or says how to get one
    assert (
        front_blocks(
            Comparison(baseline="sft", prompts=1, dropped=0, weights={"gold": 1}, policies=policies, samples=[])
        )
        == []
    )
