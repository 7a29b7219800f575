"""Hydra apps whose errors end in one message: the frame of `train.py`, `launch/pipeline.py` and `launch/sweep.py`."""

import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlhf_trl.cli.help import help_text, version_text
from rlhf_trl.cli.overrides import completed_options, compose, parse_command_line, without_sweeps
from rlhf_trl.cli.show_config import annotated_config
from rlhf_trl.config.command_line import quote_text
from rlhf_trl.config.program import App
from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.paths import conf_dir
from rlhf_trl.runs.ranks import is_main_process, world_size
from rlhf_trl.runs.record import write_json
from rlhf_trl.terminal import close_bars, printable

SECONDS_FOR_RANK_0 = 5.0


def run_app(
    task: Callable[[DictConfig], object],
    config: App,
    find_problems: Callable[[Namespace], list[str]],
    interrupted: str,
) -> None:
    """
    Run a Hydra app. Errors in its command line are reported before Hydra writes its first file, all in one message.

    `--help` and `--version` are ours. Without any argument the help is shown, since nothing should start by accident;
    a pipeline runs: its default is the demo.

    Args:
        task (`Callable[[DictConfig], object]`):
            The function to call with the config.
        config (`str`):
            Name of the config file: `train`, `sweep` or `pipeline`.
        find_problems (`Callable[[Namespace], list[str]]`):
            Returns the problems of a command line, see [`~rlhf_trl.cli.overrides.parse_command_line`]. It isn't called
            for commands that only show something, such as `--help`.
        interrupted (`str`):
            The message after Ctrl-C.

    Raises:
        SystemExit: with status 2 after an error of the user's, 130 after Ctrl-C.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra itself ends every error, with status 1 and without its traceback
    args = Namespace(overrides=[], config_dirs=[], is_checked=False, multirun=False)
    try:
        if "--version" in sys.argv[1:]:  # which is Hydra's own otherwise
            return _show(version_text())
        sys.argv[1:] = quote_text(sys.argv[1:])  # Hydra reads them again
        args = parse_command_line(sys.argv[1:])
        if args.help or (len(sys.argv) == 1 and config != "pipeline"):
            return _show(help_text(config, args.config_dirs))
        if args.cfg == "job" and not (args.config_name or args.config_path):
            return _show(annotated_config(args, config).removesuffix("\n"))
        if args.shell_completion and (words := completed_options(args.config_dirs)):
            return _show("\n".join(words))
        if args.is_checked and (problems := find_problems(args)):
            raise ConfigError.join(problems)
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config)(task)()
        sys.stdout.flush()
    except ConfigError as error:
        exit_with(f"Error: {error}", 2)
    except (HydraException, OmegaConfBaseException) as error:
        exit_with(f"Error: {_explain(error, config, args)}", 2)
    except KeyboardInterrupt:
        exit_with(interrupted, 130)
    except BrokenPipeError:
        if args.is_checked:
            raise
        # `--help | head` has read enough; Python itself flushes once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(text: str) -> None:
    if is_main_process():
        print(text, flush=True)


def _explain(error: Exception, config: str, args: Namespace) -> str:
    """Return the problems of the overrides or, where they have none, Hydra's own message."""
    if isinstance(error, HydraException):
        words = without_sweeps(args.overrides) if args.multirun else args.overrides
        _, problems = compose(words, args.config_dirs, config)
        if problems:
            return str(ConfigError.join(problems))
    lines = str(error).splitlines()
    return f"{lines[0].rstrip('.')}. {' '.join(line.strip() for line in lines[1:])}".strip()


def exit_with(message: object, status: int) -> NoReturn:
    """
    Print a message once, whatever the number of ranks, and exit.

    Rank 0 prints it for all. Another rank waits until the launcher would have ended it together with rank 0; if it is
    still there, the error is its own. The log file of each rank, where there is one, has its error at once.
    """
    if status == 2:
        record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, printable(str(message)), None, None)
        logging.raiseExceptions = False  # a log on a full disk, of which the message is
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)
    if not is_main_process():
        if status != 2:
            sys.exit(status)
        time.sleep(SECONDS_FOR_RANK_0)
        message = f"\nOn rank {os.environ['RANK']}: {message}"  # on a new line: the progress bar is rank 0's
    close_bars()
    text = printable(str(message))
    print(text, file=sys.stderr, flush=True)
    if status and (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        # torchrun's report on its failed ranks, which comes after the message, ends with what this file holds
        extra = {"py_callstack": text.strip(), "timestamp": str(int(time.time()))}
        write_json(file, {"message": {"message": text.strip(), "extraInfo": extra}})
    if world_size() > 1:
        sys.stdout.flush()
        os._exit(status)  # an orderly exit would wait for the other ranks, which wait for this one
    sys.exit(status)
