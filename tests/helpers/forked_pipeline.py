"""
A pipeline whose steps are forks of one process, so that none waits for the imports.

    python -m tests.helpers.forked_pipeline FOLDER OVERRIDE ...
"""

import os
import subprocess
import sys
from pathlib import Path

from bench.loop.steps import Steps
from rlhf_trl.cli.overrides import compose
from rlhf_trl.cli.rounds import all_steps, register_rounds

ROOT = Path(__file__).parents[2]


def forked(folder: Path, *words: str, timeout: float = 1200) -> None:
    """Run the steps of a pipeline that are not done, as `launch/pipeline.py` would in a folder."""
    command = [sys.executable, "-m", "tests.helpers.forked_pipeline", str(folder), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]


def main(folder: str, *words: str) -> None:
    """Run the steps, in a process that nothing else has used."""
    os.chdir(folder)
    register_rounds()
    cfg, problems = compose(list(words), [], "pipeline")
    assert cfg is not None and not problems, problems
    steps = Steps(Path(), cfg.project, list(cfg.overrides))
    for name, overrides in all_steps(cfg).items():
        steps.run(name, *overrides)


if __name__ == "__main__":
    main(*sys.argv[1:])
