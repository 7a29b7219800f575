"""
[`PPOTrainer`]: proximal policy optimization on `trl.GRPOTrainer`, which owns prompts, generation, rewards, the
reference model, checkpoints and distributed training. Added here: a critic, KL-shaped per-token rewards, GAE
([`score_rollout`]), and PPO's loss.

Private methods of TRL 1.16 and transformers that it overrides, and why:

- `_get_train_sampler`: the order of the prompts comes from (seed, epoch), so that a run resumes exactly.
- `_generate_and_score_completions`: the reference is scored at `beta=0` too, and values are added.
- `_prepare_inputs`: the rollouts of all ranks are scored together, and dealt into mini-batches of all ranks.
- `_compute_loss`: PPO's loss instead of GRPO's.
- `_save`, `_load_from_checkpoint`, `_load_best_model`, `_issue_warnings_after_load`: the critic has a file of its own.

The mixins [`~rlhf_trl.ppo.scoring.TokenScoring`], [`~rlhf_trl.trainers.rollout_hook.RolloutHook`] and
[`~rlhf_trl.trainers.rollouts.Rollouts`] list theirs.
`tests/unit/ppo/test_ppo_update.py` holds that seam by comparing a whole update with plain PyTorch.
"""

import functools
import logging
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import trl
from accelerate.utils import is_peft_model, set_seed
from datasets import Dataset
from torch import Tensor
from trl.trainer.utils import RepeatSampler

from rlhf_trl.data.multimodal import ExtraInputs, tokenizer_of
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.roles import (
    CRITIC,
    POLICY,
    REFERENCE,
    adapter_layers,
    copy_adapter,
    set_trainable,
)
from rlhf_trl.models.sizes import check_rows, sizes_of
from rlhf_trl.models.vision import find_unused_parameters
from rlhf_trl.patches.generation import make_output_layer_inputs_contiguous
from rlhf_trl.patches.peft import save_only
from rlhf_trl.patches.vllm import send_only
from rlhf_trl.ppo.callbacks import CountInRollouts, CriticWarmup
from rlhf_trl.ppo.checks import check_adapter_dropout, check_inputs, check_prompt_images
from rlhf_trl.ppo.config import PPOConfig
from rlhf_trl.ppo.critic import (
    VALUE_HEAD,
    add_critic,
    critic_parameter_group,
    is_critic,
    read_critic,
    save_critic,
    without_critic,
)
from rlhf_trl.ppo.losses import population_std
from rlhf_trl.ppo.options import critic_warmup_problem
from rlhf_trl.ppo.ptx import Demonstrations, add_head_at_temperature_1
from rlhf_trl.ppo.rewards import checked_reward, invalid_rewards
from rlhf_trl.ppo.rollout import Rollout, TokenScores, held_out_metrics, score_rollout
from rlhf_trl.ppo.sampled import SampledTokens
from rlhf_trl.ppo.scoring import TokenScoring
from rlhf_trl.ppo.seeds import EpochSampler
from rlhf_trl.ppo.update import MicroBatch, micro_batch, micro_batch_loss
from rlhf_trl.rewards.base import Reward
from rlhf_trl.rewards.lagrange import Lagrange
from rlhf_trl.trainers.base import TrainerMixin
from rlhf_trl.trainers.rollout_hook import RolloutHook, RolloutRecord
from rlhf_trl.trainers.rollouts import Rollouts
from rlhf_trl.trainers.seeds import SampledEvaluation, preserved_rng_state

logger = logging.getLogger(__name__)


@contextmanager
def keeping_reference(holder: Any) -> Iterator[None]:
    """Let TRL make and score a reference at `beta=0` too, where GRPO goes without one: PPO always measures KL."""
    beta, holder.beta = holder.beta, holder.beta or 1.0
    try:
        yield
    finally:
        holder.beta = beta


class PPOTrainer(SampledEvaluation, TokenScoring, RolloutHook, Rollouts, TrainerMixin, trl.GRPOTrainer):
    """
    Trainer for proximal policy optimization from a learned or programmed reward (arXiv 1707.06347, 1909.08593,
    2203.02155).

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): the policy. The reference is this very starting point: a
            frozen copy of a full model or of the adapter it starts from, or the base under a fresh adapter.
        reward_funcs: one or several of: a path of a reward model (scored on the generated ids, see
            `rlhf_trl.rewards.ModelReward`), a `PreTrainedModel` for sequence classification, or a callable with TRL's
            signature `(prompts, completions, completion_ids, **columns) -> list[float | None]`. None means that a
            function doesn't apply to a row; NaN or infinity drops the row.
        args ([`PPOConfig`], *optional*): the arguments.
        train_dataset (`Dataset`): rows with a `prompt`, text or chat messages; the rewards get the other columns.
        eval_dataset (*optional*): held-out prompts; evaluation logs their raw score, KL, length and EOS rate.
        ptx_dataset (`Dataset`, *optional*): demonstrations with `prompt` and `completion` for `args.ptx_coef`.
        combine (callable, *optional*): function that makes one score of a completion's rewards, see
            `rlhf_trl.rewards.combine`; their weighted sum when unset. A
            [`~rlhf_trl.rewards.lagrange.Lagrange`] gives the critic a value for each constraint.
        **kwargs: what `trl.GRPOTrainer` takes besides (`processing_class`, `callbacks`, `peft_config`, ...).

    Attributes:
        beta (`float`): the KL coefficient of the next rollout. A KL controller writes it between rollouts.
        last_rollout ([`~rlhf_trl.trainers.rollout_hook.RolloutRecord`], *optional*): the current rollout, with its KL,
            on every rank alike. See [`~rlhf_trl.trainers.rollout_hook.RolloutHook.on_rollout`].

    Raises:
        ConfigError: no reward, fewer prompts than a rollout holds, dropout in an adapter.
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
        check_inputs(reward_funcs, train_dataset, ptx_dataset, args)
        check_adapter_dropout(model, kwargs.get("peft_config"), args)
        tokenizer = tokenizer_of(kwargs.get("processing_class"))
        check_prompt_images(train_dataset, tokenizer)
        find_unused_parameters(args, tokenizer)

        with keeping_reference(args):
            super().__init__(
                model,
                reward_funcs=[checked_reward(func, tokenizer) for func in reward_funcs],
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                **kwargs,
            )
        self.beta = args.beta

        make_output_layer_inputs_contiguous(self._policy)
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
            constraints = self.combine_rewards.bounds if isinstance(self.combine_rewards, Lagrange) else ()
            add_critic(self.model, args, self._tokenizer, signals=1 + len(constraints))
        self._set_trainable()
        if self.use_vllm:
            send_only(self.vllm_generation, lambda name: not is_critic(name))

        self._demonstrations = None
        if ptx_dataset is not None:
            self._demonstrations = Demonstrations(ptx_dataset, self._tokenizer, seed=args.seed)
            whole = [prompt + completion for prompt, completion in self._demonstrations.rows]
            check_rows(sizes_of(self._policy), whole, 0, "Drop the longest rows of `ptx_data`.")
        self._adapter_layers = adapter_layers(self._policy)
        head = getattr(self._policy, VALUE_HEAD) if args.critic == "head" else None
        reuse = self._can_reuse_generation_logprobs()
        self._sampled = SampledTokens(self._policy, self.temperature, head) if reuse else None
        self._last_pass: tuple[Tensor, TokenScores] | None = None  # see `_old_scores`
        self._extra: list[ExtraInputs] | None = None  # inputs beside ids of the rollout that is being made
        self._rollout: Rollout | None = None  # the one that is optimized
        self._update_sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.accelerator.device))
        if problem := critic_warmup_problem(args.critic_warmup_steps, self.is_deepspeed_enabled):
            raise ConfigError(problem)
        if args.critic_warmup_steps:
            self.add_callback(CriticWarmup(self))
        # right after the stock flow callback, so that any other callback can still ask for a log or a save
        self.callback_handler.callbacks.insert(1, CountInRollouts(args.steps_per_rollout))

    def _set_trainable(self) -> None:
        """Let policy and critic be trained. Resuming, and TRL's passes of a reference adapter, change what is."""
        if is_peft_model(self.model):
            set_trainable(self.accelerator.unwrap_model(self.model), roles=(POLICY, CRITIC))

    @property
    def keeps_reference(self) -> bool:
        """Whether there is a reference: PPO keeps it at `beta=0` too."""
        return True

    @property
    def in_critic_warmup(self) -> bool:
        """Whether the current rollout trains the critic alone."""
        return self._rollout_index < self.args.critic_warmup_steps

    @property
    def _rollout_index(self) -> int:
        return self.state.global_step // self.args.steps_per_rollout

    # ---- Rewards ----

    def _invalid_rewards(self, values: Tensor) -> Tensor:
        return invalid_rewards(self.reward_funcs, self.args.max_invalid_fraction, self.accelerator)

    def _rewards_to_learn_from(self, record: RolloutRecord) -> Tensor:
        return record.rewards.values  # TRL logs them, and [`score_rollout`] learns from them

    # ---- Rollout ----

    def _get_train_sampler(self, dataset: Dataset | None = None) -> RepeatSampler:
        dataset = cast(Dataset, self.train_dataset if dataset is None else dataset)
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

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._last_pass = self._extra = None
        with keeping_reference(self):
            output = super()._generate_and_score_completions(inputs)
        self._set_trainable()
        ids, masks = (torch.cat([output[f"prompt_{x}"], output[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        scores, self._last_pass = self._old_scores(ids, masks, output["completion_ids"].size(1)), None
        extra, self._extra = self._extra, None
        self._log_mismatch(output, scores.logps)
        return output | {"old_per_token_logps": scores.logps, "old_values": scores.values, "extra": extra}

    def _make_rollout(self, inputs: Any) -> Rollout:
        """Generate completions of this rank's prompts, score those of all ranks, and log the metrics."""
        mode = "train" if self.model.training else "eval"
        output = self._generate_and_score_completions(inputs)
        self._metrics[mode].pop("frac_reward_zero_std", None)  # about groups, which PPO doesn't have
        pad_token_id = cast(int, self._tokenizer.pad_token_id)
        rollout = Rollout.gather(output, self.accelerator, pad_token_id, self.eos_token_ids)
        record = self._record
        if mode == "eval":
            rows = None if self.held_out_batch is None else self.held_out_batch.rows
            metrics, count = held_out_metrics(rollout, record.rewards, rows)
            if rows is not None:
                self.held_out_counts |= dict.fromkeys(metrics, count)
        else:
            rollout, metrics = score_rollout(rollout, record.rewards, self.args, self.beta)
            metrics["episodes"] = float((self._rollout_index + 1) * self.args.generation_batch_size)
            record.kl, record.num_sequences = metrics["objective/kl"], int(rollout.valid.sum())
            record.kl_std = population_std(rollout.kl[rollout.valid]).item()
        for key, value in metrics.items():
            self._metrics[mode][key].append(value)
        return rollout

    def _prepare_inputs(self, generation_batch) -> MicroBatch | Rollout:
        if not self.model.training:
            return self._make_rollout(generation_batch)
        micro_step = self._step % (self.args.steps_per_generation * self.num_iterations)
        if micro_step == 0 or self._rollout is None:
            self._rollout = self._make_rollout(generation_batch)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return micro_batch(self._rollout, micro_step, self._rollout_index, self.args, rank, ranks)

    # ---- Update ----

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Make the Trainer's optimizer, with parameter groups of its own for a critic with its own learning rate."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.args.critic_learning_rate is not None:
            critic_parameter_group(optimizer, self.model, self.args.critic_learning_rate)
        return optimizer

    def _compute_loss(self, model, inputs: MicroBatch) -> Tensor:
        rollout, warmup = inputs.rollout, self.in_critic_warmup
        self._policy.detach_values = self.args.critic_detach or warmup
        width = rollout.mask.size(1)
        tokens = rollout.input_ids, rollout.attention_mask
        scores = self._score_tokens(model, *tokens, width, extra=rollout.extra, compute_entropy=True)
        loss, metrics = micro_batch_loss(inputs, scores, self.args, self._ptx_loss(model, inputs), warmup)
        if self.args.ratio_threshold is not None:
            skipped = self._exceeds_ratio_threshold(scores, rollout)
            metrics["policy/skipped"] = skipped / (
                self.args.gradient_accumulation_steps * self.accelerator.num_processes
            )
            if skipped:
                loss = 0.0 * (scores.logps.sum() + scores.values.sum())
        self._record_update(metrics, inputs)
        return loss * self.accelerator.num_processes

    @torch.no_grad()
    def _exceeds_ratio_threshold(self, scores: TokenScores, rollout: Rollout) -> bool:
        """Return whether a micro-batch's mean ratio, over all ranks, says that the policy has moved too far."""
        ratio = torch.exp(scores.logps - rollout.old_logps)
        sums = torch.stack([torch.where(rollout.mask, ratio, 0.0).sum(), rollout.mask.sum().to(ratio.dtype)])
        total, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        return total > self.args.ratio_threshold * max(tokens, 1)

    def _ptx_loss(self, model, inputs: MicroBatch) -> Tensor | None:
        """Return this rank's share of the mean negative log-likelihood of the mini-batch's demonstrations, if any."""
        if self._demonstrations is None:
            return None
        start = self.state.global_step * inputs.mini_batch_size  # as many as completions, and dealt alike
        mini_batch = self._demonstrations.indices(start, inputs.mini_batch_size)
        batch = self._demonstrations.batch(mini_batch[inputs.rows], inputs.tokens.device)
        logps, _, _ = super()._get_per_token_logps_and_entropies(
            functools.partial(model, at_temperature_1=True),
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
        )
        return -(logps * batch["completion_mask"]).sum() / self._demonstrations.tokens(mini_batch)

    def _record_update(self, shares: dict[str, Tensor], inputs: MicroBatch) -> None:
        """Add a micro-batch's shares of its mini-batch's means; at a rollout's end log the mean over mini-batches."""
        for key, share in shares.items():
            self._update_sums[key] += share
        ends_run = self.state.global_step + 1 >= self.state.max_steps  # perhaps in the middle of a rollout
        if not inputs.completes or not (ends_run or inputs.mini_batches == self.args.steps_per_rollout):
            return
        sums = self.accelerator.reduce(torch.stack(list(self._update_sums.values())), reduction="sum")
        for key, total in zip(self._update_sums, sums, strict=True):
            self._metrics["train"][key].append(total.item() / inputs.mini_batches)
        self._update_sums.clear()

    # ---- Evaluation ----

    # ---- Checkpoints: the policy's files hold the policy alone, the critic's lies beside them ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = cast(str, output_dir or self.args.output_dir)
        state: dict = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
        super()._save(folder, without_critic(state))
        if self.args.should_save:
            save_critic(state, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._set_trainable()
        self._load_critic(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not self.is_deepspeed_enabled:  # whose own files hold the critic
            self._load_critic(cast(str, self.state.best_model_checkpoint))

    def _load_critic(self, folder: str) -> None:
        policy = self.accelerator.unwrap_model(self.model)
        critic = read_critic(policy, folder, self.args.critic)
        if not self.is_fsdp_enabled:  # its own file, which has just been loaded, holds the critic too
            policy.load_state_dict(critic, strict=False)

    def _issue_warnings_after_load(self, load_result) -> None:
        missing = load_result.missing_keys
        missing[:] = [key for key in missing if not is_critic(key)]  # they come from the critic's file
        super()._issue_warnings_after_load(load_result)
