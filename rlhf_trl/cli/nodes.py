"""
A meeting of the nodes of a launch before their launchers start, which says by name which one can't be reached.

    python -m rlhf_trl.cli.nodes --hosts gpu01 gpu02 --rank 1 && accelerate launch --machine_rank 1 ...

Without it torchrun's own meeting ends after ten minutes in a traceback that counts the nodes and names none.
"""

import argparse
import socket
import sys
import time
from collections.abc import Sequence

from rlhf_trl.errors import ConfigError

PORT = 29400
ANSWER = "rlhf_trl:"  # begins what the first node says
LONGEST = 100_000  # characters of it
SECONDS = 120.0


def main(words: Sequence[str] | None = None) -> None:
    """
    Wait until all nodes have met.

    Raises:
        SystemExit: with status 2 and a message on each node that is there, if one doesn't come in time.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_trl.cli.nodes", description="Wait until all nodes of a launch have met."
    )
    parser.add_argument("--hosts", nargs="+", required=True, help="all nodes, the one with machine_rank 0 first")
    parser.add_argument("--rank", type=int, required=True, help="machine_rank of this node")
    parser.add_argument("--port", type=int, default=PORT, help=f"a free port of the first node ({PORT})")
    parser.add_argument("--timeout", type=float, default=SECONDS, help=f"seconds to wait ({SECONDS:g})")
    given = parser.parse_args(words)
    if not 0 <= given.rank < len(given.hosts):
        parser.error(f"--rank {given.rank} is none of {len(given.hosts)} --hosts, which count from 0")
    try:
        if given.rank == 0:
            receive(given.hosts, given.port, given.timeout)
        else:
            report(given.hosts, given.rank, given.port, given.timeout)
    except ConfigError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def receive(hosts: Sequence[str], port: int, timeout: float) -> None:
    """
    Wait on the first node for the others, and tell them who is missing.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if one hasn't come in time; the message names it.
    """
    try:
        server = socket.create_server(("", port), backlog=len(hosts))
    except OSError as error:
        raise ConfigError(
            f"Port {port} of {hosts[0]} can't be used: {error.strerror}. Set another `--port`."
        ) from error
    met: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout
    with server:
        while len(met) < len(hosts) - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                node, _ = server.accept()
                node.settimeout(10.0)
                rank = int(node.makefile().readline() or -1)
            except (OSError, ValueError):  # the end of the time, or something else that looks for open ports
                continue
            if 0 < rank < len(hosts):
                met[rank] = node
        missing = [f"{host} (machine_rank {rank})" for rank, host in enumerate(hosts) if rank and rank not in met]
        problem = ""
        if missing:
            problem = (
                f"{', '.join(missing)} did not reach {hosts[0]}:{port} within {timeout:g} s. Look whether the launch "
                "has started there, and whether a firewall is between them."
            )
        for node in met.values():
            node.sendall(f"{ANSWER}{problem}\n".encode())
        for node in met.values():  # those who called close first, so that the port is free at once
            node.recv(1)
            node.close()
    if problem:
        raise ConfigError(problem)


def report(hosts: Sequence[str], rank: int, port: int, timeout: float) -> None:
    """
    Tell the first node that this one is there, and wait for the others.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the first node can't be reached in time, or doesn't know all others then.
    """
    deadline, why = time.monotonic() + timeout, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((hosts[0], port), timeout=left) as node:
                node.sendall(f"{rank}\n".encode())
                node.settimeout(left + 10)
                answer = node.makefile(errors="replace").readline(LONGEST)
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(min(0.2, left))
            continue
        if not answer.startswith(ANSWER):
            why = f"what listens there answers {answer.strip()[:60]!r}; set another `--port`" if answer else why
            time.sleep(min(0.2, left))
            continue
        if problem := answer.removeprefix(ANSWER).strip():
            raise ConfigError(problem)
        return
    raise ConfigError(
        f"{hosts[rank]} (machine_rank {rank}) can't reach {hosts[0]}:{port} within {timeout:g} s ({why}). Look "
        "whether the launch has started there, and whether a firewall is between them."
    )


if __name__ == "__main__":
    main()
