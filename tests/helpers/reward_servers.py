"""Reward servers on loopback."""

import contextlib
import socket
import threading
import time

import pytest


@contextlib.contextmanager
def serving(reward, app=None):
    """Return the address of the reference server with a reward."""
    uvicorn = pytest.importorskip("uvicorn")
    from rlhf_trl.rewards.server import application

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app or application(reward), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/score"
        server.should_exit = True
        thread.join()
