"""A reward served over HTTP (`stage=serve_reward`)."""

import contextlib
import errno
import ipaddress
import os
import socket

from accelerate import PartialState
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.build import reward_functions
from rlhf_trl.errors import ConfigError
from rlhf_trl.patches.warnings import filter_warnings
from rlhf_trl.rewards.server import application


def serve_reward(cfg: DictConfig) -> None:
    """
    Serves the reward of `cfg.reward` until it is interrupted: POST `/score`, and GET `/` for what is served.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: for more than one reward, one that needs a policy, a port that is taken, or
            an address that other machines reach, without a token.
    """
    import uvicorn

    OmegaConf.resolve(cfg)
    filter_warnings()
    if not PartialState().is_main_process:
        return
    token = os.environ[cfg.stage.token_env] if cfg.stage.token_env else None
    with _bound(cfg.stage.host, cfg.stage.port) as listener:
        address, port = listener.getsockname()[:2]
        alone = ipaddress.ip_address(address).is_loopback
        if not (alone or token or cfg.stage.anonymous):
            raise ConfigError(
                f"`stage.host={cfg.stage.host}` is open to other machines, and the server has no token. Type "
                "`export REWARD_TOKEN=...` and `stage.token_env=REWARD_TOKEN`; or `stage.host=127.0.0.1`; or, if "
                "anybody may use it, `stage.anonymous=true`."
            )
        (reward,) = reward_functions(cfg, tokenizer=None)
        listener.listen()  # who reads the address may connect
        sends = f" reward.http.token_env={cfg.stage.token_env}" if token else ""
        print(f"Serving the reward `{reward.__name__}`: `reward=http {_url_word(address, port)}{sends}`", flush=True)
        if not alone:
            print(
                f"It is open to other machines (host `{socket.gethostname()}`), unencrypted, and "
                f"{'asks for the token' if token else 'asks for no token: anybody may use it'}.",
                flush=True,
            )
        server = uvicorn.Server(uvicorn.Config(application(reward, token), log_level="warning"))
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended well
            server.run(sockets=[listener])


def _url_word(address: str, port: int) -> str:
    """The word that a client on this machine types."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    host = everywhere.get(address, address)
    if ":" in host:
        return f"'reward.http.url=\"http://[{host}]:{port}/score\"'"
    return f"reward.http.url=http://{host}:{port}/score"


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        way = "`stage.port=...`, or `stage.port=0` for any that is free."
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            way = "`stage.host=...`, such as `stage.host=127.0.0.1`."
        raise ConfigError(
            f"`stage.host={host} stage.port={port}` can't be served: {error.strerror}. Type another {way}"
        ) from error
    return listener
