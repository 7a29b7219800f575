"""
Agreement of the nodes of a launch: on the problems of each, and that they share the run directory. Imports nothing
heavy by itself.

A node that ends alone leaves the others waiting for half an hour, without a word of why.
"""

import contextlib
import hashlib
import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.lock import LOCK_FILE
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.runs.record import RUN_FILE

# How long the nodes wait for the slowest to import the libraries, and for a file to be seen through NFS's caches
SECONDS_FOR_NODES = 300.0
SECONDS_FOR_FILES = 60.0


def has_several_nodes() -> bool:
    """Return whether the ranks were started by several launchers, each on a node of its own, that share a store."""
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    return nodes > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def problems_of_all_nodes(problems: list[str], meeting: str, run_dir: str | os.PathLike | None = None) -> list[str]:
    """
    Return the problems of all nodes, so that all end with them. The first rank of each node must call it.

    Args:
        problems (`list[str]`): those of this node.
        meeting (`str`): name of the meeting, another one for each.
        run_dir (`str`, *optional*): directory of the run, where the nodes should see the same one.

    Returns:
        `list[str]`: those of this node alone on its other ranks, which end with the first one, and with one node.
    """
    if not has_several_nodes() or os.environ.get("LOCAL_RANK", "0") != "0":
        return problems
    from torch.distributed import DistError, TCPStore

    node, nodes = int(os.environ["GROUP_RANK"]), int(os.environ["GROUP_WORLD_SIZE"])
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=SECONDS_FOR_NODES))
    start = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    prefix = "/".join(["rlhf_trl", *start, meeting])
    keys = [f"{prefix}/{i}" for i in range(nodes)]
    store.set(keys[node], json.dumps(_report(problems, run_dir)))
    with contextlib.suppress(DistError):  # the end of the time
        store.wait(keys, timedelta(seconds=SECONDS_FOR_NODES))
    there = {i: json.loads(store.get(key)) for i, key in enumerate(keys) if store.check([key])}
    if node != 0:
        store.set(f"{keys[node]}/read", "yes")
    else:  # the store is this node's, and ends with it
        with contextlib.suppress(DistError):
            store.wait([f"{keys[i]}/read" for i in there if i], timedelta(seconds=10))
    return joined_problems(there, nodes)


def _report(problems: list[str], run_dir: str | os.PathLike | None) -> dict[str, Any]:
    """Return what the other nodes are to know of this one."""
    record = Path(run_dir, RUN_FILE) if run_dir else None
    digest = hashlib.sha256(record.read_bytes()).hexdigest() if record and record.is_file() else None
    where = str(Path(run_dir).absolute()) if run_dir else None
    return {"host": socket.gethostname(), "problems": problems, "run_dir": where, "record": digest}


def joined_problems(reports: dict[int, dict[str, Any]], nodes: int) -> list[str]:
    """
    Return the problems of all nodes as one list.

    Args:
        reports (`dict`): by node: its `host`, its `problems`, its `run_dir` and a digest of the `record` in it.
        nodes (`int`): number of nodes.
    """
    hosts = {i: f"{report['host']} (machine_rank {i})" for i, report in reports.items()}
    if missing := [f"machine_rank {i}" for i in range(nodes) if i not in reports]:
        listed = os.environ.get("SLURM_JOB_NODELIST")
        among = f", one of {listed}," if listed else ""
        return [
            f"{', '.join(missing)}{among} did not start within {SECONDS_FOR_NODES:g} s; {', '.join(hosts.values())} "
            "did. Look at the output of the launch there."
        ]
    first = reports[min(reports)]
    apart = [i for i, report in reports.items() if report["record"] != first["record"]]
    if apart:
        return [_not_shared(first["run_dir"], [hosts[min(reports)]], [hosts[i] for i in apart])]
    found: dict[str, list[int]] = {}
    for i, report in reports.items():
        for problem in report["problems"]:
            found.setdefault(problem, []).append(i)
    return [
        problem if len(where) == nodes else f"On {', '.join(hosts[i] for i in where)}: {problem}"
        for problem, where in found.items()
    ]


def _not_shared(run_dir: str, some: list[str], others: list[str]) -> str:
    return (
        f"The nodes don't share the run directory: `{run_dir}` on {', '.join(some)} is another one than on "
        f"{', '.join(others)}. Start the launch in a folder of a file system that all nodes share, or set "
        "`runs_dir=...` to one."
    )


def check_shared(run_dir: str | os.PathLike) -> None:
    """
    Check that all nodes see the lock that rank 0 has on the run directory. All ranks must call it.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: on all ranks, if one sees another directory.
    """
    if not has_several_nodes():
        return
    from accelerate.utils import broadcast_object_list, gather_object

    path = Path(run_dir, LOCK_FILE)
    text = path.read_text() if is_main_process() else ""
    text, of_rank_0 = broadcast_object_list([text, str(Path(run_dir).absolute())])
    host = f"{socket.gethostname()} (machine_rank {os.environ['GROUP_RANK']})"
    seen = gather_object([(host, _sees(path, text))])
    if others := sorted({host for host, sees in seen if not sees}):
        some = sorted({host for host, sees in seen if sees})
        raise ConfigError(_not_shared(of_rank_0, some, others))


def _sees(path: Path, text: str) -> bool:
    """Return whether a file has a text, now or soon."""
    deadline = time.monotonic() + SECONDS_FOR_FILES
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == text:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
