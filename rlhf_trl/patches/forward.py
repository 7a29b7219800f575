"""Transformers: the forward of one model wrapped, as TRL's fused head wraps it."""

import functools
import types
from collections.abc import Callable

from transformers import PreTrainedModel


def wrap_forward(model: PreTrainedModel, wrapper: Callable) -> None:
    """
    Replace the forward of a model.

    TRL adds its fused head (`trl.trainer.utils.add_fused_lm_head`) to the model itself, below adapters and below what
    DDP, FSDP and DeepSpeed wrap. Whatever changes the inputs or outputs of that head, or adds parameters to its pass,
    must be in the same place.

    Seen in: TRL 1.16.
    Test: `test_a_wrapped_forward_keeps_its_signature`.

    Args:
        model (`PreTrainedModel`):
            Model whose forward is replaced, not that of other models of its class.
        wrapper (callable):
            Function that gets the model, its former forward and the arguments of a call. The signature of the class's
            own forward is kept, by which `generate` and the Trainer check arguments and columns.
    """
    former = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, **kwargs):
        return wrapper(self, former, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
