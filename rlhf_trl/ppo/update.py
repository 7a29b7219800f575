"""Updates of PPO: the micro-batches of a rollout, and their loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_trl.ppo.config import PPOConfig
from rlhf_trl.ppo.losses import policy_losses, value_losses
from rlhf_trl.ppo.rollout import Rollout, TokenScores
from rlhf_trl.ppo.seeds import permutation


class MicroBatch(NamedTuple):
    """
    One rank's completions of a micro-batch, and their place in the mini-batch of all ranks.

    Attributes:
        rollout ([`Rollout`]): the completions.
        tokens (`Tensor`): number of tokens of the mini-batch that count, at least 1.
        rows (`slice`): place of the completions among those of the mini-batch.
        mini_batch_size (`int`): completions of the mini-batch.
        mini_batches (`int`): mini-batches of the rollout that are complete with this micro-batch.
        completes (`bool`): whether this micro-batch is the last one of its mini-batch.
    """

    rollout: Rollout
    tokens: Tensor
    rows: slice
    mini_batch_size: int
    mini_batches: int
    completes: bool


def micro_batch(
    rollout: Rollout, micro_step: int, rollout_index: int, args: PPOConfig, rank: int, ranks: int
) -> MicroBatch:
    """
    Return one rank's completions of a micro-batch.

    The completions are dealt anew each epoch by (seed, rollout, epoch), over those of all ranks, so that the number of
    ranks doesn't change which of them make a mini-batch.

    Args:
        rollout ([`Rollout`]): the scored rollout, the same on every rank.
        micro_step (`int`): micro-batches of the rollout before this one.
        rollout_index (`int`): rollouts of the run before this one.
        args ([`PPOConfig`]): batch sizes and seed.
        rank (`int`), ranks (`int`): this process, and how many there are.
    """
    assert args.steps_per_generation is not None and args.generation_batch_size is not None
    epoch, step = divmod(micro_step, args.steps_per_generation)
    mini_batch, accumulated = divmod(step, args.gradient_accumulation_steps)
    micro_batch_size = args.per_device_train_batch_size * ranks
    mini_batch_size = micro_batch_size * args.gradient_accumulation_steps
    order = permutation(args.generation_batch_size, args.seed, rollout_index, epoch).to(rollout.mask.device)
    order = order[mini_batch * mini_batch_size : (mini_batch + 1) * mini_batch_size]
    start = accumulated * micro_batch_size + rank * args.per_device_train_batch_size
    rows = slice(start, start + args.per_device_train_batch_size)
    mini_batches, rest = divmod(micro_step + 1, args.gradient_accumulation_steps)
    return MicroBatch(
        rollout.select(order[rows]),
        tokens=rollout.mask[order].sum().clamp(min=1),
        rows=rows,
        mini_batch_size=mini_batch_size,
        mini_batches=mini_batches,
        completes=rest == 0,
    )


def micro_batch_loss(
    batch: MicroBatch, scores: TokenScores, args: PPOConfig, ptx: Tensor | None = None, warmup: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    Return a micro-batch's share of the loss of its mini-batch, and of the mini-batch's metrics.

    DDP averages gradients over the ranks, and accumulated micro-batches add up: dividing each sum by the tokens of the
    global mini-batch makes the update the same however its rows are dealt.

    Args:
        batch ([`MicroBatch`]): completions with old log-probabilities, old values, advantages and returns.
        scores ([`TokenScores`]): log-probabilities, values and entropies of the same tokens now.
        args ([`PPOConfig`]): clip ranges and weights of the terms.
        ptx (`Tensor`, *optional*): share of the loss on demonstrations.
        warmup (`bool`, defaults to `False`): whether the critic alone is trained.
    """
    rollout = batch.rollout
    assert scores.entropies is not None

    def share(x: Tensor) -> Tensor:
        return torch.where(rollout.mask, x, 0.0).sum() / batch.tokens

    # Clipped surrogate (arXiv 1707.06347, equation 7)
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    policy, policy_clipped = policy_losses(
        scores.logps, rollout.old_logps, rollout.advantages, args.epsilon, epsilon_high, args.delta
    )
    if rollout.importance_ratio is not None:  # vLLM sampled from a slightly different distribution
        policy = policy * rollout.importance_ratio
    loss = share(policy)
    if args.entropy_coef:  # at 0 it would still cost a gradient over the vocabulary
        loss = loss - args.entropy_coef * share(scores.entropies)
    if ptx is not None:  # PPO-ptx (arXiv 2203.02155, equation 2)
        loss = loss + args.ptx_coef * ptx
    if warmup:
        loss = 0.0 * scores.logps.sum()  # DDP waits for a gradient of every parameter

    # Clipped value loss (openai/lm-human-preferences, `train_policy.py`)
    value, value_clipped = value_losses(scores.values, rollout.old_values, rollout.returns, args.cliprange_value)
    if value.dim() == 3:  # a value for each signal
        value, value_clipped = value.sum(dim=-1), value_clipped.float().mean(dim=-1)
    loss = loss + args.vf_coef * share(value)

    with torch.no_grad():
        log_ratio = scores.logps - rollout.old_logps
        metrics = {
            "policy/loss": share(policy),
            "policy/approxkl": share(log_ratio.square() / 2),
            "policy/clipfrac": share(policy_clipped.float()),
            "policy/entropy": share(scores.entropies),
            "policy/ratio": share(torch.exp(log_ratio)),
            "value/loss": share(value),
            "value/clipfrac": share(value_clipped.float()),
        }
        if ptx is not None:
            metrics["policy/ptx_loss"] = ptx.detach()
    return loss, metrics
