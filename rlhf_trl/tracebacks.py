"""Which part of a traceback is the user's own code: all that is shown of an error in it."""

import sysconfig
import traceback
from functools import cache
from pathlib import Path
from types import FrameType

from rlhf_trl.paths import PACKAGE

STDLIB = sysconfig.get_path("stdlib")


def told_by_own_code(error: BaseException) -> str | None:
    """
    Return what to show of an error that went through a function of the user's own (a reward, a callback, a class of
    a config): what was raised, where, and the frames from the user's first one on. `None` if no frame is the user's.

    The error may be the cause of another one, as it is of Hydra's.
    """
    for cause in reversed([] if isinstance(error, KeyboardInterrupt) else _causes(error)):
        frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        own = [i for i, frame in enumerate(frames) if _is_own(frame)]
        if own:
            last = frames[own[-1]].f_code
            shown = traceback.extract_tb(cause.__traceback__)[own[0] :]
            raised = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
            where = f"`{last.co_name}` in {_short(last.co_filename)}"
            what = f"{where} raised {raised}"
            if isinstance(cause, SystemExit):
                what = f"{where} ended the program (`sys.exit({'' if cause.code is None else cause.code!r})`)"
            return f"{what}\n{''.join(traceback.format_list(shown))}".rstrip()
    return None


def own_code(error: BaseException) -> str | None:
    """Return where an error left the user's own code, `my_rewards.py, line 3`, or `None`."""
    own = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_own(frame)]
    return f"{_short(own[-1][0].f_code.co_filename)}, line {own[-1][1]}" if own else None


def _causes(error: BaseException) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__
    return causes


def _is_own(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return frame.f_globals.get("__name__") != "__main__" and not file.startswith("<") and _is_own_file(file)


@cache
def _is_own_file(file: str) -> bool:
    path = Path(file).resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and not any(path.is_relative_to(Path(folder).resolve()) for folder in (STDLIB, PACKAGE))


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
