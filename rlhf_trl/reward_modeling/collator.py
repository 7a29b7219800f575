"""Collator of prompts with several completions and their comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.utils import pad

from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.multimodal import extra_inputs
from rlhf_trl.models.inputs import batch_inputs

# What isn't an input of the model
NOT_INPUTS = ("groups", "better", "worse", "margin", "weights", "label_smoothing", "targets", "safe")


@dataclass
class ComparisonCollator(DataCollatorMixin):
    """
    Collate rows, each a prompt with K completions, into a micro-batch of N completions.

    Its tensors, with M comparisons and H heads:

    - `input_ids`, `attention_mask` (N, T): padded on the right to the longest completion;
    - `groups` (N,): number of each completion's row;
    - `better`, `worse` (M,): indices of completions;
    - `margin`, `weights`, `label_smoothing` (M,): only if a row has them;
    - `targets` (N, H): NaN for a missing one; only if a row has any;
    - `safe` (N,): 1 for a safe completion, -1 for an unsafe one, NaN for one without a label; only if a row has any.
    - the processor's inputs beside ids (`pixel_values` ...): only if a row has images, with its `prompt`.

    Args:
        pad_token_id (`int`): id to pad with.
        heads (`Sequence[str]`): order of the heads in `targets`.
        label_smoothing (`float`): default for comparisons without their own.
        pad_to_multiple_of (`int`, *optional*): as in `trl.trainer.utils.pad`.
        tokenizer (*optional*): one with a processor, for rows with images.
    """

    pad_token_id: int
    heads: Sequence[str] = ()
    label_smoothing: float = 0.0
    pad_to_multiple_of: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the micro-batch of some rows."""
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
        if any(row.get("images") for row in examples):
            each = [extra_inputs(self.tokenizer, row["prompt"], **template_kwargs(row)) for row in examples]
            extra = [one for one, count in zip(each, counts.tolist(), strict=True) for _ in range(count)]
            batch |= batch_inputs(extra, batch["attention_mask"])
        batch["groups"] = torch.repeat_interleave(torch.arange(len(examples)), counts)
        for side in ("better", "worse"):
            indices = [
                int(start) + i for row, start in zip(examples, starts, strict=True) for i in row.get(side) or []
            ]
            batch[side] = torch.tensor(indices, dtype=torch.long)
        for name, default in (("margin", 0.0), ("weights", 1.0), ("label_smoothing", self.label_smoothing)):
            if any(row.get(name) for row in examples):
                filled = [row.get(name) or [default] * len(row.get("better") or []) for row in examples]
                batch[name] = torch.tensor([value for values in filled for value in values], dtype=torch.float)
        if any(isinstance(row.get("safe"), list) for row in examples):
            sides = [side for row in examples for side in row.get("safe") or [None] * len(row["completion_ids"])]
            batch["safe"] = torch.tensor([torch.nan if side is None else float(side) for side in sides])
        if any(row.get("targets") for row in examples):
            batch["targets"] = torch.tensor(
                [
                    [torch.nan if given[head] is None else given[head] for head in self.heads]
                    for row in examples
                    for given in row.get("targets") or [dict.fromkeys(self.heads)] * len(row["completion_ids"])
                ]
            )
        return batch
