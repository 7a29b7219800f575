"""The pure functions of PPO against published formulas and numbers."""

import pytest
import torch

from rlhf_trl.callbacks.kl import AdaptiveKL, FixedKL, LinearKL
from rlhf_trl.ppo.losses import (
    explained_variance,
    gae,
    kl_estimate,
    masked_whiten,
    policy_losses,
    token_rewards,
    value_loss,
)


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def ones(x):
    return torch.ones_like(x, dtype=torch.bool)


@pytest.mark.parametrize(
    ("estimator", "each", "total"),
    [
        ("k1", [-0.3315, -0.0426, 0.6351], 0.261),
        ("k2", [0.0549461, 0.0009074, 0.2016760], 0.2575295),
        ("k3", [0.0615561, 0.0009204, 0.1649825], 0.2274590),
    ],
)
def test_kl_estimators(estimator, each, total):
    ref = t([-1.0, -2.0, -3.0])
    kl = kl_estimate(ref + t([-0.3315, -0.0426, 0.6351]), ref, estimator)
    torch.testing.assert_close(kl, t(each), atol=1e-6, rtol=0)
    assert kl.sum().item() == pytest.approx(total, abs=1e-6)


def test_k1_and_k3_estimate_the_kl_of_the_policys_samples():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    samples = torch.multinomial(policy.exp(), 400_000, replacement=True)
    for estimator in ("k1", "k3"):
        estimate = kl_estimate(policy[samples], reference[samples], estimator).mean()
        assert estimate.item() == pytest.approx(exact.item(), abs=0.01)


def test_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="'k4'.*'k1', 'k2' or 'k3'"):
        kl_estimate(t([0.0]), t([0.0]), "k4")


def test_score_lands_on_the_last_token_and_never_on_padding():
    kl = t([0.1, 0.2, 0.3, 9.0], [0.1, 0.2, 0.3, 0.4], [9.0, 9.0, 9.0, 9.0])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0, 5.0], dtype=torch.float64), kl, mask, 0.5)
    expected = t([-0.05, -0.1, 1.85, 0.0], [-0.05, -0.1, -0.15, -1.2], [0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(rewards, expected)


REWARDS, VALUES = t([0.016575, 0.00213, 0.968245]), t([0.1, 0.2, 0.3])


def test_gae():
    advantages, returns = gae(REWARDS, VALUES, ones(REWARDS), 1.0, 0.95)
    torch.testing.assert_close(advantages, t([0.8166896125, 0.73696275, 0.668245]), atol=1e-9, rtol=0)
    torch.testing.assert_close(returns, t([0.9166896125, 0.93696275, 0.968245]), atol=1e-9, rtol=0)
    whitened = masked_whiten(advantages, ones(advantages))
    torch.testing.assert_close(whitened, t([1.2538712, -0.0604984, -1.1933728]), atol=1e-6, rtol=0)


def test_gae_at_lambda_one_and_zero():
    _, returns = gae(REWARDS, VALUES, ones(REWARDS), 1.0, 1.0)
    torch.testing.assert_close(returns, t([0.98695, 0.970375, 0.968245]), atol=1e-9, rtol=0)
    advantages, _ = gae(REWARDS, VALUES, ones(REWARDS), 1.0, 0.0)
    torch.testing.assert_close(advantages, t([0.116575, 0.10213, 0.668245]), atol=1e-9, rtol=0)


def test_gae_steps_over_what_the_mask_leaves_out():
    plain = gae(REWARDS, VALUES, ones(REWARDS), 0.9, 0.95)
    holes = torch.tensor([[1, 0, 1, 0, 0, 1, 0]])
    rewards, values = torch.full((1, 7), 77.0, dtype=torch.float64), torch.full((1, 7), -55.0, dtype=torch.float64)
    rewards[holes.bool()], values[holes.bool()] = REWARDS[0], VALUES[0]
    for with_holes, without in zip(gae(rewards, values, holes, 0.9, 0.95), plain, strict=True):
        torch.testing.assert_close(with_holes[holes.bool()], without[0])
        assert (with_holes[~holes.bool()] == 0).all()


GRID = t([1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0])


@pytest.mark.parametrize(
    ("unbiased", "expected"),
    [
        (False, t([0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492])),
        (True, t([0.1394, 0.5046, 0.8697], [1.2349, 1.6, 1.9651], [2.3303, 2.6954, 3.0606])),
    ],
)
def test_whitening(unbiased, expected):
    whitened = masked_whiten(GRID, ones(GRID), shift_mean=False, unbiased=unbiased)
    torch.testing.assert_close(whitened, expected, atol=5e-5, rtol=0)
    shifted = masked_whiten(GRID, ones(GRID), unbiased=unbiased)
    torch.testing.assert_close(shifted, whitened - 1.6, atol=1e-6, rtol=0)


def test_whitening_looks_at_the_mask_alone():
    padded = torch.cat([GRID, torch.full((3, 2), 1e6, dtype=torch.float64)], dim=1)
    mask = torch.cat([ones(GRID), torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    whitened = masked_whiten(padded, mask)
    torch.testing.assert_close(whitened[:, :3], masked_whiten(GRID, ones(GRID)))
    assert (whitened[:, 3:] == 0).all()
    one = masked_whiten(GRID, torch.eye(3).bool() & (GRID < 1.3), unbiased=True)  # a single entry has no variance
    assert torch.isfinite(one).all()


def test_policy_loss():
    ratio, advantages = t([1.3, 0.7, 1.3, 0.7]), t([1.0, 1.0, -1.0, -1.0])
    losses, clipped = policy_losses(ratio.log(), torch.zeros_like(ratio), advantages, 0.2, 0.2)
    torch.testing.assert_close(losses, t([-1.2, -0.7, 1.3, 0.8]))
    assert losses.mean().item() == pytest.approx(0.05)
    assert clipped.tolist() == [[True, False, False, True]]
    high, _ = policy_losses(ratio.log(), torch.zeros_like(ratio), advantages, 0.2, 0.28)
    torch.testing.assert_close(high, t([-1.28, -0.7, 1.3, 0.8]))
    dual, _ = policy_losses(t([5.0]).log(), t([0.0]), t([-1.0]), 0.2, 0.2, delta=3.0)
    assert dual.item() == pytest.approx(3.0)


def test_value_loss():
    loss = value_loss(t([1.0]), t([0.5]), t([2.0]), ones(t([1.0])), 0.2)
    assert loss.item() == pytest.approx(0.845, abs=1e-9)
    padded = value_loss(t([1.0, 7.0]), t([0.5, 7.0]), t([2.0, -7.0]), torch.tensor([[1, 0]]), 0.2)
    assert padded.item() == pytest.approx(0.845, abs=1e-9)


def test_explained_variance():
    returns = t([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns, returns, ones(returns)).item() == 1.0
    assert explained_variance(t([5.0, 5.0, 5.0, 5.0]), returns, ones(returns)).item() == pytest.approx(0.0)
    assert explained_variance(-returns, returns, ones(returns)).item() == pytest.approx(-3.0)
    assert explained_variance(returns, t([2.0, 2.0, 2.0, 2.0]), ones(returns)).isnan()


@pytest.mark.parametrize(("kl", "coef"), [(12, 0.151536), (6.6, 0.150768), (6, 0.15), (5.4, 0.149232), (0, 0.148464)])
def test_adaptive_kl(kl, coef):
    controller = AdaptiveKL(0.15, 6)
    assert controller.update(kl, 512) == pytest.approx(coef, abs=1e-6)
    assert controller.coef == controller.update(6, 512)


def test_adaptive_kl_over_ten_rollouts():
    controller = AdaptiveKL(coef=0.2, target=6, horizon=10_000)
    for _ in range(10):
        controller.update(12, 128)
    assert controller.coef == pytest.approx(0.20517938686, abs=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveKL(0.0, 6), "beta` above 0"),
        (lambda: AdaptiveKL(0.1, 0), "`kl.target` is 0. Set it above 0"),
        (lambda: AdaptiveKL(0.1, 6, horizon=0), "`kl.horizon` is 0. Set it above 0"),
        (lambda: FixedKL(-1), "`stage.args.beta` is -1. Set it to 0 or more"),
        (lambda: LinearKL(0.1, -1), "`kl.final` is -1. Set it to 0 or more"),
    ],
)
def test_controllers_refuse_what_can_not_work(make, message):
    with pytest.raises(ValueError, match=message):
        make()
