"""
Evaluation during training that counts each held-out row once, for any number of ranks and any batch size.

Transformers, accelerate and TRL repeat rows so that every rank has a full batch, average each batch over all of its
rows, and then average these averages. Here every row of a batch is in it equally often, and the mean of a batch is
weighted by the number of rows, completions or tokens that it is a mean over: each metric is that of one batch with all
rows.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer
from trl.trainer.utils import use_adapter

from rlhf_trl.trainers.workers import ignore_preemptions

# Means over tokens (of chosen completions, where there are chosen ones). All others are means over rows
TOKEN_MEANS = ("entropy", "mean_token_accuracy", "kl", "logits/chosen", "logits/rejected")

# Losses of GRPO that divide the sum on a rank by the mean number of tokens per rank
GLOBAL_TOKENS = ("cispo", "dapo", "vespo")


class Batch(NamedTuple):
    """
    Rows that all ranks evaluate together.

    Attributes:
        rows (`int`):
            Number of distinct rows.
        indices (`list[list[int]]`):
            Rows of each rank.
        copied (`bool`):
            Whether each rank has all rows; otherwise they are split evenly between the ranks.
    """

    rows: int
    indices: list[list[int]]
    copied: bool


def split_batches(order: Sequence[int], batch_size: int, ranks: int, group: int = 1) -> list[Batch]:
    """
    Split rows into batches in which every row is equally often.

    First full batches, then one that is smaller on all ranks alike. Of the rest, fewer rows than ranks, each rank gets
    all rows.

    Args:
        order (`Sequence[int]`):
            Indices of the rows.
        batch_size (`int`):
            Maximal number of rows per rank.
        ranks (`int`):
            Number of ranks.
        group (`int`, *optional*, defaults to `1`):
            Number of consecutive rows that stay in one batch, such as the completions of a prompt.

    Returns:
        `list[Batch]`: batches in the order of the rows.
    """
    whole, unit = batch_size * ranks, math.lcm(group, ranks)
    full = len(order) // whole * whole
    even = full + (len(order) - full) // unit * unit
    some = max(group, batch_size // group * group)
    starts = [*range(0, full, whole), *([full] if even > full else [])]
    batches = []
    for start in starts:
        rows = list(order[start : min(start + whole, even)])
        size = len(rows) // ranks
        batches.append(Batch(len(rows), [rows[rank * size : (rank + 1) * size] for rank in range(ranks)], False))
    for start in range(even, len(order), some):
        rows = list(order[start : start + some])
        batches.append(Batch(len(rows), [rows] * ranks, True))
    return batches


class RankBatchSampler(list):
    """
    Batch sampler of one rank.

    Args:
        batches (`Sequence[Batch]`):
            Batches of all ranks.
        rank (`int`):
            Index of the rank.
    """

    def __init__(self, batches: Sequence[Batch], rank: int):
        super().__init__(batch.indices[rank] for batch in batches)
        self.batches = batches


class ExactEvaluation(Trainer):
    """
    Mixin for trainers of TRL whose evaluation counts each held-out row once.

    It overrides, besides documented methods of `transformers.Trainer`, private ones of TRL 1.16: `_calculate_rewards`
    of GRPO and RLOO, `_compute_kl_logps` of KTO, and `concatenated_forward` of ORPO.

    Attributes:
        held_out_batch ([`Batch`], *optional*):
            Batch that is being evaluated.
        held_out_counts (`dict[str, float]`):
            Number of values that each metric of the batch is a mean over, on all ranks, without copies. A trainer sets
            those that don't follow from the batch.
        held_out_terms (`dict[str, tuple[Tensor, float]]`):
            Terms of this rank's loss that are means over other values than the rest: each term, and the number of its
            values. A trainer sets them.
    """

    accelerator: Any  # its `gather` and `reduce` are typed by all that they take, not by what they get
    reward_func_names: list[str]  # of GRPO and RLOO
    precompute_ref_logps: bool  # of DPO and KTO, as the next one
    ref_model: PreTrainedModel | None
    _batches: Iterator[Batch]
    _kl: Tensor | None = None
    _kl_of_policy = False

    def __init__(self, *args, **kwargs):
        self.held_out_batch: Batch | None = None
        self.held_out_counts: dict[str, float] = {}
        self.held_out_terms: dict[str, tuple[Tensor, float]] = {}
        super().__init__(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        """Return the trainer's data loader with the batches of [`split_batches`]."""
        loader: Any = super().get_eval_dataloader(eval_dataset)
        if isinstance(loader.dataset, IterableDataset):
            return ignore_preemptions(loader)
        sampler = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler).sampler
        args, accelerator = self.args, self.accelerator
        group = getattr(self, "num_generations_eval", 1)
        batches = split_batches(list(sampler), args.eval_batch_size, accelerator.num_processes, group)
        shard = DataLoaderShard(
            loader.dataset,
            device=loader.device,
            batch_sampler=RankBatchSampler(batches, accelerator.process_index),
            collate_fn=loader.collate_fn,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return ignore_preemptions(shard)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """Run the trainer's evaluation loop and pool the metrics of its batches."""
        if not isinstance(dataloader.batch_sampler, RankBatchSampler):
            return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._batches, self._losses, self._metrics_by_name = (
            iter(dataloader.batch_sampler.batches),
            [],
            defaultdict(list),
        )
        # Looked up here, so that overrides in subclasses are included
        self.prediction_step = functools.partial(self._evaluate_batch, self.prediction_step, dataloader)
        try:
            output: Any = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            del self.prediction_step
            self.held_out_batch = self._kl = None
        metrics, store = pool_metrics(self._metrics_by_name), self._stored()
        if self._losses:
            sums = torch.stack(self._losses).sum(dim=0).float().to(self.accelerator.device)
            sums, counts = self.accelerator.reduce(sums, reduction="sum").unbind(dim=1)
            terms = torch.where(counts > 0, sums / counts, 0.0).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = sum(terms)
            metrics |= {key: terms[i] for i, key in enumerate(self.held_out_terms, start=1) if key in metrics}
        store.clear()
        store.update({key: [value] for key, value in metrics.items()})
        return output

    def _evaluate_batch(self, prediction_step, dataloader, model, inputs, *args, **kwargs):
        """Run the trainer's `prediction_step`, and record its loss and metrics with their counts."""
        if self._kl is None and getattr(self, "calculate_KL", False):
            self._kl = self._held_out_kl(model, dataloader)
        self.held_out_batch = next(self._batches)
        store = self._stored()
        store.clear()
        local = local_counts(inputs)
        copies = self.accelerator.num_processes if self.held_out_batch.copied else 1
        counts = self.accelerator.reduce(local.to(self.accelerator.device), reduction="sum") / copies
        self.held_out_counts, self.held_out_terms = dict(zip(COUNTED, counts.tolist(), strict=True)), {}
        found = prediction_step(model, inputs, *args, **kwargs)
        if "completions/mean_length" in store:
            rows, mean_length = self.held_out_batch.rows, store["completions/mean_length"][-1]
            ended = rows * (1 - store["completions/clipped_ratio"][-1])
            self.held_out_counts["tokens"] = rows * mean_length
            self.held_out_counts |= {f"completions/{kind}_terminated_length": ended for kind in ("mean", "min", "max")}
        if found[0] is not None:
            terms = [(float(value), count / copies) for value, count in self.held_out_terms.values()]
            rest = found[0].detach().mean().item() - sum(value for value, _ in terms)
            count = local[COUNTED.index("tokens" if "labels" in inputs else "rows")].item() / copies
            if getattr(self, "loss_type", None) in GLOBAL_TOKENS:
                count = self.held_out_counts["tokens"] / self.accelerator.num_processes
            terms = [(rest, count), *terms]
            self._losses.append(torch.tensor([[value * count, count] for value, count in terms], dtype=torch.float64))
        for key, values in store.items():
            value, count = float(values[-1]), metric_count(key, self.held_out_counts)
            self._metrics_by_name[key].append(BatchMetric(value, count, copies * count))
        return found

    def _calculate_rewards(self, *args, **kwargs):
        # Of GRPO and RLOO
        rewards = super()._calculate_rewards(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if self.held_out_batch is not None:
            given = rewards[: self.held_out_batch.rows].isfinite()  # copies of the rows come after them
            for name, count in zip(self.reward_func_names, given.sum(dim=0).tolist(), strict=True):
                self.held_out_counts |= {f"rewards/{name}/mean": count, f"rewards/{name}/std": count}
            scored = given.any(dim=1).sum().item()
            self.held_out_counts |= {"reward": scored, "reward_std": scored}
        return rewards

    def concatenated_forward(self, model, batch):
        """Compute ORPO's forward, whose loss is the sum of a mean over tokens and one over rows."""
        # Of the trainer that this class is mixed into
        output = super().concatenated_forward(model, batch)  # pyright: ignore[reportAttributeAccessIssue]
        if self.held_out_batch is not None:
            self.held_out_terms = {"eval_nll_loss": (output[4], batch["chosen_attention_mask"][:, 1:].sum().item())}
        return output

    def _held_out_kl(self, model, dataloader) -> Tensor:
        """
        Return KTO's KL estimate (arXiv 2402.01306, section 4.1) over all held-out rows.

        The loss of each row contains the mean log-ratio of mismatched completions, which TRL takes over the batch.
        """
        sums = torch.zeros(2, device=self.accelerator.device)
        # The loader below accelerate's, which is being iterated over
        for inputs, batch in zip(dataloader.base_dataloader, dataloader.batch_sampler.batches, strict=True):
            inputs, copies = self._prepare_inputs(inputs), self.accelerator.num_processes if batch.copied else 1
            ratios = self._compute_kl_logps(model, inputs) - self._reference_kl_logps(inputs)
            sums += torch.stack([ratios.sum(), ratios.new_tensor(len(ratios))]) / copies
        total, count = self.accelerator.reduce(sums, reduction="sum")
        return total / count

    @torch.no_grad()
    def _reference_kl_logps(self, batch) -> Tensor:
        if self.precompute_ref_logps:
            return batch["ref_KL_logps"]
        if self.ref_model is not None:
            return self._compute_kl_logps(self.ref_model, batch)
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self._compute_kl_logps(self.model, batch)

    def _compute_kl_logps(self, model, batch):
        if self._kl is None:
            # Of KTO
            return super()._compute_kl_logps(model, batch)  # pyright: ignore[reportAttributeAccessIssue]
        # The trainer calls this for the policy, then for the reference, and subtracts
        zeros, self._kl_of_policy = torch.zeros(len(batch["label"]), device=self._kl.device), not self._kl_of_policy
        if self.precompute_ref_logps:
            return batch["ref_KL_logps"] + self._kl
        return zeros + self._kl if self._kl_of_policy else zeros

    def _stored(self) -> dict[str, list]:
        """Return the dict in which TRL's trainers keep the metrics of an evaluation until they log them."""
        kept = vars(self)
        return kept.get("_metrics", kept.get("_stored_metrics", {})).setdefault("eval", defaultdict(list))


COUNTED = ("rows", "tokens", "chosen", "rejected", "chosen_tokens", "rejected_tokens")


def local_counts(inputs) -> Tensor:
    """Return the counts `COUNTED` of this rank's batch, shape (6,); 0 where they don't follow from the batch."""
    counts = dict.fromkeys(COUNTED, 0)
    if isinstance(inputs, list):  # RL: the completions don't exist yet
        counts["rows"] = len(inputs)
    elif "chosen_labels" in inputs:  # ORPO
        counts["rows"] = len(inputs["chosen_labels"])
    elif "completion_mask" in inputs:
        tokens = inputs["completion_mask"][:, 1:].sum(dim=1)
        if "label" in inputs:  # KTO
            chosen = torch.as_tensor(inputs["label"], dtype=torch.bool, device=tokens.device)
        else:  # DPO
            chosen = torch.arange(len(tokens), device=tokens.device) < len(tokens) // 2
            counts["rows"] = len(tokens) // 2
        sides = {"chosen": tokens[chosen], "rejected": tokens[~chosen]}
        counts |= {"rows": counts["rows"] or len(tokens), "tokens": tokens.sum()}
        for side, each in sides.items():
            counts |= {side: len(each), f"{side}_tokens": each.sum()}
    elif "groups" in inputs:
        counts["rows"] = len(inputs["groups"].unique())
    else:
        values = next(value for value in inputs.values() if isinstance(value, Tensor))
        counts["rows"] = len(values)
        if "labels" in inputs:
            counts["tokens"] = (inputs["labels"][..., 1:] != -100).sum()
    return torch.tensor([float(counts[name]) for name in COUNTED])


def metric_count(key: str, counts: dict[str, float]) -> float:
    """Return the number of rows, completions or tokens that a metric is a mean over."""
    key = key.removeprefix("eval_")
    if key in counts:
        return counts[key]
    side = next((side for side in ("chosen", "rejected") if key.endswith(f"/{side}")), None)
    if key in TOKEN_MEANS or key.startswith("clip_ratio/"):
        side = side or ("chosen" if key == "mean_token_accuracy" and counts["chosen"] else None)
        tokens = counts[f"{side}_tokens" if side else "tokens"]
        return tokens or counts["rows"]
    return (counts[side] if side else 0) or counts["rows"]


class BatchMetric(NamedTuple):
    """
    A metric of a batch.

    Attributes:
        value (`float`):
            Value of the metric.
        count (`float`):
            Number of values that it is a mean over.
        copies (`float`):
            The same, with copies of rows.
    """

    value: float
    count: float
    copies: float


def pool_metrics(metrics: dict[str, list[BatchMetric]]) -> dict[str, float]:
    """
    Return the metrics over all rows: means, standard deviations, minima and maxima. Those of no row are left out.
    """
    found = {}
    for key, each in metrics.items():
        last = key.rsplit("/", 1)[-1].removeprefix("eval_")
        known = [one for one in each if one.count > 0]
        if last == "num_tokens":
            found[key] = each[-1].value
        elif not known:
            continue  # a mean over nothing, such as a reward that applies to no held-out row
        elif last.startswith("min_") or last == "min" or last.endswith("_min"):
            found[key] = min(one.value for one in known)
        elif last.startswith("max_") or last == "max" or last.endswith("_max"):
            found[key] = max(one.value for one in known)
        elif mean := _mean_of(key, metrics):
            found[key] = _pooled_std(each, mean)
        else:
            found[key] = sum(one.value * one.count for one in known) / sum(one.count for one in known)
    if {"rewards/chosen", "rewards/rejected", "rewards/margins"} <= found.keys():
        # KTO has a margin only for batches with both
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


def _mean_of(key: str, metrics: dict[str, list[BatchMetric]]) -> list[BatchMetric] | None:
    """Return the means that belong to standard deviations, `None` for other metrics."""
    if key.endswith("/std"):
        return metrics.get(f"{key[:-3]}mean")
    return metrics.get(key[:-4]) if key.endswith("_std") else None


def _pooled_std(stds: Sequence[BatchMetric], means: Sequence[BatchMetric]) -> float:
    """
    Return the unbiased standard deviation over all rows.

    The sum of squares is that within batches plus that between their means. The standard deviation of a batch is
    unbiased over its rows and their copies.
    """
    each = [(std, mean) for std, mean in zip(stds, means, strict=True) if mean.count and not math.isnan(mean.value)]
    count = sum(mean.count for _, mean in each)
    if count < 2:
        return math.nan
    middle = sum(mean.value * mean.count for _, mean in each) / count
    squares = 0.0
    for std, mean in each:
        within = 0.0 if math.isnan(std.value) else std.value**2 * (mean.copies - 1) / mean.copies
        squares += mean.count * (within + (mean.value - middle) ** 2)
    return math.sqrt(squares / (count - 1))
