"""What makes training on a CPU quicker changes no number."""

import platform

from rlhf_trl import cpu


def test_freed_memory_is_kept_unless_the_user_says_otherwise(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    assert cpu.keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert not cpu.keep_freed_memory()
