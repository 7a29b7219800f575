"""Errors that are the user's to fix: shown as a message, without a traceback."""

import errno
from collections.abc import Sequence


class ConfigError(ValueError):
    """
    Something in the configuration, the data or the file system keeps a run from starting or going on.

    The message is complete: it says what is wrong, where (key, file, row), and what to type. `rlhf_trl.cli` prints it
    as it is and exits with status 2.
    """

    @classmethod
    def join(cls, problems: Sequence[str]) -> "ConfigError":
        """One error that lists every problem, numbered when there is more than one."""
        if len(problems) == 1:
            return cls(problems[0])
        lines = [f"{len(problems)} problems:"] + [f"  {i}. {problem}" for i, problem in enumerate(problems, 1)]
        return cls("\n".join(lines))


class DataError(ConfigError):
    """A data row, file or column that can't be used. The message names the file, the row number and the field."""


class DivergedError(RuntimeError):
    """A training whose weights or gradients became NaN or infinite. The message says since when, and what to set."""


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that there is no room left on a disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "PytorchStreamWriter failed writing" in str(error):
            return True  # of safetensors and of torch, which have errors of their own
        error = error.__cause__ or error.__context__
    return False
