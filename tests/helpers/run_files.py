"""Files that a run leaves."""

import json
from pathlib import Path


def metrics(run_dir: str) -> dict:
    return json.loads(Path(run_dir, "metrics.json").read_text())


def record(run_dir: str) -> dict:
    return json.loads(Path(run_dir, "run.json").read_text())
