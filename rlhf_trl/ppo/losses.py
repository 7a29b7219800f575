"""
Per-token rewards, advantages and losses of PPO, as pure functions.

Legend of shapes: B sequences (rows) of a rollout, T completion tokens. `mask` is (B, T) and true where the policy
wrote a token that counts; it is false on padding, on tokens a tool wrote, and on rows without a valid reward.
"""

import torch
from torch import Tensor


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: str = "k1") -> Tensor:
    """
    Estimate KL(policy || reference) per token, at tokens sampled from the policy (J. Schulman, "Approximating KL
    divergence", 2020).

    Args:
        logp (`Tensor` of shape (B, T)): log-probability of each token under the policy, in nats.
        ref_logp (`Tensor` of shape (B, T)): the same under the reference.
        estimator: `"k1"` is d = logp - ref_logp (unbiased, can be negative), `"k2"` is d²/2 (biased, low variance),
            `"k3"` is exp(-d) - 1 + d (unbiased, never negative).

    Returns:
        `Tensor` of shape (B, T), in nats.
    """
    d = logp - ref_logp
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"`kl_estimator` is {estimator!r}. Use 'k1', 'k2' or 'k3'.")


def shape_scores(
    scores: Tensor,
    ended: Tensor,
    lengths: Tensor,
    missing_eos_penalty: float | None = None,
    missing_eos_score: float | None = None,
    length_penalty: float = 0.0,
) -> Tensor:
    """
    Shape scores: first penalize completions without an end (the "EOS trick", arXiv 2403.17031), then every completion
    for its length.

    Args:
        scores (`Tensor` of shape (B,)): rewards, normalized and clipped already.
        ended (`Tensor` of shape (B,)): whether the completion ends with an EOS token.
        lengths (`Tensor` of shape (B,)): tokens that the policy generated, EOS included.
        missing_eos_penalty: subtracted where `ended` is false; or
        missing_eos_score: takes the score's place there.
        length_penalty: subtracted for every token.

    Returns:
        `Tensor` of shape (B,).
    """
    if missing_eos_penalty is not None:
        scores = torch.where(ended, scores, scores - missing_eos_penalty)
    if missing_eos_score is not None:
        scores = torch.where(ended, scores, torch.full_like(scores, missing_eos_score))
    return scores - length_penalty * lengths.to(scores.dtype)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coef: float | Tensor) -> Tensor:
    """
    Return the KL-shaped rewards: r_t = -coef * kl_t, plus the score at the last token of the completion, which is the
    EOS token where there is one (Ziegler et al. 2019, arXiv 1909.08593, eq. 2; arXiv 2403.17031).

    Args:
        scores (`Tensor` of shape (B,)): the reward of each whole completion.
        kl (`Tensor` of shape (B, T)): per-token KL estimate.
        mask (`Tensor` of shape (B, T)): which tokens count.
        coef: KL coefficient (`beta`).

    Returns:
        `Tensor` of shape (B, T): zero where `mask` is false; a row without any true entry gets no score.
    """
    mask = mask.bool()
    rewards = torch.where(mask, -coef * kl, torch.zeros_like(kl))
    positions = torch.arange(mask.size(1), device=mask.device).expand_as(mask)
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)
    return rewards + torch.where(positions == last, scores.unsqueeze(1).to(kl.dtype), torch.zeros_like(kl))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """
    Estimate advantages by GAE (arXiv 1506.02438, eq. 16). V is read before each token, and it is 0 after the
    last token of a completion, truncated or not. Tokens with a false mask are skipped: the token before a gap
    sees the value at the first token after it.

    Args:
        rewards (`Tensor` of shape (B, T)): per-token rewards.
        values (`Tensor` of shape (B, T)): the critic's value before each token.
        mask (`Tensor` of shape (B, T)): which tokens count.
        gamma: discount. lam: GAE's lambda; 1 makes `returns` the discounted reward-to-go, 0 the one-step target.

    Returns:
        `(advantages, returns)`, both (B, T), with returns = advantages + values; zero where `mask` is false.
    """
    mask = mask.bool()
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(mask[:, t], advantage, advantages[:, t])
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return advantages, torch.where(mask, advantages + values, torch.zeros_like(values))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `values` where `mask` is true, a scalar; 0 where nothing is. Both are (B, T)."""
    mask = mask.bool()
    return torch.where(mask, values, torch.zeros_like(values)).sum() / mask.sum().clamp(min=1)


def population_std(values: Tensor) -> Tensor:
    """Return the biased standard deviation of `values`, shape (N,); NaN of none, without PyTorch's warning."""
    return values.std(unbiased=False) if len(values) else values.new_tensor(torch.nan)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, unbiased: bool = False) -> Tensor:
    """
    Scale `values` to variance 1, and to mean 0 unless `shift_mean=False`, over the entries where `mask` is true.

    The variance is the biased one (openai/lm-human-preferences), with 1e-8 inside the root; `unbiased=True` divides by
    n - 1 instead. `values` and `mask` are (B, T); the result is zero where `mask` is false.
    """
    mask = mask.bool()
    mean = masked_mean(values, mask)
    count = mask.sum()
    variance = masked_mean((values - mean).square(), mask)
    if unbiased:
        variance = variance * count / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))


def policy_losses(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Return PPO's clipped surrogate per token, -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) with
    r = exp(logp - old_logp) (arXiv 1707.06347, eq. 7). `delta` bounds r in the first term, and with it the loss of a
    token with a negative advantage (arXiv 2505.07291).

    Returns:
        `(losses, clipped)`, both (B, T): the loss and whether the clipped term is the larger one.
    """
    ratio = torch.exp(logp - old_logp)
    unclipped = -(ratio if delta is None else ratio.clamp(max=delta)) * advantages
    clipped = -ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages
    return torch.maximum(unclipped, clipped), clipped > unclipped


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """
    Return the clipped value loss per token, 0.5 * max((v - R)², (clip(v, v_old ± clip) - R)²)
    (openai/lm-human-preferences).

    Returns:
        `(losses, clipped)`, both (B, T): the loss and whether the clipped term is the larger one.
    """
    within = torch.clamp(values, old_values - clip, old_values + clip)
    unclipped = (values - returns).square()
    clipped = (within - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Return the mean of [`value_losses`] over the tokens where `mask` is true, a scalar. All tensors are (B, T)."""
    return masked_mean(value_losses(values, old_values, returns, clip)[0], mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """
    Return 1 - Var(R - V) / Var(R) over the tokens where `mask` is true: 1 for a perfect critic, 0 for one as good as a
    constant, NaN where the returns don't vary. All tensors (B, T); a scalar.
    """

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    total = variance(returns)
    return torch.where(total > 0, 1 - variance(returns - values) / total, torch.full_like(total, float("nan")))
