"""Workers of data loaders, which leave the signals of schedulers to the process that trains."""

import functools
import signal
from collections.abc import Callable
from typing import Any

from rlhf_trl.errors import PREEMPTIONS


def ignore_preemptions(loader: Any) -> Any:
    """
    Make the workers of a data loader ignore the signals of schedulers, and return the loader.

    Slurm and `timeout` signal all processes. PyTorch's workers end at SIGTERM, and the run then fails before it has
    saved a checkpoint.

    Args:
        loader (`torch.utils.data.DataLoader`): loader that hasn't started its workers yet.
    """
    own = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper reads attributes of it, and sets its own
    own.worker_init_fn = functools.partial(_begin, own.worker_init_fn)
    return loader


def _begin(begin: Callable[[int], None] | None, worker: int) -> None:
    for number in PREEMPTIONS:
        signal.signal(number, signal.SIG_IGN)
    if begin is not None:
        begin(worker)
