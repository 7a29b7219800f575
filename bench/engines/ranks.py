"""Ranks as forks of one process that has imported the libraries: a run of seconds doesn't wait for them each time."""

import contextlib
import faulthandler
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from bench.engines.draws import same_draws
from rlhf_trl.cli.launcher import launch_dir

# What a run imports: the modules that its config names, which it would otherwise import for seconds
MODULES = ("trl.experimental.orpo", "rlhf_trl.cli.main", "rlhf_trl.stages.train", "rlhf_trl.stages.reward")
MODULES += ("rlhf_trl.ppo", "rlhf_trl.trainers", "rlhf_trl.reward_modeling", "rlhf_trl.checks.libraries")
GRACE = 20.0  # seconds that the other ranks have to end by themselves


def import_modules() -> None:
    """Import what the runs need, once. Nothing may be computed or connected in this process: it is forked."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    for name in MODULES:
        importlib.import_module(name)


def launch_environment(engine: str, ranks: int) -> dict[str, str]:
    """Return what `accelerate launch --config_file launch/accelerate/ENGINE.yaml` adds to the environment."""
    path = launch_dir() / "accelerate" / f"{engine}.yaml"
    words = ["--config_file", str(path), "--num_processes", str(ranks), "train.py"]
    args, config, _ = cast(tuple[Any, Any, bool], _validate_launch_command(launch_command_parser().parse_args(words)))
    args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)  # as `launch_command` has it
    whole = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    added = {name: value for name, value in whole.items() if os.environ.get(name) != value and name != "PYTHONPATH"}
    return added | ({"DS_ACCELERATOR": "cpu"} if args.use_deepspeed else {"ACCELERATE_USE_CPU": "true"})


def rank_environments(engine: str | None, ranks: int) -> list[dict[str, str]]:
    """Return the environment of each rank under a file of launch/accelerate; of one process without a launcher."""
    if engine is None:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = launch_environment(engine, ranks)
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def train(overrides: Sequence[str], folder: Path, draws: bool = False) -> None:
    """Run `train.py` with these overrides in a folder, with `draws` by [`~bench.engines.draws.same_draws`]."""
    os.chdir(folder)
    sys.argv = ["train.py", *overrides]
    with same_draws() if draws else contextlib.nullcontext():
        importlib.import_module("rlhf_trl.cli.main").main()


def run(function: Callable[[], None], environments: Sequence[dict[str, str]], log: Path, seconds: float = 900) -> int:
    """
    Run a function in a fork of this process for each rank.

    Args:
        function (callable): the function.
        environments (`Sequence[dict[str, str]]`): what each rank has in its environment besides.
        log (`Path`): file of their output; the ranks but the first write into one of their own beside it.
        seconds (`float`): time limit.

    Returns:
        `int`: the largest exit status; 1 for an exception, 124 for ranks that were killed after the time limit.
    """
    children = {}
    for rank, environment in enumerate(environments):
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            _child(function, environment, log if rank == 0 else log.with_suffix(f".{rank}.log"))
        children[pid] = rank
    codes, deadline = [], time.monotonic() + seconds
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            del children[pid]
            codes.append(abs(os.waitstatus_to_exitcode(status)))
            if codes[-1]:
                deadline = min(deadline, time.monotonic() + GRACE)
        elif time.monotonic() > deadline:
            codes.append(0 if any(codes) else 124)
            for left in children:
                os.kill(left, signal.SIGABRT)  # which leaves where it was in the log
                time.sleep(1)
                os.kill(left, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.05)
    return max(codes)


def _child(function: Callable[[], None], environment: dict[str, str], log: Path) -> None:
    """Run a function and leave the process without the parent's clean-up."""
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.environ.update(environment)
        faulthandler.enable()
        try:
            function()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
    finally:
        os._exit(code)
