"""
The hook on rollouts, which KL controllers, reward normalizers, samples and health signs share: `trainer.on_rollout`.

[`RolloutHook`] gives it to any trainer with the engine of TRL's `GRPOTrainer` or `RLOOTrainer`, PPO's included, and
[`RolloutHookWithKL`] adds the KL to the reference, which PPO measures itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState
from trl.trainer.utils import nanstd

from rlhf_trl.data.images import take_images
from rlhf_trl.data.multimodal import thumbnail
from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.combine import weighted_sum, without_reward
from rlhf_trl.rewards.lagrange import Lagrange
from rlhf_trl.rewards.options import combination_problem
from rlhf_trl.trainers.multipliers import Multipliers


@dataclass(frozen=True)
class Rewards:
    """
    Rewards of N completions, of all ranks, by F reward functions.

    Attributes:
        values (`Tensor` of shape (N, F)): raw rewards, NaN where a function doesn't apply or gave an invalid one.
        invalid (`Tensor` of shape (N, F)): where a function gave NaN or infinity.
        weights (`Tensor` of shape (F,)), names (`Sequence[str]`): weight and name of each function.
        combine (callable): function that makes one score of the rewards, see `rlhf_trl.rewards.combine`.
        normalized (`Tensor` of shape (N, F), *optional*): rewards on the scale that is learned from.
    """

    values: Tensor
    invalid: Tensor
    weights: Tensor
    names: Sequence[str]
    combine: Callable[..., Tensor] = weighted_sum
    normalized: Tensor | None = None

    @property
    def counted(self) -> Tensor:
        """The raw rewards of completions without any invalid one, NaN elsewhere; shape (N, F)."""
        return self.values.masked_fill(self.invalid.any(dim=1, keepdim=True), torch.nan)

    def scores(self) -> Tensor:
        """Return the combined raw rewards, shape (N,): NaN where no function applies or one is invalid."""
        return self._combined(self.counted)

    def normalized_scores(self) -> Tensor:
        """Return the combined normalized rewards, shape (N,): NaN as in [`Rewards.scores`]; the raw without any."""
        return self._combined(self.counted if self.normalized is None else self.normalized)

    @property
    def constraints(self) -> list[str]:
        """The rewards whose means are constrained, C of them."""
        return list(self.combine.bounds) if isinstance(self.combine, Lagrange) else []

    def signals(self) -> Tensor:
        """
        Return what is learned from, shape (N, 1 + C): the combined normalized rewards and the cost of each constraint.
        """
        if not isinstance(self.combine, Lagrange):
            return self.normalized_scores().unsqueeze(1)
        values = self.counted if self.normalized is None else self.normalized
        return self.combine.signals(values, self.counted, self.weights.to(values), self.names)

    def weigh(self, signals: Tensor) -> Tensor:
        """Return one number of those of each signal, (..., 1 + C) -> (...)."""
        return self.combine.weigh(signals) if isinstance(self.combine, Lagrange) else signals.squeeze(-1)

    def _combined(self, values: Tensor) -> Tensor:
        return self.combine(values, self.counted, self.weights.to(values), self.names)


@dataclass
class RolloutRecord:
    """
    A rollout as every rank sees it: N completions of all ranks, and their rewards.

    Attributes:
        training (`bool`): whether it is learned from. A batch of held-out prompts is not.
        prompts (`list`), completions (`list`): N of each, text or messages.
        rewards ([`Rewards`]): of the completions.
        kl (`float`, *optional*): KL to the reference in nats, the mean over sequences of the summed k1 estimate.
            `None` without a reference, in evaluation, and until it is known: at the latest before the first optimizer
            step on the rollout.
        kl_std (`float`, *optional*): standard deviation of the summed k1 over the sequences.
        num_sequences (`int`): how many sequences `kl` is the mean of.
        images (`dict[int, list[str]]`, *optional*): thumbnails of the images of the prompts that are shown, as data
            URIs, by the number of the prompt, see [`RolloutHook.show_images`]. `None` for data without images.
        rows (`int`): how many of the completions count. In an evaluation copies of them can come after.
    """

    training: bool
    prompts: list
    completions: list
    rewards: Rewards
    kl: float | None = None
    kl_std: float | None = None
    num_sequences: int = 0
    images: dict[int, list[str]] | None = None
    rows: int = 0

    @property
    def kl_standard_error(self) -> float:
        """Standard error of `kl`, in nats; infinite for a single sequence."""
        if self.kl_std is None or self.num_sequences < 2:
            return math.inf
        return self.kl_std / math.sqrt(self.num_sequences - 1)


Listener = Callable[[RolloutRecord], Tensor | None]


class RolloutTrainer(Protocol):
    """The part of a trainer that callbacks on rollouts use: PPO's, and ours for GRPO and RLOO."""

    args: Any
    state: TrainerState
    accelerator: Any
    model: Any
    train_dataset: Any
    callback_handler: Any
    is_deepspeed_enabled: bool
    beta: float
    last_rollout: RolloutRecord | None
    combine_rewards: Callable[..., Tensor]
    reward_funcs: list
    reward_func_names: list[str]
    reward_weights: Tensor
    chat_template_kwargs: dict[str, Any]
    _metrics: dict[str, dict[str, list[float]]]
    _tokenizer: PreTrainedTokenizerBase
    _pending_metrics: dict[str, list]
    _pending_extra_logs: dict[str, list]

    @property
    def keeps_reference(self) -> bool:
        """Whether there is a reference, so that the KL to it is measured."""
        ...

    def on_rollout(self, listener: Listener) -> None:
        """See [`RolloutHook.on_rollout`]."""

    def show_images(self, choose: Callable[[bool, int], Sequence[int]]) -> None:
        """See [`RolloutHook.show_images`]."""

    def score_completions(self, inputs, prompts, completions, completion_ids_list) -> Rewards:
        """See [`RolloutHook.score_completions`]."""
        ...

    def is_world_process_zero(self) -> bool:
        """Return whether this is the first process of all."""
        ...


class RolloutHook(Trainer):
    """
    Mixin for `trl.GRPOTrainer` and `trl.RLOOTrainer`: functions that are called with each rollout.

    It overrides two private methods of TRL 1.16: `_calculate_rewards`, after which all of a rollout is known and
    nothing has been learned from it; and `_generate_and_score_completions`, since TRL logs the rewards that it learns
    from, and the raw ones are to be logged.

    Attributes:
        last_rollout ([`RolloutRecord`], *optional*): the newest one that is learned from, on every rank alike.
        combine_rewards (callable): function that makes one score of a completion's rewards, see
            `rlhf_trl.rewards.combine`; their weighted sum unless `combine` or a callback sets another. The multipliers
            of a [`~rlhf_trl.rewards.lagrange.Lagrange`] are moved by each rollout before it is learned from, and are
            in the checkpoints.

    Raises:
        ConfigError: at a `Lagrange` where GRPO normalizes every reward function.
    """

    args: Any
    accelerator: Any  # its `gather` is typed by all that it takes, not by what it gets
    model: Any
    beta: float
    reward_funcs: list
    reward_func_names: list[str]
    reward_weights: Tensor
    chat_template_kwargs: dict[str, Any]
    _record: RolloutRecord  # of the rollout that is being made
    _step: int
    held_out_counts: dict[str, float]
    _metrics: dict[str, dict[str, list[float]]]
    _logs: dict[str, Any]
    _tokenizer: PreTrainedTokenizerBase
    _pending_metrics: dict[str, list]
    _pending_extra_logs: dict[str, list]

    def __init__(self, *args, combine: Callable[..., Tensor] | None = None, **kwargs):
        self._listeners: list[Listener] = []
        self._choose_shown: Callable[[bool, int], Sequence[int]] = lambda training, count: ()
        self.last_rollout: RolloutRecord | None = None
        self.combine_rewards: Callable[..., Tensor] = combine or weighted_sum
        super().__init__(*args, **kwargs)
        if combine is not None and (problem := combination_problem(vars(self.args))):
            raise ConfigError(problem)
        if isinstance(combine, Lagrange):
            self.add_callback(Multipliers(combine))

    @property
    def keeps_reference(self) -> bool:
        """Whether there is a reference, so that the KL to it is measured."""
        return self.beta != 0

    @property
    def in_critic_warmup(self) -> bool:
        """Whether the current rollout trains PPO's critic alone."""
        return False

    def on_rollout(self, listener: Listener) -> None:
        """
        Call a function with each rollout, in training and in evaluation, before anything is learned from it.

        Args:
            listener (callable): function that takes a [`RolloutRecord`]. In training, one of the listeners may return
                the rewards to learn from, of shape (N, F); the others return `None`. All get the raw rewards, so the
                order in which they were registered doesn't matter.
        """
        self._listeners.append(listener)

    def show_images(self, choose: Callable[[bool, int], Sequence[int]]) -> None:
        """
        Keep thumbnails of the images of some prompts of each rollout.

        Args:
            choose (callable): function of whether a rollout is learned from and of its number of completions, on every
                rank alike, that returns the numbers of those whose prompts' images are shown.
        """
        self._choose_shown = choose

    def score_completions(self, inputs, prompts, completions, completion_ids_list) -> Rewards:
        """Return the rewards of completions, of all ranks on every rank; the arguments are TRL's, of this rank."""
        prompts = [prompt if isinstance(prompt, str) else take_images(prompt)[0] for prompt in prompts]
        values = super()._calculate_rewards(  # pyright: ignore[reportAttributeAccessIssue] GRPO's and RLOO's
            inputs, prompts, completions, completion_ids_list
        )
        weights, names = self.reward_weights, self.reward_func_names
        return Rewards(values, self._invalid_rewards(values), weights, names, self.combine_rewards)

    def _invalid_rewards(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values, dtype=torch.bool)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> Tensor:
        rewards = self.score_completions(inputs, prompts, completions, completion_ids_list)
        prompts = [prompt if isinstance(prompt, str) else take_images(prompt)[0] for prompt in prompts]
        prompts, completions = gather_object(prompts), gather_object(completions)
        batch = getattr(self, "held_out_batch", None)
        rows = len(prompts) if batch is None else batch.rows
        record = RolloutRecord(self.model.training, prompts, completions, rewards, rows=rows)
        if "images" in inputs[0]:  # a column of the data, so on every rank or on none
            record.images = self._thumbnails(inputs, self._choose_shown(record.training, rows))
        if record.training:
            self.last_rollout = record
        answers = [answer for listener in self._listeners if (answer := listener(record)) is not None]
        if len(answers) > 1:
            raise ConfigError("Two callbacks normalize the rewards. Use one reward normalizer.")
        record.rewards = replace(rewards, normalized=answers[0] if answers else None)
        self._log_applied(record)
        if isinstance(rewards.combine, Lagrange):
            self._constrain(rewards.combine, record)
        self._record = record
        return self._rewards_to_learn_from(record)

    def _thumbnails(self, inputs: list[dict[str, Any]], shown: Sequence[int]) -> dict[int, list[str]]:
        """Return the thumbnails of the prompts that are shown, of all ranks; `inputs` are the rows of this one."""
        start = sum(gather_object([len(inputs)])[: self.accelerator.process_index])
        own = [row for row in shown if start <= row < start + len(inputs)]
        return dict(gather_object([(row, list(map(thumbnail, inputs[row - start]["images"] or ()))) for row in own]))

    def _log_applied(self, record: RolloutRecord) -> None:
        """Log to which share of the completions each reward applies; the rest is None."""
        rewards = record.rewards
        applied = (~rewards.values.isnan() | rewards.invalid)[: record.rows]
        for name, share in zip(rewards.names, applied.double().mean(dim=0).tolist(), strict=True):
            self._metrics["train" if record.training else "eval"][f"rewards/{name}/frac_applied"].append(share)

    def _constrain(self, lagrange: Lagrange, record: RolloutRecord) -> None:
        """Move the multipliers of the constraints in training, and log how far each constraint is satisfied."""
        batch, metrics = getattr(self, "held_out_batch", None), {}
        counted = record.rewards.counted[: record.rows]
        if record.training:
            lagrange.update(counted, self.reward_weights, self.reward_func_names, self.in_critic_warmup)
            for name, value in lagrange.multipliers.items():
                metrics[f"{name}/lambda"] = value
                metrics[f"{name}/lambda_share"] = min(value / lagrange.lambda_max, 1.0)
                metrics[f"{name}/cost"] = lagrange.mean_cost(name)
        for name, measures in lagrange.measures(counted, self.reward_func_names).items():
            metrics |= {f"{name}/{key}": value for key, value in measures.items()}
            if batch is not None:
                count = float(counted[:, self.reward_func_names.index(name)].isfinite().sum())
                self.held_out_counts |= {f"constraints/{name}/{key}": count for key in measures}
        logged = self._metrics["train" if record.training else "eval"]
        for name, value in metrics.items():
            logged[f"constraints/{name}"].append(value)
        weights = self.reward_weights.to(counted)
        scored = counted[~without_reward(counted, weights)]
        if len(scored):  # a score that no multiplier changes
            signals = lagrange.signals(scored, scored, weights, self.reward_func_names)
            logged["objective/maximized"].append(signals[:, 0].mean().item())
            if batch is not None:
                self.held_out_counts["objective/maximized"] = float(len(scored))

    def _rewards_to_learn_from(self, record: RolloutRecord) -> Tensor:
        """
        Return the rewards whose weighted sum TRL learns from, shape (N, F), and log the scores.

        Where `combine_rewards` is another function, the first column holds what it gives, with weight 1, and the
        others hold nothing.
        """
        rewards, normalized, scores = record.rewards, record.rewards.normalized, record.rewards.scores()
        # TRL takes a completion with none but rewards of weight 0 for one with a score of 0
        unscored = scores.isnan().unsqueeze(1)
        if self._learns_from_raw_sum(rewards):
            return rewards.values.masked_fill(unscored, torch.nan)
        if record.training:
            self._metrics["train"]["objective/scores"].append(torch.nanmean(scores).item())
        learned = rewards.normalized_scores()
        if record.training and normalized is not None:
            self._metrics["train"]["objective/scores_normalized"].append(torch.nanmean(learned).item())
        if rewards.combine is weighted_sum and normalized is not None:
            return normalized.masked_fill(unscored, torch.nan)
        columns = torch.full_like(rewards.values, torch.nan)
        columns[:, 0] = learned
        self.reward_weights = torch.ones_like(self.reward_weights)  # until the rollout is made
        return columns

    @staticmethod
    def _learns_from_raw_sum(rewards: Rewards) -> bool:
        return rewards.combine is weighted_sum and rewards.normalized is None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        weights = self.reward_weights
        try:
            # Of the trainer that this class is mixed into
            output = super()._generate_and_score_completions(inputs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self.reward_weights = weights
        if not self._learns_from_raw_sum(self._record.rewards) or (weights == 0).any():
            self._log_raw_rewards(self._record.rewards, "train" if self._record.training else "eval")
        return output

    def _log_raw_rewards(self, rewards: Rewards, mode: str) -> None:
        metrics, logs = self._metrics[mode], self._logs["rewards"]
        columns = dict(zip(rewards.names, rewards.values.unbind(dim=1), strict=True))
        for name, column in columns.items():
            for _ in range(min(len(column), len(logs[name]))):
                logs[name].pop()
            logs[name].extend(column.tolist())
            metrics[f"rewards/{name}/mean"][-1] = torch.nanmean(column).item()
            metrics[f"rewards/{name}/std"][-1] = nanstd(column).item()
        scores = rewards.scores()
        metrics["reward"][-1], metrics["reward_std"][-1] = torch.nanmean(scores).item(), nanstd(scores).item()


class RolloutHookWithKL(RolloutHook):
    """
    [`RolloutHook`] for `trl.GRPOTrainer` and `trl.RLOOTrainer` themselves, which measures the KL of each rollout. It
    is mixed in with [`~rlhf_trl.trainers.rollouts.Rollouts`].

    Both compute the log-probabilities of a rollout under policy and reference right after they sampled it, and the KL
    is taken from there. GRPO skips the policy's where a rollout is optimized in one step: then they are those of the
    loss's own forwards, in which the policy has not moved yet. No forward is added. Where `beta` is 0 there is no
    reference, and the KL stays `None`.

    `objective/kl` and `objective/kl_coef` are logged once per rollout. It overrides two more private methods of TRL:
    `_get_per_token_logps_and_entropies`, to see the log-probabilities, and `_compute_loss`, where the missing ones are
    computed.
    """

    _log_mismatch: Callable[[dict[str, Any], Tensor], None]  # of `Rollouts`

    def __init__(self, *args, **kwargs):
        self._passes: list[Tensor] | None = None  # log-probabilities computed since listening began
        self._sequence_kls: list[Tensor] = []  # summed k1 of this rank's sequences, one tensor per micro-batch
        self._micro_batches_without_kl = 0
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        # Of the trainer that this class is mixed into
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if self._passes is not None:
            self._passes.append(result[0].detach())
        return result

    def _listen(self, function: Callable, *args) -> tuple[Any, list[Tensor]]:
        """Return what a function returns, and the log-probabilities computed in it, in order."""
        self._passes = []
        try:
            return function(*args), self._passes
        finally:
            self._passes = None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        # TRL lets a rollout begin in the middle of an optimizer step: all since the last whole one count as one
        if self._step % self.args.gradient_accumulation_steps == 0:
            self._sequence_kls.clear()
        output, passes = self._listen(super()._generate_and_score_completions, inputs)
        logps = passes[0] if "old_logps" in output else output.get("old_per_token_logps")  # RLOO's output has sums
        if logps is not None:
            self._log_mismatch(output, logps)
        if len(passes) == 2:  # the policy's, then the reference's
            self._add_kl(passes[0], passes[1], output)
            self._measure_kl()
        elif self.beta != 0:
            self._micro_batches_without_kl = self.args.steps_per_generation
        return output

    def _compute_loss(self, model, inputs: dict[str, Any]) -> Tensor:
        if not self._micro_batches_without_kl or not self.model.training:
            # Of the trainer that this class is mixed into
            return super()._compute_loss(model, inputs)  # pyright: ignore[reportAttributeAccessIssue]
        # Of the trainer that this class is mixed into
        loss, passes = self._listen(super()._compute_loss, model, inputs)  # pyright: ignore[reportAttributeAccessIssue]
        self._add_kl(passes[0], inputs["ref_per_token_logps"], inputs)
        self._micro_batches_without_kl -= 1
        if not self._micro_batches_without_kl:
            self._measure_kl()
        return loss

    def _add_kl(self, logps: Tensor, ref_logps: Tensor, inputs: dict[str, Any]) -> None:
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        self._sequence_kls.append(torch.where(mask, logps - ref_logps, 0.0).sum(dim=1))

    def _measure_kl(self) -> None:
        kl, record = self.accelerator.gather(torch.cat(self._sequence_kls)).double(), self.last_rollout
        assert record is not None
        record.kl, record.kl_std, record.num_sequences = kl.mean().item(), kl.std(unbiased=False).item(), len(kl)
        self._metrics["train"]["objective/kl"].append(kl.mean().item())
        self._metrics["train"]["objective/kl_coef"].append(float(self.beta))
