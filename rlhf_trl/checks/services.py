"""Services that a run needs from elsewhere: a vLLM server, the hub that it pushes to."""

from typing import Any

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

SECONDS = 5.0


def vllm_problem(args: Any) -> str | None:
    """Return the problem of a vLLM server that doesn't answer, `None` if it does or none is used."""
    if not getattr(args, "use_vllm", False) or args.vllm_mode != "server":
        return None
    url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    remedy = "Start it with `vllm serve MODEL`, or set `+stage.args.vllm_server_base_url`."
    try:
        answer = httpx.get(f"{url.rstrip('/')}/health", timeout=SECONDS)
    except httpx.HTTPError as error:
        return f"The vLLM server at {url} can't be reached ({error}). {remedy}"
    if answer.status_code == 200:
        return None
    return f"The vLLM server at {url} answered {answer.status_code} {answer.reason_phrase} to `/health`. {remedy}"


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
