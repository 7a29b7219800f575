"""The command lines of `launch/pipeline.py` and `launch/sweep.py`: they speak as `train.py` does."""

import os
import sys
from collections.abc import Callable

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlhf_trl.cli.overrides import compose, parsed, without_sweeps
from rlhf_trl.config.command_line import as_meant
from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.paths import conf_dir


def run_app(
    task: Callable[[DictConfig], object],
    config: str,
    problems: Callable[[list[str], bool, DictConfig], list[str]],
    stopped: str,
) -> None:
    """
    Run a Hydra app; what is wrong with its command line is said before anything starts, all of it in one message, and
    the exit status is 2.

    Args:
        task (callable):
            What gets the config.
        config (`str`):
            Name of the config's file.
        problems (callable):
            Gets the words of the command line, whether `-m` is given, and the config (of a multirun's first job), and
            returns what is wrong with them besides keys and options.
        stopped (`str`):
            What is said after Ctrl-C.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra ends every error itself, with its own words
    sys.argv[1:] = as_meant(sys.argv[1:])
    try:
        args = parsed(sys.argv[1:])
        folders = [args.config_dir] if args.config_dir else []
        if not (args.help or args.hydra_help or args.cfg or args.info or args.shell_completion):
            cfg, found = compose(without_sweeps(args.overrides), folders, config)
            found = found if cfg is None else found or problems(args.overrides, args.multirun, cfg)
            if found:
                raise ConfigError.join(found)
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config)(task)()
    except ConfigError as error:
        leave(f"Error: {error}", 2)
    except (HydraException, OmegaConfBaseException) as error:
        leave(f"Error: {' '.join(str(error).split())}", 2)
    except KeyboardInterrupt:
        leave(stopped, 130)


def leave(message: object, status: int) -> None:
    """Says why, and exits."""
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)
