"""
A run's directory while it is written: claimed by one process, and with the run that it overwrites kept aside until the
new one has begun. Imports nothing heavy.
"""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf_trl.errors import ConfigError

LOCK = ".lock"
OLD = ".overwritten"  # the earlier run, whole
MOVING = f"{OLD}.partial"  # on its way there or back
GONE = f"{OLD}.deleted"
# Hydra's folder and logs are of the new run already: Hydra writes them before anything of ours is called
KEPT = {".hydra", LOCK, OLD, MOVING, GONE}


@contextmanager
def claimed(run_dir: str | os.PathLike) -> Iterator[None]:
    """
    Claim a run directory, which is made if need be, for this process alone. Call it on rank 0.

    The claim is a lock of the operating system's on the file `.lock`: it ends with the process, however that ends. The
    file says whose it is.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if another process has claimed it.
    """
    try:
        os.makedirs(run_dir, exist_ok=True)
        descriptor = os.open(Path(run_dir, LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"`{run_dir}` can't be written: {error.strerror}. Set another `runs_dir=...`.") from error
    try:
        _lock(descriptor, run_dir)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
        yield
    finally:
        with suppress(OSError):  # not by `close` alone: a forked worker that is still there holds the lock as well
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int, run_dir: str | os.PathLike) -> None:
    for _ in range(20):  # somebody may be looking at it just now, see `holder`
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError as error:
            print(f"`{run_dir}` can't be locked ({error.strerror}): don't start the same run a second time.")
            return None
    raise ConfigError(under_way(run_dir, _owner(descriptor)))


def holder(run_dir: str | os.PathLike) -> tuple[int, str] | None:
    """Process id and host of the process that has claimed a run directory, if it is another one than this."""
    try:
        descriptor = os.open(Path(run_dir, LOCK), os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(descriptor)
        return None if owner == (os.getpid(), socket.gethostname()) else owner
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return None


def _owner(descriptor: int) -> tuple[int, str]:
    pid, _, host = os.pread(descriptor, 512, 0).decode().partition(" ")
    return int(pid or 0), host  # it may have been claimed so lately that the file is empty


def under_way(run_dir: str | os.PathLike, owner: tuple[int, str]) -> str:
    """The problem of a directory that another process has claimed."""
    pid, host = owner
    here = host in ("", socket.gethostname())
    stop = f"stop it with `kill {pid}`" if here else f"stop it there (if it is gone, delete `{Path(run_dir, LOCK)}`)"
    return (
        f"The run in `{run_dir}` is still under way, as process {pid}{'' if here else f' on {host}'}. Wait for it, "
        f"{stop}, or give this one another `run_name=...`."
    )


def entries(run_dir: str | os.PathLike) -> list[Path]:
    """What a run has left in its directory."""
    return [path for path in Path(run_dir).iterdir() if path.name not in KEPT and path.suffix != ".log"]


def clear(run_dir: str | os.PathLike) -> None:
    """Delete what a run has left in its directory."""
    for path in entries(run_dir):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def set_aside(run_dir: str | os.PathLike) -> None:
    """Move what an earlier run has left out of the way of the one that overwrites it."""
    moving = Path(run_dir, MOVING)
    moving.mkdir()
    for path in entries(run_dir):
        path.rename(moving / path.name)
    moving.rename(Path(run_dir, OLD))


def put_back(run_dir: str | os.PathLike) -> None:
    """Delete what the new run has left, and move the one that it was to overwrite back, if there is one."""
    old, moving = Path(run_dir, OLD), Path(run_dir, MOVING)
    if not moving.exists():
        clear(run_dir)
        if old.exists():
            old.rename(moving)
    if moving.exists():
        for path in moving.iterdir():
            path.rename(Path(run_dir, path.name))
        moving.rmdir()


def holds_old(run_dir: str | os.PathLike) -> bool:
    """Whether an earlier run is set aside: the new one has not begun."""
    return Path(run_dir, OLD).exists()


def discard_old(run_dir: str | os.PathLike) -> None:
    """Delete the run that was set aside: the new one has begun."""
    old, gone = Path(run_dir, OLD), Path(run_dir, GONE)
    if old.exists():
        old.rename(gone)  # at once: a part of it must never be put back
    shutil.rmtree(gone, ignore_errors=True)


def recover(run_dir: str | os.PathLike) -> None:
    """Settle what a killed process has left half done: the old run is put back unless the new one has a checkpoint."""
    has_begun = any(Path(run_dir).glob("checkpoint-*/")) or any(Path(run_dir).glob("member_*/checkpoint-*/"))
    if (Path(run_dir, OLD).exists() and not has_begun) or Path(run_dir, MOVING).exists():
        put_back(run_dir)
    discard_old(run_dir)
