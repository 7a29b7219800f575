"""glibc: freed memory kept by a process that trains on a CPU. Inactive on accelerators."""

import ctypes
import os
import platform

# From glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# No buffer of a training step on a CPU is larger; 2 GiB is the largest value of mallopt's int
LARGEST_KEPT = 2**30


def keep_freed_memory() -> bool:
    """
    Let glibc keep freed large buffers for the next step.

    By default each one is returned to the system, which clears it again at the next step. That took up to half of a
    small model's step. The process holds its peak memory until it ends.

    Seen in: glibc 2.36.
    Test: `test_freed_memory_is_kept_unless_the_user_says_otherwise`.

    Returns:
        `bool`: whether it was set: not without glibc, nor where the user has set `MALLOC_*_THRESHOLD_`.
    """
    set_by_user = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if set_by_user or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
