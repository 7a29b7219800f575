"""The critic of [`PPOTrainer`]: a value head on the policy's own hidden states."""

import functools
import math
import types
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

VALUE_HEAD = "value_head"


@dataclass
class PolicyAndValueOutput(FusedCausalLMOutput):
    """
    Output of a model with a value head: TRL's fused output, and the values.

    `value_preds` has the shape of `log_probs`, (batch, seq_len - 1): V read before each next-token label. (A field
    called `values` would hide `dict.values`, and a bare extra key breaks accelerate's conversion to float32.)
    """

    value_preds: Tensor | None = None


def left_padded_position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count from 0 at the first token that isn't padding, as `generate` counts. (B, L) -> (B, L)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def count_positions_from_mask(model: PreTrainedModel) -> None:
    """
    Make the fused forward (`trl.trainer.utils.add_fused_lm_head`) count positions from the attention mask.

    TRL passes no `position_ids`, so with left padding a model with absolute positions (GPT-2, say) would score its own
    tokens at other positions than it generated them at.
    """
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if fused_lm_head:
            kwargs["fused_lm_head"] = True
            if kwargs.get("attention_mask") is not None and kwargs.get("position_ids") is None:
                kwargs["position_ids"] = left_padded_position_ids(kwargs["attention_mask"])
        return fused_forward(*args, **kwargs)

    model.forward = types.MethodType(forward, model)


def project_labels_only(model: PreTrainedModel) -> None:
    """
    Make the fused forward project only the positions that have a label to the vocabulary, on a CPU too.

    TRL does so where Triton runs. Elsewhere it projects prompts and padding as well, and throws the result away.
    """
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head or labels.device.type != "cpu":
            given = {} if labels is None else {"labels": labels}
            return fused_forward(*args, **given, **kwargs, **({"fused_lm_head": True} if fused_lm_head else {}))
        labels = labels[:, 1:]
        mask = labels != -100
        rows = mask.flatten().nonzero().squeeze(1)

        def select(_, __, output):
            hidden = output.last_hidden_state[:, :-1]
            # `index_select`, because the backward of `hidden[mask]` adds element by element
            output.last_hidden_state = hidden.flatten(0, 1).index_select(0, rows).unsqueeze(0)
            return output

        hook = self.base_model.register_forward_hook(select)
        try:
            output = fused_forward(*args, fused_lm_head=True, shift_labels=labels[mask].unsqueeze(0), **kwargs)
        finally:
            hook.remove()
        for name in ("log_probs", "entropy"):
            if output.get(name) is not None:
                output[name] = output[name].new_zeros(mask.shape).masked_scatter(mask, output[name])
        output.label_mask = mask
        return output

    model.forward = types.MethodType(forward, model)


def add_value_head(model: PreTrainedModel, init: str = "zero", detach: bool = False) -> nn.Linear:
    """
    Give a causal language model a float32 value head, and return it.

    The fused forward then returns [`PolicyAndValueOutput`]. Log-probabilities and values come from one pass through
    the trunk, inside the wrapped forward, where DDP, FSDP and ZeRO see every parameter that is used.

    Args:
        model (`PreTrainedModel`): a causal language model with `trl.trainer.utils.add_fused_lm_head` applied.
        init (`str`): `"zero"` (openai/lm-human-preferences) or `"normal"`, std 1/sqrt(d + 1) (arXiv 2403.17031).
        detach (`bool`): whether the values' gradient stops at the head.
    """
    lm_head = model.get_output_embeddings()
    width = lm_head.in_features
    head = nn.Linear(width, 1, device=lm_head.weight.device, dtype=torch.float32)
    nn.init.zeros_(head.bias)
    if init == "zero":
        nn.init.zeros_(head.weight)
    else:
        nn.init.normal_(head.weight, std=1 / math.sqrt(width + 1))
    model.add_module(VALUE_HEAD, head)
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return fused_forward(*args, **kwargs)
        trunk = {}
        hook = self.base_model.register_forward_hook(lambda _, __, output: trunk.update(h=output.last_hidden_state))
        try:
            output = fused_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            hook.remove()
        hidden = trunk["h"][:, :-1]
        if detach:
            hidden = hidden.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            values = getattr(self, VALUE_HEAD)(hidden.float()).squeeze(-1)
        return PolicyAndValueOutput(**output, value_preds=values)

    model.forward = types.MethodType(forward, model)
    return head
