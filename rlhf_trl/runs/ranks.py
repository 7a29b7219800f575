"""Agreement between the ranks of a run."""

import os

import torch
from accelerate.utils import broadcast_object_list

from rlhf_trl.errors import ConfigError


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank. All ranks have to call it, and get the same answer."""
    if not torch.distributed.is_initialized():
        return flag
    found = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found.item())


def is_first_rank() -> bool:
    """Whether this process is the one that writes and prints, by what the launcher says."""
    return os.environ.get("RANK", "0") == "0"


def raise_everywhere(problems: list[str]) -> None:
    """Raise on every rank what rank 0 has found, if anything: a rank that goes on alone would wait for ever."""
    (problems,) = broadcast_object_list([problems])
    if problems:
        raise ConfigError.join(problems)
