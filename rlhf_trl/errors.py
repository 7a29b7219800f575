"""Errors that are the user's to fix, which are shown as a message without a traceback."""

import errno
import re
import signal
import sysconfig
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import FrameType


class ConfigError(ValueError):
    """
    An error in the configuration, the data or the file system that keeps a run from starting or continuing.

    The message is complete: it says what is wrong, where (key, file, row), and what to set. `rlhf_trl.cli.main`
    prints it as it is and exits with status 2.
    """

    @classmethod
    def join(cls, problems: Sequence[str]) -> "ConfigError":
        """Return one error that lists every problem, numbered if there are several."""
        if len(problems) == 1:
            return cls(problems[0])
        lines = [f"{len(problems)} problems:"] + [f"  {i}. {problem}" for i, problem in enumerate(problems, 1)]
        return cls("\n".join(lines))


class DataError(ConfigError):
    """An error in a data row, file or column. The message names the file, the row number and the field."""


class DivergedError(RuntimeError):
    """The end of a training whose weights or gradients became NaN or infinite. The message says since when."""


class Interrupted(SystemExit):
    """The end of a run that Ctrl-C stopped with a checkpoint: exit status 130, as a shell has it."""

    def __init__(self):
        super().__init__(130)


# Sent by schedulers that want the machine back: SIGTERM by all, before the time limit SIGUSR1 (`sbatch
# --signal=USR1@300`) or SIGUSR2 (submitit)
PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# `EX_TEMPFAIL` of `sysexits.h`
PREEMPTED_STATUS = 75


class Preempted(SystemExit):
    """The end of a run that a scheduler asked to make room: exit status 75. The same command can resume it."""

    def __init__(self):
        super().__init__(PREEMPTED_STATUS)


# Of safetensors and torch, which raise errors of their own: `torch.save` in the midst and at the end of its file
FULL_DISK = re.compile(
    r"No space left on device|PytorchStreamWriter failed writing|inline_container\S+ \. unexpected pos"
)


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, is that of a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if FULL_DISK.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


PACKAGE = Path(__file__).resolve().parent
STDLIB = sysconfig.get_path("stdlib")


def user_traceback(error: BaseException) -> str | None:
    """
    Return the message of an error that was raised in the user's own code (a reward, a callback, a class of a config):
    the exception, its place, and the traceback from the user's first frame on. `None` if no frame is the user's.

    The error may be the cause of another one, as of Hydra's.
    """
    for cause in reversed([] if isinstance(error, KeyboardInterrupt) else _causes(error)):
        frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        own = [i for i, frame in enumerate(frames) if _is_own(frame)]
        if own:
            last = frames[own[-1]].f_code
            shown = traceback.extract_tb(cause.__traceback__)[own[0] :]
            if isinstance(cause, SystemExit):
                shown = shown[: own[-1] - own[0] + 1]  # W&B wraps sys.exit
            raised = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
            where = f"`{last.co_name}` in {short_path(last.co_filename)}"
            what = f"{where} raised {raised}"
            if isinstance(cause, SystemExit):
                what = f"{where} ended the program (`sys.exit({'' if cause.code is None else cause.code!r})`)"
            return f"{what}\n{''.join(traceback.format_list(shown))}".rstrip()
    return None


def user_location(error: BaseException) -> str | None:
    """Return where an error left the user's own code, `my_rewards.py, line 3`, or `None`."""
    own = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_own(frame)]
    return f"{short_path(own[-1][0].f_code.co_filename)}, line {own[-1][1]}" if own else None


def _causes(error: BaseException) -> list[BaseException]:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__
    return causes


def _is_own(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return frame.f_globals.get("__name__") != "__main__" and not file.startswith("<") and _is_own_file(file)


@cache
def _is_own_file(file: str) -> bool:
    path = Path(file).resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and not any(path.is_relative_to(Path(folder).resolve()) for folder in (STDLIB, PACKAGE))


def short_path(file: str | Path) -> str:
    """Return a path relative to the working directory if it is below it, else as it is."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
