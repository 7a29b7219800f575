"""
Evaluation during training that counts each held-out row once, however many ranks and whatever batch size there are.

Transformers, accelerate and TRL repeat rows so that every rank has a batch of full size, take the mean of each batch
over all of its rows, and then the mean of these means. Here every row of a batch stands in it equally often, and means
of batches are weighted by what they are means of: each figure is that of one batch with all rows.
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

# Means over tokens, and over the tokens of chosen answers where there are chosen ones; others are means over rows
TOKEN_MEANS = ("entropy", "mean_token_accuracy", "kl", "logits/chosen", "logits/rejected")

# Losses of GRPO whose sum on a rank is divided by the mean number of tokens a rank
GLOBAL_TOKENS = ("cispo", "dapo", "vespo")


class Batch(NamedTuple):
    """
    Rows that all ranks evaluate together.

    Attributes:
        rows: how many different ones.
        indices: those of each rank.
        copied: whether each rank has all of them; else they are dealt, as many to each rank.
    """

    rows: int
    indices: list[list[int]]
    copied: bool


def deal(order: Sequence[int], batch_size: int, ranks: int, group: int = 1) -> list[Batch]:
    """
    Batches in which every row stands equally often: full ones, one that is smaller on all ranks alike, and of the rows
    that are then fewer than ranks the same on each rank.

    Args:
        order (`Sequence[int]`): indices of the rows.
        batch_size (`int`): rows of a rank, at most.
        ranks (`int`): their number.
        group (`int`): so many rows in a row stay in one batch (the completions of a prompt).
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


class Dealt(list):
    """Batch sampler of one rank: its rows of each batch."""

    def __init__(self, batches: Sequence[Batch], rank: int):
        super().__init__(batch.indices[rank] for batch in batches)
        self.batches = batches


class EachRowOnce(Trainer):
    """
    What a trainer gets, before its own class, to evaluate as this module says.

    Attributes:
        held_out_batch ([`Batch`], *optional*): what is being evaluated.
        held_out_counts (`dict[str, float]`): of how many things a metric of the batch is the mean, over all ranks,
            each counted once; a trainer sets those that aren't known from the batch.
        held_out_terms (`dict[str, tuple]`): terms of this rank's loss that are means over something else than the
            rest: the value of each, and of how many things it is the mean; a trainer sets them.
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
        """The trainer's own, with its rows dealt by [`deal`]."""
        loader: Any = super().get_eval_dataloader(eval_dataset)
        if isinstance(loader.dataset, IterableDataset):
            return loader
        sampler = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler).sampler
        args, accelerator = self.args, self.accelerator
        group = getattr(self, "num_generations_eval", 1)
        batches = deal(list(sampler), args.eval_batch_size, accelerator.num_processes, group)
        return DataLoaderShard(
            loader.dataset,
            device=loader.device,
            batch_sampler=Dealt(batches, accelerator.process_index),
            collate_fn=loader.collate_fn,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """The trainer's own, with means over all rows."""
        if not isinstance(dataloader.batch_sampler, Dealt):
            return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._batches, self._losses, self._figures = iter(dataloader.batch_sampler.batches), [], defaultdict(list)
        # Bound here, so that what a class before this one makes of it counts as well
        self.prediction_step = functools.partial(self._evaluate_batch, self.prediction_step, dataloader)
        try:
            output: Any = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            del self.prediction_step
            self.held_out_batch = self._kl = None
        figures, store = pooled(self._figures), self._stored()
        if self._losses:
            sums = torch.stack(self._losses).sum(dim=0).float().to(self.accelerator.device)
            sums, counts = self.accelerator.reduce(sums, reduction="sum").unbind(dim=1)
            terms = torch.where(counts > 0, sums / counts, 0.0).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = sum(terms)
            figures |= {key: terms[i] for i, key in enumerate(self.held_out_terms, start=1) if key in figures}
        store.clear()
        store.update({key: [value] for key, value in figures.items()})
        return output

    def _evaluate_batch(self, prediction_step, dataloader, model, inputs, *args, **kwargs):
        """The trainer's `prediction_step`; keeps its loss and its metrics with their counts."""
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
            self._figures[key].append(Figure(value, count, copies * count))
        return found

    def _calculate_rewards(self, *args, **kwargs):
        # Of GRPO and RLOO
        rewards = super()._calculate_rewards(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if self.held_out_batch is not None:
            given = rewards[: self.held_out_batch.rows].isfinite()  # copies stand behind
            for name, count in zip(self.reward_func_names, given.sum(dim=0).tolist(), strict=True):
                self.held_out_counts |= {f"rewards/{name}/mean": count, f"rewards/{name}/std": count}
            scored = given.any(dim=1).sum().item()
            self.held_out_counts |= {"reward": scored, "reward_std": scored}
        return rewards

    def concatenated_forward(self, model, batch):
        """ORPO's: its loss has a mean over tokens and one over rows."""
        output = super().concatenated_forward(model, batch)  # pyright: ignore[reportAttributeAccessIssue]
        if self.held_out_batch is not None:
            self.held_out_terms = {"eval_nll_loss": (output[4], batch["chosen_attention_mask"][:, 1:].sum().item())}
        return output

    def _held_out_kl(self, model, dataloader) -> Tensor:
        """KTO's: the mean log-ratio of mismatched answers is in the loss of each row; here that of all rows."""
        sums = torch.zeros(2, device=self.accelerator.device)
        # The loader under accelerate's: that one is in use
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
        # The trainer asks for the policy's, and subtracts the reference's from it
        zeros, self._kl_of_policy = torch.zeros(len(batch["label"]), device=self._kl.device), not self._kl_of_policy
        if self.precompute_ref_logps:
            return batch["ref_KL_logps"] + self._kl
        return zeros + self._kl if self._kl_of_policy else zeros

    def _stored(self) -> dict[str, list]:
        """Where TRL's trainers keep the metrics of an evaluation until they log them."""
        kept = vars(self)
        return kept.get("_metrics", kept.get("_stored_metrics", {})).setdefault("eval", defaultdict(list))


COUNTED = ("rows", "tokens", "chosen", "rejected", "chosen_tokens", "rejected_tokens")


def local_counts(inputs) -> Tensor:
    """What this rank's batch holds of each of `COUNTED`, shape (6,); 0 where the batch doesn't tell."""
    counts = dict.fromkeys(COUNTED, 0)
    if isinstance(inputs, list):  # of RL: the completions aren't there yet
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
    """Of how many rows, answers or tokens a metric is the mean."""
    key = key.removeprefix("eval_")
    if key in counts:
        return counts[key]
    side = next((side for side in ("chosen", "rejected") if key.endswith(f"/{side}")), None)
    if key in TOKEN_MEANS or key.startswith("clip_ratio/"):
        side = side or ("chosen" if key == "mean_token_accuracy" and counts["chosen"] else None)
        tokens = counts[f"{side}_tokens" if side else "tokens"]
        return tokens or counts["rows"]
    return (counts[side] if side else 0) or counts["rows"]


class Figure(NamedTuple):
    """A metric of a batch: its value, of how many things it is one, and of how many with copies."""

    value: float
    count: float
    copies: float


def pooled(figures: dict[str, list[Figure]]) -> dict[str, float]:
    """What the metrics of batches are for all rows together: means, standard deviations, least and greatest values."""
    found = {}
    for key, each in figures.items():
        last = key.rsplit("/", 1)[-1].removeprefix("eval_")
        known = [one for one in each if one.count > 0]
        if last == "num_tokens" or not known:
            found[key] = each[-1].value
        elif last.startswith("min_") or last == "min" or last.endswith("_min"):
            found[key] = min(one.value for one in known)
        elif last.startswith("max_") or last == "max" or last.endswith("_max"):
            found[key] = max(one.value for one in known)
        elif mean := _mean_of(key, figures):
            found[key] = _pooled_std(each, mean)
        else:
            found[key] = sum(one.value * one.count for one in known) / sum(one.count for one in known)
    if {"rewards/chosen", "rewards/rejected", "rewards/margins"} <= found.keys():
        # KTO has a margin only of batches with both
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


def _mean_of(key: str, figures: dict[str, list[Figure]]) -> list[Figure] | None:
    """The means that belong to standard deviations."""
    if key.endswith("/std"):
        return figures.get(f"{key[:-3]}mean")
    return figures.get(key[:-4]) if key.endswith("_std") else None


def _pooled_std(stds: Sequence[Figure], means: Sequence[Figure]) -> float:
    """The unbiased standard deviation over all rows, of those of batches (unbiased over rows and copies)."""
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
