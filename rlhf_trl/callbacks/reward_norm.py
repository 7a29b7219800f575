"""
Reward normalizers: callbacks that bring the rewards of a rollout to a scale, and combine them, for PPO and for TRL's
own GRPO and RLOO.

They act on the rewards of all ranks, shape (N, functions), so they need no communication and agree on every rank. What
is learned from is: raw reward -> normalized -> clipped -> weighted and combined (-> PPO's EOS and length penalties).
Evaluation, `objective/scores`, `reward`, `rewards/<name>/*` and samples.jsonl keep the raw rewards;
`objective/scores_normalized` combines the normalized ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from rlhf_trl.callbacks.options import REFERENCE_NORM, REWARD_NORM, normalizer_problem
from rlhf_trl.config.ranges import check_values
from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.tokenize import split_row_ids
from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.combine import weighted_sum
from rlhf_trl.rewards.lagrange import Lagrange
from rlhf_trl.rewards.options import combination_problem
from rlhf_trl.trainers.checkpoints import resumed_state
from rlhf_trl.trainers.rollout_hook import RolloutRecord, RolloutTrainer


class Moments(NamedTuple):
    """Moments of each reward function, float64 tensors of shape (functions,), over all rewards that are not NaN."""

    count: Tensor
    mean: Tensor
    m2: Tensor  # sum of squared differences from the mean

    @classmethod
    def of(cls, rewards: Tensor) -> "Moments":
        """Return the moments of rewards of shape (N, functions), NaN where there is none."""
        there = ~rewards.isnan()
        count = there.sum(dim=0).double()
        mean = torch.where(there, rewards, 0.0).sum(dim=0) / count.clamp(min=1)
        return cls(count, mean, torch.where(there, rewards - mean, 0.0).square().sum(dim=0))

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta.square() * self.count * share)

    def std(self, unbiased: bool = True) -> Tensor:
        """Return the standard deviations; 0 where there are fewer than two values."""
        return (self.m2 / (self.count - int(unbiased)).clamp(min=1)).sqrt()


def is_constant(mean: Any, std: Any) -> Any:
    """Return where values differ by no more than float32's rounding: scaled to std 1, noise would become signal."""
    return std <= 1e-6 * abs(mean)


def standardize(rewards: Tensor, mean: Tensor, std: Tensor, shift_mean: bool = True) -> Tensor:
    """
    Return (rewards - mean) / std, plus the mean again unless `shift_mean`. A constant reward is not scaled.

    Args:
        rewards (`Tensor` of shape (N, functions)). mean, std (`Tensor` of shape (functions,)).
    """
    scaled = (rewards - mean) / torch.where(is_constant(mean, std), 1.0, std)
    return scaled if shift_mean else scaled + mean


class RewardNorm(TrainerCallback):
    """
    Raw rewards, clipped if asked; the base of the normalizers, which override `scale`.

    Args:
        clip (`float`, *optional*): every reward function's (normalized) values are held within plus and minus this.
        trainer (*optional*): PPO, or TRL's GRPO or RLOO. Without one, `normalize` can be used by itself.
        combine (callable, *optional*): what makes one score of the rewards, see `rlhf_trl.rewards.combine`; their
            weighted sum when unset.

    Raises:
        ConfigError: at a `clip` that is not above 0, or where the trainer's own scaling would cancel a normalizer or
            a combination.
    """

    def __init__(
        self,
        clip: float | None = None,
        trainer: RolloutTrainer | None = None,
        combine: Callable[..., Tensor] | None = None,
    ):
        check_values(REWARD_NORM, {"clip": clip}, "reward_norm.")
        self.clip = clip
        self.trainer: Any = trainer
        self.combine = combine or weighted_sum
        self._sums = getattr(self.combine, "func", self.combine) is weighted_sum  # which trainers do themselves
        self._normalizes = clip is not None or type(self) is not RewardNorm
        if trainer is not None and (self._normalizes or not self._sums):
            self._attach()

    def _attach(self) -> None:
        trainer = self.trainer
        if type(self) is not RewardNorm and (problem := normalizer_problem(vars(trainer.args))):
            raise ConfigError(problem)
        if not self._sums and (problem := combination_problem(vars(trainer.args))):
            raise ConfigError(problem)
        if isinstance(self.combine, Lagrange) and trainer.combine_rewards is not self.combine:
            raise ConfigError(
                "A trainer learns from the signals of a `Lagrange` that it was made with. Pass it to the trainer as "
                "well, `combine=`."
            )
        trainer.combine_rewards = weighted_sum if self._sums else self.combine
        if self._normalizes:
            trainer.on_rollout(self._normalized)

    def _normalized(self, rollout: RolloutRecord) -> Tensor | None:
        return self.normalize(rollout.rewards.counted) if rollout.training else None

    def normalize(self, rewards: Tensor) -> Tensor:
        """
        Return the rewards of a training rollout on the scale to learn from.

        Args:
            rewards (`Tensor` of shape (N, functions)): of all ranks; NaN where a function doesn't apply. A row with an
                infinite reward doesn't enter any moment.
        """
        values = rewards.double().cpu()  # some accelerators have no float64
        scaled = self.scale(values, values.masked_fill(values.isinf().any(dim=1, keepdim=True), torch.nan))
        if self.clip is not None:
            scaled = scaled.clamp(-self.clip, self.clip)
        return scaled.to(rewards)

    def scale(self, rewards: Tensor, counted: Tensor) -> Tensor:
        """Return `rewards` on the normalizer's scale, in float64; `counted` are those that enter the moments."""
        return rewards


class RunningNorm(RewardNorm, ExportableState):
    """
    Scale each reward function to mean 0 and std 1 by the moments of all its rewards so far, the rollout's included.

    The std is the unbiased one. Moments move in training only, and are in the checkpoint.

    Args:
        shift_mean (`bool`, defaults to `True`): whether the mean becomes 0; else it stays.
        clip, trainer, combine (*optional*): see [`RewardNorm`].
    """

    def __init__(
        self,
        shift_mean: bool = True,
        clip: float | None = None,
        trainer: RolloutTrainer | None = None,
        combine: Callable[..., Tensor] | None = None,
    ):
        super().__init__(clip, trainer, combine)
        self.shift_mean = shift_mean
        self.moments: Moments | None = None

    def scale(self, rewards: Tensor, counted: Tensor) -> Tensor:
        """See [`RewardNorm.scale`]; adds `counted` to the moments first."""
        new = Moments.of(counted)
        self.moments = new if self.moments is None else self.moments.merge(new)
        return standardize(rewards, self.moments.mean, self.moments.std(), self.shift_mean)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: `count`, `mean` and `m2` of every function."""
        moments = self.moments and {key: value.tolist() for key, value in self.moments._asdict().items()}
        return {"args": {}, "attributes": {"moments": moments}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if (saved := resumed_state(self, state, "reward_norm")) and (moments := saved["moments"]):
            self.moments = Moments(**{key: torch.tensor(value, dtype=torch.float64) for key, value in moments.items()})


class BatchNorm(RewardNorm):
    """
    Whiten each reward function over the rollout: mean 0, biased variance 1, with 1e-8 inside the root.

    Args:
        shift_mean (`bool`, defaults to `True`): whether the mean becomes 0; else it stays.
        clip, trainer, combine (*optional*): see [`RewardNorm`].
    """

    def __init__(
        self,
        shift_mean: bool = True,
        clip: float | None = None,
        trainer: RolloutTrainer | None = None,
        combine: Callable[..., Tensor] | None = None,
    ):
        super().__init__(clip, trainer, combine)
        self.shift_mean = shift_mean

    def scale(self, rewards: Tensor, counted: Tensor) -> Tensor:
        """See [`RewardNorm.scale`]."""
        moments = Moments.of(counted)
        std = moments.std(unbiased=False)
        std = torch.where(is_constant(moments.mean, std), std, (std.square() + 1e-8).sqrt())
        return standardize(rewards, moments.mean, std, self.shift_mean)


class ReferenceNorm(RewardNorm, ExportableState):
    """
    Calibrate each reward function once: gain * reward + bias, so that reference answers or policy
    samples have the mean and std asked for (Ziegler et al. 2019; InstructGPT):

        gain = std / std of the references;  bias = mean - gain * mean of the references

    The references are, for each function: the moments that it brings itself (`calibration`, see [`ModelReward`]); else
    the answers in `column`, scored before training; else the first training rollout in which it gave two rewards.
    What was found is in the checkpoint.

    Args:
        column (`str`, *optional*): column of the training data that holds reference answers, text or messages.
        rows (`int`, defaults to `256`): how many of them are scored, drawn by the run's seed.
        mean (`float`, defaults to `0.0`): mean of the references afterwards.
        std (`float`, *optional*, defaults to `1.0`): their std afterwards (unbiased); `None` only shifts.
        clip, trainer, combine (*optional*): see [`RewardNorm`].

    Raises:
        ConfigError: at a value out of range; before training, if there is no such column or it yields no rewards.
    """

    def __init__(
        self,
        column: str | None = None,
        rows: int = 256,
        mean: float = 0.0,
        std: float | None = 1.0,
        clip: float | None = None,
        trainer: RolloutTrainer | None = None,
        combine: Callable[..., Tensor] | None = None,
    ):
        check_values(REFERENCE_NORM, {"rows": rows, "mean": mean, "std": std}, "reward_norm.")
        super().__init__(clip, trainer, combine)
        self.column, self.rows = column, rows
        self.mean, self.std = float(mean), std
        self.gain: list[float | None] = []  # by function; None: not calibrated yet
        self.bias: list[float | None] = []

    def calibrate(self, function: int, mean: float, std: float, source: str) -> None:
        """
        Set gain and bias of a reward function.

        Args:
            function (`int`): its index. mean, std (`float`): of its rewards of the references. source (`str`): what
                the references are, for the line that says so.
        """
        constant = is_constant(mean, std)
        gain = 1.0 if self.std is None or constant else self.std / std
        self.gain[function], self.bias[function] = gain, self.mean - gain * mean
        if self.trainer is not None and self.trainer.is_world_process_zero():
            name = self.trainer.reward_func_names[function]
            only = ", which don't vary: it is only shifted" if constant and self.std is not None else ""
            tqdm.write(
                f"Reward `{name}` is calibrated on {source} (mean {mean:.4g}, std {std:.4g}){only}: "
                f"{self.gain[function]:.4g} * reward {self.bias[function]:+.4g}."
            )

    def scale(self, rewards: Tensor, counted: Tensor) -> Tensor:
        """See [`RewardNorm.scale`]; calibrates what isn't yet."""
        self._start(rewards.size(1))
        moments = Moments.of(counted)
        for i, gain in enumerate(self.gain):
            if gain is None and moments.count[i] >= 2:
                self.calibrate(i, moments.mean[i].item(), moments.std()[i].item(), "the first rollout")
        gain = torch.tensor([1.0 if gain is None else gain for gain in self.gain], dtype=torch.float64)
        return rewards * gain + torch.tensor([bias or 0.0 for bias in self.bias], dtype=torch.float64)

    def _start(self, functions: int) -> None:
        if not self.gain:
            self.gain, self.bias = [None] * functions, [None] * functions

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: `gain` and `bias` of every function."""
        return {"args": {}, "attributes": {"gain": self.gain, "bias": self.bias}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if saved := resumed_state(self, state, "reward_norm"):
            self.gain, self.bias = saved["gain"], saved["bias"]
            return
        self.gain, self.bias = [], []
        self._start(len(self.trainer.reward_funcs))
        for i, function in enumerate(self.trainer.reward_funcs):
            if (calibration := getattr(function, "calibration", None)) is not None:
                self.calibrate(i, calibration.mean, calibration.std, "what its model brings")
        if self.column is not None and None in self.gain:
            self._calibrate_on_column(self._score_column())

    def _calibrate_on_column(self, rewards: Tensor) -> None:
        moments = Moments.of(rewards.double().cpu())
        for i, gain in enumerate(self.gain):
            if gain is None and moments.count[i] < 2:
                raise ConfigError(
                    f"The reward `{self.trainer.reward_func_names[i]}` gives fewer than two of the reference answers "
                    f"in `{self.column}` a number. Set `reward_norm.column=null` to calibrate on the first rollout."
                )
            if gain is None:
                self.calibrate(i, moments.mean[i].item(), moments.std()[i].item(), f"the answers in `{self.column}`")

    def _score_column(self) -> Tensor:
        """Return the raw rewards of the reference answers, on all ranks; shape (rows, functions)."""
        trainer, data = self.trainer, self.trainer.train_dataset
        columns = list(data.column_names or ())
        if self.column not in columns:
            raise ConfigError(
                f"`reward_norm.column` is {self.column!r}, and the training data has {columns}. Name one of these, or "
                "set it to null to calibrate on the first rollout."
            )
        generator = torch.Generator().manual_seed(trainer.args.seed)
        ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        drawn = torch.randperm(len(data), generator=generator)[: self.rows].tolist()
        drawn = drawn[: len(drawn) // ranks * ranks][rank::ranks]  # as many on every rank
        rows = [data[index] for index in drawn]
        prompts = [row["prompt"] for row in rows]
        answers = [_as_answer(row[self.column], row["prompt"], self.column) for row in rows]
        tokenizer, ids = trainer._tokenizer, []
        for row, answer in zip(rows, answers, strict=True):
            template = trainer.chat_template_kwargs | template_kwargs(row)
            ids.append(split_row_ids(tokenizer, row["prompt"], answer, **template)[1])
        rewards = trainer.score_completions(rows, prompts, answers, ids).values
        trainer._pending_metrics.clear()  # of the reward functions, about completions that were never sampled
        trainer._pending_extra_logs.clear()
        return rewards


def _as_answer(answer: str | list[dict] | None, prompt: str | list[dict], column: str) -> str | list[dict]:
    if not answer or not isinstance(answer, str | list) or (isinstance(answer, list) and isinstance(prompt, str)):
        raise ConfigError(
            f"`reward_norm.column={column}` holds {answer!r} for the prompt {str(prompt)[:100]!r}. It must hold text, "
            "or messages where prompts are chats."
        )
    return (
        [{"role": "assistant", "content": answer}] if isinstance(answer, str) and isinstance(prompt, list) else answer
    )
