"""JSON lines that one process appends to, each synced: what is done is not done again after a kill."""

import json
import os
from pathlib import Path
from typing import Any


class SyncedLines:
    """
    A file of JSON lines, appended to by this process alone. The part of a line that a killed process left is
    overwritten.

    Args:
        path (`str` or `os.PathLike`): the file, which is made with the first line.

    Attributes:
        rows (`list[dict]`): the lines that were there.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in whole]
        self._size = sum(map(len, whole))

    @property
    def is_empty(self) -> bool:
        """Whether there is no line."""
        return self._size == 0

    def append(self, row: dict[str, Any]) -> None:
        """Append a line. When this returns, it is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.truncate(self._size)
            # A lone surrogate, which UTF-8 lacks, is written as JSON's own escape of it
            self._size += file.write((json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
