"""Scoring of a rollout: rewards to advantages and returns by hand, without a model."""

import math
import warnings

import pytest
import torch

from rlhf_trl.ppo import PPOConfig
from rlhf_trl.ppo.rollout import Rollout, held_out_metrics, score_rollout
from rlhf_trl.ppo.update import micro_batch
from rlhf_trl.rewards.combine import minimum
from rlhf_trl.trainers.rollout_hook import Rewards

EOS = 9


def config(tmp_path, **options) -> PPOConfig:
    defaults = {"beta": 0.5, "gamma": 1.0, "lam": 1.0, "report_to": "none", "use_cpu": True, "bf16": False}
    return PPOConfig(str(tmp_path), **(defaults | options))


def rollout_of_three() -> Rollout:
    """
    Return three completions: one that ends after 2 tokens, one of 3 tokens that doesn't end, and one of 3 tokens of
    which a tool wrote the second. The log-ratio is 0.2 per token, the values are 1, 2 and 3.
    """
    logps = torch.full((3, 3), -1.0)
    output = {
        "prompt_ids": torch.tensor([[0, 5], [5, 6], [0, 7]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1], [0, 1]]),
        "completion_ids": torch.tensor([[5, EOS, 0], [5, 6, 7], [5, 6, EOS]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]]),
        "tool_mask": torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1]]),
        "old_per_token_logps": logps,
        "ref_per_token_logps": logps - 0.2,
        "old_values": torch.tensor([[1.0, 2.0, 3.0]] * 3),
    }
    return Rollout.from_output(output, [EOS])


def rewards_of(*values: float, invalid: tuple[int, ...] = (), **options) -> Rewards:
    """Return the rewards of one function."""
    column = torch.tensor(values).unsqueeze(1)
    flags = torch.tensor([[i in invalid] for i in range(len(values))])
    return Rewards(column.masked_fill(flags, math.nan), flags, torch.ones(1), ["reward"], **options)


def close(actual: torch.Tensor, *expected):
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-6, rtol=0)


def test_a_rollout_is_read_from_the_outputs_of_trl():
    rollout = rollout_of_three()
    assert rollout.mask.tolist() == [[True, True, False], [True, True, True], [True, False, True]]
    assert rollout.ended.tolist() == [True, False, True]
    assert rollout.input_ids.shape == rollout.attention_mask.shape == (3, 5)


def test_returns_and_advantages_by_hand(tmp_path):
    rewards = rewards_of(1.0, 2.0, -4.0)
    scored, metrics = score_rollout(rollout_of_three(), rewards, config(tmp_path))
    # With gamma = lam = 1 a return is the reward to go: the score, less 0.5 * 0.2 for each token that is left
    returns = [[0.8, 0.9, 0.0], [1.7, 1.8, 1.9], [-4.2, 0.0, -4.1]]
    close(scored.returns, *returns)
    advantages = [-0.2, -1.1, 0.7, -0.2, -1.1, -5.2, -7.1]  # less the values, at the seven tokens of the policy
    mean = sum(advantages) / 7
    std = math.sqrt(sum((a - mean) ** 2 for a in advantages) / 7)
    whitened = [(a - mean) / std for a in advantages]
    torch.testing.assert_close(scored.advantages[scored.mask], torch.tensor(whitened), atol=1e-5, rtol=0)
    assert not scored.advantages[~scored.mask].any()
    close(scored.kl, 0.4, 0.6, 0.4)
    assert metrics == {
        "objective/scores": pytest.approx(-1 / 3),
        "objective/scores_std": pytest.approx(math.sqrt(62) / 3),  # of 1, 2 and -4
        "objective/kl": pytest.approx(1.4 / 3),
        "objective/kl_per_token": pytest.approx(0.2),
        "objective/rlhf_reward": pytest.approx((0.8 + 1.7 - 4.2) / 3),
        "objective/kl_coef": 0.5,
        "objective/invalid_rewards": 0,
        "completions/eos_rate": pytest.approx(2 / 3),
        "value/mean": pytest.approx((1 + 2 + 1 + 2 + 3 + 1 + 3) / 7),
        "value/explained_variance": pytest.approx(1 - std**2 / (45.64 / 7 - (1.2 / 7) ** 2), abs=1e-5),
        "returns/mean": pytest.approx((0.8 + 0.9 + 1.7 + 1.8 + 1.9 - 4.2 - 4.1) / 7),
    }


def test_it_is_pure(tmp_path):
    rollout, rewards = rollout_of_three(), rewards_of(1.0, 2.0, -4.0)
    before = {name: None if value is None else value.clone() for name, value in vars(rollout).items()}
    first, _ = score_rollout(rollout, rewards, config(tmp_path))
    again, _ = score_rollout(rollout, rewards, config(tmp_path))
    for name, value in vars(rollout).items():
        assert value is before[name] is None or torch.equal(value, before[name]), name
    assert torch.equal(first.advantages, again.advantages) and rollout.advantages is None


@pytest.mark.parametrize(
    ("options", "first_returns"),
    [
        ({"beta": 0.0}, [1, 2, -4]),
        ({"kl_estimator": "k2"}, [1 - 0.02, 2 - 0.03, -4 - 0.02]),
        ({"beta": 0.0, "missing_eos_penalty": 3.0}, [1, -1, -4]),
        ({"beta": 0.0, "missing_eos_score": -3.0}, [1, -3, -4]),
        ({"beta": 0.0, "length_penalty": 0.5}, [0, 0.5, -5]),  # of the policy's own tokens: 2, 3 and 2
        ({"beta": 0.0, "length_penalty": 0.5, "missing_eos_score": -3.0}, [0, -4.5, -5]),
        ({"beta": 0.0, "gamma": 0.5}, [0.5, 0.5, -2]),  # the tool's token is not a step
    ],
    ids=str,
)
def test_what_shapes_the_rewards(tmp_path, options, first_returns):
    scored, _ = score_rollout(rollout_of_three(), rewards_of(1.0, 2.0, -4.0), config(tmp_path, **options))
    close(scored.returns[:, 0], *map(float, first_returns))


def test_the_coefficient_of_a_controller_takes_the_place_of_the_arguments(tmp_path):
    scored, metrics = score_rollout(rollout_of_three(), rewards_of(1.0, 2.0, -4.0), config(tmp_path), beta=5.0)
    close(scored.returns[:, 0], 1 - 2.0, 2 - 3.0, -4 - 2.0)
    assert metrics["objective/kl_coef"] == 5


def test_whitened_rewards_keep_their_mean(tmp_path):
    plain, _ = score_rollout(rollout_of_three(), rewards_of(1.0, 2.0, -4.0), config(tmp_path))
    scaled, _ = score_rollout(rollout_of_three(), rewards_of(1.0, 2.0, -4.0), config(tmp_path, whiten_rewards=True))
    token_rewards = torch.tensor([-0.1, 0.9, -0.1, -0.1, 1.9, -0.1, -4.1])
    mean, std = token_rewards.mean(), token_rewards.std(unbiased=False)
    whitened = (token_rewards - mean) / std + mean
    torch.testing.assert_close(scaled.returns[0, 1], whitened[1])
    torch.testing.assert_close(scaled.returns[1, 0], whitened[2:5].sum())
    assert not torch.allclose(plain.returns, scaled.returns)


def test_the_policy_learns_from_normalized_rewards_and_raw_ones_are_logged(tmp_path):
    rewards = rewards_of(1.0, 2.0, -4.0, normalized=torch.tensor([[10.0], [20.0], [-30.0]]))
    scored, metrics = score_rollout(rollout_of_three(), rewards, config(tmp_path, beta=0.0))
    close(scored.returns[:, 0], 10.0, 20.0, -30.0)
    assert metrics["objective/scores"] == pytest.approx(-1 / 3) and metrics["objective/scores_normalized"] == 0


def test_several_functions_are_combined(tmp_path):
    values = torch.tensor([[1.0, 5.0], [2.0, math.nan], [-4.0, 1.0]])
    none = torch.zeros(3, 2, dtype=torch.bool)
    for combine, expected in ((None, [2 + 0.5, 4.0, -8 + 0.1]), (minimum, [0.5, 4.0, -8.0])):
        options = {} if combine is None else {"combine": combine}
        rewards = Rewards(values, none, torch.tensor([2.0, 0.1]), ["a", "b"], **options)
        scored, _ = score_rollout(rollout_of_three(), rewards, config(tmp_path, beta=0.0))
        close(scored.returns[:, 0], *expected)


def test_a_rollout_without_a_valid_reward_has_no_spread_and_no_warning(tmp_path):
    args = config(tmp_path)
    with warnings.catch_warnings(action="error"):
        scored, metrics = score_rollout(rollout_of_three(), rewards_of(math.nan, math.nan, math.nan), args)
    assert not scored.mask.any() and not scored.advantages.any()
    assert math.isnan(metrics["objective/scores_std"]) and metrics["objective/scores"] == 0


def test_completions_without_a_valid_reward_are_masked_out(tmp_path):
    invalid = rewards_of(1.0, 2.0, -4.0, invalid=(1,))
    none = rewards_of(1.0, math.nan, -4.0)
    for rewards, count in ((invalid, 1), (none, 0)):
        scored, metrics = score_rollout(rollout_of_three(), rewards, config(tmp_path))
        assert scored.valid.tolist() == [True, False, True] and not scored.mask[1].any()
        assert not scored.advantages[1].any() and not scored.returns[1].any()
        advantages = scored.advantages[scored.mask]
        assert advantages.mean().item() == pytest.approx(0, abs=1e-6)
        assert advantages.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
        assert metrics["objective/scores"] == pytest.approx(-1.5) and metrics["objective/invalid_rewards"] == count
        assert metrics["objective/kl"] == pytest.approx(0.4) and metrics["completions/eos_rate"] == 1
        assert all(math.isfinite(value) for value in metrics.values())


def test_held_out_metrics_are_means_of_raw_scores():
    rewards = rewards_of(1.0, 2.0, -4.0, normalized=torch.zeros(3, 1))
    metrics, count = held_out_metrics(rollout_of_three(), rewards)
    assert count == 3 and metrics["objective/scores"] == pytest.approx(-1 / 3)
    assert metrics["completions/mean_length"] == pytest.approx(8 / 3)
    metrics, count = held_out_metrics(rollout_of_three(), rewards, rows=2)  # the third one is a copy
    assert count == 2 and metrics["objective/scores"] == 1.5 and metrics["objective/kl"] == pytest.approx(0.5)


def test_micro_batches_of_an_epoch_hold_each_completion_once_whatever_the_number_of_ranks(tmp_path):
    scored, _ = score_rollout(rollout_of_three(), rewards_of(1.0, 2.0, -4.0), config(tmp_path))
    eight = scored.select(torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))
    eight.old_values = torch.arange(8.0).unsqueeze(1).expand(8, 3).clone()
    made = {}
    for ranks in (1, 2):
        args = config(
            tmp_path, per_device_train_batch_size=4 // ranks, steps_per_generation=2, gradient_accumulation_steps=1
        )
        args.generation_batch_size = 8  # as with so many processes
        for step in range(4):
            batches = [micro_batch(eight, step, 5, args, rank, ranks) for rank in range(ranks)]
            rows = [batch.rollout.old_values[:, 0].tolist() for batch in batches]
            made[ranks, step] = [*rows[0], *rows[-1]] if ranks == 2 else rows[0]
            assert batches[0].mini_batches == step + 1
            assert batches[0].tokens == eight.mask.sum(dim=1)[[int(row) for row in made[ranks, step]]].sum()
            assert batches[0].mini_batch_size == 4 and all(batch.completes for batch in batches)
    for step in range(4):
        assert made[1, step] == made[2, step]
    for epoch in (0, 1):
        assert sorted(made[1, 2 * epoch] + made[1, 2 * epoch + 1]) == list(range(8))
    assert made[1, 0] != made[1, 2]  # dealt anew
