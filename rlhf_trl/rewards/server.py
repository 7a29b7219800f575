"""Reference server for `reward=http`: the ASGI application of one reward (`stage=serve_reward`)."""

import asyncio
import errno
import json
import logging
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

import torch
from pydantic import BaseModel, model_validator
from torch import nn

from rlhf_trl.errors import ConfigError, user_location
from rlhf_trl.models.fingerprints import tokenizer_fingerprint
from rlhf_trl.rewards.base import RESERVED_COLUMNS, Reward
from rlhf_trl.rewards.http import json_number
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.terminal import printable

logger = logging.getLogger(__name__)

# Limits of a request: bytes, and seconds until it is complete
MAX_BODY, MAX_SECONDS = 64 * 2**20, 60.0

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class Request(BaseModel):
    """A request by the schema of `rlhf_trl.rewards.http`; all but `prompts` and `completions` is optional."""

    prompts: list[str | list[dict[str, Any]]]
    completions: list[str | list[dict[str, Any]]]
    completion_ids: list[list[int]] | None = None
    ended: list[bool] | None = None
    tokenizer: str | None = None
    columns: dict[str, list] = {}

    @model_validator(mode="after")
    def _check(self):
        lists = {"completions": self.completions, "completion_ids": self.completion_ids, "ended": self.ended}
        for name, values in (lists | self.columns).items():
            if values is not None and len(values) != len(self.prompts):
                raise ValueError(f"`{name}` has {len(values)} entries for {len(self.prompts)} prompts")
        if reserved := [name for name in self.columns if name in (*RESERVED_COLUMNS, "with_eos")]:
            raise ValueError(
                f"`columns` holds `{reserved[0]}`, which is an argument of every reward. Rename the column"
            )
        for chat in [value for value in (*self.prompts, *self.completions) if not isinstance(value, str)]:
            if not chat or not all(isinstance(message.get("role"), str) for message in chat):
                raise ValueError("a chat must be a list of at least one message, each with a `role`")
            if any(isinstance(message.get("content"), list) for message in chat):
                raise ValueError("the `content` of a message must be text: images are not served")
        if "images" in self.columns:
            raise ValueError("`columns` holds `images`, which are not served")
        return self


def application(reward: Reward, token: str | None = None) -> Application:
    """
    Return the ASGI application that serves a reward.

    A reward model scores the generated ids themselves where they come from a tokenizer like its own, as it does in the
    policy's process, else the text.

    Args:
        reward ([`Reward`]): reward to serve.
        token (`str`, *optional*): token that requests must send, as `Authorization: Bearer`.
    """
    from fastapi import FastAPI, HTTPException
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    # The pages `/docs` and `/redoc` load scripts from other hosts
    app = FastAPI(title=f"rlhf_trl: {reward.__name__}", docs_url=None, redoc_url=None)
    lock = threading.Lock()  # one batch at a time: `bind` and the scores belong together
    own = tokenizer_fingerprint(reward.tokenizer) if isinstance(reward, ModelReward) else None

    @app.get("/")
    def about() -> dict:
        return {"reward": reward.__name__, "tokenizer": own, "schema": "/openapi.json"}

    @app.post("/score")
    def score(request: Request) -> dict:
        metrics: dict[str, float] = {}

        def log_metric(name: str, value: float):
            metrics[name.rsplit("/", 1)[-1]] = value

        columns: dict[str, Any] = dict(request.columns)
        ids = request.completion_ids or [[] for _ in request.prompts]
        try:
            with lock:
                if isinstance(reward, ModelReward):
                    same = request.completion_ids is not None and request.tokenizer == own
                    known = cast(nn.Embedding, reward.model.get_input_embeddings()).num_embeddings
                    if same and (unknown := [i for row in ids for i in row if not 0 <= i < known]):
                        raise ConfigError(f"`completion_ids` holds {unknown[0]}, and the model has {known} tokens")
                    reward.bind(reward.tokenizer if same else None)
                    columns["with_eos"] = request.ended
                values = reward(
                    request.prompts, request.completions, completion_ids=ids, log_metric=log_metric, **columns
                )
        except ConfigError as error:
            raise HTTPException(422, _json_text(error)) from error
        except torch.OutOfMemoryError as error:
            raise HTTPException(503, _json_text(f"out of memory: {error}")) from error
        except (Exception, SystemExit) as error:
            # The same request would fail again, so the status is none that a client retries
            place = f" ({user_location(error)})" if user_location(error) else ""
            detail = _json_text(f"the reward `{reward.__name__}` raised {type(error).__name__}: {error}{place}")
            logger.warning("%s", detail)
            raise HTTPException(422, detail) from error
        return {
            "rewards": [json_number(value) for value in values],
            "metrics": {name: json_number(value) for name, value in metrics.items()},
        }

    @app.exception_handler(RequestValidationError)
    def malformed(request, error: RequestValidationError) -> JSONResponse:
        # FastAPI's own answer repeats the request, which may be long or no JSON
        problems = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()[:3]]
        return JSONResponse({"detail": _json_text("; ".join(problems))}, 422)

    return Guarded(app, token)


def _json_text(message: object) -> str:
    """Return a message that JSON can carry, of 1,000 characters at most."""
    return printable(str(message)[:1000].encode(errors="replace").decode())


class Guarded:
    """
    An ASGI application behind limits of a request's size and duration, and behind a token.

    Args:
        app (callable): ASGI application to guard.
        token (`str`, *optional*): token that requests must send, as `Authorization: Bearer`.
    """

    def __init__(self, app: Application, token: str | None):
        self.app = app
        self.expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on to the application once it is complete, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if self.expected and not secrets.compare_digest(headers.get(b"authorization", b""), self.expected):
            return await _refuse(send, 401, "the server wants its token, as `Authorization: Bearer`")
        too_long = f"a request may have {MAX_BODY >> 20} MiB. Send fewer completions at a time"
        if int(headers.get(b"content-length", b"0")) > MAX_BODY:
            return await _refuse(send, 413, too_long)
        body, complete = bytearray(), False
        try:
            async with asyncio.timeout(MAX_SECONDS):
                while not complete:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    complete = not message.get("more_body", False)
                    if len(body) > MAX_BODY:
                        return await _refuse(send, 413, too_long)
        except TimeoutError:
            return await _refuse(send, 408, f"the request was not complete within {MAX_SECONDS:g} s")
        messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return await self.app(scope, replay, send)


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": reason}).encode()})


def bound_socket(host: str, port: int, section: str) -> socket.socket:
    """
    Return a socket that is bound to an address, on which nothing listens yet.

    Args:
        host (`str`), port (`int`): address; port 0: any free one.
        section (`str`): section of the config that has them, for the message.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the address can't be served.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        remedy = f"`{section}.port=...`, or `{section}.port=0` for any free one."
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            remedy = f"`{section}.host=...`, such as `{section}.host=127.0.0.1`."
        raise ConfigError(
            f"`{section}.host={host} {section}.port={port}` can't be served: {error.strerror}. Set another {remedy}"
        ) from error
    return listener
