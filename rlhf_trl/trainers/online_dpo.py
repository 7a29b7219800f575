"""
Online DPO (arXiv 2402.04792), in a module of its own: TRL warns of its experimental trainers when they are imported.

Each prompt gets two completions of the policy as it is now. A reward or a judge prefers one of them, and the policy
learns from the pair by DPO's loss.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import trl
from accelerate.utils import is_peft_model, set_seed
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl.data_utils import is_conversational
from trl.distributed import DistributedBackend
from trl.experimental import online_dpo
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import add_fused_lm_head, nanstd, pad, use_adapter

from rlhf_trl.config.ranges import TRAINING, check_values
from rlhf_trl.data.messages import as_text
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.roles import POLICY, REFERENCE
from rlhf_trl.patches.generation import special_tokens_only
from rlhf_trl.patches.online_dpo import models_as_in_other_trainers
from rlhf_trl.trainers.base import TrainerMixin
from rlhf_trl.trainers.options import ONLINE_DPO, online_dpo_problem
from rlhf_trl.trainers.rollout_hook import RolloutHookWithKL, RolloutRecord
from rlhf_trl.trainers.rollouts import Rollouts
from rlhf_trl.trainers.seeds import SampledEvaluation, preserved_rng_state

PAIR = 2  # completions per prompt


@dataclass
class OnlineDPOConfig(online_dpo.OnlineDPOConfig):
    """
    Arguments of [`OnlineDPOTrainer`]: those of `trl.experimental.online_dpo.OnlineDPOConfig`, but for
    `rlhf_trl.trainers.options.REFUSED`.

    A *rollout* is what an optimizer step learns from: two completions of each of `per_device_train_batch_size * world
    size * gradient_accumulation_steps` prompts, sampled from the policy as it is before the step.

    Args:
        max_completion_length (`int`, defaults to `512`): limit of a completion in tokens.

    Raises:
        ConfigError: at an argument without effect, or a value out of range.
    """

    max_completion_length: int = field(default=512, metadata={"help": "Limit of a completion in tokens."})

    sides: ClassVar[int] = PAIR  # completions per row of a micro-batch
    num_generations: ClassVar[int] = PAIR
    num_iterations: ClassVar[int] = 1
    num_generations_eval: ClassVar[int] = 1
    fills_rollouts: ClassVar[bool] = False  # the last one of an epoch may be smaller
    use_transformers_continuous_batching: ClassVar[bool] = False

    def __post_init__(self):
        if self.max_new_tokens == self.max_completion_length:  # of a copy
            self.max_new_tokens, self.max_length = 64, 512
        if problem := online_dpo_problem(vars(self)):
            raise ConfigError(problem)
        if self.data_seed is None:  # accelerate would shuffle with the state of torch, which is each rank's own here
            self.data_seed = self.seed
        # TRL compares both, to warn of prompts that it would cut
        self.max_new_tokens, self.max_length = self.max_completion_length, self.max_completion_length + 1
        super().__post_init__()
        check_values(TRAINING | ONLINE_DPO, vars(self))

    @property
    def steps_per_generation(self) -> int:
        """Micro-batches per rollout."""
        return self.gradient_accumulation_steps

    @property
    def generation_batch_size(self) -> int:
        """Completions per rollout, of all ranks."""
        return PAIR * self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps


# A function that judges P prompts with a first and a second completion each, all as text. It returns 1 where the first
# is better, 0 where the second is, 0.5 for a tie, and NaN where it has no verdict
PairJudge = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[float]]


def preferences(scores: Tensor) -> Tensor:
    """
    Return which completion of each pair scores higher.

    Args:
        scores (`Tensor` of shape `(2P,)`): those of the pairs, one after the other. NaN: no reward applies.

    Returns:
        `Tensor` of shape `(P,)`: 1 for the first, -1 for the second, 0 for equal scores, NaN where one has none.
    """
    first, second = scores.view(-1, PAIR).unbind(dim=1)
    return signs(first - second)


def signs(differences: Tensor) -> Tensor:
    """Return the signs of numbers; NaN stays NaN, which `torch.sign` makes 0."""
    return torch.where(differences.isnan(), differences, torch.sign(differences))


def pair_losses(log_ratios: Tensor, preference: Tensor, beta: float, loss_type: str) -> Tensor:
    """
    Return the loss of each pair: DPO's (arXiv 2305.18290, equation 7) or IPO's (arXiv 2310.12036, equation 17), and 0
    where neither completion is preferred.

    Args:
        log_ratios (`Tensor` of shape `(P, 2)`): log pi(y | x) - log pi_ref(y | x) of both completions of a pair.
        preference (`Tensor` of shape `(P,)`): 1 for the first, -1 for the second, 0 for neither.
        beta (`float`): weight of the KL to the reference.
        loss_type (`str`): `"sigmoid"` or `"ipo"`.
    """
    margins = preference * (log_ratios[:, 0] - log_ratios[:, 1])
    losses = -logsigmoid(beta * margins) if loss_type == "sigmoid" else (margins - 1 / (2 * beta)) ** 2
    return torch.where(preference == 0, 0.0, losses)


def rows_as_they_are(rows: list[Any]) -> Any:
    """Return the rows of a micro-batch: prompts are tokenized when completions are sampled."""
    return rows


class PairEngine(online_dpo.OnlineDPOTrainer):
    """
    `trl.experimental.online_dpo.OnlineDPOTrainer` with rollouts in the form of `trl.GRPOTrainer`'s, so that what works
    on those works here: the hook on rollouts, evaluation, samples, health signs.

    TRL's class makes the models, the sampling settings and the schedule of `beta`. Replaced are, in TRL 1.16:

    - `training_step`, which samples each micro-batch by itself and doesn't divide its loss by
      `gradient_accumulation_steps`: here a step's micro-batches are sampled together, and the Trainer's own step
      computes the gradients. Equal scores were a preference for the first completion; here they teach nothing.
    - `_generate`, which renders prompts as text, without their `tools` and BOS, and without a cache where gradients
      are checkpointed; `_forward`, which keeps the logits of the whole vocabulary, and left-pads prompts of models
      with absolute positions to other ones.
    - its metrics, in which padding counts, and evaluation, which there is none of.
    """

    loss_is_scaled_for_ga = False
    environments = None  # as in `GRPOTrainer`, whose methods these are
    _calculate_rewards = trl.GRPOTrainer._calculate_rewards
    _get_per_token_logps_and_entropies = trl.GRPOTrainer._get_per_token_logps_and_entropies
    _log_completion_extra = trl.GRPOTrainer._log_completion_extra
    _log_metric = trl.GRPOTrainer._log_metric

    args: OnlineDPOConfig
    model: Any
    accelerator: Any
    eos_token_ids: list[int]
    _tokenizer: Any
    _record: RolloutRecord

    def __init__(
        self,
        model,
        args: OnlineDPOConfig,
        reward_funcs: list | None = None,
        judge: PairJudge | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs,
    ):
        if not (reward_funcs or judge):
            raise ConfigError("Online DPO needs a reward or a judge. Set `reward=...` or `judge=...`.")
        for split in (train_dataset, eval_dataset):
            images = {"image", "images"} & set(split.column_names or []) if split is not None else None
            if images:
                raise ConfigError(
                    f"The prompts have images (column `{images.pop()}`), and online DPO trains on text and chat "
                    "prompts. Remove the column."
                )
        self.judge = judge
        self.chat_template_kwargs: dict[str, Any] = {}
        self._is_vlm = False
        self._step = 0  # micro-batches of the optimizer step so far
        self._metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._pending_metrics: dict[str, list] = defaultdict(list)
        self._pending_extra_logs: dict[str, list] = defaultdict(list)
        self._micro_batches: list[list[dict[str, Any]]] = []  # of the optimizer step that begins
        self._made: list[dict[str, Tensor]] = []  # their pairs, until they are learned from
        if is_peft_model(model):
            model.add_adapter(REFERENCE, model.peft_config[POLICY])
        use_cache = model.config.use_cache
        with models_as_in_other_trainers(args):
            super().__init__(
                model,
                reward_funcs=list(reward_funcs or []),
                args=args,
                data_collator=rows_as_they_are,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                **kwargs,
            )
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.config.use_cache = (
            use_cache  # TRL writes false where gradients are checkpointed, also into what is saved
        )
        self.generation_config.use_cache = self.generation_kwargs["use_cache"] = True
        add_fused_lm_head(model.get_base_model() if is_peft_model(model) else model, outputs=("log_probs", "entropy"))
        self._dist = DistributedBackend(self.accelerator)
        set_seed(args.seed, device_specific=True)  # the ranks have other prompts, and need other draws

    @property
    def beta(self) -> float:
        """Weight of the KL to the reference in this epoch."""
        betas = self._beta if isinstance(self._beta, list) else [self._beta]
        return betas[min(int(self.state.epoch or 0), len(betas) - 1)]

    # ---- Completions ----

    def _sample(self, model, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Return a completion of each prompt, up to and with its end token."""
        tensors = [torch.tensor(ids) for ids in prompt_ids]
        ids = pad(tensors, padding_value=self._tokenizer.pad_token_id, padding_side="left").to(self.args.device)
        mask = pad([torch.ones_like(each) for each in tensors], padding_side="left").to(self.args.device)
        with (
            unwrap_model_for_generation(
                model,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=cast(dict, self.args.gradient_checkpointing_kwargs),
            ) as unwrapped,
            torch.no_grad(),
            self._dist.summon_full_params(model, recurse=False),
        ):
            written = unwrapped.generate(input_ids=ids, attention_mask=mask, generation_config=self.generation_config)
        is_end = torch.isin(written[:, ids.size(1) :], torch.tensor(self.eos_token_ids, device=written.device))
        lengths = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, is_end.size(1)).tolist()
        return [row[:length] for row, length in zip(written[:, ids.size(1) :].tolist(), lengths, strict=True)]

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: None = None) -> list[list[int]]:
        return self._sample(self.model_wrapped, prompt_ids)

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """Yield the model that computes the reference: its own, or the policy's with another adapter or none."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name=REFERENCE if REFERENCE in model.peft_config else None):
            yield self.model

    def _answers(self, prompts: Sequence, completion_ids: list[list[int]]) -> list:
        """Return completions as text, or as an assistant's turn where their prompts are chats."""
        texts = self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        chat = is_conversational({"prompt": prompts[0]})
        return [[{"role": "assistant", "content": text}] for text in texts] if chat else texts

    # ---- Rollouts ----

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """
        Sample and score a completion of each row of `inputs`, and log what is known of it.

        Returns:
            `dict`: ids and masks of prompts and completions, `ref_per_token_logps`, and in training, where each two
                rows are one pair, its `preference`, of shape (P,): 1, -1 or 0.
        """
        prompts = [row["prompt"] for row in inputs]
        # Of the class that this one is mixed into
        prompt_ids, _, _ = self._tokenize_prompts(prompts)  # pyright: ignore[reportAttributeAccessIssue]
        completion_ids = self._generate_single_turn(prompt_ids, None)
        completions, mode = self._answers(prompts, completion_ids), "train" if self.model.training else "eval"
        self._calculate_rewards(inputs, prompts, completions, completion_ids)
        output = self._tensors(prompt_ids, completion_ids)
        ids, mask = (torch.cat([output[f"prompt_{x}"], output[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        train = self.model.training
        rows = PAIR * self.args.per_device_train_batch_size if train else self.args.per_device_eval_batch_size
        width = output["completion_ids"].size(1)
        with self._reference() as reference:
            ref_logps, _, _ = self._get_per_token_logps_and_entropies(reference, ids, mask, width, rows)
        output["ref_per_token_logps"] = ref_logps
        self._log_rollout(mode, completion_ids)
        if train:
            output["preference"] = self._preference(prompts, completions, completion_ids)
        else:
            logps, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, mask, width, rows)
            kl = ((logps - ref_logps) * output["completion_mask"]).sum(dim=1)
            self._metrics["eval"]["objective/kl"].append(self.accelerator.gather(kl).mean().item())
            if self.judge is not None:
                self._log_win_rate(prompts, prompt_ids, completions)
        return output

    def _tensors(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> dict[str, Tensor]:
        """Return ids and masks: prompts padded on the left, completions on the right."""
        tensors = {}
        for name, rows, side in (("prompt", prompt_ids, "left"), ("completion", completion_ids, "right")):
            each = [torch.tensor(ids) for ids in rows]
            tensors[f"{name}_ids"] = pad(each, padding_value=self._tokenizer.pad_token_id, padding_side=side)
            tensors[f"{name}_mask"] = pad([torch.ones_like(ids) for ids in each], padding_side=side)
        return {name: tensor.to(self.args.device) for name, tensor in tensors.items()}

    def _judged(self, prompts: Sequence, first: Sequence, second: Sequence) -> Tensor:
        """Return a judge's outcomes of P pairs, shape (P,); a judge may draw at random as well."""
        assert self.judge is not None
        with preserved_rng_state():
            outcomes = self.judge(*([as_text(each) for each in texts] for texts in (prompts, first, second)))
        return torch.tensor([float(each) for each in outcomes], device=self.args.device)

    def _preference(self, prompts: list, completions: list, completion_ids: list[list[int]]) -> Tensor:
        """Return which completion of this rank's pairs is preferred, and log how many pairs have none."""
        if self.judge is not None:
            preference = signs(self._judged(prompts[::PAIR], completions[::PAIR], completions[1::PAIR]) - 0.5)
        else:
            start = self.accelerator.process_index * len(prompts)
            scores = self._record.rewards.scores()[start : start + len(prompts)].clone()
            if self.args.missing_eos_penalty is not None:
                ended = [ids[-1] in self.eos_token_ids for ids in completion_ids]
                scores -= self.args.missing_eos_penalty * ~torch.tensor(ended, device=scores.device)
            preference = preferences(scores)
        found, metrics = self.accelerator.gather(preference), self._metrics["train"]
        metrics["pairs/ties"].append((found == 0).float().mean().item())
        metrics["pairs/unjudged"].append(found.isnan().float().mean().item())
        return preference.nan_to_num(0.0)

    def _log_win_rate(self, prompts: list, prompt_ids: list[list[int]], completions: list) -> None:
        """Log how often a judge prefers held-out completions to the reference's own."""
        with self._reference() as reference, special_tokens_only(self._unwrapped(reference)):
            baseline = self._answers(prompts, self._sample(reference, prompt_ids))
        outcomes = self.accelerator.gather(self._judged(prompts, completions, baseline))
        counts = vars(self).get("held_out_counts")
        batch = vars(self).get("held_out_batch")
        outcomes = outcomes if batch is None else outcomes[: batch.rows]  # copies of the rows come after them
        self._metrics["eval"]["win_rate"].append(torch.nanmean(outcomes).item())
        if counts is not None:
            counts["win_rate"] = outcomes.isfinite().sum().item()

    def _unwrapped(self, model) -> Any:
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return model.get_base_model() if is_peft_model(model) else model

    def _log_rollout(self, mode: str, completion_ids: list[list[int]]) -> None:
        """Log rewards and lengths of a rollout, of all ranks, under the names of `GRPOTrainer`."""
        metrics, rewards = self._metrics[mode], self._record.rewards
        for name, column in zip(rewards.names, rewards.values.unbind(dim=1), strict=True):
            metrics[f"rewards/{name}/mean"].append(torch.nanmean(column).item())
            metrics[f"rewards/{name}/std"].append(nanstd(column).item())
        if rewards.names:
            scores = rewards.scores()
            metrics["reward"].append(torch.nanmean(scores).item())
            metrics["reward_std"].append(nanstd(scores).item())
        device = self.args.device
        lengths = self.accelerator.gather(torch.tensor([len(ids) for ids in completion_ids], device=device)).float()
        ended = torch.tensor([ids[-1] in self.eos_token_ids for ids in completion_ids], device=device)
        metrics["completions/mean_length"].append(lengths.mean().item())
        metrics["completions/min_length"].append(lengths.min().item())
        metrics["completions/max_length"].append(lengths.max().item())
        metrics["completions/clipped_ratio"].append(1 - self.accelerator.gather(ended).float().mean().item())
        for name, values in self._pending_metrics.items():  # of reward functions
            metrics[name].append(sum(values) / len(values))
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()

    # ---- Steps ----

    def get_batch_samples(self, *args, **kwargs):
        """Return the micro-batches of the next optimizer step, which are sampled together."""
        self._micro_batches, number = super().get_batch_samples(*args, **kwargs)
        self._made, self._step = [], 0
        return self._micro_batches, number

    def training_step(self, *args, **kwargs) -> Tensor:
        """Take a step of `transformers.Trainer`."""
        loss = super(online_dpo.OnlineDPOTrainer, self).training_step(*args, **kwargs)
        self._step += 1
        return loss

    def _prepare_inputs(self, inputs: Any) -> dict[str, Tensor]:
        if not self.model.training:
            return self._generate_and_score_completions(inputs)
        if not self._made:
            batches = self._micro_batches or [inputs]
            made = self._generate_and_score_completions([row for each in batches for row in each for _ in range(PAIR)])
            sizes = [len(batch) for batch in batches]
            parts = {
                name: tensor.split(sizes if name == "preference" else [PAIR * size for size in sizes])
                for name, tensor in made.items()
            }
            self._made = [{name: part[i] for name, part in parts.items()} for i in range(len(batches))]
        return self._made.pop(0)

    def compute_loss(self, model, inputs: dict[str, Tensor], return_outputs=False, num_items_in_batch=None) -> Tensor:
        """Return the loss of a micro-batch of pairs."""
        return self._compute_loss(model, inputs)

    def _compute_loss(self, model, inputs: dict[str, Tensor]) -> Tensor:
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        written, preference = inputs["completion_mask"], inputs["preference"]
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, mask, written.size(1), compute_entropy=True
        )
        log_ratios = ((logps - inputs["ref_per_token_logps"]) * written).sum(dim=1).view(-1, PAIR)
        self._log_pairs(log_ratios.detach(), (logps.detach() * written).sum(dim=1).view(-1, PAIR), preference)
        sums = torch.stack([(entropies.detach() * written).sum(), written.sum().float()])
        entropy, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._metrics["train"]["entropy"].append(entropy / max(tokens, 1))
        return pair_losses(log_ratios, preference, self.beta, self.args.loss_type).mean()

    def _log_pairs(self, log_ratios: Tensor, logps: Tensor, preference: Tensor) -> None:
        """Log DPO's metrics, means over the pairs of all ranks in which one completion is preferred."""
        kept, better = preference != 0, (preference < 0).long().unsqueeze(1)
        rewards = self.beta * log_ratios

        def of(values: Tensor, which: Tensor) -> Tensor:
            return values.gather(1, which).squeeze(1)

        chosen, rejected = of(rewards, better), of(rewards, 1 - better)
        columns = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": of(logps, better),
            "logps/rejected": of(logps, 1 - better),
        }
        sums = torch.stack([*((column * kept).sum() for column in columns.values()), kept.sum().float()])
        *totals, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        if count:
            for name, total in zip(columns, totals, strict=True):
                self._metrics["train"][name].append(total / count)

    # ---- Evaluation and logs ----

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        # TRL's own averages its `stats`
        super(online_dpo.OnlineDPOTrainer, self)._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means of the metrics since the last call."""
        mode = "train" if self.model.training else "eval"
        for name, values in self._metrics[mode].items():
            known = [value for value in values if not math.isnan(value)]
            mean: Any = sum(known) / len(known) if known else None  # as in `GRPOTrainer`
            logs[f"eval_{name}" if mode == "eval" else name] = mean
        super().log(logs, start_time)
        self._metrics[mode].clear()


class OnlineDPOTrainer(SampledEvaluation, RolloutHookWithKL, Rollouts, TrainerMixin, PairEngine):
    """
    Trainer for online DPO: [`PairEngine`] with the hook on rollouts and
    [`~rlhf_trl.trainers.base.TrainerMixin`].

    Args:
        model (`PreTrainedModel` or `PeftModel`): the policy. The reference is this very starting point.
        args ([`OnlineDPOConfig`]): the arguments.
        reward_funcs (`list`, *optional*): functions with TRL's signature
            `(prompts, completions, completion_ids, **columns) -> list[float | None]`. The completion with the higher
            combined reward is preferred; equal ones teach nothing.
        judge (callable, *optional*): function that prefers one of two completions in the rewards' place, see
            `PairJudge`; the rewards are then logged.
        train_dataset (`Dataset`): rows with a `prompt`, text or chat messages; the rewards get the other columns.
        eval_dataset (`Dataset`, *optional*): held-out prompts.
        **kwargs: what TRL's trainer takes besides (`processing_class`, `callbacks`, `peft_config`, ...).

    Raises:
        ConfigError: without a reward and a judge, and at images in the data.
    """

    READS_NO_IMAGES = "its prompts are text. DPO, GRPO and PPO read them"

    def _rewards_to_learn_from(self, record: RolloutRecord) -> Tensor:
        return record.rewards.values  # their scores are compared in pairs, and logged as they are

    @staticmethod
    def _learns_from_raw_sum(rewards) -> bool:
        return True

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:  # the last step of an epoch may have fewer
            self._micro_batches_without_kl = max(len(self._micro_batches), 1)
        return output
