"""
Reward models from K-way rankings, ratings and attributes: the losses, and a trainer on `trl.RewardTrainer`.

N completions of one micro-batch, M comparisons between them, G prompts, H heads. A *comparison* says that one
completion is better than another one of its prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.utils import pad

from rlhf_trl.calibration import calibration_of, write_calibration
from rlhf_trl.data.lengths import head_names, keep_short_completions, tokenize_comparisons
from rlhf_trl.errors import ConfigError
from rlhf_trl.models import score_heads
from rlhf_trl.ranges import REWARD_MODEL, TRAINING, check_values
from rlhf_trl.trainers.base import TrainerMixin

KINDS = ("pairwise", "plackett_luce")
# The most completions that the calibration of a saved model is measured on
CALIBRATION_COMPLETIONS = 1024


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    groups: Tensor,
    kind: str = "pairwise",
    margin: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    center: float = 0.0,
) -> Tensor:
    """
    Loss of scores that should follow rankings, each within one prompt.

    Args:
        scores (`Tensor` of shape `(N,)`): of the completions.
        ranks (`Tensor` of shape `(N,)`): the smallest is best; equal ranks tie, and a tie gives no comparison.
        groups (`Tensor` of shape `(N,)`): which prompt a completion belongs to.
        kind (`str`): `pairwise` (InstructGPT, arXiv 2203.02155 eq. 1) or `plackett_luce`, see [`comparison_losses`].
        margin (`float` or `Tensor`, *optional*): by how much the better one should lead, for all comparisons, or as
            `(G,)` one for each prompt (in the order of its group's number), or as `(N,)` a level of each completion:
            the margin of two is the better one's level less the worse one's.
        label_smoothing (`float`): probability that a comparison is the wrong way round.
        center (`float`): factor of the centering term.

    Returns:
        `Tensor`: mean over each prompt's untied pairs, then over the prompts that have any; 0 without any.

    Raises:
        ValueError: for shapes that don't fit, or another `kind`.
    """
    if not (scores.ndim == 1 and scores.shape == ranks.shape == groups.shape):
        raise ValueError(
            f"`scores`, `ranks` and `groups` have shapes {tuple(scores.shape)}, {tuple(ranks.shape)} and "
            f"{tuple(groups.shape)}, and must be 1-D and of one length."
        )
    _, groups = groups.unique(return_inverse=True)
    same = groups[:, None] == groups[None, :]
    better, worse = torch.nonzero(same & (ranks[:, None] < ranks[None, :]), as_tuple=True)
    if isinstance(margin, Tensor) and margin.ndim > 0:
        if margin.shape == scores.shape:
            margin = margin[better] - margin[worse]
        elif margin.shape == (int(groups.max()) + 1 if len(groups) else 0,):
            margin = margin[groups[better]]
        else:
            raise ValueError(f"`margin` has shape {tuple(margin.shape)}: one a prompt or one a completion is needed.")
    losses, compared = comparison_losses(scores, better, worse, groups, kind, margin, label_smoothing, center)
    return losses.sum() / compared.sum().clamp(min=1)


def comparison_losses(
    scores: Tensor,
    better: Tensor,
    worse: Tensor,
    groups: Tensor,
    kind: str = "pairwise",
    margin: float | Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    center: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Ranking loss of each prompt. With d = score of the better one - score of the worse one - margin:

    - `pairwise`: mean over the prompt's comparisons of -log sigmoid(d) (Bradley-Terry; the margin as in Llama 2, arXiv
      2307.09288);
    - `plackett_luce`: sum over the prompt's completions of log(1 + sum exp(-d)), the inner sum over what the
      completion is better than. For a full order that is the negative log-likelihood of the Plackett-Luce model; tied
      completions don't compete.

    Both are the same for two completions. Label smoothing e is (1 - e) of the loss and e of the loss with all
    comparisons turned round (d becomes -d), as in conservative DPO. Centering adds `center` times the mean over the
    comparisons of (better + worse)² (arXiv 2312.09244).

    Args:
        scores (`Tensor` of shape `(N,)`): of the completions.
        better, worse (`Tensor` of shape `(M,)`): indices into `scores`, both of one prompt.
        groups (`Tensor` of shape `(N,)`): the prompt's number, from 0.
        margin, label_smoothing (`float` or `Tensor` of shape `(M,)`): of each comparison.
        weights (`Tensor` of shape `(M,)`, *optional*): factor of each comparison's loss. `plackett_luce` takes the
            mean over a completion's comparisons, as it does for `label_smoothing`.

    Returns:
        the loss of each prompt, shape `(G,)`, 0 where nothing is compared; and whether something is, `(G,)`.

    Raises:
        ValueError: for another `kind`.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` is {kind!r}. Use one of: {', '.join(KINDS)}.")
    prompts = int(groups.max()) + 1 if len(groups) else 0
    ones = scores.new_ones(len(better))
    smoothing = ones * label_smoothing
    weights = ones if weights is None else weights.to(scores)
    lead = scores[better] - scores[worse] - (0.0 if margin is None else margin)
    if kind == "pairwise":
        values = (1 - smoothing) * F.softplus(-lead) + smoothing * F.softplus(lead)
        ranking = _mean_by(weights * values, groups[better], prompts)
    else:
        right = _stages(lead, better, worse, len(scores)) * _mean_by(weights * (1 - smoothing), better, len(scores))
        turned = _stages(-lead, worse, better, len(scores)) * _mean_by(weights * smoothing, worse, len(scores))
        ranking = scores.new_zeros(prompts).index_add(0, groups, right + turned)
    centering = _mean_by((scores[better] + scores[worse]) ** 2, groups[better], prompts)
    compared = torch.bincount(groups[better], minlength=prompts) > 0
    return ranking + center * centering, compared


def _mean_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Mean of `values` by `index`, shape `(size,)`; 0 where there is none."""
    counts = torch.bincount(index, minlength=size).clamp(min=1)
    return values.new_zeros(size).index_add(0, index, values) / counts


def _stages(lead: Tensor, winner: Tensor, loser: Tensor, size: int) -> Tensor:
    """log(1 + sum over the losers of exp(-lead)) of each winner, shape `(size,)`; 0 for one that wins nothing."""
    rivals = lead.new_full((size, size), -torch.inf).index_put((winner, loser), -lead)
    return torch.cat([lead.new_zeros(size, 1), rivals], dim=1).logsumexp(dim=1)


def regression_loss(scores: Tensor, targets: Tensor, count: Tensor | None = None) -> Tensor:
    """
    Mean squared error over the targets that are given.

    Args:
        scores, targets (`Tensor` of shape `(N, H)`): a NaN target is a missing one: it has no loss and no gradient.
        count (`Tensor`, *optional*): what the sum is divided by, of a batch of which these are a part.
    """
    given = ~targets.isnan()
    count = given.sum() if count is None else count
    return ((scores - targets.nan_to_num()) ** 2 * given).sum() / count.clamp(min=1)


def loss_counts(inputs: dict[str, Tensor]) -> Tensor:
    """How many prompts of a micro-batch have comparisons, and how many targets are given; shape (2,)."""
    prompts, targets = inputs["groups"][inputs["better"]].unique(), inputs.get("targets")
    given = 0 if targets is None else int((~targets.isnan()).sum())
    return torch.tensor([len(prompts), given], dtype=torch.float)


@dataclass
class RewardConfig(trl.RewardConfig):
    """
    Arguments of [`RewardTrainer`]. Those of `trl.RewardConfig` mean the same; `per_device_train_batch_size` counts
    prompts, each with all of its completions.

    Args:
        loss_type (`str`, *optional*, defaults to `"pairwise"`):
            Of rows that compare completions: `"pairwise"` or `"plackett_luce"`, see [`comparison_losses`].
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability, below 0.5, that a comparison is the wrong way round. Rows with shares of raters who agree
            (`agreement: smoothing`) bring their own.
        head_init (`str`, *optional*):
            `"normal"` draws the score head anew with standard deviation 1/sqrt(d + 1) and bias 0, d the width of its
            input (arXiv 2403.17031). Unset, a new head has the model's `initializer_range`.
        calibrate_on (`str`, *optional*, defaults to `"all"`):
            Held-out completions that are the reference for `calibration.json`: `"all"`, or `"best"`, those that
            are worse than no other one of their prompt.
    """

    loss_type: str = field(default="pairwise", metadata={"help": "`pairwise` or `plackett_luce`."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Probability that a comparison is the wrong way round."}
    )
    head_init: str | None = field(
        default=None, metadata={"help": "`normal`: score head with standard deviation 1/sqrt(d + 1)."}
    )
    calibrate_on: str = field(default="all", metadata={"help": "Completions the calibration is measured on."})

    def __post_init__(self):
        super().__post_init__()
        check_values(TRAINING | REWARD_MODEL, vars(self), error=ValueError)


@dataclass
class ComparisonCollator(DataCollatorMixin):
    """
    Rows (each a prompt with `completion_ids` and what is known of them) as tensors, completions one below the other.

    - `input_ids`, `attention_mask`, `(N, T)`: padded on the right to the longest completion of the micro-batch;
    - `groups`, `(N,)`: the number of the row;
    - `better`, `worse`, `(M,)`: indices of completions; `margin`, `weights`, `label_smoothing`, `(M,)`, where rows
      bring them;
    - `targets`, `(N, H)`: NaN where there is none; only if some row has any.

    Args:
        pad_token_id (`int`): id to pad with.
        heads (`Sequence[str]`): order of the heads in `targets`.
        label_smoothing (`float`): of comparisons that don't bring their own.
        pad_to_multiple_of (`int`, *optional*): as in `trl.trainer.utils.pad`.
    """

    pad_token_id: int
    heads: Sequence[str] = ()
    label_smoothing: float = 0.0
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of these rows."""
        ids = [torch.tensor(completion) for row in examples for completion in row["completion_ids"]]
        counts = torch.tensor([len(row["completion_ids"]) for row in examples])
        starts = counts.cumsum(0) - counts
        batch = {
            name: pad(
                values,
                padding_value=padding,
                padding_side="right",
                pad_to_multiple_of=self.pad_to_multiple_of,
            )
            for name, values, padding in (
                ("input_ids", ids, self.pad_token_id),
                ("attention_mask", [torch.ones_like(row) for row in ids], 0),
            )
        }
        batch["groups"] = torch.repeat_interleave(torch.arange(len(examples)), counts)
        for side in ("better", "worse"):
            places = [int(start) + i for row, start in zip(examples, starts, strict=True) for i in row.get(side) or []]
            batch[side] = torch.tensor(places, dtype=torch.long)
        for name, default in (("margin", 0.0), ("weights", 1.0), ("label_smoothing", self.label_smoothing)):
            if any(row.get(name) for row in examples):
                filled = [row.get(name) or [default] * len(row.get("better") or []) for row in examples]
                batch[name] = torch.tensor([value for values in filled for value in values], dtype=torch.float)
        if any(row.get("targets") for row in examples):
            batch["targets"] = torch.tensor(
                [
                    [torch.nan if given[head] is None else given[head] for head in self.heads]
                    for row in examples
                    for given in row.get("targets") or [dict.fromkeys(self.heads)] * len(row["completion_ids"])
                ]
            )
        return batch


class RewardTrainer(TrainerMixin, trl.RewardTrainer):
    """
    `trl.RewardTrainer` for K-way rankings, regression and several heads.

    One row is a prompt with K completions, each of which goes through the model once, all in one micro-batch. Rows are
    `prompt`, `completions` and `better`, `worse` (indices of the completions of each comparison), with `margin`,
    `weights` and `label_smoothing` (a number a comparison) or `targets` (a dict of head and number a completion) where
    they have them; `prompt`, `chosen`, `rejected`; or rows of [`~rlhf_trl.data.tokenize_comparisons`]. Comparisons
    have the ranking loss, targets the squared error, rows with both have both.

    Overridden: the refusal of `num_labels != 1`, the tokenizing and filtering of datasets, the collator, the columns
    that are kept, and the loss. The names of the metrics are TRL's; `mse` and, of several heads, `mse_<head>` and
    `accuracy_<head>` are added. Where rows have targets, accuracy is over the pairs of one prompt whose targets
    differ.

    `save_model` also writes `calibration.json`: mean and standard deviation of the scores of held-out completions
    (without an eval split: of training ones), numbers or, with several heads, lists in the order of `heads`.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, **kwargs: as in `trl.RewardTrainer`; `args` a
            [`RewardConfig`]. A model with several heads has as many `num_labels` as the data has targets.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the model's heads aren't the data's.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RewardConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase | None = None,
        eval_dataset=None,
        data_collator=None,
        **kwargs,
    ):
        self.heads = head_names(train_dataset) or ["score"]
        self._scores: list | None = None  # those of the pass that calibrates
        config = None if isinstance(model, str) else model.config
        if config is not None:
            _check_heads(config.num_labels, self.heads, train_dataset)
            if args.head_init == "normal":
                init_heads(model, args.seed)
            config.num_labels = 1  # TRL refuses others; `id2label` gives the number back
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
                self.processing_class.pad_token_id, self.heads, args.label_smoothing, args.pad_to_multiple_of
            )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if "completion_ids" in dataset.column_names:
            return keep_short_completions(dataset, args.max_length, dataset_name)
        return tokenize_comparisons(dataset, processing_class, args.max_length)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [
            "completion_ids", "better", "worse", "margin", "weights", "label_smoothing", "targets"
        ]  # fmt: skip

    # `compute_loss` divides by what the whole batch holds: accumulation, and how rows lie on ranks, change nothing
    loss_is_scaled_for_ga = True

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step; and how many prompts with comparisons, and targets, they have on all ranks."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = sum((loss_counts(inputs).to(device) for inputs in samples), torch.zeros(2, device=device))
        return samples, self.accelerator.reduce(counts, reduction="sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The ranking loss and the squared error of one micro-batch; records the metrics."""
        mode = "train" if self.model.training else "eval"
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        scores = outputs.logits.float()  # (N, H)
        better, worse, targets = inputs["better"], inputs["worse"], inputs.get("targets")
        counts, ranks = num_items_in_batch, self.accelerator.num_processes
        if counts is None:  # by itself
            counts, ranks = loss_counts(inputs).to(scores.device), 1
        prompts, given = counts.clamp(min=1)
        # Adding nothing keeps a gradient where a micro-batch holds ties alone
        ranking = error = 0.0 * scores.sum()
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
            error = regression_loss(scores, targets, given)
        loss = ranks * (ranking + error)  # of which DDP takes the mean over ranks
        batch = self.held_out_batch
        if batch is not None:
            compared, known = counts.tolist()
            self.held_out_terms = {"ranking": (ranking, compared), "mse": (error, known)}
        if self._scores is not None and not (batch.copied and self.args.process_index):
            self._scores += reference_scores(scores.detach(), inputs, self.args.calibrate_on).tolist()
        self._record(mode, scores.detach(), inputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _record(self, mode: str, scores: Tensor, inputs: dict[str, Tensor]) -> None:
        """Notes TRL's metrics; means over comparisons are exact, whatever their number in a micro-batch."""
        metrics, gather = self._metrics[mode], self.accelerator.gather
        if mode == "train":
            self._total_train_tokens += int(gather(inputs["attention_mask"].sum()).sum()) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["min_reward"].append(gather(scores.min()).min().item())
        self._extend(metrics, {"mean_reward": scores.flatten()})
        metrics["max_reward"].append(gather(scores.max()).max().item())
        leads = {"": leads_of(scores, inputs)}
        if self.train_has_targets:  # the same keys on all ranks and in all micro-batches: gathering needs it
            targets = inputs.get("targets", torch.full_like(scores, torch.nan))
            by_head = [_leads(scores[:, i], targets[:, i], inputs["groups"]) for i in range(len(self.heads))]
            errors = (scores - targets) ** 2
            named = dict(zip(self.heads, range(len(self.heads)), strict=True)) if len(self.heads) > 1 else {}
            for name, values in {"": errors, **{f"_{head}": errors[:, i] for head, i in named.items()}}.items():
                self._extend(metrics, {f"mse{name}": values[~values.isnan()]})
            leads |= {f"_{head}": by_head[i] for head, i in named.items()}
        for name, values in leads.items():
            margin = {"margin": values} if not name else {}
            self._extend(metrics, {f"accuracy{name}": (values > 0).float(), **margin})

    def _extend(self, metrics: dict[str, list[float]], values: dict[str, Tensor]) -> None:
        """Adds each metric's mean over all ranks as often as there are values, so that means of several are exact."""
        batch = self.held_out_batch
        for name, each in values.items():
            total, count = self.accelerator.gather(
                torch.stack([each.sum(), each.new_tensor(float(each.numel()))]).unsqueeze(0)
            ).sum(0)
            if batch is not None:
                copies = self.accelerator.num_processes if batch.copied else 1
                self.held_out_counts[name] = count.item() / copies
                metrics[name].append((total / count.clamp(min=1)).item())
            elif count > 0:
                metrics[name] += [(total / count).item()] * int(count)

    @property
    def train_has_targets(self) -> bool:
        """Whether the training rows have targets."""
        return "targets" in self.train_dataset.column_names

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Saves the model and, at the end of a training, `calibration.json` beside it. All ranks call it."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            calibration = self.calibrate()
            if self.args.should_save:
                write_calibration(output_dir or self.args.output_dir, calibration)

    def calibrate(self) -> dict[str, Any]:
        """
        Mean and standard deviation (unbiased) of the scores of reference answers (`calibrate_on`).

        Returns:
            `dict`: `mean`, `std` (numbers; with several heads lists), `n`, `on` (which answers); `heads`,
                `covariance` if several.
        """
        split = "train" if self.eval_dataset is None else "eval"
        dataset = self.train_dataset if split == "train" else self.eval_dataset
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
        return calibration_of(scores, self.heads, f"{self.args.calibrate_on} completions of {split}")


def init_heads(model: PreTrainedModel, seed: int) -> None:
    """Draws the weights of a model's score heads from N(0, 1/(d + 1)), d their input width; biases become 0."""
    generator = torch.Generator().manual_seed(seed)
    for head in score_heads(model):
        std = (head.in_features + 1) ** -0.5
        drawn = torch.empty(head.weight.shape).normal_(std=std, generator=generator)
        head.weight.data.copy_(drawn)
        if head.bias is not None:
            nn.init.zeros_(head.bias)


def _check_heads(labels: int, heads: list[str], dataset: Dataset) -> None:
    if labels != len(heads):
        raise ConfigError(
            f"The reward model has {labels} head{'s' * (labels != 1)}, and the data has targets for {len(heads)} "
            f"({', '.join(heads)}). Start from a policy, or from a reward model with the data's heads."
        )
    if len(heads) > 1 and "better" in dataset.column_names:
        raise ConfigError(
            f"The data compares completions, which trains one score, and the reward model has {labels} heads. "
            "Type `data.feedback.use=regression`, or start from a policy."
        )


def leads_of(scores: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """
    Score differences that should be positive, of a micro-batch's `scores`, shape (N, H): of its comparisons; without
    any, of the pairs of each head that [`_leads`] finds.
    """
    if len(inputs["better"]) or "targets" not in inputs:
        return scores[inputs["better"], 0] - scores[inputs["worse"], 0]
    pairs = zip(scores.unbind(dim=1), inputs["targets"].unbind(dim=1), strict=True)
    return torch.cat([_leads(head, targets, inputs["groups"]) for head, targets in pairs])


def _leads(scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
    """Score differences of all pairs of one prompt whose targets differ, the one with the higher target first."""
    ahead = (groups[:, None] == groups[None, :]) & (targets[:, None] > targets[None, :])  # NaN is not ahead of any
    better, worse = torch.nonzero(ahead, as_tuple=True)
    return scores[better] - scores[worse]


def reference_scores(scores: Tensor, inputs: dict[str, Tensor], which: str) -> Tensor:
    """Of `scores`, shape (N, ...), those of the completions that a calibration is about (`calibrate_on`)."""
    if which == "all":
        return scores
    beaten = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    beaten[inputs["worse"]] = True
    return scores[~beaten]
