"""
The command line: `python train.py`, `rlhf-trl`, and what `accelerate launch train.py` runs on each rank.

Hydra composes the config; errors that are the user's to fix end in one message and exit status 2, before anything is
written. Nothing heavy is imported before the config is in order, so that `--help`, `--cfg job` and a misspelt key are
answered at once.
"""

import os
import re
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlhf_trl.checks import check, find_problems
from rlhf_trl.checks.disk import bytes_text
from rlhf_trl.checks.paths import brings_values, for_embedded
from rlhf_trl.cli.app import exit_with, run_app
from rlhf_trl.cli.outcome import first_line, last_lines
from rlhf_trl.cli.overrides import compose, composed, without_sweeps
from rlhf_trl.config.command_line import unquote_text
from rlhf_trl.config.program import command_line, is_launched
from rlhf_trl.config.values import as_dict, at, plain
from rlhf_trl.errors import (
    PREEMPTED_STATUS,
    ConfigError,
    DivergedError,
    Interrupted,
    Preempted,
    disk_is_full,
    user_traceback,
)
from rlhf_trl.patches.malloc import keep_freed_memory
from rlhf_trl.patches.warnings import filter_warnings
from rlhf_trl.runs.checkpoints import last_whole_checkpoint
from rlhf_trl.runs.directory import is_finished, resumes
from rlhf_trl.runs.nodes import problems_of_all_nodes
from rlhf_trl.runs.paths import DEMO
from rlhf_trl.runs.ranks import leave_process_group, world_size
from rlhf_trl.terminal import close_bars, keep_output_above_bars, say

# Set unless the user has set them. The first four keep the libraries from phoning home.
DEFAULT_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL's and the hub's
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers asks a service to convert models that have only .bin files
    "WANDB_ERROR_REPORTING": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warns at each fork of a data worker
    "TRL_EXPERIMENTAL_SILENCE": "1",  # ORPO is in trl.experimental, and `stage=orpo` is the user's choice already
}


def main() -> None:
    """
    Run the stage that the command line names.

    Raises:
        SystemExit: with status 2 after an error of the user's, 130 after Ctrl-C, 75 after a signal of a scheduler.
    """
    prepare_process()
    interrupted = "Stopped immediately. If there is a checkpoint, `resume=true` resumes the run from it."
    run_app(run, "train", command_line_problems, interrupted)


def prepare_process() -> None:
    """
    Set what the libraries read when they are imported, and put the working directory on the import path.

    Raises:
        SystemExit: with status 2, for an environment that no run can start in.
    """
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    names = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if not os.environ.get(name, "0").isdecimal()]
    for name, value in {name: os.environ.pop(name) for name in names}.items():
        exit_with(
            f"Error: the environment variable `{name}` is {value!r} and must be a number, which a launcher sets. "
            f"Remove it: `unset {name}`.",
            2,
        )
    try:
        sys.path.append(os.getcwd())  # for functions of the user's own, where `rlhf-trl` is the program
    except FileNotFoundError:
        exit_with("Error: The working directory was deleted. Change to one that exists: `cd ...`.", 2)
    filter_warnings()
    keep_freed_memory()


def command_line_problems(args: Namespace) -> list[str]:
    """
    Return the problems of a command line and its config: a refused run must not touch the directory of an earlier one.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: for a multirun on every rank of a launch.
    """
    if not args.multirun:
        cfg, problems = compose(args.overrides, args.config_dirs)
        if cfg is None:
            return problems_of_all_nodes(problems, "config")
        # Overrides that don't fit can't be composed again
        problems = (problems or _options_without_effect(cfg, args)) + find_problems(cfg)
        return problems_of_all_nodes(problems, "config", plain(cfg)[0].get("run_dir"))
    if is_launched():
        raise ConfigError(
            f"`{command_line('-m')}` would start the whole sweep on every rank. "
            f"Use `{command_line('-m', *args.overrides, app='sweep')}`, which launches each of its jobs."
        )
    _, problems = compose(without_sweeps(args.overrides), args.config_dirs)  # its jobs are checked one by one
    return problems


def _options_without_effect(cfg: DictConfig, args: Namespace) -> list[str]:
    """Return the problems of options that don't act, by what Hydra alone knows: the choices and the typed words."""
    values = as_dict(cfg, resolve=False)
    problems = _unread_rate(values, args.overrides)
    path = at(values, "model.path")
    if path is None or str(path).startswith(DEMO) or not brings_values(cfg.stage.name):
        return problems
    whole = composed("train", args.overrides, args.config_dirs, with_hydra=True)
    if whole.hydra.runtime.choices.get("model") != "demo":
        return problems
    return [*problems, for_embedded("model.path", str(path))]


def _unread_rate(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Return the problem of an adapter's learning rate for this stage that is not what the stage takes, or none."""
    key, rate = f"adapter.learning_rates.{at(values, 'stage.name')}", at(values, "stage.args.learning_rate")
    if str(rate).startswith("${adapter.") or key not in (word.split("=")[0].lstrip("+") for word in overrides):
        return []
    whose = ", that of the embedded model" if str(at(values, "model.path")).startswith(DEMO) else ""
    return [f"`{key}` has no effect: `stage.args.learning_rate` is {rate}{whose}. Set that one."]


def run(cfg: DictConfig) -> float | None:
    """Check the config and run its stage, or with `dry_run` print its plan."""
    started = time.monotonic()
    keep_output_above_bars()
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        cfg.run_name = f"{cfg.run_name}_sweep/{HydraConfig.get().job.num}"  # which is also Hydra's folder of this job
    # First, since `check` imports torch, which takes a while
    say(first_line(cfg, writes=HydraConfig.get().output_subdir is not None))
    try:
        values = plain(cfg)[0]
        if is_finished(values):
            return say(f"The run in `{cfg.run_dir}` is finished: nothing to do.")
        cfg.resume = resumes(values)  # before the check, in which the ranks wait for each other
        check(cfg)
        if cfg.get("dry_run"):
            from rlhf_trl.cli.dry_run import show_plan

            return show_plan(cfg, timed=bool(cfg.get("time_steps")))
        objective = hydra.utils.instantiate(cfg.stage.run)(cfg)
        leave_process_group()
        if lines := last_lines(cfg, unquote_text(HydraConfig.get().overrides.task), time.monotonic() - started):
            say(f"\n{lines}")
        return objective
    except BaseException as error:  # here, because Hydra would print the overrides in front of the message
        if isinstance(error, Preempted) and world_size() > 1:
            sys.stdout.flush()
            os._exit(PREEMPTED_STATUS)  # an orderly exit may wait for a rank that has left already
        if message := error_message(error, cfg):
            exit_with(f"Error: {message}", 2)
        close_bars()  # so that the traceback begins on a line of its own
        raise


def error_message(error: BaseException, cfg: DictConfig) -> str | None:
    """Return the message of an error within a stage that is the user's to fix, `None` for any other error."""
    if isinstance(error, Interrupted | Preempted):
        return None  # wherever the signal arrived, in a function of the user's too
    if isinstance(error, ConfigError | DivergedError):
        return str(error)
    if disk_is_full(error):
        return _disk_message(Path(cfg.run_dir))
    if isinstance(error, InstantiationException):
        if isinstance(error.__cause__, ConfigError):
            return str(error.__cause__)
        return user_traceback(error) or _instantiation_message(error)
    if isinstance(error, OmegaConfBaseException | HydraException):
        return " ".join(str(error).split())
    if isinstance(error, RuntimeError) and re.search("Connection (closed|reset) by peer", str(error)):
        return "another rank has ended. Its own message stands above, or in its log."
    return user_traceback(error)


def _disk_message(run_dir: Path) -> str:
    """Return the message of a full disk: what is free there, and the checkpoint from which the run can be resumed."""
    place = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
    free, (checkpoint, _) = bytes_text(shutil.disk_usage(place).free), last_whole_checkpoint(run_dir)
    then = "start again: `overwrite=true`"
    if checkpoint:
        then = f"resume from `{checkpoint}`, which is complete: `resume=true`"
    return (
        f"There is no room left on the disk of `{run_dir}`: {free} are free, without the checkpoint that was being "
        f"written. Make room (`stage.args.save_total_limit` keeps fewer checkpoints), and {then}."
    )


def _instantiation_message(error: InstantiationException) -> str:
    """Return the key and the cause of an error in the class or the function that a node of the config names."""
    named = re.search(r"full_key: (\S+)", str(error)) or re.search(r"target '([^']+)'", str(error))
    where = f"`{named.group(1)}`: " if named else ""
    cause = error.__cause__
    if cause is None:
        return where + " ".join(str(error).split("\nfull_key")[0].split())
    return f"{where}{type(cause).__name__}: {cause}"


if __name__ == "__main__":
    main()
