"""Services that a run needs from elsewhere: a vLLM server, the hub that it pushes to."""

import shlex
import time
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from packaging.version import Version

from rlhf_trl.checks.vllm import installed_version, version_problem
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.sizes import empty_model
from rlhf_trl.terminal import say

SECONDS = 5.0
RETRY = 2.0
# What two models of one architecture may differ in
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")


class _Unsuitable(Exception):
    """A server that can't make the completions of a run, with what is wrong."""


def vllm_problem(args: Any, path: str, trust_remote_code: bool = False, wait: float = 0.0) -> str | None:
    """
    Return the problem of a vLLM server, `None` if it can make the completions of a run or none is used.

    Args:
        args (`TrainingArguments`): those of the run.
        path (`str`): path or hub id of the model that is trained. A server may have another one of the same sizes,
            such as the base that it was fine-tuned from: it gets the trained weights before the first rollout.
        trust_remote_code (`bool`): whether the model may bring code of its own.
        wait (`float`): seconds to wait for a server that isn't up yet.
    """
    if not getattr(args, "use_vllm", False) or args.vllm_mode != "server":
        return None
    url = (args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}").rstrip("/")
    try:
        _wait_for(url, wait)
        _check_version(url)
        _check_log_probs(_server_config(url), args)
        _check_model(url, path, trust_remote_code)
    except _Unsuitable as problem:
        return (
            f"The vLLM server at {url} {problem}. Start it with `{serve_command(path)}`, or set "
            "`stage.args.vllm_server_base_url` to another one."
        )
    return None


def serve_command(path: str) -> str:
    """Return the command that starts a vLLM server to which TRL can send weights."""
    options = '--weight-transfer-config \'{"backend": "nccl"}\' --logprobs-mode processed_logprobs --max-logprobs -1'
    return f"VLLM_SERVER_DEV_MODE=1 vllm serve {shlex.quote(path)} {options}"


def _wait_for(url: str, seconds: float) -> None:
    """Return as soon as a server is up."""
    end = time.monotonic() + seconds
    if _health_problem(url) and seconds:
        say(f"Waiting up to {seconds:.0f} s for the vLLM server at {url}.")
    while problem := _health_problem(url):
        if time.monotonic() >= end:
            raise _Unsuitable(problem)
        time.sleep(RETRY)


def _health_problem(url: str) -> str | None:
    try:
        answer = httpx.get(f"{url}/health", timeout=SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"can't be reached ({error})"
    return None if answer.status_code == 200 else f"answered {answer.status_code} {answer.reason_phrase} to `/health`"


def _ask(url: str, path: str, **parameters: str) -> dict[str, Any]:
    """Return what a server answers, empty where it has no such path."""
    try:
        answer = httpx.get(f"{url}{path}", params=parameters, timeout=SECONDS)
        content = answer.json() if answer.status_code == 200 else {}
    except (httpx.HTTPError, ValueError) as error:
        raise _Unsuitable(f"can't be read at `{path}` ({error})") from error
    return content if isinstance(content, dict) else {}


def _check_version(url: str) -> None:
    """Check the version of a server, to which TRL sends weights in the way of the one that is installed here."""
    there, here = _ask(url, "/version").get("version"), installed_version()
    if there is None:
        raise _Unsuitable("doesn't answer to `/version`, as a vLLM server does")
    there = Version(there)
    if problem := version_problem(there, "it"):
        raise _Unsuitable(f"is too old: {problem.removesuffix('.')}, on its side")
    if here is not None and here.release[:2] != there.release[:2]:
        raise _Unsuitable(
            f"has vLLM {there}, and this environment {here}, which sends weights differently. Install one version on "
            "both sides"
        )


def _server_config(url: str) -> dict[str, Any]:
    config = _ask(url, "/server_info", config_format="json").get("vllm_config")
    if not isinstance(config, dict):
        raise _Unsuitable("has no development endpoints (`VLLM_SERVER_DEV_MODE=1`), over which weights are sent")
    if config.get("weight_transfer_config", "of an older version") is None:
        raise _Unsuitable("was started without `--weight-transfer-config`, and takes no weights")
    return config


def _check_log_probs(config: dict[str, Any], args: Any) -> None:
    """Check that log-probabilities are those of the distribution that is sampled from."""
    mode = config["model_config"]["logprobs_mode"]
    corrects = getattr(args, "vllm_importance_sampling_correction", False)
    if corrects and args.temperature != 1 and mode != "processed_logprobs":
        raise _Unsuitable(
            f"returns {mode}, which are without the temperature {args.temperature:g} and would bias the importance-"
            "sampling correction"
        )


def _check_model(url: str, path: str, trust_remote_code: bool) -> None:
    models = _ask(url, "/v1/models").get("data") or [{}]
    names = [str(models[0][key]) for key in ("root", "id") if models[0].get(key)]
    if not names:
        raise _Unsuitable("serves no model")
    if path in names or Path(path).resolve() in [Path(name).resolve() for name in names]:
        return
    there = _sizes(names[0], trust_remote_code)
    if there is None:
        raise _Unsuitable(
            f"serves `{names[0]}`, which can't be read here, and this run trains `{path}`. If it is the same model in "
            f"another place, start it with `--served-model-name {shlex.quote(path)}`"
        )
    if there != _sizes(path, trust_remote_code):
        raise _Unsuitable(f"serves `{names[0]}`, and this run trains `{path}`")


def _sizes(path: str, trust_remote_code: bool) -> list[int] | None:
    """Return the sizes of a model, `None` where it can't be read from here."""
    try:
        config = empty_model(path, "CAUSAL_LM", trust_remote_code).config.get_text_config()
    except ConfigError:
        return None
    return [getattr(config, size) for size in SIZES]


def hub_problem(args: Any) -> str | None:
    """Return the problem of a token that the hub doesn't take, `None` if it does or the run doesn't push."""
    if not args.push_to_hub:
        return None
    try:
        HfApi(token=args.hub_token).whoami()
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        return (
            f"`stage.args.push_to_hub=true` writes to the hub, which doesn't take the token ({error}). Log in with "
            "`hf auth login`, or set `HF_TOKEN`."
        )
    return None
