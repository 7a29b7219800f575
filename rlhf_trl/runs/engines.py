"""The engine that a launch asks for, by the environment that `accelerate launch` sets. Imports nothing heavy."""

import os
from typing import Any

from rlhf_trl.runs.ranks import world_size


def uses_deepspeed() -> bool:
    """Return whether DeepSpeed makes the updates."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def uses_fsdp() -> bool:
    """Return whether FSDP shards the parameters."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def uses_zero3() -> bool:
    """Return whether DeepSpeed shards the parameters."""
    return uses_deepspeed() and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


def shards_parameters() -> bool:
    """Return whether FSDP or ZeRO-3 shards the parameters."""
    return uses_zero3() or uses_fsdp()


def deepspeed_on_cpu() -> bool:
    """Return whether DeepSpeed's ranks are those of a CPU, as a rehearsal of a run on GPUs."""
    return uses_deepspeed() and os.environ.get("DS_ACCELERATOR") == "cpu"


def engine() -> str:
    """Return the name of the engine, or `none`."""
    if uses_deepspeed():
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        return f"DeepSpeed ZeRO-{stage}" if stage else "DeepSpeed"
    if uses_fsdp():
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return "DDP" if world_size() > 1 else "none"


def used_engine(use_cpu: bool = False) -> str:
    """
    Return the engine that accelerate runs: it leaves out DeepSpeed with `use_cpu`, and FSDP in one process.

    Args:
        use_cpu (`bool`): the trainer's argument.
    """
    name, ranks = engine(), world_size()
    if (name.startswith("DeepSpeed") and use_cpu) or (name.startswith("FSDP") and ranks == 1):
        return "DDP" if ranks > 1 else "none"
    return name


def cpu_arguments() -> dict[str, Any]:
    """
    Return the trainer's arguments by which the ranks of a machine without an accelerator find each other; without
    them each would train by itself.
    """
    if not uses_deepspeed():
        return {"use_cpu": True}
    return {"ddp_backend": "gloo"} if world_size() > 1 else {}  # `use_cpu` would leave DeepSpeed out
