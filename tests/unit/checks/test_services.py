"""Services that a dry run asks for: a vLLM server and the hub, both on loopback."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from rlhf_trl.checks.services import hub_problem, vllm_problem


@pytest.fixture
def server():
    """Return the address of a server, and the answers that it gives by path."""
    answers: dict[str, tuple[int, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answers.get(self.path, (404, b"{}"))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}", answers
    made.shutdown()
    thread.join()


def test_a_vllm_server_must_answer(server):
    url, answers = server

    def problem(**options) -> str | None:
        defaults = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url}
        return vllm_problem(SimpleNamespace(**(defaults | options)))

    assert f"The vLLM server at {url} answered 404" in str(problem())
    answers["/health"] = (200, b"")
    assert problem() is None and problem(vllm_server_base_url=f"{url}/") is None
    host, port = url.removeprefix("http://").split(":")
    place = {"vllm_server_base_url": None, "vllm_server_host": host}
    assert problem(**place, vllm_server_port=int(port)) is None
    assert "can't be reached" in str(problem(**place, vllm_server_port=9))
    assert problem(**place, vllm_server_port=9, vllm_mode="colocate") is None
    assert problem(**place, vllm_server_port=9, use_vllm=False) is None
    assert vllm_problem(SimpleNamespace()) is None  # stages without rollouts


def test_the_hub_must_take_the_token(server, monkeypatch):
    url, answers = server
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    args = SimpleNamespace(push_to_hub=True, hub_token="hf_some")
    answers["/api/whoami-v2"] = (401, b'{"error": "Invalid username or password."}')
    assert "doesn't take the token" in str(hub_problem(args))
    answers["/api/whoami-v2"] = (200, b'{"name": "someone"}')
    assert hub_problem(args) is None
    assert hub_problem(SimpleNamespace(push_to_hub=False)) is None
