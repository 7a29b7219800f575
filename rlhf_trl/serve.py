"""A reference server for `reward=http`: one reward of this package, on loopback (`stage=serve_reward`)."""

import contextlib
import socket
import threading
from typing import Any

from accelerate import PartialState
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, model_validator

from rlhf_trl.errors import ConfigError
from rlhf_trl.quiet import quiet
from rlhf_trl.rewards import ModelReward, Reward
from rlhf_trl.rewards.http import tokenizer_hash
from rlhf_trl.run import reward_functions


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
        return self


def serve_reward(cfg: DictConfig) -> None:
    """
    Serves the reward of `cfg.reward` until it is interrupted: POST `/score`, and GET `/` for what is served.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: for more than one reward, one that needs a policy, or a port that is taken.
    """
    import uvicorn

    OmegaConf.resolve(cfg)
    quiet()
    if not PartialState().is_main_process:
        return
    listener = _listen(cfg.stage.host, cfg.stage.port)
    with listener:
        (reward,) = reward_functions(cfg, tokenizer=None)
        host, port = listener.getsockname()[:2]
        print(
            f"Serving the reward `{reward.__name__}`: `reward=http reward.http.url=http://{host}:{port}/score`",
            flush=True,
        )
        server = uvicorn.Server(uvicorn.Config(application(reward), log_level="warning"))
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended well
            server.run(sockets=[listener])


def application(reward: Reward):
    """
    The FastAPI application that serves a reward.

    A model scores the generated ids themselves where they come from a tokenizer like its own, as it does in the
    policy's process, else the text.
    """
    from fastapi import FastAPI, HTTPException

    app, turn = FastAPI(title=f"rlhf_trl: {reward.__name__}"), threading.Lock()
    own = tokenizer_hash(reward.tokenizer) if isinstance(reward, ModelReward) else None

    @app.get("/")
    def about() -> dict:
        return {"reward": reward.__name__, "tokenizer": own, "schema": "/docs"}

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
                    reward.bind(reward.tokenizer if same else None)
                    given["with_eos"] = request.ended
                values = reward(**given, completion_ids=ids, log_metric=log_metric)
        except ConfigError as error:
            raise HTTPException(422, str(error)) from error
        return {"rewards": values, "metrics": metrics}

    return app


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"`stage.host={host} stage.port={port}` can't be served: {error.strerror}. Type another "
            "`stage.port=...`, or `stage.port=0` for any that is free."
        ) from error
    return listener
