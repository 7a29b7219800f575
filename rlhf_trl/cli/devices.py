"""GPUs of the jobs of a sweep that run side by side on one machine: each job gets its own."""

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rlhf_trl.cli.launcher import launch_setting
from rlhf_trl.errors import ConfigError

# Hydra launchers that start jobs side by side on this machine. On Slurm each job has an allocation of its own
SIDE_BY_SIDE = ("JoblibLauncher", "LocalLauncher")
SECONDS_BETWEEN_LOOKS = 1.0


def visible_devices() -> list[str]:
    """Return the GPUs that a job may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in (word.strip() for word in named.split(",")) if name not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def devices_of_job(
    launcher: Mapping[str, Any], given: int | None, accelerate: str | None, options: Sequence[str]
) -> tuple[list[str], int]:
    """
    Return the GPUs that the jobs of a sweep share, and how many of them each job gets.

    Args:
        launcher (`Mapping`):
            The config of Hydra's launcher.
        given (`int`, *optional*):
            GPUs of each job. Without it as many as a job has processes, else the share of each of `n_jobs`.
        accelerate (`str`, *optional*), options (`Sequence[str]`):
            File and options of `accelerate launch`, see [`~rlhf_trl.cli.launcher.launch_command`].

    Returns:
        `tuple`: nothing and 0 where jobs run one after another, so that each has all, or on the CPU.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a job needs more than there are.
    """
    side_by_side = str(launcher.get("_target_")).endswith(SIDE_BY_SIDE)
    if (not side_by_side and given is None) or launch_setting(accelerate, options, "use_cpu") is True:
        return [], 0
    devices = visible_devices()
    processes = launch_setting(accelerate, options, "num_processes")
    jobs = launcher.get("n_jobs") or -1
    wanted = given or processes or (max(1, len(devices) // jobs) if jobs > 0 else 1)
    if devices and int(wanted) > len(devices):
        why = f"`gpus_per_job` is {given}" if given else f"A job has {processes} processes"
        raise ConfigError(f"{why}, and this machine shows {len(devices)} GPUs ({', '.join(devices)}). Set fewer.")
    return devices, int(wanted) if devices else 0


@contextmanager
def claimed(sweep_dir: str | os.PathLike, devices: Sequence[str], count: int) -> Iterator[list[str]]:
    """
    Claim GPUs for a job until the block ends, once enough of them are free.

    A claim is a lock of the operating system, which ends with this process, however that ends.

    Args:
        sweep_dir (`str`): directory of the sweep, whose jobs share the GPUs.
        devices (`Sequence[str]`): all of them.
        count (`int`): number of those to claim.

    Yields:
        `list[str]`: those claimed.
    """
    name = hashlib.sha256(str(Path(sweep_dir).absolute()).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"rlhf_trl-{os.getuid()}", name)  # of this machine, where locks work
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        mine: list[str] = []
        while len(mine) < count:
            with ExitStack() as tried, open(folder / "claims", "w") as claims:
                fcntl.flock(claims, fcntl.LOCK_EX)  # one job at a time, else two could hold half of what both need
                mine = []
                for device in devices:
                    if len(mine) < count and _try_lock(tried, folder / device.replace("/", "_")):
                        mine.append(device)
                if len(mine) == count:
                    held.enter_context(tried.pop_all())
            if len(mine) < count:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        yield mine


def _try_lock(stack: ExitStack, path: Path) -> bool:
    file = open(path, "w")  # noqa: SIM115 - closed with the stack
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    stack.enter_context(file)
    return True
