"""The meeting of nodes before a launch: who doesn't come is named on all that did."""

import contextlib
import socket
import threading

import pytest

from rlhf_trl.cli import nodes
from rlhf_trl.errors import ConfigError

HOSTS = ["127.0.0.1", "gpu02", "gpu03"]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def meet(ranks, port, timeout=5.0) -> dict[int, str | None]:
    """Let nodes meet, each in a thread, and return the error of each."""
    errors: dict[int, str | None] = {}

    def node(rank):
        try:
            nodes.receive(HOSTS, port, timeout) if rank == 0 else nodes.report(HOSTS, rank, port, timeout)
            errors[rank] = None
        except ConfigError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=node, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_all_nodes_meet_and_the_port_is_free_again(port):
    for _ in range(2):
        assert meet([2, 1, 0], port) == {0: None, 1: None, 2: None}


def test_a_node_that_does_not_come_is_named_on_the_others(port):
    errors = meet([0, 1], port, timeout=0.5)
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"gpu03 (machine_rank 2) did not reach 127.0.0.1:{port} within 0.5 s.")


def test_a_first_node_that_can_not_be_reached_is_named(port, capsys):
    with pytest.raises(SystemExit) as ended:
        nodes.main(["--hosts", *HOSTS, "--rank", "1", "--port", str(port), "--timeout", "0.3"])
    assert ended.value.code == 2
    assert (
        f"gpu02 (machine_rank 1) can't reach 127.0.0.1:{port} within 0.3 s (Connection refused)"
        in capsys.readouterr().err
    )


def test_a_stranger_is_no_node(port):
    def call():
        while not called.is_set():
            with (
                contextlib.suppress(ConnectionRefusedError),
                socket.create_connection(("127.0.0.1", port)) as stranger,
            ):
                stranger.sendall(b"GET / HTTP/1.1\r\n")
                called.set()

    def come_later():
        called.wait()
        nodes.report(HOSTS, 1, port, 5.0)

    called = threading.Event()
    threads = [threading.Thread(target=each) for each in (call, come_later)]
    for thread in threads:
        thread.start()
    assert meet([0, 2], port) == {0: None, 2: None}
    for thread in threads:
        thread.join()


def test_another_server_on_the_port_is_not_the_first_node():
    def answer(server):
        with contextlib.suppress(OSError):
            while True:
                caller, _ = server.accept()
                with caller:
                    caller.recv(100)
                    caller.sendall(b"HTTP/1.1 400 Bad Request\r\n")

    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    thread = threading.Thread(target=answer, args=(server,), daemon=True)
    thread.start()
    with server, pytest.raises(ConfigError) as raised:
        nodes.report(HOSTS, 1, port, 0.5)
    assert f"can't reach 127.0.0.1:{port} within 0.5 s (what listens there answers 'HTTP/1.1 400" in str(raised.value)
    assert "`--port`" in str(raised.value)


def test_a_rank_without_a_host_is_refused(capsys):
    with pytest.raises(SystemExit):
        nodes.main(["--hosts", "a", "--rank", "1"])
    assert "--rank 1 is none of 1 --hosts" in capsys.readouterr().err
