"""
The lock that one process has on the run directory it writes. Imports nothing heavy.

The lock is the operating system's. On file systems that several machines share it isn't always seen by the others
(Lustre with `localflock`, or none at all), so that its holder also gives a sign of life: it touches the file.
"""

import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.ranks import is_main_process

LOCK_FILE = ".lock"
# Seconds between two signs of life, and how long another machine watches for one
BEAT = 10.0
WATCH = 45.0
# A file that was last touched longer ago than this isn't watched: clocks of machines differ, but not by hours
LONG_AGO = 4 * 3600.0


class Owner(NamedTuple):
    """
    Process that has a run directory, as its lock file says.

    Attributes:
        pid (`int`): process; 0 in the moment before it has written the file, and after its end.
        host (`str`): its machine.
        job (`str`): its Slurm job and how often that was requeued, `123.0`; empty outside of one.
    """

    pid: int = 0
    host: str = ""
    job: str = ""

    @classmethod
    def this(cls) -> "Owner":
        """Return this process."""
        job, restarts = (os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "RESTART_COUNT"))
        return cls(os.getpid(), socket.gethostname(), f"{job}.{restarts or 0}" if job else "")

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is on another machine."""
        return self.host not in ("", socket.gethostname())

    def restarts(self, other: "Owner") -> bool:
        """Return whether another owner is an earlier start of this Slurm job, which was requeued since."""
        (job, _, start), (other_job, _, other_start) = (each.job.partition(".") for each in (self, other))
        return bool(job) and job == other_job and int(start) > int(other_start)


@contextmanager
def locked(run_dir: str | os.PathLike) -> Iterator[None]:
    """
    Lock a run directory, which is made if need be, for this process alone. Call it on rank 0.

    The lock is the operating system's, on the file `.lock`: it ends with the process, however that ends. The file says
    which process has it, and is touched every ten seconds.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if another process has locked it.
    """
    path = Path(run_dir, LOCK_FILE)
    try:
        os.makedirs(run_dir, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"`{run_dir}` can't be written: {error.strerror}. Set another `runs_dir=...`.") from error
    ended = threading.Event()
    try:
        works, owner = _lock(descriptor, run_dir), _owner(descriptor)
        if _is_alive(path, owner, works):
            raise ConfigError(in_use_problem(run_dir, owner))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, " ".join(map(str, Owner.this())).encode(), 0)
        threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        ended.set()
        with suppress(OSError):  # not by `close` alone: a forked worker that is still there holds the lock as well
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int, run_dir: str | os.PathLike) -> bool:
    """Take the lock, and return whether the file system has locks."""
    for _ in range(20):  # another process may be looking at it just now, see `lock_owner`
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
        except OSError as error:
            print(f"`{run_dir}` can't be locked ({error.strerror}): don't start the same run a second time.")
            return False
    raise ConfigError(in_use_problem(run_dir, _owner(descriptor)))


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def lock_owner(run_dir: str | os.PathLike) -> Owner | None:
    """Return the process that has locked a run directory, if it is another one than this."""
    path = Path(run_dir, LOCK_FILE)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    works = True
    try:
        owner = _owner(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(descriptor)  # once more: it may have written the file since
        return None if owner == Owner.this() else owner
    except OSError:  # a file system without locks
        works = False
    finally:
        os.close(descriptor)
    return owner if _is_alive(path, owner, works) else None


def _owner(descriptor: int) -> Owner:
    pid, host, job, *_ = [*os.pread(descriptor, 512, 0).decode().split(" "), "", "", ""]
    return Owner(int(pid or 0), host, job)  # the file is empty in the moment between the lock and its text


# Time of the last sign of those that were found dead
_dead: dict[str, int] = {}


def _is_alive(path: Path, owner: Owner, works: bool) -> bool:
    """
    Return whether the process that a lock file names is there, though the file isn't locked.

    A process that ends empties the file. One that was killed leaves its name; where the machine is another one, or the
    file system has no locks, only its sign of life can tell. An earlier start of this Slurm job is over.
    """
    this = Owner.this()
    if not owner.pid or owner == this or (works and not owner.is_elsewhere) or this.restarts(owner):
        return False
    last = _touched(path)
    if _dead.get(str(path.absolute())) == last or time.time() - last / 1e9 > LONG_AGO:
        return False
    if is_main_process():
        where = f" on {owner.host}" if owner.is_elsewhere else ""
        print(f"Waiting {WATCH:g} s for a sign of life of process {owner.pid}{where} in `{path.parent}`.", flush=True)
    deadline = time.monotonic() + WATCH
    while time.monotonic() < deadline:
        time.sleep(min(1.0, WATCH / 10))
        if _touched(path) != last:
            return True
    _dead[str(path.absolute())] = last
    return False


def _touched(path: Path) -> int:
    """Return when a file was touched, in nanoseconds; 0 where it is gone. NFS asks its server when it opens a file."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def in_use_problem(run_dir: str | os.PathLike, owner: Owner) -> str:
    """Return the problem of a directory that another process has locked."""
    stop = f"stop it with `kill {owner.pid}`"
    if owner.is_elsewhere:
        stop = f"stop it there (if it is gone, delete `{Path(run_dir, LOCK_FILE)}`)"
    return (
        f"The run in `{run_dir}` is still in progress, as process {owner.pid}"
        f"{f' on {owner.host}' if owner.is_elsewhere else ''}. Wait for it, {stop}, or give this one another "
        "`run_name=...`."
    )
