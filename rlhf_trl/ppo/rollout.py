"""
Rollouts of PPO: completions of the current policy, and the advantages and returns that the next updates learn from.

Legend of shapes: N completions (of all ranks), P prompt tokens (padded on the left), T completion tokens (padded on
the right), F reward functions. With constraints (`combine=lagrange`) there are S > 1 signals that are learned from,
the score and the cost of each constraint, and values and returns have the shape (N, T, S) instead of (N, T).
"""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rlhf_trl.data.multimodal import ExtraInputs
from rlhf_trl.ppo.config import PPOConfig
from rlhf_trl.ppo.losses import (
    explained_variance,
    gae,
    kl_estimate,
    masked_mean,
    masked_whiten,
    population_std,
    shape_scores,
    token_rewards,
)
from rlhf_trl.trainers.rollout_hook import Rewards

# Tensors of a rollout as `GRPOTrainer` returns it, and the critic's values
OUTPUTS = (
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "importance_sampling_ratio",
    "old_values",
)


class TokenScores(NamedTuple):
    """
    One forward pass of policy and critic over completion tokens, each tensor of shape (N, T).

    Attributes:
        logps: log-probability of each token, in nats.
        values: the critic's value before each token.
        entropies (*optional*): entropy of the distribution that each token was drawn from, in nats.
    """

    logps: Tensor
    values: Tensor
    entropies: Tensor | None = None


@dataclass
class Rollout:
    """
    Completions of the current policy, as tensors.

    Attributes:
        prompt_ids (`Tensor` of shape (N, P)), prompt_mask (`Tensor` of shape (N, P)): the prompts.
        completion_ids (`Tensor` of shape (N, T)), completion_mask (`Tensor` of shape (N, T)): the completions.
        mask (`Tensor` of shape (N, T)): true where the policy wrote a token that counts: false on padding and on
            tokens that a tool wrote, and after [`score_rollout`] on completions without a valid reward.
        ended (`Tensor` of shape (N,)): whether the completion ends with an EOS token.
        old_logps (`Tensor` of shape (N, T)): log-probabilities under the policy that wrote the tokens.
        ref_logps (`Tensor` of shape (N, T)): log-probabilities under the reference.
        old_values (`Tensor` of shape (N, T)): the critic's values before each token.
        importance_ratio (`Tensor` of shape (N, T) or (N, 1), *optional*): the policy's probability over vLLM's.
        advantages (`Tensor` of shape (N, T), *optional*): whitened advantages, set by [`score_rollout`].
        returns (`Tensor` of shape (N, T), *optional*): targets of the critic, set by [`score_rollout`].
        valid (`Tensor` of shape (N,), *optional*): whether the completion has a valid reward, set by
            [`score_rollout`].
        kl (`Tensor` of shape (N,), *optional*): summed k1 estimate in nats, set by [`score_rollout`].
        extra (`list[ExtraInputs]`, *optional*): what the model reads of each prompt beside its ids, such as images, on
            the CPU.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    mask: Tensor
    ended: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    old_values: Tensor
    importance_ratio: Tensor | None = None
    advantages: Tensor = None  # pyright: ignore[reportAssignmentType] set by `score_rollout`
    returns: Tensor = None  # pyright: ignore[reportAssignmentType] set by `score_rollout`
    valid: Tensor = None  # pyright: ignore[reportAssignmentType] set by `score_rollout`
    kl: Tensor = None  # pyright: ignore[reportAssignmentType] set by `score_rollout`
    extra: list[ExtraInputs] | None = None

    @classmethod
    def gather(
        cls, output: dict[str, Any], accelerator: Accelerator, pad_token_id: int, eos_token_ids: list[int]
    ) -> "Rollout":
        """
        Return the completions of all ranks, on every rank, so that mini-batches and moments don't depend on the number
        of ranks.

        Args:
            output (`dict`): this rank's completions, as `GRPOTrainer._generate_and_score_completions` returns them,
                with the critic's `old_values`.
            accelerator (`Accelerator`): the trainer's.
            pad_token_id (`int`): token to pad ids with.
            eos_token_ids (`list[int]`): tokens that end a completion.
        """
        gathered = {}
        for key in [key for key in OUTPUTS if key in output]:
            padding = {"pad_index": pad_token_id if key.endswith("_ids") else 0, "pad_first": key.startswith("prompt")}
            gathered[key] = accelerator.gather(accelerator.pad_across_processes(output[key], dim=1, **padding))
        rollout = cls.from_output(gathered, eos_token_ids)
        extra = output.get("extra")
        return replace(rollout, extra=gather_object(extra)) if extra else rollout

    @classmethod
    def from_output(cls, output: dict[str, Tensor], eos_token_ids: list[int]) -> "Rollout":
        """Return the rollout in `GRPOTrainer`'s tensors and the critic's `old_values`, see [`Rollout.gather`]."""
        completion_ids, completion_mask = output["completion_ids"], output["completion_mask"]
        mask = completion_mask.bool()
        if "tool_mask" in output:
            mask = mask & output["tool_mask"].bool()
        lengths = completion_mask.bool().sum(dim=1)
        last = completion_ids.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        ended = torch.isin(last, torch.tensor(eos_token_ids, device=last.device)) & (lengths > 0)
        return cls(
            prompt_ids=output["prompt_ids"],
            prompt_mask=output["prompt_mask"],
            completion_ids=completion_ids,
            completion_mask=completion_mask,
            mask=mask,
            ended=ended,
            old_logps=output["old_per_token_logps"],
            ref_logps=output["ref_per_token_logps"],
            old_values=output["old_values"],
            importance_ratio=output.get("importance_sampling_ratio"),
        )

    def select(self, rows: Tensor) -> "Rollout":
        """Return some completions, cut to the longest prompt and the longest completion among them."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        chosen: dict[str, Any] = {name: None if x is None else x[rows] for name, x in tensors.items()}
        prompt = int(chosen["prompt_mask"].sum(dim=1).max())
        completion = max(1, int(chosen["completion_mask"].sum(dim=1).max()))
        for name, tensor in chosen.items():
            if tensor is not None and tensor.dim() > 1:
                chosen[name] = tensor[:, -prompt:] if name.startswith("prompt") else tensor[:, :completion]
        extra = None if self.extra is None else [self.extra[row] for row in rows.tolist()]
        return Rollout(**chosen, extra=extra)

    @property
    def input_ids(self) -> Tensor:
        """Prompts and completions, shape (N, P + T)."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """1 at the tokens of prompts and completions, shape (N, P + T)."""
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)


def score_rollout(
    rollout: Rollout, rewards: Rewards, args: PPOConfig, beta: float | None = None
) -> tuple[Rollout, dict[str, float]]:
    """
    Turn rewards into advantages and returns.

    Args:
        rollout ([`Rollout`]): completions with log-probabilities and values.
        rewards ([`~rlhf_trl.trainers.rollout_hook.Rewards`]): rewards of the same N completions, raw and normalized.
        args ([`PPOConfig`]): `kl_estimator`, `gamma`, `lam`, `whiten_rewards`, and what shapes the scores.
        beta (`float`, *optional*): KL coefficient of this rollout, `args.beta` unless given.

    Returns:
        The rollout with `advantages`, `returns`, `valid` and `kl`, and a `mask` without the completions that have no
        valid reward; and the metrics of the rollout, means over the completions or tokens that are left.
    """
    beta = args.beta if beta is None else beta

    # 1. Combine the reward functions into one score per completion. A completion without any reward, or with a NaN or
    # infinite one, is masked out of everything below.
    scores = rewards.scores()
    valid = ~scores.isnan()
    scores = scores.nan_to_num()
    mask = rollout.mask & valid.unsqueeze(1)

    # 2. Normalize. The policy learns from rewards on one scale (arXiv 1909.08593, section 2: mean 0 and variance 1 on
    # reference answers); the raw scores are logged. Each constraint has a cost beside the score (arXiv 2310.12773).
    learned = rewards.signals().nan_to_num()

    # 3. EOS and length: a completion without an end is penalized (the "EOS trick", arXiv 2403.17031).
    shaped = shape_scores(
        learned[:, 0],
        rollout.ended,
        rollout.mask.sum(dim=1),
        missing_eos_penalty=args.missing_eos_penalty,
        missing_eos_score=args.missing_eos_score,
        length_penalty=args.length_penalty,
    )

    # 4. KL and token rewards: r_t = -beta * KL_t, plus the score at the last token (arXiv 1909.08593, equation 2).
    # It is a penalty, which lowers a reward and raises a cost.
    kl = kl_estimate(rollout.old_logps, rollout.ref_logps, args.kl_estimator)
    signals = torch.cat([shaped.unsqueeze(1), learned[:, 1:]], dim=1)
    values = rollout.old_values.reshape(*mask.shape, -1)
    estimates = []
    for i, signal in enumerate(signals.unbind(dim=1)):
        token_reward = token_rewards(signal, kl, mask, -beta if i else beta)
        if args.whiten_rewards:  # openai/lm-human-preferences, `train_policy.py`: `whiten(rewards, shift_mean=False)`
            token_reward = masked_whiten(token_reward, mask, shift_mean=False)

        # 5. Generalized advantage estimation (arXiv 1506.02438, equation 16), with a value of each signal's own.
        estimates.append(gae(token_reward, values[..., i], mask, args.gamma, args.lam))
    advantages, returns = (torch.stack(each, dim=-1) for each in zip(*estimates, strict=True))
    advantages = rewards.weigh(advantages)

    # 6. Whiten the advantages over the rollout of all ranks (openai/lm-human-preferences, `train_policy.py`).
    advantages = masked_whiten(advantages, mask)

    # 7. Metrics. `objective/kl` is the summed k1 whatever estimator is in the reward.
    statistics = sequence_statistics(rollout, scores, mask)
    count = valid.sum().clamp(min=1)
    k1 = kl_estimate(rollout.old_logps, rollout.ref_logps, "k1")
    metrics = {key: (value * valid).sum() / count for key, value in statistics.items()}
    metrics.pop("completions/mean_length")  # TRL logs it
    metrics |= {
        "objective/scores_std": population_std(scores[valid]),
        "objective/kl_per_token": masked_mean(k1, mask),
        "objective/rlhf_reward": ((rewards.weigh(signals) - beta * (kl * mask).sum(dim=1)) * valid).sum() / count,
        "objective/kl_coef": torch.tensor(float(beta)),
        "objective/invalid_rewards": rewards.invalid.any(dim=1).sum(),
    }
    for i, name in enumerate(["", *(f"{name}/" for name in rewards.constraints)]):
        metrics |= {
            f"value/{name}mean": masked_mean(values[..., i], mask),
            f"value/{name}explained_variance": explained_variance(values[..., i], returns[..., i], mask),
            f"returns/{name}mean": masked_mean(returns[..., i], mask),
        }
    if rewards.normalized is not None:
        metrics["objective/scores_normalized"] = (rewards.weigh(learned) * valid).sum() / count
    kl_of_sequences = statistics["objective/kl"]
    returns = returns.view_as(rollout.old_values)
    scored = replace(rollout, mask=mask, advantages=advantages, returns=returns, valid=valid, kl=kl_of_sequences)
    return scored, {key: value.item() for key, value in metrics.items()}


def held_out_metrics(rollout: Rollout, rewards: Rewards, rows: int | None = None) -> tuple[dict[str, float], int]:
    """
    Return the metrics of held-out completions, which are means of raw scores, and over how many completions.

    Args:
        rollout ([`Rollout`]), rewards ([`~rlhf_trl.trainers.rollout_hook.Rewards`]): of the same N completions.
        rows (`int`, *optional*): how many of them count; the others, behind them, are copies.
    """
    scores = rewards.scores()
    valid = ~scores.isnan()
    statistics = sequence_statistics(rollout, scores.nan_to_num(), rollout.mask & valid.unsqueeze(1))
    if rows is not None:
        valid[rows:] = False
    return {key: value[valid].mean().item() for key, value in statistics.items()}, int(valid.sum())


def sequence_statistics(rollout: Rollout, scores: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the metrics that are means over completions, each of shape (N,) before the mean."""
    k1 = kl_estimate(rollout.old_logps, rollout.ref_logps, "k1")
    return {
        "objective/scores": scores,
        "objective/kl": torch.where(mask, k1, 0.0).sum(dim=1),
        "completions/eos_rate": rollout.ended.float(),
        "completions/mean_length": rollout.completion_mask.bool().sum(dim=1).float(),
    }
