"""Trainer of reward models from K-way rankings, ratings and attributes."""

import math
from typing import Any, cast

import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from rlhf_trl.data.lengths import has_safety_labels, head_names, keep_short_completions, tokenize_comparisons
from rlhf_trl.data.multimodal import processor_of, tokenizer_of
from rlhf_trl.data.row_types import PASSED_ON
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.calibration import Calibration, write_calibration
from rlhf_trl.models.heads import score_heads
from rlhf_trl.models.vision import find_unused_parameters
from rlhf_trl.reward_modeling.border import border_ece, border_loss
from rlhf_trl.reward_modeling.collator import NOT_INPUTS, ComparisonCollator
from rlhf_trl.reward_modeling.config import RewardConfig
from rlhf_trl.reward_modeling.losses import (
    comparison_losses,
    loss_counts,
    reference_scores,
    regression_loss,
    score_margins,
    target_margins,
)
from rlhf_trl.trainers.base import TrainerMixin

# Maximum number of completions that a calibration is measured on
CALIBRATION_COMPLETIONS = 1024


class RewardTrainer(TrainerMixin, trl.RewardTrainer):
    """
    `trl.RewardTrainer` for K-way rankings, regression and several heads.

    A row is a prompt with K completions, each of which goes through the model once, all in one micro-batch. A
    *comparison* says that one completion is better than another one of its prompt. Rows have one of these formats:

    - `prompt`, `completions`, and `better`, `worse` (indices of the completions of each comparison), optionally with
      `margin`, `weights` and `label_smoothing` (one number per comparison) or `targets` (a dict of head and number per
      completion) or `safe` (1, -1 or null per completion);
    - `prompt`, `chosen`, `rejected`;
    - rows of [`~rlhf_trl.data.tokenize_comparisons`].

    Comparisons have the ranking loss, targets the squared error, and rows with both have both. Labels of safety add
    the loss of [`~rlhf_trl.reward_modeling.border.border_loss`], which makes 0 the border; `border_accuracy` and, held
    out, `border_ece` say how good it is.

    Overridden: the refusal of `num_labels != 1`, the tokenizing and filtering of datasets, the collator, the columns
    that are kept, and the loss. Metrics have TRL's names; `mse` is added and, with several heads, `mse_<head>` and
    `accuracy_<head>`. For rows with targets, accuracy is over the pairs of one prompt whose targets differ.

    `save_model` also writes `calibration.json`, see [`~rlhf_trl.models.calibration.Calibration`], measured on held-out
    completions (on training ones without an eval split).

    Args:
        model, args, train_dataset, eval_dataset, processing_class, **kwargs: as in `trl.RewardTrainer`; `args` is a
            [`RewardConfig`]. A model with several heads has as many `num_labels` as the data has targets.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the model's heads aren't the data's.
    """

    # TRL and transformers declare them wider
    args: RewardConfig
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase
    train_dataset: Dataset
    eval_dataset: Dataset | dict[str, Dataset] | None
    _tp_size: int

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RewardConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        eval_dataset=None,
        data_collator=None,
        **kwargs,
    ):
        processing_class = tokenizer_of(processing_class)  # which TRL's takes, and the collator finds the processor
        find_unused_parameters(args, processing_class)
        self.heads = head_names(train_dataset) or ["score"]
        self._scores: list | None = None  # scores of the calibration pass
        self._labeled: list[tuple[float, float]] = []  # scores and labels of safety of an evaluation
        if not isinstance(model, str):
            _check_heads(model.config.num_labels, self.heads, train_dataset)
            if args.head_init == "normal":
                init_heads(model, args.seed)
            model.config.num_labels = 1  # TRL refuses others; `id2label` below sets the number again
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            **kwargs,
        )
        self.model.config.id2label = dict(enumerate(self.heads))
        self.model.config.label2id = {name: i for i, name in enumerate(self.heads)}
        if data_collator is None:
            self.data_collator = ComparisonCollator(
                cast(int, self.processing_class.pad_token_id),
                self.heads,
                args.label_smoothing,
                cast(int | None, args.pad_to_multiple_of),
                self.processing_class,
            )

    def _prepare_dataset(self, dataset: Dataset, processing_class, args, dataset_name):
        if "completion_ids" in dataset.column_names:
            return keep_short_completions(dataset, args.max_length, dataset_name)
        return tokenize_comparisons(dataset, processing_class, args.max_length)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [
            "completion_ids", "better", "worse", "margin", "weights", "label_smoothing", "targets", "safe"
        ]  # fmt: skip
        if "images" in self.train_dataset.column_names:  # from which the collator makes the processor's inputs
            self._signature_columns += ["prompt", *PASSED_ON]

    # `compute_loss` divides by the counts of the whole batch, so that the loss depends neither on accumulation nor on
    # how rows are distributed over ranks
    loss_is_scaled_for_ga = True

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step, and the [`loss_counts`] of all of them on all ranks."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = sum((loss_counts(inputs).to(device) for inputs in samples), torch.zeros(3, device=device))
        return samples, self.accelerator.reduce(counts, reduction="sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of one micro-batch, ranking loss plus squared error, and record its metrics."""
        mode = "train" if self.model.training else "eval"
        given = {name: value for name, value in inputs.items() if name not in NOT_INPUTS}
        outputs = model(**given, use_cache=False)
        scores = outputs.logits.float()  # (N, H)
        better, worse, targets = inputs["better"], inputs["worse"], inputs.get("targets")
        counts, ranks = num_items_in_batch, self.accelerator.num_processes
        if counts is None:  # called with a single micro-batch
            counts, ranks = loss_counts(inputs).to(scores.device), 1
        prompts, known, labeled = counts.clamp(min=1)
        # 0 times the scores keeps the graph of a micro-batch with nothing but ties, as DDP needs
        ranking = error = border = 0.0 * scores.sum()
        if len(better):
            losses, _ = comparison_losses(
                scores[:, 0],
                better,
                worse,
                inputs["groups"],
                self.args.loss_type,
                inputs.get("margin"),
                inputs.get("label_smoothing", self.args.label_smoothing),
                self.args.center_rewards_coefficient or 0.0,
                inputs.get("weights"),
            )
            ranking = losses.sum() / prompts
        if targets is not None:
            error = regression_loss(scores, targets, known)
        if "safe" in inputs:
            coefs = self.args.border_coef, self.args.border_l2_coef
            border = border_loss(scores[:, 0], inputs["safe"], *coefs, labeled)
        loss = ranks * (ranking + error + border)  # DDP takes the mean over ranks
        batch = self.held_out_batch
        if batch is not None:
            prompt_count, target_count, label_count = counts.tolist()
            self.held_out_terms = {"ranking": (ranking, prompt_count), "mse": (error, target_count)}
            if self.train_has_labels:
                self.held_out_terms["border"] = border, label_count
        is_copy = batch is not None and batch.copied and self.args.process_index
        if batch is not None and "safe" in inputs and not is_copy:
            self._labeled += zip(scores[:, 0].tolist(), inputs["safe"].tolist(), strict=True)
        if self._scores is not None and not is_copy:
            self._scores += reference_scores(scores.detach(), inputs, self.args.calibrate_on).tolist()
        self._record(mode, scores.detach(), inputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _record(self, mode: str, scores: Tensor, inputs: dict[str, Tensor]) -> None:
        """Record TRL's metrics; means over comparisons are exact, whatever their number in a micro-batch."""
        metrics, gather = self._metrics[mode], self._gather
        if mode == "train":
            self._total_train_tokens += int(gather(inputs["attention_mask"].sum()).sum()) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["min_reward"].append(gather(scores.min()).min().item())
        self._extend(metrics, {"mean_reward": scores.flatten()})
        metrics["max_reward"].append(gather(scores.max()).max().item())
        margins = {"": score_margins(scores, inputs)}
        if self.train_has_targets:  # gathering needs the same keys on all ranks and in all micro-batches
            targets = inputs.get("targets", torch.full_like(scores, torch.nan))
            by_head = [target_margins(scores[:, i], targets[:, i], inputs["groups"]) for i in range(len(self.heads))]
            errors = (scores - targets) ** 2
            named = dict(zip(self.heads, range(len(self.heads)), strict=True)) if len(self.heads) > 1 else {}
            for name, values in {"": errors, **{f"_{head}": errors[:, i] for head, i in named.items()}}.items():
                self._extend(metrics, {f"mse{name}": values[~values.isnan()]})
            margins |= {f"_{head}": by_head[i] for head, i in named.items()}
        if self.train_has_labels:
            sides = inputs.get("safe", torch.full_like(scores[:, 0], torch.nan))
            known = ~sides.isnan()
            self._extend(metrics, {"border_accuracy": ((scores[:, 0] > 0) == (sides > 0))[known].float()})
        for name, values in margins.items():
            self._extend(metrics, {f"accuracy{name}": (values > 0).float()} | ({} if name else {"margin": values}))

    def _extend(self, metrics: dict[str, list[float]], values: dict[str, Tensor]) -> None:
        """Append each metric's mean over all ranks once per value, so that means over micro-batches are exact."""
        batch = self.held_out_batch
        for name, each in values.items():
            total, count = self._gather(
                torch.stack([each.sum(), each.new_tensor(float(each.numel()))]).unsqueeze(0)
            ).sum(0)
            if batch is not None:
                copies = self.accelerator.num_processes if batch.copied else 1
                self.held_out_counts[name] = count.item() / copies
                metrics[name].append((total / count.clamp(min=1)).item())
            elif count > 0:
                metrics[name] += [(total / count).item()] * int(count)

    def _gather(self, tensor: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.gather(tensor))

    def evaluation_loop(self, *args, **kwargs):
        """Run the evaluation loop, and add the calibration error of the border between safe and unsafe."""
        self._labeled = []
        output = super().evaluation_loop(*args, **kwargs)
        if self.train_has_labels:
            labeled = [(score, side) for score, side in gather_object(self._labeled) if not math.isnan(side)]
            if labeled:
                scores, sides = torch.tensor(labeled).unbind(dim=1)
                self._metrics["eval"]["border_ece"] = [border_ece(scores, sides)]
        return output

    @property
    def train_has_labels(self) -> bool:
        """Return whether the training rows say which completions are safe."""
        return has_safety_labels(self.train_dataset)

    @property
    def train_has_targets(self) -> bool:
        """Return whether the training rows have targets."""
        return "targets" in self.train_dataset.column_names

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Save the model and, at the end of training, `calibration.json` beside it. Call it on all ranks."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and (processor := processor_of(self.processing_class)) is not None:
            processor.save_pretrained(output_dir or cast(str, self.args.output_dir))
        if not _internal_call:
            calibration = self.calibrate()
            if self.args.should_save:
                write_calibration(output_dir or cast(str, self.args.output_dir), calibration)

    def calibrate(self) -> Calibration:
        """Return the calibration on the reference answers that `calibrate_on` chooses. Call it on all ranks."""
        split = "train" if self.eval_dataset is None else "eval"
        dataset: Any = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
        rows, completions = 0, 0
        while rows < len(dataset) and completions < CALIBRATION_COMPLETIONS:
            completions += len(dataset[rows]["completion_ids"])
            rows += 1
        kept, self._scores = self._metrics["eval"], []
        self._metrics["eval"] = type(kept)(list)
        loader = self.get_eval_dataloader(dataset.select(range(rows)))
        self.evaluation_loop(loader, "Calibration", prediction_loss_only=True)
        self.callback_handler.on_predict(self.args, self.state, self.control, {})  # progress bars end
        scores = torch.tensor(gather_object(self._scores), dtype=torch.float64)  # (n, H)
        self._scores, self._metrics["eval"] = None, kept
        return Calibration.of(scores, self.heads, f"{self.args.calibrate_on} completions of {split}")


def init_heads(model: PreTrainedModel, seed: int) -> None:
    """Draw the weights of a model's score heads from N(0, 1/(d + 1)), d their input width, and set biases to 0."""
    generator = torch.Generator().manual_seed(seed)
    for head in score_heads(model):
        std = (head.in_features + 1) ** -0.5
        drawn = torch.empty(head.out_features, head.in_features).normal_(std=std, generator=generator)
        with gather_params_ctx(list(head.parameters())):  # which ZeRO-3 has dealt out
            head.weight.data.copy_(drawn)
            if head.bias is not None:
                nn.init.zeros_(head.bias)


def _check_heads(labels: int | None, heads: list[str], dataset: Dataset) -> None:
    if labels != len(heads):
        raise ConfigError(
            f"The reward model has {labels} head{'s' * (labels != 1)}, and the data has targets for {len(heads)} "
            f"({', '.join(heads)}). Start from a policy, or from a reward model with the data's heads."
        )
    if len(heads) > 1 and ("better" in dataset.column_names or has_safety_labels(dataset)):
        raise ConfigError(
            f"The data compares completions, which trains one score, and the reward model has {labels} heads. "
            "Set `data.feedback.use=regression`, or start from a policy."
        )
