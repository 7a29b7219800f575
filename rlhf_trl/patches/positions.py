"""TRL: position ids of left-padded rows in the fused forward."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_trl.patches.forward import wrap_forward


def takes_positions(trunk: nn.Module) -> bool:
    """Return whether a transformer takes position ids. Some attention knows distances only, such as ALiBi."""
    return "position_ids" in inspect.signature(type(trunk).forward).parameters


def counts_positions(trunk: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """
    Return whether a transformer counts the positions of these inputs itself, from the mask and the grids of images:
    Qwen-VL's have three for each token of an image.
    """
    return hasattr(trunk, "get_rope_index") and any(name.endswith("grid_thw") for name in inputs)


def positions(attention_mask: Tensor) -> Tensor:
    """Return positions that start at 0 at the first token that isn't padding, as in `generate`. (B, L) -> (B, L)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def count_positions_from_mask(model: PreTrainedModel) -> None:
    """
    Make the fused forward (`trl.trainer.utils.add_fused_lm_head`) count positions from the attention mask.

    TRL passes no `position_ids` (see also https://github.com/huggingface/trl/issues/6800), so that with left padding a
    model with absolute positions, such as GPT-2, would score its tokens at other positions than it generated them at.

    Seen in: TRL 1.16.
    Test: `test_padding_on_the_left_moves_no_token`.

    Args:
        model (`PreTrainedModel`):
            Causal language model with a fused head. One that takes no positions is left as it is.
    """
    if not takes_positions(model.base_model):
        return

    def with_positions(model, forward, *args, fused_lm_head=False, **kwargs):
        if fused_lm_head:
            kwargs["fused_lm_head"] = True
            given = kwargs.get("attention_mask") is not None and kwargs.get("position_ids") is None
            if given and not counts_positions(model.base_model, kwargs):
                kwargs["position_ids"] = positions(kwargs["attention_mask"])
        return forward(*args, **kwargs)

    wrap_forward(model, with_positions)
