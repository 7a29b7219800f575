"""The stage `serve_reward`: one reward served over HTTP."""

import contextlib
import ipaddress
import os
import socket

from omegaconf import DictConfig, OmegaConf

from rlhf_trl.build import reward_functions
from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.server import application, bound_socket
from rlhf_trl.runs.ranks import is_main_process


def serve_reward(cfg: DictConfig) -> None:
    """
    Serve the reward of `cfg.reward` until interrupted: POST `/score`, and GET `/` for what is served.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the port is taken, or if other machines can reach the address and no token
            is set.
    """
    import uvicorn

    OmegaConf.resolve(cfg)
    if not is_main_process():
        return
    token = os.environ[cfg.stage.token_env] if cfg.stage.token_env else None
    with bound_socket(cfg.stage.host, cfg.stage.port, "stage") as listener:
        address, port = listener.getsockname()[:2]
        is_local = ipaddress.ip_address(address).is_loopback
        if not (is_local or token or cfg.stage.anonymous):
            raise ConfigError(
                f"`stage.host={cfg.stage.host}` is open to other machines, and the server has no token. Run "
                "`export REWARD_TOKEN=...` and set `stage.token_env=REWARD_TOKEN`; or set `stage.host=127.0.0.1`; or, "
                "if anybody may use it, `stage.anonymous=true`."
            )
        (reward,) = reward_functions(cfg, tokenizer=None)
        listener.listen()  # before the address is printed, so that whoever reads it can connect
        token_option = f" reward.http.token_env={cfg.stage.token_env}" if token else ""
        print(
            f"Serving the reward `{reward.__name__}`: `reward=http {_url_option(address, port)}{token_option}`",
            flush=True,
        )
        if not is_local:
            print(
                f"It is open to other machines (host `{socket.gethostname()}`), unencrypted, and "
                f"{'asks for the token' if token else 'asks for no token: anybody may use it'}.",
                flush=True,
            )
        server = uvicorn.Server(uvicorn.Config(application(reward, token), log_level="warning"))
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after its shutdown
            server.run(sockets=[listener])


def _url_option(address: str, port: int) -> str:
    """Return the option that a client on this machine sets."""
    wildcards = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    host = wildcards.get(address, address)
    if ":" in host:
        return f"'reward.http.url=\"http://[{host}]:{port}/score\"'"
    return f"reward.http.url=http://{host}:{port}/score"
