"""The device of a rank: the memory that it may take, and GPUs that a run leaves unused."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import TrainingArguments

# Where Linux names the control groups of a process, and has their files
GROUPS, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def unused_devices(args: TrainingArguments) -> str | None:
    """Return that GPUs stay unused, and how to use them; `None` where there are no others."""
    visible = torch.cuda.device_count()
    if args.n_gpu == 0 or args.world_size > 1 or visible < 2:
        return None
    return (
        f"{visible} GPUs are visible, and this one process trains on the first alone. To train on all of them: "
        f"`accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes {visible} train.py ...`; to "
        "choose another one, or to be told no more: `export CUDA_VISIBLE_DEVICES=0`."
    )


class Device(NamedTuple):
    """
    Memory that a rank has.

    Attributes:
        name (`str`): for messages.
        memory (`int`): bytes.
    """

    name: str
    memory: int


def device(use_cpu: bool = False) -> Device:
    """Return the device of this rank: a GPU, or its share of what the machine, its container or its job may take."""
    if torch.cuda.is_available() and not use_cpu:
        properties = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
        return Device(properties.name, properties.total_memory)
    memory, name = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
    if (limit := group_limit()) is not None and limit < memory:
        memory, name = limit, "this container or job (its memory limit)"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Device(name if ranks == 1 else f"a rank's share of {name} ({ranks} ranks)", memory // ranks)


def group_limit(groups: Path = GROUPS, mounted: Path = MOUNTED) -> int | None:
    """
    Return the lowest memory limit of the control groups that this process is in, as containers and Slurm set them.

    Args:
        groups (`Path`): the file that names them.
        mounted (`Path`): folder of their files, by version 1 or 2.

    Returns:
        `int` or `None`: bytes; `None` without a limit.
    """
    limits = []
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (mounted / "memory", "memory.limit_in_bytes") if controllers else (mounted, "memory.max")
        folder = base / path.lstrip("/")
        for each in (folder, *folder.parents):  # in a container the path may be that outside of it
            file = each / name
            if each.is_relative_to(base) and file.is_file() and (text := file.read_text().strip()).isdecimal():
                limits.append(int(text))
    return min(limits, default=None)
