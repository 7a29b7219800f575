"""
The difference between the probabilities of the engine that samples completions and those of the policy that learns
from them, and what the importance-sampling correction of it does. Pure functions; N completions of T tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TOKENS, RATIOS, CLIPPED, LOG_RATIO, ABSOLUTE, FACTOR, LARGEST = range(7)


class Correction(NamedTuple):
    """
    TRL's importance-sampling correction.

    Attributes:
        mode (`str`): `vllm_importance_sampling_mode`, `token_...` or `sequence_...`.
        clip_min (`float`, *optional*), clip_max (`float`, *optional*): bounds of the ratio, `None` for none.
    """

    mode: str
    clip_min: float | None
    clip_max: float | None

    def clips(self, log_ratios: Tensor) -> Tensor:
        """Return where ratios are outside of the bounds, and so truncated or masked."""
        ratios = torch.exp(log_ratios)
        low = -math.inf if self.clip_min is None else self.clip_min
        high = math.inf if self.clip_max is None else self.clip_max
        return (ratios < low) | (ratios > high)


def mismatch_statistics(
    logps: Tensor, sampled_logps: Tensor, mask: Tensor, correction: Correction | None = None
) -> Tensor:
    """
    Return what [`mismatch_metrics`] needs of each completion.

    Args:
        logps (`Tensor` of shape (N, T)): log-probabilities of the sampled tokens under the policy, in nats.
        sampled_logps (`Tensor` of shape (N, T)): the same of the engine that sampled them; NaN where it has none.
        mask (`Tensor` of shape (N, T)): true where the policy wrote a token.
        correction ([`Correction`], *optional*): the one that the loss is corrected by.

    Returns:
        `Tensor` of shape (N, 7): tokens; ratios; ratios that are clipped; log ratio of the completion; sum and maximum
        of the absolute log ratio of its tokens, and the sum of its exponential between them.
    """
    difference = logps - sampled_logps
    counts = mask.bool() & ~difference.isnan()
    difference = torch.where(counts, difference, 0.0)
    tokens, log_ratio = counts.sum(dim=1), difference.sum(dim=1)
    ratios, clipped = torch.zeros_like(log_ratio), torch.zeros_like(log_ratio)
    if correction is not None and correction.mode.startswith("token"):
        ratios, clipped = tokens, (correction.clips(difference) & counts).sum(dim=1)
    elif correction is not None:
        ratios, clipped = torch.ones_like(log_ratio), correction.clips(log_ratio)
    absolute = difference.abs()
    factor = torch.where(counts, absolute.exp(), 0.0).sum(dim=1)
    columns = [tokens, ratios, clipped, log_ratio, absolute.sum(dim=1), factor, absolute.amax(dim=1)]
    return torch.stack([column.double() for column in columns], dim=1)


def mismatch_metrics(statistics: Tensor) -> dict[str, float]:
    """
    Return the metrics of the difference between the engine that samples and the policy.

    Args:
        statistics (`Tensor` of shape (N, 7)): of the completions of all ranks, see [`mismatch_statistics`].

    Returns:
        `dict[str, float]`: by the name under which they are logged; without any token none, and completions
            without any don't count. The share of clipped
        ratios is also given for the half of the completions that are shorter, and for the longer half.
    """
    statistics = statistics[statistics[:, TOKENS] > 0]  # `mask_truncated_completions` leaves some without any
    if len(statistics) == 0:
        return {}
    tokens = statistics[:, TOKENS].sum()
    log_ratio = statistics[:, LOG_RATIO].abs()
    metrics = {
        "sampling/sampling_logp_difference/mean": statistics[:, ABSOLUTE].sum() / tokens,
        "sampling/sampling_logp_difference/max": statistics[:, LARGEST].max(),
        # NeMo RL's token_mult_prob_error, less 1
        "sampling/prob_error": statistics[:, FACTOR].sum() / tokens - 1,
        "sampling/sequence_logp_difference/mean": log_ratio.mean(),
        "sampling/sequence_logp_difference/max": log_ratio.max(),
    }
    by_length, half = statistics[statistics[:, TOKENS].argsort(stable=True)], len(statistics) // 2
    parts = {"": by_length, "_short": by_length[:half], "_long": by_length[len(by_length) - half :]}
    for suffix, part in parts.items():
        if (ratios := part[:, RATIOS].sum()) > 0:
            metrics[f"sampling/clipfrac{suffix}"] = part[:, CLIPPED].sum() / ratios
    return {name: float(value) for name, value in metrics.items()}
