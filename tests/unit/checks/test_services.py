"""Services that a dry run asks for: a vLLM server and the hub, both on loopback."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from packaging.version import Version

from rlhf_trl.checks.services import hub_problem, vllm_problem
from tests.helpers.architectures import save_architecture


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
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}", answers
    made.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_architecture(tmp_path_factory.mktemp("models") / "policy", "llama")


@pytest.fixture
def vllm(server, path, monkeypatch):
    """Return the answers of a vLLM server that suits the model at `path`, and a function that gives its problem."""
    url, answers = server
    config = {"model_config": {"logprobs_mode": "processed_logprobs"}, "weight_transfer_config": {"backend": "nccl"}}
    contents = {
        "/health": {},
        "/version": {"version": "0.30.1+cu129"},
        "/server_info?config_format=json": {"vllm_config": config},
        "/v1/models": {"data": [{"id": path, "root": path}]},
    }
    monkeypatch.setattr("rlhf_trl.checks.services.installed_version", lambda: Version("0.30.0"))

    def problem(wait=0.0, **options) -> str | None:
        answers.update({place: (200, json.dumps(content).encode()) for place, content in contents.items()})
        defaults = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "temperature": 0.7}
        defaults["vllm_importance_sampling_correction"] = True
        return vllm_problem(SimpleNamespace(**(defaults | options)), path, wait=wait)

    return contents, problem


def test_a_vllm_server_must_be_up(server, vllm):
    url, (_, problem) = server[0], vllm
    assert problem() is None and problem(vllm_server_base_url=f"{url}/") is None
    host, port = url.removeprefix("http://").split(":")
    place = {"vllm_server_base_url": None, "vllm_server_host": host}
    assert problem(**place, vllm_server_port=int(port)) is None
    down = str(problem(**place, vllm_server_port=9))
    assert f"The vLLM server at http://{host}:9 can't be reached" in down
    assert "Start it with `VLLM_SERVER_DEV_MODE=1 vllm serve " in down and "--weight-transfer-config '{" in down
    assert problem(**place, vllm_server_port=9, vllm_mode="colocate") is None
    assert problem(**place, vllm_server_port=9, use_vllm=False) is None
    assert vllm_problem(SimpleNamespace(), "model") is None  # stages without rollouts


def test_a_run_waits_for_a_vllm_server_that_starts(server, vllm, monkeypatch, capsys):
    answers, (contents, problem) = server[1], vllm
    del contents["/health"]
    answers["/health"] = (503, b"")
    assert "answered 503 Service Unavailable to `/health`" in str(problem())

    def start(seconds: float) -> None:
        answers["/health"] = (200, b"")

    monkeypatch.setattr("rlhf_trl.checks.services.time.sleep", start)
    assert problem(wait=60.0) is None
    assert "Waiting up to 60 s for the vLLM server" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        (
            "/version",
            {"version": "0.21.2"},
            "is too old: it has vLLM 0.21.2, and this TRL works with 0.22.0 to 0.31.0",
        ),
        ("/version", {"version": "0.28.0"}, "has vLLM 0.28.0, and this environment 0.30.0"),
        ("/version", {}, "doesn't answer to `/version`"),
        ("/server_info?config_format=json", {}, "has no development endpoints"),
        (
            "/server_info?config_format=json",
            {"vllm_config": {"model_config": {"logprobs_mode": "raw_logprobs"}}},
            "returns raw_logprobs, which are without the temperature 0.7",
        ),
        (
            "/server_info?config_format=json",
            {"vllm_config": {"model_config": {"logprobs_mode": "x"}, "weight_transfer_config": None}},
            "was started without `--weight-transfer-config`",
        ),
        ("/v1/models", {"data": []}, "serves no model"),
    ],
)
def test_a_vllm_server_must_be_able_to_make_the_completions(vllm, place, content, message):
    contents, problem = vllm
    contents[place] = content
    assert message in str(problem())


def test_a_vllm_server_must_have_a_model_of_the_same_sizes(vllm, path, tmp_path):
    contents, problem = vllm

    def serving(name: str) -> str | None:
        contents["/v1/models"] = {"data": [{"id": "policy", "root": name}]}
        return problem()

    shutil.copytree(path, tmp_path / "base")
    assert serving(str(tmp_path / "base")) is None  # it gets the trained weights before the first rollout
    shutil.copytree(path, tmp_path / "larger")
    config = json.loads((tmp_path / "larger" / "config.json").read_text())
    (tmp_path / "larger" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert f"serves `{tmp_path}/larger`, and this run trains `{path}`" in str(serving(f"{tmp_path}/larger"))
    unread = str(serving("org/base"))
    assert "serves `org/base`, which can't be read here, and this run trains `" in unread
    assert f"start it with `--served-model-name {path}`" in unread
    contents["/v1/models"] = {"data": [{"id": path, "root": "/models/base"}]}
    assert problem() is None


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
