"""
The command line: `python train.py`, `rlhf-trl`, and what `accelerate launch train.py` runs on each rank.

Hydra composes the config; errors that are the user's to fix end in one message and exit status 2, before anything is
written. Nothing heavy is imported before the config is in order, so that `--help`, `--cfg job` and a misspelt key are
answered at once.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlhf_trl.checks import check, find_problems
from rlhf_trl.cli.overrides import compose, parsed, without_sweeps
from rlhf_trl.config.command_line import as_meant
from rlhf_trl.errors import ConfigError, DivergedError, disk_is_full, told_by_own_code
from rlhf_trl.patches.malloc import keep_freed_memory
from rlhf_trl.patches.warnings import filter_warnings
from rlhf_trl.runs.paths import conf_dir
from rlhf_trl.terminal import AboveBars, close_bars, printable

# Set unless the user has set them. The first four keep the libraries from phoning home.
DEFAULT_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL's and the hub's
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers asks a service to convert models that have only .bin files
    "WANDB_ERROR_REPORTING": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warns at each fork of a data worker
    "TRL_EXPERIMENTAL_SILENCE": "1",  # ORPO lives in trl.experimental; a stage of ours is a choice already made
}
SECONDS_FOR_THE_FIRST_RANK = 5.0


def main() -> None:
    """Run the stage that the command line names, and exit with 2 at an error of the user's, 130 after Ctrl-C."""
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Hydra trims tracebacks and turns every error into exit status 1; here unexpected errors keep all of theirs
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        sys.path.append(os.getcwd())  # for functions of the user's own, where `rlhf-trl` is the program
    except FileNotFoundError:
        _leave("Error: The working directory was deleted. Change to one that exists: `cd ...`.", 2)
    filter_warnings()
    keep_freed_memory()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if not os.environ.get(name, "0").isdecimal():
            print(
                f"Error: the environment variable `{name}` is {os.environ[name]!r} and must be a number, which a "
                f"launcher sets. Type `unset {name}`.",
                file=sys.stderr,
            )
            sys.exit(2)
    try:
        sys.argv[1:] = as_meant(sys.argv[1:])  # for Hydra, which reads them again
        words, config_dirs = _look_at(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(run)()
    except ConfigError as error:
        _leave(f"Error: {error}", 2)
    except (HydraException, OmegaConfBaseException) as error:
        _leave(f"Error: {_explained(error, words, config_dirs)}", 2)
    except KeyboardInterrupt:
        _leave("Stopped at once. If there is a checkpoint, `resume=true` goes on from it.", 130)


def run(cfg: DictConfig) -> float | None:
    """Check the config and run its stage; with `dry_run` only tell what would be run."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setStream(AboveBars(handler.stream))
            if os.environ.get("RANK", "0") != "0":
                handler.setLevel(logging.ERROR)  # rank 0 says it for all
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        cfg.run_name = f"{cfg.run_name}_sweep/{HydraConfig.get().job.num}"  # which is also Hydra's folder of this job
    try:
        check(cfg)
        if cfg.get("dry_run"):
            from rlhf_trl.cli.dry_run import show_plan

            return show_plan(cfg)
        return hydra.utils.instantiate(cfg.stage.run)(cfg)
    except (ConfigError, DivergedError) as error:  # here, because Hydra would print the overrides in front of it
        _leave(f"Error: {error}", 2)
    except BaseException as error:
        if disk_is_full(error):
            _leave(
                f"Error: There is no room left on the disk of `{cfg.run_dir}`. Make room, and resume the run with "
                "`resume=true`, or start again with `overwrite=true` where it has no checkpoint yet.",
                2,
            )
        if told := _explained_here(error):
            _leave(f"Error: {told}", 2)
        raise


def _explained_here(error: BaseException) -> str | None:
    """What to say of an error inside of a stage that is the user's to fix; `None` for one that is none."""
    if isinstance(error, InstantiationException):
        if isinstance(error.__cause__, ConfigError):
            return str(error.__cause__)
        return told_by_own_code(error) or _without_target(error)
    if isinstance(error, OmegaConfBaseException | HydraException):
        return " ".join(str(error).split())
    if isinstance(error, RuntimeError) and re.search("Connection (closed|reset) by peer", str(error)):
        return "another rank has ended. Its own message stands above, or in its log."
    return told_by_own_code(error)


def _without_target(error: InstantiationException) -> str:
    """What an error says whose cause lies in the class or the function that a node of the config names."""
    named = re.search(r"full_key: (\S+)", str(error)) or re.search(r"target '([^']+)'", str(error))
    where = f"`{named.group(1)}`: " if named else ""
    cause = error.__cause__
    if cause is None:
        return where + " ".join(str(error).split("\nfull_key")[0].split())
    return f"{where}{type(cause).__name__}: {cause}"


def _look_at(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Stop at what is wrong with a command before Hydra writes its first file: a refused run must not touch the directory
    of an earlier one.

    Returns the overrides and the config folders of the command line. Commands that only show something are left to
    Hydra.
    """
    args = parsed(argv)
    config_dirs = [args.config_dir] if args.config_dir else []
    if args.multirun and _is_launched():
        raise ConfigError(
            "`accelerate launch train.py -m` would start the whole sweep on every rank. "
            f"Type `python launch/sweep.py -m {' '.join(args.overrides)}`, which launches each of its jobs."
        )
    shows = args.help or args.hydra_help or args.cfg or args.info or args.shell_completion
    if not (shows or args.experimental_rerun or args.config_name or args.config_path):
        words = without_sweeps(args.overrides) if args.multirun else args.overrides
        cfg, problems = compose(words, config_dirs)
        if cfg and not args.multirun:  # its jobs are checked one by one
            problems += find_problems(cfg)
        if problems:
            raise ConfigError.join(problems)
    return args.overrides, config_dirs


def _explained(error: Exception, words: Sequence[str], config_dirs: Sequence[str]) -> str:
    """What the overrides' problems are; where they have none, what Hydra says."""
    if isinstance(error, HydraException):
        _, problems = compose(without_sweeps(words), config_dirs)
        if problems:
            return str(ConfigError.join(problems))
    lines = str(error).splitlines()
    return f"{lines[0].rstrip('.')}. {' '.join(line.strip() for line in lines[1:])}".strip()


def _is_launched() -> bool:
    """Whether a launcher started this process: `accelerate launch` sets the first of these even for a single rank."""
    return bool({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "RANK"} & os.environ.keys())


def _leave(message: str, status: int) -> None:
    """
    Say it once, whatever the number of ranks, and exit.

    The first rank speaks for all. Another one waits until the launcher would have ended it with the first, as one that
    fails is enough for it; if it is still there, the error is its own.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        if status != 2:
            sys.exit(status)
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)
        message = f"\nOn rank {rank}: {message}"  # the bar that may be there is the first rank's
    close_bars()
    print(printable(message), file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        os._exit(status)  # an orderly end would wait for the other ranks, which wait for this one
    sys.exit(status)


if __name__ == "__main__":
    main()
