"""The lock that one process has on the run directory it writes. Imports nothing heavy."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf_trl.errors import ConfigError

LOCK_FILE = ".lock"


@contextmanager
def locked(run_dir: str | os.PathLike) -> Iterator[None]:
    """
    Lock a run directory, which is made if need be, for this process alone. Call it on rank 0.

    The lock is the operating system's, on the file `.lock`: it ends with the process, however that ends. The file says
    which process has it.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if another process has locked it.
    """
    try:
        os.makedirs(run_dir, exist_ok=True)
        descriptor = os.open(Path(run_dir, LOCK_FILE), os.O_RDWR | os.O_CREAT, 0o644)
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
    for _ in range(20):  # another process may be looking at it just now, see `lock_owner`
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError as error:
            print(f"`{run_dir}` can't be locked ({error.strerror}): don't start the same run a second time.")
            return None
    raise ConfigError(in_use_problem(run_dir, _owner(descriptor)))


def lock_owner(run_dir: str | os.PathLike) -> tuple[int, str] | None:
    """Return process id and host of the process that has locked a run directory, if it is another one than this."""
    try:
        descriptor = os.open(Path(run_dir, LOCK_FILE), os.O_RDONLY)
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
    return int(pid or 0), host  # the file is empty in the moment between the lock and its text


def in_use_problem(run_dir: str | os.PathLike, owner: tuple[int, str]) -> str:
    """Return the problem of a directory that another process has locked."""
    pid, host = owner
    here = host in ("", socket.gethostname())
    stop = (
        f"stop it with `kill {pid}`" if here else f"stop it there (if it is gone, delete `{Path(run_dir, LOCK_FILE)}`)"
    )
    return (
        f"The run in `{run_dir}` is still in progress, as process {pid}{'' if here else f' on {host}'}. Wait for it, "
        f"{stop}, or give this one another `run_name=...`."
    )
