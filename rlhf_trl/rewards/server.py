"""A reference server for `reward=http`: one reward of this package, on loopback (`stage=serve_reward`)."""

import asyncio
import json
import logging
import secrets
import threading
from typing import Any

import torch
from pydantic import BaseModel, model_validator

from rlhf_trl.errors import ConfigError, own_code
from rlhf_trl.rewards.base import GIVEN, Reward
from rlhf_trl.rewards.http import as_json, tokenizer_hash
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.terminal import printable

logger = logging.getLogger(__name__)


# Of a request: bytes, and seconds until it has come whole
MAX_BODY, MAX_SECONDS = 64 * 2**20, 60.0


class Request(BaseModel):
    """What a client sends, see `rlhf_trl.rewards.http`; `completion_ids`, `ended` and the rest may be left out."""

    prompts: list[str | list[dict[str, Any]]]
    completions: list[str | list[dict[str, Any]]]
    completion_ids: list[list[int]] | None = None
    ended: list[bool] | None = None
    tokenizer: str | None = None
    columns: dict[str, list] = {}

    @model_validator(mode="after")
    def _of_one_length(self):
        lists = {"completions": self.completions, "completion_ids": self.completion_ids, "ended": self.ended}
        for name, values in (lists | self.columns).items():
            if values is not None and len(values) != len(self.prompts):
                raise ValueError(f"`{name}` has {len(values)} entries for {len(self.prompts)} prompts")
        if taken := [name for name in self.columns if name in (*GIVEN, "with_eos")]:
            raise ValueError(f"`columns` holds `{taken[0]}`, a name under which a reward gets something else")
        for chat in [given for given in (*self.prompts, *self.completions) if not isinstance(given, str)]:
            if not chat or not all(isinstance(message.get("role"), str) for message in chat):
                raise ValueError("a chat must be a list of at least one message, each with a `role`")
        return self


def application(reward: Reward, token: str | None = None):
    """
    The ASGI application that serves a reward, to those who send the token if there is one.

    A model scores the generated ids themselves where they come from a tokenizer like its own, as it does in the
    policy's process, else the text.
    """
    from fastapi import FastAPI, HTTPException
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    # The page `/docs` would load its scripts from elsewhere
    app = FastAPI(title=f"rlhf_trl: {reward.__name__}", docs_url=None, redoc_url=None)
    turn = threading.Lock()
    own = tokenizer_hash(reward.tokenizer) if isinstance(reward, ModelReward) else None

    @app.get("/")
    def about() -> dict:
        return {"reward": reward.__name__, "tokenizer": own, "schema": "/openapi.json"}

    @app.post("/score")
    def score(request: Request) -> dict:
        metrics: dict[str, float] = {}

        def log_metric(name: str, value: float):
            metrics[name.rsplit("/", 1)[-1]] = value

        given = {"prompts": request.prompts, "completions": request.completions, **request.columns}
        empty: list[list[int]] = [[] for _ in request.prompts]
        try:
            with turn:
                ids = request.completion_ids or empty
                if own is not None:
                    same = request.completion_ids is not None and request.tokenizer == own
                    known = reward.model.get_input_embeddings().num_embeddings
                    if same and (wrong := [i for row in ids for i in row if not 0 <= i < known]):
                        raise ConfigError(f"`completion_ids` holds {wrong[0]}, and the model has {known} tokens")
                    reward.bind(reward.tokenizer if same else None)
                    given["with_eos"] = request.ended
                values = reward(**given, completion_ids=ids, log_metric=log_metric)
        except ConfigError as error:
            raise HTTPException(422, _sendable(error)) from error
        except torch.OutOfMemoryError as error:
            raise HTTPException(503, _sendable(f"out of memory: {error}")) from error
        except (Exception, SystemExit) as error:
            # Whatever it is, the same request will not do better: so no status that a client tries again
            place = f" ({own_code(error)})" if own_code(error) else ""
            said = _sendable(f"the reward `{reward.__name__}` raised {type(error).__name__}: {error}{place}")
            logger.warning("%s", said)
            raise HTTPException(422, said) from error
        # As text where it is no finite number: null would say that the reward doesn't apply
        said = {name: as_json(value) for name, value in metrics.items()}
        return {"rewards": [as_json(value) for value in values], "metrics": said}

    @app.exception_handler(RequestValidationError)
    def malformed(request, error: RequestValidationError) -> JSONResponse:
        # FastAPI's own answer repeats what was sent, which may be long or no JSON
        problems = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()[:3]]
        return JSONResponse({"detail": _sendable("; ".join(problems))}, 422)

    return Guarded(app, token)


def _sendable(said: object) -> str:
    """A message as JSON can carry it, not too long."""
    return printable(str(said)[:1000].encode(errors="replace").decode())


class Guarded:
    """
    An ASGI application behind limits: of a request's size and of the time that it may take to come, and of those who
    send a token.
    """

    def __init__(self, app, token: str | None):
        self.app = app
        self.expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if self.expected and not secrets.compare_digest(headers.get(b"authorization", b""), self.expected):
            return await _refuse(send, 401, "the server wants its token, as `Authorization: Bearer`")
        too_long = f"a request may have {MAX_BODY >> 20} MiB. Send fewer completions at a time"
        if int(headers.get(b"content-length", b"0")) > MAX_BODY:
            return await _refuse(send, 413, too_long)
        body, whole = bytearray(), False
        try:
            async with asyncio.timeout(MAX_SECONDS):
                while not whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    whole = not message.get("more_body", False)
                    if len(body) > MAX_BODY:
                        return await _refuse(send, 413, too_long)
        except TimeoutError:
            return await _refuse(send, 408, f"the request did not come whole within {MAX_SECONDS:g} s")
        messages = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again():
            return messages.pop() if messages else await receive()

        await self.app(scope, again, send)


async def _refuse(send, status: int, why: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": why}).encode()})
