"""Multi-objective DPO (MODPO, arXiv 2310.03708): DPO on pairs, each with a margin from other rewards."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import trl
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf_trl.config.ranges import check_values
from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.tokenize import split_row_ids
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import count_of
from rlhf_trl.rewards.base import Reward
from rlhf_trl.terminal import say
from rlhf_trl.trainers.base import DPOTrainer
from rlhf_trl.trainers.options import MODPO

# Columns of the margin rewards of both answers of a pair
SIDES = ("chosen", "rejected")
COLUMNS = tuple(f"{side}_reward" for side in SIDES)
CHUNK = 256  # pairs scored at a time


@dataclass
class MODPOConfig(trl.DPOConfig):
    """
    Arguments of [`MODPOTrainer`]: those of `trl.DPOConfig` with its sigmoid loss.

    Args:
        preference_weight (`float`, defaults to `0.5`): weight w of what the pairs prefer, above 0; that of the margin
            rewards is 1 - w. At 1 it is DPO.

    Raises:
        ConfigError: at a value out of range.
    """

    preference_weight: float = field(default=0.5, metadata={"help": "Weight of what the pairs prefer, (0, 1]."})

    def __post_init__(self):
        super().__post_init__()
        check_values(MODPO, vars(self))


class MODPOTrainer(DPOTrainer):
    """
    `trl.DPOTrainer` for a weighted sum of what pairs prefer and of margin rewards m(x, y) (arXiv 2310.03708).

    The loss of a pair (x, y_c, y_l) is -log sigmoid(r(x, y_c) - r(x, y_l)) with

        r(x, y) = (beta log(pi(y | x) / pi_ref(y | x)) - (1 - w) m(x, y)) / w

    where m is the weighted sum of the margin rewards, found before training. That is DPO's loss with beta / w and
    reference log-probabilities that are higher by (1 - w) m / beta, which is what TRL's loss is given: `_compute_loss`
    is overridden, and reads them as precomputed ones.

    Args:
        model: see `trl.DPOTrainer`.
        reward_funcs (`Sequence[Reward]`, *optional*): margin rewards, see [`with_margin_rewards`]. Without any, the
            data has the columns `chosen_reward` and `rejected_reward`, or a `margin`, which is their difference.
        args ([`MODPOConfig`], *optional*): the arguments.
        train_dataset (`Dataset`), eval_dataset (`Dataset`, *optional*): rows with `prompt`, `chosen`, `rejected`.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the policy's tokenizer; needed for `reward_funcs`.
        **kwargs: what `trl.DPOTrainer` takes besides.

    Raises:
        ConfigError: at the first loss, if the data has no margin rewards.
    """

    READS_NO_IMAGES = "its margin rewards read text alone. DPO reads them"
    _tag_names: ClassVar[list[str]] = ["trl", "modpo", "rlhf_trl"]
    _name = "MODPO"
    args: MODPOConfig
    beta: float

    def __init__(
        self,
        model: Any,
        reward_funcs: Sequence[Reward] = (),
        args: MODPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        args = MODPOConfig("modpo") if args is None else args
        train_dataset, eval_dataset = (
            dataset and with_margin_rewards(dataset, reward_funcs, processing_class)
            for dataset in (train_dataset, eval_dataset)
        )
        super().__init__(
            model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.data_collator = MarginCollator(self.data_collator)
        self.beta = args.beta / args.preference_weight

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast(list[str], self._signature_columns)
        columns += [name for name in COLUMNS if name not in columns]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        if not set(COLUMNS) <= inputs.keys():
            raise ConfigError(
                "MODPO needs a margin reward of each answer, and there is none. Set `reward=model`, or another one, "
                "or give the data a column `margin`: the difference of chosen and rejected."
            )
        inputs = dict(inputs)
        rewards = torch.stack([inputs.pop(name) for name in COLUMNS])
        if self.precompute_ref_logps:
            references = [inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]
        else:
            references = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        shifts = (1 - self.args.preference_weight) * rewards / self.args.beta
        for side, reference, shift in zip(SIDES, references, shifts, strict=True):
            inputs[f"ref_{side}_logps"] = reference + shift
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            loss = super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        self._log_margins(rewards)
        return loss

    def _log_margins(self, rewards: Tensor) -> None:
        """Log means of the margin rewards (2, N) of a batch."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        chosen, rejected = self.accelerator.gather(rewards.T.contiguous()).unbind(dim=1)
        metrics["margin_rewards/chosen"].append(chosen.mean().item())
        metrics["margin_rewards/rejected"].append(rejected.mean().item())
        metrics["margin_rewards/margins"].append((chosen - rejected).mean().item())


class MarginCollator:
    """
    Collator of pairs that keeps their margin rewards, of shape (N,) each.

    Args:
        collator (callable): TRL's collator of pairs.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the examples as a batch."""
        kept = {
            name: torch.tensor([example[name] for example in examples], dtype=torch.float32)
            for name in COLUMNS
            if name in examples[0]
        }
        return self.collator(examples) | kept


def with_margin_rewards(
    dataset: Dataset, rewards: Sequence[Reward], tokenizer: PreTrainedTokenizerBase | None
) -> Dataset:
    """
    Return pairs with their margin rewards, in the columns `chosen_reward` and `rejected_reward`.

    A pair of which a reward applies to one answer only, or to none, gets none of it. The ranks share the work.

    Args:
        dataset (`Dataset`): rows with `prompt`, `chosen` and `rejected`. Without rewards their column `margin`, if
            they have one, is the margin reward of the chosen answer, and that of the other is 0.
        rewards (`Sequence[Reward]`): they are summed by their weights.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the policy's, which makes the ids that rewards get.

    Raises:
        ConfigError: at a reward that is NaN or infinite.
    """
    names = set(dataset.column_names)
    if not rewards:
        if "margin" not in names or names & {*COLUMNS}:
            return dataset
        margins = dataset["margin"][:]
        return dataset.add_column("chosen_reward", margins).add_column("rejected_reward", [0.0] * len(margins))
    if found := names & {*COLUMNS, "margin"}:
        say(f"the margin rewards are those of `reward`: the data's own, `{min(found)}`, is not used")
        dataset = dataset.remove_columns(sorted(names & {*COLUMNS}))
    state = PartialState()
    own = range(state.process_index, len(dataset), state.num_processes)
    scored = list(_scored(dataset.select(own), rewards, tokenizer, disable=not state.is_main_process))
    each = dict(gather_object(list(zip(own, scored, strict=True))))  # (F, 2) of each pair, None where not applicable
    values = [each[row] for row in range(len(dataset))]
    _say_margins(values, rewards)
    sums = [
        [
            sum(reward.weight * pair[side] for reward, pair in zip(rewards, row, strict=True) if None not in pair)
            for row in values
        ]
        for side in (0, 1)
    ]
    for name, column in zip(COLUMNS, sums, strict=True):
        dataset = dataset.add_column(name, [float(value) for value in column])
    return dataset


def _scored(
    dataset: Dataset, rewards: Sequence[Reward], tokenizer: PreTrainedTokenizerBase | None, disable: bool
) -> Iterator[list[tuple]]:
    """Yield, for each pair, the values that each reward gives to the chosen and to the rejected answer."""
    for start in tqdm(range(0, len(dataset), CHUNK), desc="scoring margins", unit=f"{CHUNK} pairs", disable=disable):
        rows: list[dict] = dataset.select(range(start, min(start + CHUNK, len(dataset)))).to_list()
        prompts = [row["prompt"] for row in rows] * 2
        answers = [row[side] for side in SIDES for row in rows]
        ids = [
            split_row_ids(tokenizer, row["prompt"], row[side], **template_kwargs(row))[1] if tokenizer else []
            for side in SIDES
            for row in rows
        ]
        others = [name for name in dataset.column_names if name not in ("prompt", *SIDES)]
        columns = {name: [row[name] for row in rows] * 2 for name in others}
        found = []
        for reward in rewards:
            values = list(reward(prompts, answers, completion_ids=ids, **columns))
            for value, answer in zip(values, answers, strict=True):
                if value is not None and not math.isfinite(value):
                    raise ConfigError(
                        f"The margin reward `{reward.__name__}` is {value} for {str(answer)[:200]!r}. Fix it, or let "
                        "it return None where it doesn't apply."
                    )
            found.append(values)
        for row in range(len(rows)):
            yield [(values[row], values[row + len(rows)]) for values in found]


def _say_margins(values: Sequence[list[tuple]], rewards: Sequence[Reward]) -> None:
    """Say by how much each margin reward tells the answers of the pairs apart; warn of one that doesn't."""
    for number, reward in enumerate(rewards):
        pairs = [row[number] for row in values]
        known = torch.tensor([pair for pair in pairs if None not in pair], dtype=torch.float64).reshape(-1, 2)
        gaps = reward.weight * (known[:, 0] - known[:, 1])
        missing = (
            "" if len(known) == len(pairs) else f"; it applies to {len(known):,} of {count_of(len(pairs), 'pair')}"
        )
        if not gaps.any():
            say(f"warning: the margin reward `{reward.__name__}` is the same for both answers of every pair{missing}")
            continue
        say(
            f"margin reward `{reward.__name__}`, weighted: chosen less rejected has mean {gaps.mean():.3g} and "
            f"standard deviation {gaps.std(correction=0):.3g}, and it prefers the chosen answer of "
            f"{(gaps > 0).double().mean():.0%} of {count_of(len(known), 'pair')}{missing}"
        )
