"""FSDP2 on CPU ranks, which accelerate leaves out in silence; PyTorch's `fully_shard` itself runs over gloo."""

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu() -> None:
    """Let `AcceleratorState` of accelerate 1.15 take CPU ranks for FSDP, as it takes those of accelerators."""
    initialize = AcceleratorState.__init__

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and fsdp_plugin is not None
        if asked and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = __init__
