"""Rewards over HTTP: the reference server, and servers with malformed, slow, or no answers."""

import contextlib
import http.server
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import torch
from transformers import AutoTokenizer

from rlhf_trl.checks import find_problems
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.fingerprints import tokenizer_fingerprint
from rlhf_trl.rewards.finite import FiniteReward
from rlhf_trl.rewards.function import FunctionReward
from rlhf_trl.rewards.http import HttpReward
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.runs.paths import conf_dir
from tests.helpers.reward_models import ROWS, as_chat, save_reward_model
from tests.helpers.reward_servers import serving
from tests.helpers.rl import TRAINERS, logged, rl_trainer
from tests.helpers.tiny import make_tokenizer, save_model

TEXTS = {"prompts": ["a", "b", "c"], "completions": ["d", "e f", ""], "completion_ids": [[1], [2, 3], []]}


@contextlib.contextmanager
def answering(answer):
    """
    Return the address of a server that answers a request, decoded, with what `answer(request, number, headers)` gives:
    an object for JSON, or (status, body, content type).
    """
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            found = answer(body, len(requests), self.headers)
            status, text, kind = found if isinstance(found, tuple) else (200, json.dumps(found), "application/json")
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = requests
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score", requests
    finally:
        server.shutdown()
        server.server_close()


def lengths(request, number, headers):
    return {"rewards": [float(len(text)) for text in request["completions"]]}


def test_requests_are_batches_of_the_documented_schema():
    with answering(lengths) as (url, requests):
        reward = HttpReward(url, batch_size=2, columns=["answer"], weight=2, name="judge")
        tokenizer = make_tokenizer()
        reward.bind(tokenizer)
        ids = [[5, tokenizer.eos_token_id], [6, 7], []]
        rows = TEXTS | {"completion_ids": ids, "answer": ["x", "y", "z"], "other": [1, 2, 3], "trainer_state": None}
        assert reward(**rows) == [1.0, 3.0, 0.0]
        assert (reward.__name__, reward.weight) == ("judge", 2.0)
    first, second = requests
    assert first == {
        "prompts": ["a", "b"],
        "completions": ["d", "e f"],
        "completion_ids": ids[:2],
        "ended": [True, False],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "columns": {"answer": ["x", "y"]},
    }
    assert second["prompts"] == ["c"] and second["columns"] == {"answer": ["z"]}


def test_null_does_not_apply_and_metrics_are_logged():
    found = {}
    with answering(lambda *_: {"rewards": [1, None, 0.5], "metrics": {"disagreement": 0.25}}) as (url, _):
        assert HttpReward(url)(**TEXTS, log_metric=found.__setitem__) == [1.0, None, 0.5]
    assert found == {"rewards/http/disagreement": 0.25}


def test_a_token_is_sent_from_the_environment(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    seen = []

    def answer(request, number, headers):
        seen.append(headers["Authorization"])
        return lengths(request, number, headers)

    with answering(answer) as (url, _):
        HttpReward(url, token_env="JUDGE_TOKEN")(**TEXTS)
    assert seen == ["Bearer secret"]


def test_transient_failures_are_retried(monkeypatch, caplog):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)

    def answer(request, number, headers):
        return (503, "busy", "text/plain") if number < 4 else lengths(request, number, headers)

    with answering(answer) as (url, requests):
        assert HttpReward(url, retries=3, backoff=0.5)(**TEXTS) == [1.0, 3.0, 0.0]
    assert len(requests) == 4 and waited == [0.5, 1.0, 2.0]
    told = [record.message for record in caplog.records if record.name == "rlhf_trl.rewards.http"]
    assert len(told) == 3 and "answered 503 Service Unavailable: 'busy'. Trying again in 0.5 s." in told[0]


HTML = (200, "<html><body>Welcome to nginx!</body></html>", "text/html")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (HTML, "answered with text/html, which is no JSON: '<html><body>Welcome to nginx!"),
        ((200, "", "text/plain"), "answered with text/plain, which is no JSON: ''"),
        ({"scores": [1, 2, 3]}, """answered without `rewards`: '{"scores": [1, 2, 3]}'"""),
        ([1, 2, 3], "answered without `rewards`"),
        ({"rewards": 1.0}, "answered without `rewards`"),
        ({"rewards": [1, 2]}, "gave 2 rewards for 3 completions"),
        ({"rewards": [1, "good", 3]}, 'gave "good" as reward 1 of 3'),
        ({"rewards": [1, True, 3]}, "gave true as reward 1 of 3"),
        ({"rewards": [1, 2, "nan"]}, 'gave "nan" as reward 2 of 3'),
        ({"rewards": [1, 2, float("nan")]}, "gave NaN as reward 2 of 3"),
        ({"rewards": [1, 2, float("inf")]}, "gave Infinity as reward 2 of 3"),
        ({"rewards": [1, 2, 3], "metrics": {"std": "low"}}, 'gave {"std": "low"} as `metrics`'),
        ({"rewards": [1, 2, 3], "metrics": {"mean": 0.5}}, 'gave a metric "mean". Its name must be'),
        ({"rewards": [1, 2, 3], "metrics": {"a/b\x1b[2J": 0.5}}, 'gave a metric "a/b\\u001b[2J"'),
        ({"rewards": [1, 2, 3], "metrics": {str(i): i for i in range(65)}}, "gave 65 metrics"),
        ({"rewards": [1, 2, 10**400]}, "gave 1000000000"),
        ((200, "[" * 100_000, "application/json"), "answered with application/json, which is no JSON"),
        ((200, " " * (17 << 20), "application/json"), "answers with more than 16 MiB"),
        (
            (404, '{"detail": "Not Found"}', "application/json"),
            """answered 404 Not Found: '{"detail": "Not Found"}'. Look""",
        ),
        ((200, '{"rewards": [1, 2', "application/json"), "answered with application/json, which is no JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_malformed_answers_are_one_error_without_retry(answer, message):
    with answering(lambda *_: answer) as (url, requests), pytest.raises(ConfigError) as error:
        HttpReward(url, retries=5)(**TEXTS)
    assert f"The server of the reward `http` at {url} {message}" in str(error.value)
    assert len(requests) == 1


def test_endless_answer_ends_at_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while True:
                    connection.sendall(b" ")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        begun = time.monotonic()
        with pytest.raises(ConfigError, match="gave no answer within 0.4 s, and one try was made"):
            HttpReward(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=0.4, retries=0)(**TEXTS)
        assert 0.3 < time.monotonic() - begun < 3


def test_errors_of_the_server_are_raised_after_the_retries():
    with answering(lambda *_: (500, "Traceback: out of memory", "text/plain")) as (url, requests):
        message = (
            "answered 500 Internal Server Error: 'Traceback: out of memory', and 3 tries were made. Look into its log"
        )
        with pytest.raises(ConfigError, match=re.escape(message)):
            HttpReward(url, retries=2, backoff=0.0)(**TEXTS)
    assert len(requests) == 3


def test_slow_and_missing_servers_are_errors():
    with answering(lambda *args: (time.sleep(0.5), lengths(*args))[1]) as (url, requests):
        message = r"gave no answer within 0.1 s, and 2 tries were made. Give it more time \(`reward.judge.timeout="
        with pytest.raises(ConfigError, match=message):
            HttpReward(url, timeout=0.1, retries=1, backoff=0.0, name="judge")(**TEXTS)
        assert len(requests) == 2
    with pytest.raises(ConfigError, match="can't be reached .*, and one try was made. Start it, or correct"):
        HttpReward(url, retries=0)(**TEXTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "`reward.http.url` is 'localhost:8000'. Set the whole address"),
        ({"url": "http://host:port/score"}, "`reward.http.url` is 'http://host:port/score'. Set the whole address"),
        ({"url": "http://127.0.0.1:99999/x"}, "Set the whole address"),
        ({"url": "http:///x"}, "Set the whole address"),
        ({"url": "http://x", "columns": "gold"}, "`reward.http.columns` is 'gold' and must be a list of names"),
        ({"url": "http://x", "columns": [3]}, "and must be a list of names. Set"),
        ({"timeout": 0}, "`reward.http.timeout` is 0. Set it above 0"),
        ({"retries": -1}, "`reward.http.retries` is -1. Set it to 0 or more"),
        ({"batch_size": 0}, "`reward.http.batch_size` is 0. Set it to 1 or more"),
        ({"token_env": "NO_SUCH_TOKEN"}, "which is not set"),
    ],
)
def test_invalid_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        HttpReward(**({"url": "http://127.0.0.1:1/score"} | options))


def test_column_that_is_no_json_is_an_error():
    for value in (time.struct_time, float("nan")):
        with pytest.raises(ConfigError, match=r"is to send is no JSON .* `reward.http.columns` .now: when"):
            HttpReward("http://127.0.0.1:1", columns=["when"])(**TEXTS, when=[value] * 3)


def test_options_are_checked_before_anything_loads(compose, tmp_path):
    words = ["reward=http", "reward.http.url=localhost:8000", "reward.http.timeout=0", "reward.http.token_env=NO_SUCH"]
    problems = find_problems(compose("stage=ppo", f"runs_dir={tmp_path}", *words))
    assert [problem.split("`")[1] for problem in problems] == [
        f"reward.http.{n}" for n in ("timeout", "url", "token_env")
    ]


def test_missing_column_is_named():
    with pytest.raises(ConfigError, match="names `anser`, and the data has no such column .it has `answer`"):
        HttpReward("http://127.0.0.1:1", columns=["anser"])(**TEXTS, answer=["x", "y", "z"], trainer_state=None)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_scores_over_http_equal_those_in_the_process(tmp_path, chat, lora):
    path = save_reward_model(tmp_path, lora=lora)
    rows = as_chat(ROWS) if chat else ROWS
    own, other = make_tokenizer(), make_tokenizer()
    other.add_tokens(["zebra"])
    words = [c[0]["content"] if chat else c for c in rows["chosen"]]
    ids = [own(text, add_special_tokens=False)["input_ids"] for text in words]
    ids = [row + [own.eos_token_id] * (i % 2) for i, row in enumerate(ids)]  # some are cut off
    given = {"prompts": rows["prompt"], "completions": rows["chosen"], "completion_ids": ids}
    with serving(ModelReward(path)) as url:
        by_http, by_path = HttpReward(url, batch_size=3), ModelReward(path)
        found = {}
        for name, tokenizer in (("own", own), ("other", other), ("none", None)):
            by_http.bind(tokenizer)
            by_path.bind(tokenizer)
            found[name] = by_path(**given)
            assert by_http(**given) == pytest.approx(found[name], abs=1e-6), name
        assert found["own"] != found["none"]  # without a tokenizer nothing says which were cut off
        about = json.load(urllib.request.urlopen(url.removesuffix("/score")))
        assert about["reward"] == "reward_model" and about["tokenizer"] == tokenizer_fingerprint(own)


def test_heads_and_functions_are_served(tmp_path):
    def judge(prompts, completions, answer):
        return [float(text == right) if right else None for text, right in zip(completions, answer, strict=True)]

    with serving(FunctionReward(judge)) as url:
        reward = HttpReward(url, columns=["answer"])
        assert reward(**TEXTS, answer=["d", "no", ""]) == [1.0, 0.0, None]
        request = {"prompts": ["a"], "completions": ["b", "c"]}
        with pytest.raises(ConfigError, match="422.*`completions` has 2 entries for 1 prompts"):
            reward._post(request)

    def broken(completions):
        return [1.0]

    refusal = "answered 422 .*`broken` returned 1 values for 3 completions"
    with serving(FunctionReward(broken)) as url, pytest.raises(ConfigError, match=refusal):
        HttpReward(url)(**TEXTS)


def test_none_and_nan_stay_apart_over_http(tmp_path):
    given = [float("nan"), None, float("inf"), -float("inf"), 0.5]

    def mixed(completions):
        return given

    texts = {name: [values[0]] * 5 for name, values in TEXTS.items()}
    with serving(FunctionReward(mixed)) as url:
        answer = HttpReward(url)._post({name: texts[name] for name in ("prompts", "completions")})
        assert json.loads(answer.content)["rewards"] == ["NaN", None, "Infinity", "-Infinity", 0.5]
        found = HttpReward(url)(**texts)
    assert str(found) == str(given)
    with serving(FunctionReward(lambda completions: [float("nan")] + [1.0] * (len(completions) - 1))) as url:
        path = save_model(tmp_path / "policy")
        reward = HttpReward(url, batch_size=8)
        trainer = rl_trainer("ppo", path, tmp_path, reward_funcs=[reward], max_invalid_fraction=0.5)
        trainer.train()
        assert logged(trainer, "objective/invalid_rewards") == [1, 1] and logged(trainer, "objective/scores") == [1, 1]
        with pytest.raises(ConfigError, match="The reward `http` is nan for completion 0"):
            FiniteReward(reward)(**TEXTS)


def test_disagreement_of_an_ensemble_is_sent_as_a_metric(tmp_path, monkeypatch):
    path = save_reward_model(tmp_path, lora=True)
    reward, metrics = ModelReward(path), {}
    monkeypatch.setattr(reward, "member_scores", lambda rows: torch.tensor([[1.0] * len(rows), [3.0] * len(rows)]))
    with serving(reward) as url:
        assert HttpReward(url)(**TEXTS, log_metric=metrics.__setitem__) == [2.0, 2.0, 2.0]
    assert metrics == {"rewards/http/disagreement": pytest.approx(2**0.5)}


@pytest.mark.parametrize("kind", TRAINERS)
def test_trainers_learn_from_a_server_and_log_its_metrics(tmp_path, kind):
    path = save_model(tmp_path / "policy")
    with answering(lambda request, *_: lengths(request, *_) | {"metrics": {"load": 0.5}}) as (url, requests):
        reward = HttpReward(url, name="judge", batch_size=3)
        reward.bind(AutoTokenizer.from_pretrained(path))
        trainer = rl_trainer(kind, path, tmp_path, reward_funcs=[reward])
        trainer.train()
    assert len(logged(trainer, "rewards/judge/mean")) == 2 and logged(trainer, "rewards/judge/load") == [0.5, 0.5]
    assert len(requests) == 6  # two rollouts of 8 in batches of 3


def asked(url: str, body: bytes, **headers) -> tuple[int, str]:
    """Status and `detail` of what the server answers."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["detail"]


@pytest.fixture(scope="module")
def model_server(tmp_path_factory):
    reward = ModelReward(save_reward_model(tmp_path_factory.mktemp("served")))
    with serving(reward) as url:
        yield url, {"tokenizer": tokenizer_fingerprint(reward.tokenizer), "prompts": ["a"], "completions": ["b"]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"completion_ids": [[99]]}, "`completion_ids` holds 99, and the model has 21 tokens"),
        ({"completion_ids": [[-1]]}, "`completion_ids` holds -1"),
        ({"completion_ids": [[2**70]]}, "completion_ids"),
        ({"prompts": [[]], "completions": [[]]}, "a chat must be a list of at least one message"),
        ({"prompts": [[{"content": "x"}]]}, "each with a `role`"),
        ({"prompts": ["a"], "completions": [[{"role": "x", "content": "b"}]], "tokenizer": None}, "raised"),
        ({"prompts": ["a", "b"]}, "`completions` has 1 entries for 2 prompts"),
        ({"prompts": [float("nan")]}, "prompts.0"),
        ({"prompts": ["\ud800"], "tokenizer": None}, "raised"),
        ({"columns": {"prompts": ["x"]}}, "`columns` holds `prompts`"),
        ({"columns": {"log_metric": ["x"]}}, "`columns` holds `log_metric`"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_requests_that_can_not_be_scored_are_errors_without_retry(model_server, given, message):
    url, rows = model_server
    status, detail = asked(url, json.dumps(rows | given).encode())
    assert status == 422 and message in detail, detail
    assert "Traceback" not in detail


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b"\xff", b"", b"[]", b'{"prompts": 1}'], ids=lambda b: b[:9])
def test_malformed_request_is_refused(model_server, body):
    assert asked(model_server[0], body)[0] in (400, 422)


def test_an_error_of_the_served_function_names_its_line():
    def broken(completions):
        raise KeyError("answer")

    def leaves(completions):
        sys.exit()

    for function, message in (
        (broken, "(tests/unit/rewards/test_http_reward.py, line "),
        (leaves, "SystemExit"),
    ):
        with serving(FunctionReward(function)) as url:
            with pytest.raises(ConfigError, match=re.escape(message)) as told:
                HttpReward(url, retries=5, backoff=100)(**TEXTS)
            assert "answered 422" in str(told.value)


def test_a_request_has_limits_of_size_and_time(monkeypatch):
    from rlhf_trl.rewards import server as serve

    monkeypatch.setattr(serve, "MAX_BODY", 1 << 20)
    monkeypatch.setattr(serve, "MAX_SECONDS", 0.3)
    with serving(FunctionReward(lambda completions: [0.0] * len(completions), name="zero")) as url:
        host, port = re.search(r"//(.*):(\d+)", url).groups()
        for head in ("Content-Length: 2000000", "Transfer-Encoding: chunked"):
            with socket.create_connection((host, int(port))) as connection, contextlib.suppress(OSError):
                connection.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
                if "chunked" in head:
                    for _ in range(2):
                        connection.sendall(b"c0000\r\n" + b" " * 0xC0000 + b"\r\n")
                assert b" 413 " in connection.recv(4096)
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n ")
            assert b" 408 " in connection.recv(4096)
        assert HttpReward(url)(**TEXTS) == [0.0, 0.0, 0.0]


def test_server_refuses_requests_without_its_token(monkeypatch):
    from rlhf_trl.rewards.server import application

    monkeypatch.setenv("REWARD_TOKEN", "secret")
    reward = FunctionReward(lambda completions: [0.0] * len(completions), name="zero")
    with serving(reward, application(reward, "secret")) as url:
        assert HttpReward(url, token_env="REWARD_TOKEN")(**TEXTS) == [0.0, 0.0, 0.0]
        with pytest.raises(ConfigError, match="answered 401 Unauthorized.*the server wants its token"):
            HttpReward(url)(**TEXTS)
        assert asked(url.replace("/score", "/"), None)[0] == 401
        with urllib.request.urlopen(
            urllib.request.Request(url.replace("/score", "/"), headers={"Authorization": "Bearer secret"})
        ) as answer:
            assert json.loads(answer.read())["schema"] == "/openapi.json"


def test_pages_that_load_scripts_from_other_hosts_are_off(model_server):
    for page in ("docs", "redoc"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(model_server[0].replace("score", page))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage.host=null"], "`stage.host` is None and must be an address"),
        (["stage.port=null"], "`stage.port` is None and must be an integer from 0 to 65535"),
        (["stage.port=http"], "`stage.port` is 'http'"),
        (["stage.port=99999"], "`stage.port` is 99999"),
        (["stage.token_env=NOT_THERE"], "the environment variable `NOT_THERE`, which is not set"),
    ],
)
def test_invalid_address_is_an_error(compose, tmp_path, words, message):
    problems = find_problems(compose("stage=serve_reward", "reward=demo", f"runs_dir={tmp_path}", *words))
    assert len(problems) == 1 and message in problems[0], problems


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_need_a_token_or_stage_anonymous(compose, tmp_path, capsys, monkeypatch, host):
    import uvicorn

    from rlhf_trl.stages.serve_reward import serve_reward

    words = [
        "stage=serve_reward",
        "reward=demo",
        "stage.port=0",
        f"runs_dir={tmp_path}",
        f"'stage.host=\"{host}\"'"[1:-1],
    ]
    if host == "::" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with pytest.raises(ConfigError, match="is open to other machines, and the server has no token"):
        serve_reward(compose(*words))
    connected = []

    def run(self, sockets):  # whoever reads the address may connect
        family = sockets[0].family
        with socket.socket(family) as client:
            client.connect(("127.0.0.1" if family == socket.AF_INET else "::1", sockets[0].getsockname()[1]))
            connected.append(True)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setenv("REWARD_TOKEN", "secret")
    serve_reward(compose(*words, "stage.token_env=REWARD_TOKEN"))
    said = capsys.readouterr().out
    here = "http://127.0.0.1:" if host == "0.0.0.0" else "http://[::1]:"
    assert (
        connected
        and here in said
        and "reward.http.token_env=REWARD_TOKEN" in said
        and "open to other machines" in said
    )
    serve_reward(compose(*words, "stage.anonymous=true"))
    assert "anybody may use it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward=[demo,eos]"], "serves one reward, and `reward` has 2 (gold, eos)"),
        (
            ["reward=adapter", "reward.adapter.run=null", "reward.adapter.path=organization/name"],
            "and `stage=serve_reward` trains none. Set `reward=model`",
        ),
    ],
)
def test_rewards_that_can_not_be_served_are_errors(compose, tmp_path, monkeypatch, words, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    problems = find_problems(compose("stage=serve_reward", f"runs_dir={tmp_path}", *words))
    assert len(problems) == 1 and message in problems[0], problems


def test_taken_port_is_an_error(compose, tmp_path):
    from rlhf_trl.stages.serve_reward import serve_reward

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cfg = compose("stage=serve_reward", "reward=demo", f"stage.port={port}", f"runs_dir={tmp_path}")
        with pytest.raises(
            ConfigError, match=f"stage.port={port}` can't be served: Address already in use. Set another"
        ):
            serve_reward(cfg)


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(tmp_path):
    command = [sys.executable, "train.py", "stage=serve_reward", "reward=demo", "stage.port=0", f"runs_dir={tmp_path}"]
    for _ in range(2):  # a server may be started again in the same place
        process = subprocess.Popen(command, cwd=conf_dir().parent, stdout=subprocess.PIPE, text=True)
        found = (re.search(r"reward.http.url=(\S+)`", line) for line in process.stdout)
        url = next(filter(None, found)).group(1)
        rows = {"prompts": ["How do I bake bread?"], "completions": ["First, mix flour with water."]}
        assert HttpReward(url)(**rows, completion_ids=[[]], answer=[""])[0] is not None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
