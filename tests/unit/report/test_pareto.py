"""Non-dominated points, hypervolumes and knees, by hand."""

import itertools

import numpy as np
import pytest

from rlhf_trl.report.pareto import hypervolume, knee, nondominated, pareto


def test_nondominated_points_ties_and_missing_values():
    points = [(1, 3), (2, 2), (2, 2), (3, 1), (2, 1), (1, 2), (np.nan, 9)]
    assert nondominated(points) == [True, True, True, True, False, False, False]
    assert nondominated([(1, 1, 2), (1, 2, 1), (1, 1, 1)]) == [True, True, False]
    # A gain at a cost is the same with the cost's sign turned
    assert pareto([1, 2, 2, None], [0, 1, 2, 0]) == [True, True, False, False]


@pytest.mark.parametrize(
    ("points", "reference", "volume"),
    [
        ([(2, 3)], (0, 0), 6),
        # Three steps: 1 x 3 + 1 x 2 + 1 x 1
        ([(1, 3), (2, 2), (3, 1)], (0, 0), 6),
        ([(3, 1), (2, 2), (1, 3), (1, 1), (2, 2)], (0, 0), 6),
        ([(1, 3), (2, 2), (3, 1)], (1, 0), 3),  # the first one adds nothing: it is at the reference
        ([(1, 3)], (2, 0), 0),
        ([(np.nan, 3), (1, 1)], (0, 0), 1),
        ([(4,), (2,)], (1,), 3),
        # Two boxes of 1 x 2 x 3 and 3 x 2 x 1, which share 1 x 2 x 1
        ([(1, 2, 3), (3, 2, 1)], (0, 0, 0), 10),
        # By inclusion and exclusion: three boxes, each two of which share 1 x 2 x 1, and all three 1 x 1 x 1
        ([(1, 2, 3), (2, 3, 1), (3, 1, 2)], (0, 0, 0), 3 * 6 - 3 * 2 + 1),
        ([(1, 1, 1, 1), (2, 1, 1, 0.5)], (0, 0, 0, 0), 1.5),
    ],
)
def test_hypervolume_of_worked_examples(points, reference, volume):
    for order in itertools.permutations(range(len(reference))):
        turned = [[point[i] for i in order] for point in points]
        assert hypervolume(turned, [reference[i] for i in order]) == pytest.approx(volume)


def test_hypervolume_equals_the_share_of_random_points_that_are_dominated():
    random = np.random.default_rng(0)
    points, drawn = random.random((12, 3)), random.random((40_000, 3))
    share = (drawn[:, None] <= points).all(axis=2).any(axis=1).mean()
    assert hypervolume(points, np.zeros(3)) == pytest.approx(share, abs=0.01)


def test_no_points_have_no_volume_and_no_knee():
    assert hypervolume(np.empty((0, 2)), (0, 0)) == 0
    assert knee(np.empty((0, 2))) is None


def test_knee():
    assert knee([(0, 10), (0.8, 9), (1, 0)]) == 1
    assert knee([(0, 10), (0.5, 5), (1, 0)]) is None  # on the line
    assert knee([(0, 10), (0.4, 4), (1, 0)]) is None  # behind it
    assert knee([(1, 1), (0, 0)]) == 0  # better in all
    assert knee([(0, 0), (1, 1), (1, 1)]) == 1  # as good as its copy
    # A dominated point is none, however far from the ends
    assert knee([(0, 1), (0.9, 0.9), (0.95, 0.95), (1, 0)]) == 2
    assert knee([(0, 0, 1), (0, 1, 0), (1, 0, 0), (0.5, 0.5, 0.5)]) == 3
