"""Selections of pairs, by numbers that were computed by hand."""

import numpy as np
import pytest

from rlhf_trl.labels.selection import (
    Pool,
    best_arm_thompson,
    best_worst,
    d_optimal,
    double_thompson,
    greedy_d_optimal,
    member_scores,
    pair_uncertainty,
    random_pairs,
    thompson,
    uncertainty,
)

# Two members, three candidates. Means 1, 1.5, 0; member 0 prefers candidate 0, member 1 candidate 1
SCORES = np.array([[2.0, 1.0, 0.0], [0.0, 2.0, 0.0]])


def pools(*scores) -> list[Pool]:
    return [Pool(np.asarray(each).shape[1], scores=np.asarray(each, float)) for each in scores]


def chosen(found) -> list[tuple[int, int, int]]:
    return [tuple(pair[:3]) for pair in found]


def test_the_variance_of_a_difference_is_over_the_members():
    # r0 - r1 is 1 and -2: mean -.5, variance 2.25. r0 - r2 is 2 and 0: variance 1. r1 - r2 is 1 and 2: variance .25
    values = pair_uncertainty(SCORES)
    assert values[0, 1] == values[1, 0] == 2.25
    assert (values[0, 2], values[1, 2]) == (1.0, 0.25)


def test_the_variance_of_a_probability_and_of_a_draw():
    # Differences of ln 3 and -ln 3 are probabilities of 3/4 and 1/4: variance 1/16, mean 1/2, whose p (1 - p) is 1/4
    scores = np.array([[np.log(3), 0.0], [-np.log(3), 0.0]])
    assert pair_uncertainty(scores, "probabilities")[0, 1] == pytest.approx(1 / 16)
    assert pair_uncertainty(scores, "bernoulli")[0, 1] == pytest.approx(1 / 4)
    # At temperature 2 the differences are of ln 3 / 2, the probabilities sqrt(3) / (1 + sqrt(3))
    high = 3**0.5 / (1 + 3**0.5)
    assert pair_uncertainty(scores, "probabilities", 2.0)[0, 1] == pytest.approx((high - 0.5) ** 2)
    # One member: no variance, and still a probability
    assert pair_uncertainty(scores[:1], "scores")[0, 1] == 0
    assert pair_uncertainty(scores[:1], "bernoulli")[0, 1] == pytest.approx(3 / 16)
    assert np.isfinite(pair_uncertainty(np.array([[1e4, -1e4]]), "bernoulli")).all()


def test_uncertainty_spends_the_budget_where_the_members_disagree():
    other = [[3.0, 0.0], [3.0, 0.0]]  # they agree
    rng = np.random.default_rng(0)
    assert chosen(uncertainty(pools(other, SCORES), 1, 1, rng)) == [(1, 0, 1)]
    assert chosen(uncertainty(pools(other, SCORES), None, 2, rng)) == [(1, 0, 1), (1, 0, 2), (0, 0, 1)]
    assert uncertainty(pools(SCORES), None, 1, rng)[0].value == 2.25


def test_best_and_worst_are_by_the_mean_of_the_members():
    rng = np.random.default_rng(0)
    assert chosen(best_worst(pools(SCORES), None, 1, rng)) == [(0, 1, 2)]
    four = [[1.0, 4.0, 3.0, 2.0]]
    assert chosen(best_worst(pools(four), None, 5, rng)) == [(0, 1, 0), (0, 2, 3)]


def test_double_thompson_takes_the_next_member_that_differs():
    assert double_thompson(SCORES, [0, 1]) == (0, 1)
    assert double_thompson(SCORES, [1, 0]) == (1, 0)
    three = np.array([[2.0, 1.0, 0.0], [5.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert double_thompson(three, [0, 1, 2]) == (0, 2)
    # All agree: the second best by the mean, since one candidate alone is no question
    assert double_thompson(three[:2], [1, 0]) == (0, 1)


def test_best_arm_asks_about_the_least_known_difference_to_the_best():
    # Member 0 prefers candidate 0. Var(r0 - r1) = 2.25 is above Var(r0 - r2) = 1
    assert best_arm_thompson(SCORES, [0]) == (0, 1)
    # Member 1 prefers candidate 1. Var(r1 - r0) = 2.25, Var(r1 - r2) = .25
    assert best_arm_thompson(SCORES, [1, 0]) == (1, 0)
    # No member has an opinion on the differences: another candidate all the same
    assert best_arm_thompson(np.zeros((2, 2)), [0]) == (0, 1)


def test_thompson_asks_no_pair_twice():
    found = thompson(pools(SCORES), None, 3, np.random.default_rng(0), rule="double")
    pairs = [frozenset(pair[1:3]) for pair in found]
    assert len(set(pairs)) == len(pairs) and frozenset((0, 1)) in pairs


def test_random_pairs_come_from_all_prompts_before_one_has_two():
    found = random_pairs(pools(SCORES, SCORES, SCORES), 4, 2, np.random.default_rng(0))
    assert sorted(pair.prompt for pair in found[:3]) == [0, 1, 2] and len(found) == 4
    assert len({(pair.prompt, frozenset(pair[1:3])) for pair in found}) == 4
    assert len(random_pairs(pools([[1.0, 2.0]]), None, 5, np.random.default_rng(0))) == 1


def test_greedy_d_optimal_by_hand():
    # V = I: the values are z'z = 4, 3.61 and 1. After the first, V = diag(5, 1): 3.61 / 5 = .722 for the second, which
    # has its direction, and 1 for the third. After that V = diag(5, 2)
    z = np.array([[2.0, 0.0], [1.9, 0.0], [0.0, 1.0]])
    rows = list(greedy_d_optimal(z, 1.0, lambda row: True))
    assert [row for row, _ in rows] == [0, 2, 1]
    assert [value for _, value in rows] == pytest.approx([4.0, 1.0, 0.722])
    assert [value for _, value in greedy_d_optimal(z, 2.0, lambda row: row != 0)] == pytest.approx([1.805, 0.5])


def test_greedy_d_optimal_is_that_of_the_inverse():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(12, 4))
    v, left = np.eye(4) * 0.5, set(range(12))
    for row, value in greedy_d_optimal(z, 0.5, lambda row: True):
        values = {m: z[m] @ np.linalg.inv(v) @ z[m] for m in left}
        assert row == max(values, key=values.get) and value == pytest.approx(values[row])
        v, left = v + np.outer(z[row], z[row]), left - {row}
    assert not left


def test_d_optimal_avoids_what_it_knows_already():
    same = np.array([[0.0, 0.0], [3.0, 0.0]])
    across = np.array([[0.0, 0.0], [0.0, 1.0]])
    given = [Pool(2, features=each) for each in (same, same, across)]
    assert [pair.prompt for pair in d_optimal(given, 2, 1, np.random.default_rng(0), ridge=0.01)] == [0, 2]
    assert d_optimal([Pool(1, features=same[:1])], None, 1, np.random.default_rng(0)) == []


def test_rewards_are_summed_member_by_member():
    scores = [{"model": [1.0, 3.0], "length": [0.5]}, {"model": [2.0, None], "length": [1.0]}]
    found = member_scores(scores, {"model": 1.0, "length": 2.0})
    np.testing.assert_array_equal(found, [[2.0, 4.0], [4.0, np.nan]])
    with pytest.raises(ValueError, match="`other` has 3 members, and another reward has 2"):
        member_scores([{"model": [1.0, 3.0], "other": [1.0] * 3}], {"model": 1.0, "other": 1.0})
