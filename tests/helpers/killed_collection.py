"""
Collections (`stage=collect`) that are killed in their midst, each in a fork of one process that nothing else has used.

    python -m tests.helpers.killed_collection FOLDER CALLS,CALLS,... OVERRIDE ...

One is killed, by SIGKILL, in the call of that number of what draws a batch (from 0 on), or at `end`, when the
candidates are written. The runs directory of each is the folder of that name in FOLDER.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.utils import instantiate

import rlhf_trl.stages.collect as stage
from rlhf_trl.cli.overrides import compose

ROOT = Path(__file__).parents[2]


def kill_collections(folder: Path, points: Sequence[str], words: Sequence[str]) -> None:
    """Run a collection for each of `points`, and kill it there."""
    command = [sys.executable, "-m", "tests.helpers.killed_collection", str(folder), ",".join(points), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def die(*_, **__):
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying_after(count: int, function: Callable) -> Callable:
    """Return a function that can be called so many times; the next call kills this process."""
    left = [function] * count + [die]
    return lambda *args, **kwargs: left.pop(0)(*args, **kwargs)


def main(folder: str, points: str, *words: str) -> None:
    """Fork for each point, and see that the signal was what ended it."""
    for point in points.split(","):
        cfg, problems = compose([*words, f"runs_dir={folder}/{point}"], [], "train")
        assert cfg is not None and not problems, problems
        child = os.fork()
        if child == 0:
            if point == "end":
                stage.write_metrics = die
            else:
                stage.sample = dying_after(int(point), stage.sample)
            instantiate(cfg.stage.run)(cfg)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{point}: {status}"


if __name__ == "__main__":
    main(*sys.argv[1:])
