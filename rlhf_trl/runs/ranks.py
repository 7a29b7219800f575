"""
The ranks of a launch: which of them writes, and agreement between them. Imports nothing heavy by itself.

Callbacks and trainers ask the object that transformers hands them (`state.is_world_process_zero`, `accelerator`);
everything else asks [`is_main_process`].
"""

import os
from typing import TYPE_CHECKING

from rlhf_trl.errors import ConfigError

if TYPE_CHECKING:
    import torch


def is_main_process() -> bool:
    """Return whether this process is rank 0, the one that writes and prints, by the launcher's environment."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Return the number of ranks, by the launcher's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def any_rank(flag: bool, device: "torch.device") -> bool:
    """Return on all ranks whether `flag` is set on any of them. All ranks must call it."""
    return bool(highest_of_ranks(int(flag), device))


def highest_of_ranks(value: int, device: "torch.device") -> int:
    """Return on all ranks the highest of their values. All ranks must call it."""
    import torch

    if not torch.distributed.is_initialized():
        return value
    found = torch.tensor(value, device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return int(found.item())


def raise_on_all_ranks(problems: list[str]) -> None:
    """
    Raise on all ranks the problems that rank 0 has found, if any: a rank that continued alone would wait forever. All
    ranks must call it.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with all problems of rank 0.
    """
    from accelerate.utils import broadcast_object_list

    (problems,) = broadcast_object_list([problems])
    if problems:
        raise ConfigError.join(problems)


def leave_process_group() -> None:
    """
    Leave the process group of the ranks, if there are several, at the end of a run: threads of gloo that outlive the
    interpreter can abort a process whose work is done, and its launcher would report a failure.
    """
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
