"""
`PPOTrainer`: proximal policy optimization on `trl.GRPOTrainer`, which owns prompts, generation, rewards, the reference
model, checkpoints and distributed training. Added here: a critic, KL-shaped per-token rewards, GAE, and PPO's loss.

The methods with a leading underscore override private ones of TRL 1.16; `tests/test_ppo_update.py` holds that seam by
comparing a whole update with plain PyTorch.
"""

import functools
import logging
import math
import os
import textwrap
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model, set_seed
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from trl.trainer.utils import RepeatSampler, get_callable_name, is_async_callable, nanstd

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.roles import (
    CRITIC,
    POLICY,
    REFERENCE,
    adapter_layers,
    copy_adapter,
    policy_is_active,
    set_trainable,
)
from rlhf_trl.models.sizes import check_rows, sizes_of
from rlhf_trl.patches.peft import save_only
from rlhf_trl.ppo.advantages import (
    explained_variance,
    gae,
    kl_estimate,
    masked_mean,
    masked_whiten,
    policy_losses,
    shape_scores,
    token_rewards,
    value_losses,
)
from rlhf_trl.ppo.config import PPOConfig
from rlhf_trl.ppo.critic import VALUE_HEAD, add_critic, is_critic
from rlhf_trl.ppo.ptx import Demonstrations, add_head_at_temperature_1
from rlhf_trl.ppo.sampled import SampledTokens
from rlhf_trl.ppo.seeds import derived_seed, permutation, preserved_rng_state
from rlhf_trl.rewards.base import Reward
from rlhf_trl.rewards.combine import weighted_sum
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.trainers.rollouts import GRPOTrainer

logger = logging.getLogger(__name__)

CRITIC_FILE = "critic.safetensors"


class EpochSampler(RepeatSampler):
    """TRL's `RepeatSampler` whose order comes from (seed, epoch), so that a resumed epoch is the one that was left."""

    def __init__(self, *args, epoch: Callable[[], int], **kwargs):
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(derived_seed(self.seed or 0, self.epoch()))
        return super().__iter__()


class CountInRollouts(TrainerCallback):
    """Log, evaluate and save every so many rollouts: in between, a rollout is half-way through its optimization."""

    def __init__(self, steps_per_rollout: int):
        self.steps_per_rollout = steps_per_rollout

    def on_step_end(self, args, state, control, **kwargs):
        rollouts, within = divmod(state.global_step, self.steps_per_rollout)

        def due(strategy, given, steps) -> bool:
            if strategy != IntervalStrategy.STEPS or within or not steps:
                return False
            every = int(steps) if given >= 1 else math.ceil(steps / self.steps_per_rollout)
            return rollouts % every == 0

        control.should_log = due(args.logging_strategy, args.logging_steps, state.logging_steps)
        if args.logging_first_step and state.global_step == self.steps_per_rollout:
            control.should_log = True
        control.should_evaluate = due(args.eval_strategy, args.eval_steps or 0, state.eval_steps)
        if args.eval_delay and rollouts < args.eval_delay:
            control.should_evaluate = False
        if state.global_step < state.max_steps:
            control.should_save = due(args.save_strategy, args.save_steps, state.save_steps)
        elif args.logging_strategy == IntervalStrategy.STEPS:  # what the last rollouts gave isn't lost
            control.should_log = True


class CriticWarmup(TrainerCallback):
    """In the critic's warm-up, take no step on the policy: not even weight decay moves what has no gradient."""

    def __init__(self, trainer: "PPOTrainer"):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.in_critic_warmup:
            for name, parameter in self.trainer.model.named_parameters():
                if not is_critic(name):
                    parameter.grad = None


class PPOTrainer(GRPOTrainer):
    """
    Trainer for proximal policy optimization from a learned or programmed reward (arXiv 1707.06347, 1909.08593,
    2203.02155).

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): the policy. The reference is this very starting point: a
            frozen copy of a full model or of the adapter it starts from, or the base under a fresh adapter.
        reward_funcs: one or several of: a path of a reward model (scored on the generated ids, see
            `rlhf_trl.rewards.ModelReward`), a `PreTrainedModel` for sequence classification, or a callable with TRL's
            signature `(prompts, completions, completion_ids, **columns) -> list[float | None]`. None means that a
            function doesn't apply to a row; NaN or infinity leaves the row out.
        args ([`PPOConfig`], *optional*): the arguments.
        train_dataset (`Dataset`): rows with a `prompt`, text or chat messages; the rewards get the other columns.
        eval_dataset (*optional*): held-out prompts; evaluation logs their raw score, KL, length and EOS rate.
        ptx_dataset (`Dataset`, *optional*): demonstrations with `prompt` and `completion` for `args.ptx_coef`.
        **kwargs: what `trl.GRPOTrainer` takes besides (`processing_class`, `callbacks`, `peft_config`, ...).

    Attributes:
        beta (`float`): the KL coefficient of the next rollout. A KL controller writes it between rollouts.
        last_rollout (`dict`): `kl` (mean over sequences of the summed k1, in nats), its `kl_std` over them and
            `num_sequences` of the rollout just made, on every rank alike.
        reward_normalizer (callable, *optional*): takes the rewards of a rollout, shape (N, functions) with NaN where
            there is none, and returns what is learned from. `rlhf_trl.callbacks.reward_norm` sets it.
        combine_rewards (callable): makes one score of the rewards of each completion, see `rlhf_trl.rewards.combine`;
            their weighted sum, unless `rlhf_trl.callbacks.reward_norm` sets another.

    Raises:
        ConfigError: no reward, fewer prompts than a rollout holds, images in the data, dropout in an adapter.
    """

    _tag_names = ["trl", "ppo", "rlhf_trl"]
    _name = "PPO"
    _paper = {
        "title": "Fine-Tuning Language Models from Human Preferences",
        "id": "1909.08593",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{ziegler2019finetuning,
                title        = {{Fine-Tuning Language Models from Human Preferences}},
                author       = {Daniel M. Ziegler and Nisan Stiennon and Jeffrey Wu and Tom B. Brown and Alec Radford and Dario Amodei and Paul Christiano and Geoffrey Irving},
                year         = 2019,
                eprint       = {arXiv:1909.08593},
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset=None,
        ptx_dataset: Dataset | None = None,
        **kwargs,
    ):
        if args is None:
            args = PPOConfig("ppo")
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        if not reward_funcs:
            raise ConfigError("PPO needs a reward. Pass at least one of `reward_funcs`.")
        if (ptx_dataset is None) != (args.ptx_coef == 0):
            raise ConfigError(
                f"`ptx_coef` is {args.ptx_coef} and there are {'no' if ptx_dataset is None else ''} demonstrations "
                "for it. Give both (`stage.args.ptx_coef=0.1 +data@ptx_data=demo`) or none."
            )
        _check_dataset(train_dataset, args)
        _check_adapter_dropout(model, kwargs.get("peft_config"), args)

        # GRPOTrainer keeps no reference at beta 0; PPO always measures KL.
        beta, args.beta = args.beta, args.beta or 1.0
        try:
            super().__init__(
                model,
                reward_funcs=[self._as_reward(func, kwargs.get("processing_class")) for func in reward_funcs],
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                **kwargs,
            )
        finally:
            args.beta = beta
        self.beta = beta

        # `generate` projects the last position of its prompts, a strided view, for which torch copies the whole weight
        # of the output layer once a row: for 16 rows of SmolLM2-135M 0.9 GB and a second on a CPU.
        self._policy.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        if self.ref_model is not None and args.ref_dtype is not None:
            self.ref_model.to(getattr(torch, args.ref_dtype))
        if is_peft_model(self.model):
            save_only(self.model, [POLICY])
            copy_adapter(self.model, POLICY, REFERENCE)
        if ptx_dataset is not None:
            add_head_at_temperature_1(self._policy, args.cast_lm_head_to_fp32)
        with preserved_rng_state():  # the same critic on every rank
            set_seed(args.seed)
            for func in reward_funcs:
                if isinstance(func, Reward):
                    func.attach(self.model)
            add_critic(self.model, args, self._tokenizer)
        self._set_trainable()
        if self.use_vllm:
            named_params = self.vllm_generation._iter_named_params
            self.vllm_generation._iter_named_params = lambda: (
                (name, parameter) for name, parameter in named_params() if not is_critic(name)
            )

        self._demonstrations = (
            None if ptx_dataset is None else Demonstrations(ptx_dataset, self._tokenizer, seed=args.seed)
        )
        if self._demonstrations is not None:
            whole = [prompt + completion for prompt, completion in self._demonstrations.rows]
            check_rows(sizes_of(self._policy), whole, 0, "Leave the longest rows of `ptx_data` out.")
        self._adapter_layers = adapter_layers(self._policy)
        head = getattr(self._policy, VALUE_HEAD) if args.critic == "head" else None
        self._sampled = SampledTokens(self._policy, self.temperature, head) if self._sampling_serves() else None
        self.last_rollout: dict[str, float] = {}
        self.reward_normalizer: Callable[[Tensor], Tensor] | None = None
        self.combine_rewards: Callable[..., Tensor] = weighted_sum
        self._rollout: dict[str, Tensor] | None = None
        self._rewards_per_func: Tensor | None = None
        self._invalid: Tensor | None = None
        self._forward_values: list[Tensor | None] = []
        self._update_sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.accelerator.device))
        if args.critic_warmup_steps:
            if self.is_deepspeed_enabled:
                raise ConfigError("`critic_warmup_steps` is not supported with DeepSpeed. Set it to 0.")
            self.add_callback(CriticWarmup(self))
        # right after the stock flow callback, so that any other callback can still ask for a log or a save
        self.callback_handler.callbacks.insert(1, CountInRollouts(args.steps_per_rollout))

    def _set_trainable(self):
        """Let policy and critic be trained. Resuming, and TRL's passes of a reference adapter, leave the policy so."""
        if is_peft_model(self.model):
            set_trainable(self.accelerator.unwrap_model(self.model), roles=(POLICY, CRITIC))

    @property
    def in_critic_warmup(self) -> bool:
        """Whether the rollout in hand trains the critic alone."""
        return self._rollout_index < self.args.critic_warmup_steps

    # ---- Rewards ----

    @staticmethod
    def _as_reward(func, tokenizer) -> Callable:
        """Reward models become callables that score the generated ids; NaN of a callable is told apart from None."""
        if isinstance(func, (str, PreTrainedModel)):
            func = ModelReward(func)
        if isinstance(func, ModelReward) and tokenizer is not None:
            func.bind(tokenizer)
        name = get_callable_name(func)

        def marked(values):
            # TRL writes None as NaN. A reward that is NaN itself travels as infinity until `_calculate_rewards`.
            return [v if v is None or math.isfinite(v) else math.inf for v in values]

        if is_async_callable(func):

            async def reward(*args, **kwargs):
                return marked(await func(*args, **kwargs))
        else:

            def reward(*args, **kwargs):
                return marked(func(*args, **kwargs))

        reward.__name__ = name
        reward.calibration = getattr(func, "calibration", None)
        return reward

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (N, functions)
        invalid = torch.isinf(rewards)
        self._invalid = invalid.any(dim=1)
        if invalid.any():
            rows, columns = invalid.nonzero(as_tuple=True)
            where = ", ".join(
                f"row {row} of `{self.reward_func_names[column]}`"
                for row, column in list(zip(rows.tolist(), columns.tolist(), strict=True))[:5]
            )
            message = (
                f"{int(self._invalid.sum())} of {len(rewards)} completions got a NaN or infinite reward ({where})."
            )
            if self._invalid.float().mean() > self.args.max_invalid_fraction:
                raise ConfigError(
                    f"{message} That is more than `max_invalid_fraction={self.args.max_invalid_fraction}`. Mend the "
                    "reward function, or let it return None where it doesn't apply."
                )
            if self.accelerator.is_main_process:
                logger.warning("%s They are left out of this update.", message)
            rewards = rewards.masked_fill(invalid, torch.nan)
        self._rewards_per_func = rewards
        return rewards

    # ---- Rollout ----

    def _get_train_sampler(self, dataset: Dataset | None = None) -> RepeatSampler:
        dataset = self.train_dataset if dataset is None else dataset
        prompts_per_rollout = self.args.generation_batch_size // self.num_generations
        steps_per_epoch = len(dataset) // prompts_per_rollout * self.args.steps_per_rollout
        return EpochSampler(
            data_source=dataset,
            mini_repeat_count=self.num_generations,
            batch_size=prompts_per_rollout,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
            epoch=lambda: self.state.global_step // steps_per_epoch,
        )

    def _sampling_serves(self) -> bool:
        """Whether `generate` computes what the first pass over a rollout would, see [`SampledTokens`]."""
        return (
            not (self.use_vllm or self.rollout_func or self.tools)
            and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
            and self._policy.dtype == torch.float32
            and getattr(self._policy, "hf_quantizer", None) is None
            and self.accelerator.mixed_precision == "no"
            and torch.get_float32_matmul_precision() == "highest"
            and self.args.disable_dropout
            and self.generation_config.cache_implementation is None  # a static one may be compiled
        )

    def _generate_single_turn(self, *args, **kwargs):
        if self._sampled is None:
            return super()._generate_single_turn(*args, **kwargs)
        with self._sampled.watching():
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        self._sampled.keep(completion_ids)
        return completion_ids, logprobs

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        if self._sampled is not None and model is self.model and not torch.is_grad_enabled():
            log_probs = self._log_probs_of_sampling(input_ids, attention_mask, logits_to_keep, batch_size)
            if log_probs is not None:
                return log_probs, None, None
        return self._log_probs_of_pass(model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)

    def _log_probs_of_pass(self, model, *args, **kwargs):
        # TRL's chunked pass, with the values of each chunk kept: one forward for log-probabilities and values
        values = []
        extra = {"with_values": True} if model is not self.ref_model else {}

        def forward(**inputs):
            output = model(**inputs, **extra)
            values.append(output.get("value_preds"))
            return output

        result = super()._get_per_token_logps_and_entropies(forward, *args, **kwargs)
        width = result[0].size(1)
        self._forward_values.append(None if values[0] is None else torch.cat(values)[:, -width:])
        return result

    def _log_probs_of_sampling(self, input_ids, attention_mask, width, batch_size) -> Tensor | None:
        """Log-probabilities (N, T) that sampling has computed, if it has; their values go where a pass puts them."""
        if not policy_is_active(self._adapter_layers):
            return None
        sampled = self._sampled.take(attention_mask[:, -width:])
        if sampled is None:
            return None
        log_probs, values = sampled
        batch_size = batch_size or len(input_ids)
        if not self._sampled.compared:
            of_a_pass, _, _ = self._log_probs_of_pass(
                self.model, input_ids[:batch_size], attention_mask[:batch_size], width
            )
            self._forward_values.pop()
            if not self._sampled.agrees(log_probs[:batch_size], of_a_pass):
                self._sampled = None
                return None
        if values is None:
            rows = zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True)
            values = torch.cat(
                [
                    self.model(
                        input_ids=ids, attention_mask=mask, fused_lm_head=True, with_values=True, values_only=True
                    ).value_preds[:, -width:]
                    for ids, mask in rows
                ]
            )
        self._forward_values.append(values)
        return log_probs

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        self._forward_values.clear()
        coefficient, self.beta = self.beta, self.beta or 1.0  # TRL skips the reference at 0
        try:
            rollout = super()._generate_and_score_completions(inputs)
        finally:
            self.beta = coefficient
            self._set_trainable()
        self._metrics[mode].pop("frac_reward_zero_std", None)  # about groups, which PPO doesn't have
        values = self._forward_values[0]
        if "old_per_token_logps" not in rollout:  # TRL skips it when each rollout gets one optimizer step
            with torch.no_grad():
                rollout["old_per_token_logps"], _, _ = self._get_per_token_logps_and_entropies(
                    self.model,
                    torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1),
                    torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1),
                    rollout["completion_ids"].size(1),
                    batch_size=self.args.per_device_train_batch_size
                    if mode == "train"
                    else self.args.per_device_eval_batch_size,
                )
            values = self._forward_values[-1]
        self._forward_values.clear()
        rollout["old_values"] = values
        rollout = {key: rollout[key] for key in _ROLLOUT_KEYS if key in rollout}
        rollout = self._gather_rollout(rollout)
        self._score_rollout(rollout, mode)
        return rollout

    def _gather_rollout(self, rollout: dict[str, Tensor]) -> dict[str, Tensor]:
        """All ranks' rows on every rank, so that mini-batches and moments don't depend on the number of ranks."""
        if self.accelerator.num_processes == 1:
            return rollout
        for key, value in rollout.items():
            pad_index = self._tokenizer.pad_token_id if key.endswith("_ids") else 0
            value = self.accelerator.pad_across_processes(
                value, dim=1, pad_index=pad_index, pad_first=key.startswith("prompt")
            )
            rollout[key] = self.accelerator.gather(value)
        return rollout

    def _score_rollout(self, rollout: dict[str, Tensor], mode: str):
        """Add scores, advantages and returns to a rollout of N rows and T tokens, in place, and log its metrics."""
        completion_mask = rollout["completion_mask"].bool()
        mask = completion_mask & rollout["tool_mask"].bool() if "tool_mask" in rollout else completion_mask
        raw = self._rewards_per_func
        scores = self._combined(raw, raw)
        valid = ~self._invalid & ~scores.isnan()
        scores = scores.nan_to_num()
        if self.combine_rewards is not weighted_sum:  # TRL has logged its own sum
            there = scores.masked_fill(~valid, torch.nan)
            self._metrics[mode]["reward"][-1] = torch.nanmean(there).item()
            self._metrics[mode]["reward_std"][-1] = nanstd(there).item()
        generated = mask.sum(dim=1)
        mask = mask & valid.unsqueeze(1)

        lengths = completion_mask.sum(dim=1)
        last = rollout["completion_ids"].gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        ended = torch.isin(last, torch.tensor(self.eos_token_ids, device=last.device)) & (lengths > 0)
        old_logp, ref_logp = rollout["old_per_token_logps"], rollout["ref_per_token_logps"]
        k1 = torch.where(mask, kl_estimate(old_logp, ref_logp, "k1"), 0.0)
        per_sequence = {
            "objective/scores": scores,
            "objective/kl": k1.sum(dim=1),
            "completions/eos_rate": ended.float(),
            "completions/mean_length": lengths.float(),
        }
        if mode == "eval":
            if self.held_out_batch is not None:
                valid[self.held_out_batch.rows :] = False  # copies of its rows stand behind them
                self.held_out_counts |= dict.fromkeys(per_sequence, int(valid.sum()))
            for key, value in per_sequence.items():
                self._metrics["eval"][key].append(value[valid].mean().item())
            return

        normalized = scores
        if self.reward_normalizer is not None:
            counted = raw.masked_fill(self._invalid.unsqueeze(1), torch.nan)
            normalized = self._combined(self.reward_normalizer(counted), counted).nan_to_num()
        shaped = shape_scores(
            normalized,
            ended,
            generated,
            missing_eos_penalty=self.args.missing_eos_penalty,
            missing_eos_score=self.args.missing_eos_score,
            length_penalty=self.args.length_penalty,
        )
        token_kl = kl_estimate(old_logp, ref_logp, self.args.kl_estimator)
        rewards = token_rewards(shaped, token_kl, mask, self.beta)
        if self.args.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        values = rollout["old_values"]
        advantages, returns = gae(rewards, values, mask, self.args.gamma, self.args.lam)
        rollout["advantages"] = masked_whiten(advantages, mask)
        rollout["returns"] = returns
        rollout["mask"] = mask

        count = valid.sum().clamp(min=1)
        mean = {key: (value * valid).sum() / count for key, value in per_sequence.items()}
        self.last_rollout = {
            "kl": mean["objective/kl"].item(),
            "kl_std": per_sequence["objective/kl"][valid].std(unbiased=False).item(),
            "num_sequences": int(valid.sum()),
        }
        metrics = mean | {
            "objective/scores_std": scores[valid].std(unbiased=False),
            "objective/kl_per_token": masked_mean(k1, mask),
            "objective/rlhf_reward": ((shaped - self.beta * (token_kl * mask).sum(dim=1)) * valid).sum() / count,
            "objective/kl_coef": torch.tensor(float(self.beta)),
            "objective/invalid_rewards": self._invalid.sum(),
            "value/mean": masked_mean(values, mask),
            "value/explained_variance": explained_variance(values, returns, mask),
            "returns/mean": masked_mean(returns, mask),
            "episodes": torch.tensor(float(self._rollout_index + 1) * self.args.generation_batch_size),
        }
        if self.reward_normalizer is not None:
            metrics["objective/scores_normalized"] = (normalized * valid).sum() / count
        metrics.pop("completions/mean_length")  # TRL has logged it
        for key, value in metrics.items():
            self._metrics[mode][key].append(value.item())

    def _combined(self, values: Tensor, raw: Tensor) -> Tensor:
        """Scores of shape (N,), NaN where no function applies."""
        weights = self.reward_weights.to(values.device)
        return self.combine_rewards(values, raw, weights, self.reward_func_names)

    @property
    def _rollout_index(self) -> int:
        return self.state.global_step // self.args.steps_per_rollout

    # ---- Optimizer ----

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with a parameter group of its own for a critic with a learning rate of its own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.args.critic_learning_rate is not None:
            ids = {id(p) for name, p in self.model.named_parameters() if is_critic(name)}
            for group in list(optimizer.param_groups):
                critic = [p for p in group["params"] if id(p) in ids]
                group["params"] = [p for p in group["params"] if id(p) not in ids]
                if critic:
                    optimizer.add_param_group(
                        {"params": critic, "lr": self.args.critic_learning_rate, "weight_decay": group["weight_decay"]}
                    )
        return optimizer

    # ---- Mini-batches ----

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        micro_step = self._step % (self.args.steps_per_generation * self.num_iterations)
        if micro_step == 0 or self._rollout is None:
            self._rollout = self._generate_and_score_completions(generation_batch)
        return self._micro_batch(micro_step)

    def _micro_batch(self, micro_step: int) -> dict[str, Tensor]:
        """
        This rank's rows of a micro-batch. The rollout's rows are dealt anew each epoch by (seed, rollout, epoch), over
        the rows of all ranks, so that their number doesn't change which rows make a mini-batch.
        """
        args, ranks = self.args, self.accelerator.num_processes
        epoch, step = divmod(micro_step, args.steps_per_generation)
        mini_batch, accumulated = divmod(step, args.gradient_accumulation_steps)
        micro_rows = args.per_device_train_batch_size * ranks
        mini_rows = micro_rows * args.gradient_accumulation_steps
        order = permutation(args.generation_batch_size, args.seed, self._rollout_index, epoch)
        order = order.to(self._rollout["mask"].device)
        rows_of_mini_batch = order[mini_batch * mini_rows : (mini_batch + 1) * mini_rows]
        start = accumulated * micro_rows + self.accelerator.process_index * args.per_device_train_batch_size
        rows = rows_of_mini_batch[start : start + args.per_device_train_batch_size]

        inputs = {key: value[rows] for key, value in self._rollout.items()}
        prompt = int(inputs["prompt_mask"].sum(dim=1).max())
        completion = max(1, int(inputs["completion_mask"].sum(dim=1).max()))
        inputs = {k: v[:, -prompt:] if k.startswith("prompt") else v[:, :completion] for k, v in inputs.items()}
        inputs["tokens"] = self._rollout["mask"][rows_of_mini_batch].sum().clamp(min=1)
        done, rest = divmod(micro_step + 1, args.gradient_accumulation_steps)
        ends_run = self.state.global_step + 1 >= self.state.max_steps  # perhaps in the middle of a rollout
        # demonstrations for PPO-ptx are dealt alike, as many as completions
        inputs["ptx_start"], inputs["ptx_rows"] = self.state.global_step * mini_rows, mini_rows
        inputs["ptx_slice"] = start, start + args.per_device_train_batch_size
        inputs["mini_batches"] = done
        inputs["ends_rollout"] = rest == 0 and (done == args.steps_per_rollout or ends_run)
        return inputs

    # ---- Loss ----

    def _compute_loss(self, model, inputs):
        mask = inputs["mask"]
        warmup = self.in_critic_warmup
        self._policy.detach_values = self.args.critic_detach or warmup
        self._forward_values.clear()
        logp, entropy, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            mask.size(1),
            compute_entropy=True,
        )
        values = self._forward_values.pop()

        old_logp, old_values = inputs["old_per_token_logps"], inputs["old_values"]
        policy, policy_clipped = policy_losses(
            logp, old_logp, inputs["advantages"], self.epsilon_low, self.epsilon_high, self.args.delta
        )
        if "importance_sampling_ratio" in inputs:  # vLLM sampled from a slightly different distribution
            policy = policy * inputs["importance_sampling_ratio"]
        value, value_clipped = value_losses(values, old_values, inputs["returns"], self.args.cliprange_value)
        ratio = torch.exp(logp - old_logp)

        # DDP averages gradients over the ranks, and accumulated micro-batches add up: dividing each sum by the tokens
        # of the global mini-batch makes the update the same however its rows are dealt.
        def share(x: Tensor) -> Tensor:
            return torch.where(mask, x, 0.0).sum() / inputs["tokens"]

        loss = share(policy)
        if self.entropy_coef:  # at 0 it would still cost a gradient over the vocabulary
            loss = loss - self.entropy_coef * share(entropy)
        ptx = self._ptx_loss(model, inputs) if self._demonstrations is not None else None
        if ptx is not None:
            loss = loss + self.args.ptx_coef * ptx
        if warmup:
            loss = 0.0 * logp.sum()  # DDP waits for a gradient of every parameter
        loss = loss + self.args.vf_coef * share(value)
        skipped = self._exceeds_ratio_threshold(ratio.detach(), mask)
        if skipped:
            loss = 0.0 * (logp.sum() + values.sum())
        with torch.no_grad():
            metrics = {
                "policy/loss": share(policy),
                "policy/approxkl": share((logp - old_logp).square() / 2),
                "policy/clipfrac": share(policy_clipped.float()),
                "policy/entropy": share(entropy),
                "policy/ratio": share(ratio),
                "value/loss": share(value),
                "value/clipfrac": share(value_clipped.float()),
            }
            if ptx is not None:
                metrics["policy/ptx_loss"] = ptx.detach()
            if self.args.ratio_threshold is not None:
                micro_batches = self.args.gradient_accumulation_steps * self.accelerator.num_processes
                metrics["policy/skipped"] = torch.tensor(skipped / micro_batches, device=mask.device)
            self._record_update(metrics, inputs["mini_batches"] if inputs["ends_rollout"] else None)
        return loss * self.accelerator.num_processes

    def _exceeds_ratio_threshold(self, ratio: Tensor, mask: Tensor) -> bool:
        """Whether the mean ratio of a micro-batch, over all ranks, says that the policy has moved too far."""
        if self.args.ratio_threshold is None:
            return False
        sums = torch.stack([torch.where(mask, ratio, 0.0).sum(), mask.sum().to(ratio.dtype)])
        total, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        return total > self.args.ratio_threshold * max(tokens, 1)

    def _ptx_loss(self, model, inputs: dict[str, Any]) -> Tensor:
        """This rank's share of the mean negative log-likelihood of the mini-batch's demonstrations."""
        mini_batch = self._demonstrations.indices(inputs["ptx_start"], inputs["ptx_rows"])
        start, end = inputs["ptx_slice"]
        batch = self._demonstrations.batch(mini_batch[start:end], inputs["mask"].device)
        logp, _, _ = super()._get_per_token_logps_and_entropies(
            functools.partial(model, at_temperature_1=True),
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
        )
        return -(logp * batch["completion_mask"]).sum() / self._demonstrations.tokens(mini_batch)

    def _record_update(self, shares: dict[str, Tensor], mini_batches: int | None):
        """Add a micro-batch's shares of its mini-batch's means; at a rollout's end log the mean over mini-batches."""
        for key, share in shares.items():
            self._update_sums[key] += share
        if mini_batches is None:
            return
        sums = self.accelerator.reduce(torch.stack(list(self._update_sums.values())), reduction="sum")
        for key, total in zip(self._update_sums, sums, strict=True):
            self._metrics["train"][key].append(total.item() / mini_batches)
        self._update_sums.clear()

    # ---- Evaluation ----

    def evaluate(self, *args, **kwargs):
        """Score held-out prompts, sampled with the run's seed each time, leaving the training's random state alone."""
        with preserved_rng_state():
            set_seed(self.args.seed, device_specific=True)
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        """Sample and score a batch of held-out prompts. There is no held-out loss: a rollout's loss means nothing."""
        with torch.no_grad(), self.compute_loss_context_manager():
            self._prepare_inputs(inputs)
        return None, None, None

    # ---- Checkpoints: the policy's files hold the policy alone, the critic lies beside them ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        if state_dict is None:
            state_dict = self.accelerator.unwrap_model(self.model).state_dict()
        super()._save(output_dir, {k: v for k, v in state_dict.items() if not is_critic(k)})
        if self.args.should_save:
            critic = {k: v.contiguous() for k, v in state_dict.items() if is_critic(k)}
            save_file(critic, os.path.join(output_dir, CRITIC_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._set_trainable()
        path = os.path.join(resume_from_checkpoint, CRITIC_FILE)
        if not os.path.isfile(path):
            raise ConfigError(f"`{resume_from_checkpoint}` has no `{CRITIC_FILE}`. Resume from a checkpoint of PPO.")
        critic = load_file(path)
        model = self.accelerator.unwrap_model(self.model)
        expected = {key for key in model.state_dict() if is_critic(key)}
        if expected != critic.keys():
            raise ConfigError(
                f"`{path}` holds another kind of critic than `critic={self.args.critic}`. Resume with the critic that "
                "the run began with."
            )
        model.load_state_dict(critic, strict=False)

    def _issue_warnings_after_load(self, load_result) -> None:
        missing = load_result.missing_keys
        missing[:] = [key for key in missing if not is_critic(key)]  # it comes from its own file
        super()._issue_warnings_after_load(load_result)


_ROLLOUT_KEYS = (
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


def _check_dataset(dataset: Dataset | None, args: PPOConfig):
    if dataset is None:
        raise ConfigError("PPO needs prompts. Pass `train_dataset` with a column `prompt`.")
    images = {"image", "images"} & set(dataset.column_names or [])
    if images:
        raise ConfigError(
            f"The prompts have images (column `{images.pop()}`), and PPO trains on text and chat prompts. Remove the "
            "column."
        )
    if not isinstance(dataset, Dataset):
        raise ConfigError("PPO needs a dataset of known length. Pass a `datasets.Dataset`, not an iterable one.")
    prompts = args.generation_batch_size // args.num_generations
    if len(dataset) < prompts:
        raise ConfigError(
            f"There are {len(dataset)} prompts, fewer than the {prompts} of one rollout. Lower "
            "`per_device_train_batch_size` or `steps_per_generation`, or give more prompts."
        )
    remainder = len(dataset) % prompts
    if remainder and args.process_index == 0:
        logger.warning(
            "An epoch leaves out %d of %d prompts, other ones each time: rollouts take %d.",
            remainder,
            len(dataset),
            prompts,
        )


def _check_adapter_dropout(model, peft_config, args: PPOConfig):
    configs = (
        list(model.peft_config.values()) if isinstance(model, PeftModel) else [peft_config] if peft_config else []
    )
    dropout = max((getattr(config, "lora_dropout", 0.0) or 0.0 for config in configs), default=0.0)
    if dropout > 0 and args.disable_dropout:
        raise ConfigError(
            f"The adapter has a dropout of {dropout}, which `disable_dropout=True` would silently undo. Set the "
            "adapter's dropout to 0."
        )
