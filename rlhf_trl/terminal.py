"""Output to a terminal: no control characters, above progress bars, once per launch. Imports nothing heavy."""

import logging
import re
import sys
import warnings
from typing import TextIO

from tqdm import tqdm

from rlhf_trl.runs.ranks import is_main_process

# Control characters except line breaks and tabs, and those that turn the direction of text
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return a text from elsewhere (a prompt, a completion, a server's answer) with its control characters escaped."""
    return CONTROL.sub(lambda found: repr(found.group())[1:-1], text)


def say(text: str) -> None:
    """Print a text above the progress bars, on rank 0 only."""
    if is_main_process():
        tqdm.write(printable(text))
        sys.stdout.flush()


def close_bars() -> None:
    """Close all progress bars, so that the next output has a line of its own."""
    # In no type stub of tqdm
    for bar in list(tqdm._instances):  # pyright: ignore[reportAttributeAccessIssue]
        bar.close()


class AboveBars:
    """A stream whose lines stand above the progress bars instead of behind them, for a handler of `logging`."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        """Write whole lines."""
        tqdm.write(printable(text), file=self.stream, end="")

    def flush(self) -> None:
        """See `io.TextIOBase.flush`."""
        self.stream.flush()


def keep_output_above_bars() -> None:
    """
    Let the handlers of `logging` and Python's warnings write above progress bars. Below rank 0 the root logger's
    handlers write errors only. Call it again when more libraries have been imported: each brings a handler.
    """
    root = logging.getLogger()
    loggers = [each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    for logger in (root, *loggers):
        for handler in logger.handlers:
            if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
                continue
            # Those whose stream is a property take the one of the moment, and can't be set
            if vars(handler).get("stream") in (sys.stdout, sys.stderr):
                handler.setStream(AboveBars(handler.stream))
            if logger is root and not is_main_process():
                handler.setLevel(logging.ERROR)
    warnings.showwarning = show_warning


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Write a warning on one line above the progress bars. See `warnings.showwarning`."""
    text = f"{category.__name__}: {message} ({filename}, line {lineno})"
    tqdm.write(printable(text), file=file or sys.stderr)
