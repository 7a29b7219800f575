"""The difference between sampler and policy, and what its correction does, by hand."""

import math

import pytest
import torch

from rlhf_trl.trainers.mismatch import Correction, mismatch_metrics, mismatch_statistics

# Probabilities of the policy over those of the sampler, token by token: one, two, three and four tokens
RATIOS = [[2.0], [0.5, 1.0], [2.0, 2.0, 1.0], [2.0, 2.0, 2.0, 0.25]]


def statistics(correction=None):
    sampled = torch.full((4, 5), -1.0)
    logps, mask = sampled.clone(), torch.zeros(4, 5, dtype=torch.long)
    for row, ratios in enumerate(RATIOS):
        logps[row, : len(ratios)] += torch.tensor(ratios).log()
        mask[row, : len(ratios)] = 1
    logps[:, 4] = 7.0  # padding
    return mismatch_statistics(logps, sampled, mask, correction)


def test_the_difference_is_a_mean_over_tokens_and_over_completions():
    metrics = mismatch_metrics(statistics())
    log2 = math.log(2)
    assert metrics == {
        # 1 + 1 + 2 + (3 + 2) times log 2 in 10 tokens
        "sampling/sampling_logp_difference/mean": pytest.approx(0.9 * log2),
        "sampling/sampling_logp_difference/max": pytest.approx(2 * log2),
        # 7 tokens off by a factor 2, one by 4, two by none
        "sampling/prob_error": pytest.approx((7 * 2 + 4 + 2) / 10 - 1),
        # 2, 1/2, 4 and 2 in whole
        "sampling/sequence_logp_difference/mean": pytest.approx(5 / 4 * log2),
        "sampling/sequence_logp_difference/max": pytest.approx(2 * log2),
    }


@pytest.mark.parametrize(
    ("correction", "shares"),
    [
        # The third completion's ratio is 4
        (Correction("sequence_mask", None, 3.0), (1 / 4, 0, 1 / 2)),
        # And the second one's is 1/2
        (Correction("sequence_truncate", 0.6, 3.0), (2 / 4, 1 / 2, 1 / 2)),
        (Correction("token_mask", None, 3.0), (0, 0, 0)),
        # One of the two tokens of the first half, and one of the seven of the second
        (Correction("token_truncate", 0.6, None), (2 / 10, 1 / 3, 1 / 7)),
        (Correction("sequence_mask", None, None), (0, 0, 0)),
    ],
)
def test_the_share_of_clipped_ratios_is_also_that_of_either_half_by_length(correction, shares):
    metrics = mismatch_metrics(statistics(correction)[torch.tensor([2, 0, 3, 1])])  # in any order
    found = [metrics[f"sampling/clipfrac{half}"] for half in ("", "_short", "_long")]
    assert found == pytest.approx(shares)


def test_tokens_without_a_log_probability_do_not_count():
    logps, sampled = torch.zeros(1, 3), torch.tensor([[0.0, math.nan, -1.0]])
    (row,) = mismatch_statistics(logps, sampled, torch.ones(1, 3), Correction("token_mask", None, 2.0)).tolist()
    assert row == pytest.approx([2, 2, 1, 1, 1, 1 + math.e, 1])
    assert mismatch_metrics(mismatch_statistics(logps, sampled, torch.zeros(1, 3))) == {}


def test_completions_without_a_token_do_not_count():
    """Those that `mask_truncated_completions` leaves out, which are the longest ones."""
    correction = Correction("sequence_mask", None, 3.0)
    extra = mismatch_statistics(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3), correction)
    counted = statistics(correction)
    assert mismatch_metrics(torch.cat([counted, extra])) == mismatch_metrics(counted)


def test_a_ratio_that_overflows_is_clipped():
    logps, mask = torch.full((1, 200), 1.0), torch.ones(1, 200)
    clipped = mismatch_statistics(logps, torch.zeros(1, 200), mask, Correction("sequence_mask", None, 3.0))
    assert mismatch_metrics(clipped)["sampling/clipfrac"] == 1


def test_long_completions_are_masked_more_than_short_ones_by_the_same_difference_per_token():
    generator = torch.Generator().manual_seed(0)
    difference = 0.05 * torch.randn(200, 2000, generator=generator)
    lengths = torch.cat([torch.full((100,), 20), torch.full((100,), 2000)])
    mask = torch.arange(2000) < lengths.unsqueeze(1)
    metrics = mismatch_metrics(
        mismatch_statistics(difference, torch.zeros(200, 2000), mask, Correction("sequence_mask", None, 3.0))
    )
    assert metrics["sampling/clipfrac_short"] == 0 and metrics["sampling/clipfrac_long"] > 0.2
    assert metrics["sampling/prob_error"] == pytest.approx(0.041, abs=0.002)  # of a normal: 2 exp(s^2/2) F(s) - 1
