"""What makes training on a CPU quicker, with the same numbers. On an accelerator none of this acts."""

import ctypes
import os
import platform

# From glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# No buffer of a training step on a CPU is larger; 2 GiB is the most that mallopt's int takes
LARGEST_KEPT = 2**30


def keep_freed_memory() -> bool:
    """
    Lets glibc keep large buffers that are freed, for the next step to use.

    By default each one is given back to the system and cleared by it again at the next step, which took up to half of
    a small model's step. The process holds its peak memory until it ends.

    Returns:
        `bool`: whether it was set: not without glibc, nor where the user has set `MALLOC_*_THRESHOLD_`.
    """
    set_by_user = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if set_by_user or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def score_labels_only() -> None:
    """
    Makes TRL's fused log-probabilities compute the positions with a label alone on a CPU, too.

    TRL 1.16 does so on GPUs and scores every position, prompts and padding as well, elsewhere, because some
    accelerators compile anew for each number of positions (`trl.trainer.utils.add_fused_lm_head`).
    """
    from trl.trainer import utils

    if not hasattr(utils._use_triton, "on_gpus"):
        on_gpus = utils._use_triton

        def compact(device) -> bool:
            return device.type == "cpu" or on_gpus(device)

        compact.on_gpus = on_gpus
        utils._use_triton = compact
