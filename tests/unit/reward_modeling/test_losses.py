"""Losses of reward models against published numbers."""

import math

import pytest
import torch

from rlhf_trl.reward_modeling.losses import comparison_losses, ranking_loss, regression_loss

FOUR = [2.0, 1.0, 0.5, -1.0]


def loss(scores, ranks, groups=None, **options) -> float:
    """Return the ranking loss in float64."""
    groups = [0] * len(scores) if groups is None else groups
    return ranking_loss(
        torch.tensor(scores, dtype=torch.float64), torch.tensor(ranks), torch.tensor(groups), **options
    ).item()


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (None, 0.31326168751822286),
        (1 / 3, 0.41437008685),
        (2 / 3, 0.54030557469),
        (1.0, 0.69314718056),
        (2.0, 1.31326168752),
        (3.0, 2.12692801104),
    ],
)
@pytest.mark.parametrize("loss_type", ["pairwise", "plackett_luce"])
def test_pair_with_a_margin(loss_type, margin, expected):
    assert loss([0.5, 1.5], [2, 1], loss_type=loss_type, margin=margin) == pytest.approx(expected, abs=1e-6)
    if margin is not None:
        by_prompt, by_completion = torch.tensor([margin]).double(), torch.tensor([-margin, 0.0]).double()
        for tensor in (by_prompt, by_completion):
            assert loss([0.5, 1.5], [2, 1], loss_type=loss_type, margin=tensor) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_ranking_of_four(order):
    scores, ranks = [FOUR[i] for i in order], [i + 1 for i in order]
    assert loss(scores, ranks) == pytest.approx(0.22761343171342482, abs=1e-9)
    assert loss(scores, ranks, loss_type="plackett_luce") == pytest.approx(1.251552095710599, abs=1e-9)


def test_prompts_have_equal_weight_whatever_their_number_of_pairs():
    both = loss([*FOUR, 1.5, 0.5], [1, 2, 3, 4, 1, 2], [7, 7, 7, 7, 3, 3])
    assert both == pytest.approx((0.22761343171342482 + 0.31326168751822286) / 2, abs=1e-9)
    mixed = loss([1.5, *FOUR, 0.5], [1, 1, 2, 3, 4, 2], [3, 7, 7, 7, 7, 3])
    assert mixed == pytest.approx(both, abs=1e-12)
    alone = loss([*FOUR, 9.0], [1, 2, 3, 4, 1], [0, 0, 0, 0, 1])  # a prompt without comparisons doesn't count
    assert alone == pytest.approx(0.22761343171342482, abs=1e-9)


@pytest.mark.parametrize("loss_type", ["pairwise", "plackett_luce"])
def test_ties_are_not_compared(loss_type):
    scores = torch.tensor([1.5, 3.0, 0.5], requires_grad=True)
    value = ranking_loss(scores, torch.tensor([1, 1, 2]), torch.zeros(3, dtype=torch.long), loss_type)
    lone = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(-2.5))]
    assert value.item() == pytest.approx(sum(lone) / (2 if loss_type == "pairwise" else 1), abs=1e-6)
    tied = ranking_loss(scores, torch.ones(3), torch.zeros(3, dtype=torch.long), loss_type)
    tied.backward()
    assert tied.item() == 0.0 and scores.grad.tolist() == [0.0, 0.0, 0.0]


def test_label_smoothing_reverses_comparisons():
    right, wrong = 0.31326168751822286, 1.3132616875182228
    for loss_type in ("pairwise", "plackett_luce"):
        smooth = loss([1.5, 0.5], [1, 2], loss_type=loss_type, label_smoothing=0.1)
        assert smooth == pytest.approx(0.9 * right + 0.1 * wrong, abs=1e-9)
    reversed_loss = loss(FOUR, [4, 3, 2, 1], loss_type="plackett_luce")
    smooth = loss(FOUR, [1, 2, 3, 4], loss_type="plackett_luce", label_smoothing=0.2)
    assert smooth == pytest.approx(0.8 * 1.251552095710599 + 0.2 * reversed_loss, abs=1e-9)


def test_centering_is_the_square_of_each_pairs_sum():
    plain, centered = loss([1.5, 0.5], [1, 2]), loss([1.5, 0.5], [1, 2], center=0.01)
    assert centered - plain == pytest.approx(0.01 * 4.0, abs=1e-12)
    sums = [(a + b) ** 2 for i, a in enumerate(FOUR) for b in FOUR[i + 1 :]]
    assert loss(FOUR, [1, 2, 3, 4], center=0.1) - loss(FOUR, [1, 2, 3, 4]) == pytest.approx(0.1 * sum(sums) / 6)


def test_weights_and_margins_are_per_comparison():
    scores, groups = torch.tensor(FOUR).double(), torch.tensor([0, 0, 1, 1])
    better, worse = torch.tensor([0, 2]), torch.tensor([1, 3])
    weights, margin = torch.tensor([0.5, 2.0]), torch.tensor([0.0, 1.0])
    losses, compared = comparison_losses(scores, better, worse, groups, weights=weights, margin=margin)
    assert losses.tolist() == pytest.approx([0.5 * math.log1p(math.exp(-1)), 2 * math.log1p(math.exp(-0.5))])
    assert compared.tolist() == [True, True]


def test_wrong_shapes_and_loss_types_are_errors():
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match="1-D and of one length"):
        ranking_loss(two, three, two.long())
    with pytest.raises(ValueError, match="one entry per prompt or one per completion"):
        ranking_loss(two, torch.tensor([1, 2]), two.long(), margin=three)
    with pytest.raises(ValueError, match="pairwise, plackett_luce"):
        ranking_loss(two, two, two.long(), loss_type="listwise")


def test_missing_targets_have_neither_loss_nor_gradient():
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    value = regression_loss(scores, torch.tensor([[0.0, torch.nan], [torch.nan, 2.0]]))
    value.backward()
    assert value.item() == (1.0 + 4.0) / 2 and scores.grad.tolist() == [[1.0, 0.0], [0.0, 2.0]]
