"""What is written to a terminal: nothing that steers it, and nothing behind a progress bar. Imports nothing heavy."""

import os
import re
from typing import TextIO

from tqdm import tqdm

# Control characters except line breaks and tabs, and those that turn the direction of text
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return a text that others wrote (a prompt, a completion, a server's answer) as it may stand in a terminal."""
    return STEERING.sub(lambda found: repr(found.group())[1:-1], text)


def say(text: str) -> None:
    """Print a text on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), flush=True)


def close_bars() -> None:
    """End all progress bars, so that what is written next has a line of its own."""
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
