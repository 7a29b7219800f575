"""Demonstrations for PPO-ptx: a language-model loss beside PPO's (InstructGPT, arXiv 2203.02155, equation 2)."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head, pad

from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.tokenize import split_row_ids
from rlhf_trl.errors import ConfigError
from rlhf_trl.patches.forward import wrap_forward
from rlhf_trl.patches.log_probs import speed_up_log_probs
from rlhf_trl.patches.positions import count_positions_from_mask
from rlhf_trl.ppo.seeds import permutation


def add_head_at_temperature_1(model: PreTrainedModel, cast_lm_head_to_fp32: bool) -> None:
    """
    Let the fused forward take `at_temperature_1=True`: a language model's loss knows no temperature of sampling, by
    which the head that scores rollouts divides its logits.
    """
    of_sampling = model.forward
    add_fused_lm_head(model, cast_lm_head_to_fp32=cast_lm_head_to_fp32)
    speed_up_log_probs(model)
    count_positions_from_mask(model)

    def forward(model, at_1, *args, at_temperature_1=False, **kwargs):
        return (at_1 if at_temperature_1 else of_sampling)(*args, **kwargs)

    wrap_forward(model, forward)


class Demonstrations:
    """
    Tokenized demonstrations, in an order that depends on the seed alone, so that a resumed run gets the same.

    Args:
        dataset (`Dataset`): rows with `prompt` and `completion`, text or chat. The loss is on the completion's tokens.
        tokenizer: the policy's.
        seed (`int`): gives the order.

    Raises:
        ConfigError: if there are no rows, or the columns are missing.
    """

    def __init__(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, seed: int):
        missing = {"prompt", "completion"} - set(dataset.column_names)
        if missing or not len(dataset):
            raise ConfigError(
                "PPO-ptx needs demonstrations with `prompt` and `completion`"
                + (f"; `{missing.pop()}` is missing." if missing else ", and there are none.")
            )
        self.seed = seed
        self.pad_token_id: Any = tokenizer.pad_token_id
        self.rows = []
        row: Any
        for row in tqdm(dataset, desc="Tokenizing demonstrations", leave=False):
            self.rows.append(split_row_ids(tokenizer, row["prompt"], row["completion"], **template_kwargs(row)))

    def indices(self, start: int, n: int) -> list[int]:
        """Return the rows at `start` to `start + n - 1` of an endless sequence of epochs, each shuffled anew."""
        found: list[int] = []
        while len(found) < n:
            epoch, first = divmod(start + len(found), len(self.rows))
            order = permutation(len(self.rows), self.seed, epoch)
            found += order[first : first + n - len(found)].tolist()
        return found

    def tokens(self, indices: list[int]) -> int:
        """Return the number of completion tokens of some rows."""
        return sum(len(self.rows[i][1]) for i in indices)

    def batch(self, indices: list[int], device: torch.device) -> dict[str, Tensor]:
        """Return `prompt_ids` (padded left), `completion_ids` (padded right) and their masks, each (rows, tokens)."""
        made = {}
        for name, column, side in (("prompt", 0, "left"), ("completion", 1, "right")):
            ids = [torch.tensor(self.rows[i][column], dtype=torch.long) for i in indices]
            ones = [torch.ones_like(x) for x in ids]
            made[f"{name}_ids"] = pad(ids, padding_value=self.pad_token_id, padding_side=side).to(device)
            made[f"{name}_mask"] = pad(ones, padding_value=0, padding_side=side).to(device)
        return made
