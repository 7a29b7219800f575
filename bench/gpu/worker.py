"""
One measurement in a process of its own: `python -m bench.gpu.worker CONTENDER`, told what to do by lines on stdin.

It imports first, then reads the job, loads the models, and waits for a second line before it trains: so a worker gets
ready while another one warms up. A job is JSON: `setting`, `options`, and `report`, the file for the results, which is
written anew after each rollout.
"""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.setting import Meter, Setting

MODULES = {"ours": "bench.ours", "grpo": "bench.gpu.contenders", "rloo": "bench.gpu.contenders"}
MODULES |= {"trl112": "bench.trl112", "models": "bench.gpu.models"}


class Reporter(Meter):
    """Meter that writes its report after each rollout."""

    def __init__(self, setting: Setting, path: Path, go: Callable[[], object] = lambda: None):
        super().__init__()
        self.setting, self.path, self.go = setting, path, go

    def ready(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.go()

    def end(self):
        super().end()
        if not self.rollouts:
            return
        first = sum(seconds for phase, seconds in self.rollouts[0].items() if phase != "cpu")
        # The first rollout also pays for kernels and buffers
        counts = {"rollouts": len(self.rollouts), "first_seconds": first, "warm": len(self.rollouts) > 1}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.report(self.setting) | counts))
        partial.replace(self.path)


def train(contender: str, options: dict[str, Any], reporter: Reporter):
    """Measure one training."""
    setting = reporter.setting
    torch.manual_seed(setting.seed)
    module = importlib.import_module(MODULES[contender])
    getattr(module, contender if contender in ("grpo", "rloo") else "train")(setting, options, reporter)
    reporter.end()


def job(setting: Setting, options: dict[str, Any], report: Path) -> bytes:
    """Return a job as a line."""
    return json.dumps({"setting": asdict(setting), "options": options, "report": str(report)}).encode() + b"\n"


def main():
    """Import what the contender needs, wait for the job, and do it."""
    contender = sys.argv[1]
    importlib.import_module(MODULES[contender])
    line = sys.stdin.readline()
    if not line:
        return
    values = json.loads(line)
    reporter = Reporter(Setting(**values["setting"]), Path(values["report"]), go=sys.stdin.readline)
    train(contender, values["options"], reporter)


if __name__ == "__main__":
    main()
