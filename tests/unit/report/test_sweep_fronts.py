"""Fronts of the settings of a sweep."""

from dataclasses import replace

import pytest

from rlhf_trl.report.fronts import FrontOptions
from rlhf_trl.report.sweep import Sweep
from rlhf_trl.report.text import front_text
from rlhf_trl.runs.results import SweepJob


def job(number: int, seed: int, overrides: dict[str, str], gold: float, tokens: float, status="done") -> SweepJob:
    """Return a job of a sweep that measured two rewards."""
    eval_ = {"eval_rewards/gold/mean": gold, "eval_rewards/tokens/mean": tokens, "eval_reward": gold}
    given = {**overrides, "seed": str(seed)}
    measured = {"objective": "eval_reward", "value": gold, "eval": eval_} if status == "done" else {}
    return SweepJob(number=number, overrides=given, status=status, **measured)


def weights(gold: str, tokens: str) -> dict[str, str]:
    """Return the overrides of a setting."""
    return {"reward.gold.weight": gold, "reward.tokens.weight": tokens}


def test_front_of_weights_over_two_seeds_with_a_failed_job():
    jobs = [
        job(0, 1, weights("1", "0"), 3.0, 10.0),
        job(1, 2, weights("1", "0"), 3.0, 12.0),
        job(2, 1, weights("0.5", "-1"), 2.0, 4.0),
        job(3, 2, weights("0.5", "-1"), 2.0, 6.0),
        job(4, 1, weights("0", "-2"), 1.0, 6.0),
        job(5, 2, weights("0", "-2"), 0.0, 0.0, status="failed"),
    ]
    found = Sweep.of(jobs, FrontOptions(choose={"gold": 1})).front
    front = found.front
    assert front.minimized == ["tokens"] and front.chosen == "gold=1, tokens=0"
    # The means over seeds: 3 and 11, 2 and 5, 1 and 6, of which the second has more gold for fewer tokens
    assert front.policies == ["gold=1, tokens=0", "gold=0.5, tokens=-1"]
    assert front.reference_point == {"gold": 1, "tokens": 11}
    assert front.missing == {"job 5 (gold=0, tokens=-2)": "failed"}
    # One seed is in every setting: boxes of 1 x 7 and 2 x 1 in it, which share 1 x 1
    assert found.seeds == 1 and front.hypervolumes[""].mean == pytest.approx(1 * 7 + 2 * 1 - 1)
    # Without the failed one both seeds are: 8 and, with 12 and 6 tokens, 1 x 5
    both = Sweep.of(jobs[:4], FrontOptions(reference_point={"gold": 1, "tokens": 11})).front
    assert both.seeds == 2 and both.front.hypervolumes[""].mean == pytest.approx((8 + 5) / 2)
    assert both.front.hypervolumes[""].high > 20  # t with one degree of freedom
    assert all(head in front_text(both.front, both.points) for head in ("gold [95 %]", "hypervolume [95 %]"))


def test_front_of_thresholds_and_no_front_of_other_sweeps():
    bounds = ["{tokens: '<= 10'}", "{tokens: '<= 14'}"]
    jobs = [job(i, 1, {"combine.constraints": bound}, 2.0 + i, 10.0 + i) for i, bound in enumerate(bounds)]
    found = Sweep.of(jobs).front
    assert found.front.minimized == ["tokens"] and len(found.front.policies) == 2 and found.front.chosen is None
    assert "[95 %]" not in front_text(found.front, found.points)  # of one seed there are no intervals
    jobs = [job(i, 1, {"stage.args.beta": beta}, 2.0 + i, 10.0) for i, beta in enumerate(("0.1", "0.2"))]
    assert Sweep.of(jobs).front is None


def test_weights_that_no_override_sets_are_those_of_the_config():
    jobs = [job(i, 1, {"reward.gold.weight": each}, 2.0 + i, 10.0 + i) for i, each in enumerate(("0.5", "1"))]
    priced = [replace(each, weights={"gold": 1.0, "tokens": -0.01}) for each in jobs]
    assert Sweep.of(priced).front.front.minimized == ["tokens"]
    # A reward that is only watched is no objective
    watched = [replace(each, weights={"gold": 1.0, "tokens": 0.0}) for each in jobs]
    assert Sweep.of(watched).front is None
