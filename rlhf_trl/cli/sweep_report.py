"""The table at the end of a sweep: parameters against metrics."""

import sys
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from rlhf_trl.report.records import metric_names, swept_keys
from rlhf_trl.report.sweep import write_sweep_report
from rlhf_trl.report.text import WIDTH, duration, table
from rlhf_trl.runs.record import SWEEP_FILE, read_json, write_json


class SweepReport(Callback):
    """
    A Hydra callback of `launch/sweep.py`: when all jobs have ended it writes `sweep.json` and the report, and prints
    the table.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        """Notes which records are from an earlier sweep in the same directory."""
        self.earlier = {path: path.stat().st_mtime_ns for path in _records(config.hydra.sweep.dir)}

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        """
        Reads what the jobs left, whatever launcher ran them where.

        Raises:
            SystemExit: if a job failed.
        """
        folder = Path(config.hydra.sweep.dir)
        paths = [path for path in _records(folder) if self.earlier.get(path) != path.stat().st_mtime_ns]
        jobs = [read_json(path) for path in paths]
        write_json(folder / SWEEP_FILE, jobs)
        page = write_sweep_report(folder)
        print("\n" + report(jobs) + f"\n\n{folder / SWEEP_FILE}\nReport: {page}", flush=True)
        if any(job["status"] == "failed" for job in jobs):
            sys.exit(1)


def _records(folder: str | Path) -> list[Path]:
    return sorted(
        (path for path in Path(folder).glob("*.json") if path.stem.isdigit()), key=lambda path: int(path.stem)
    )


def report(jobs: list[dict]) -> str:
    """
    The jobs as a table, and what the failed ones said.

    Args:
        jobs (`list[dict]`):
            Each with `number`, `overrides` (name to value), `status`, `seconds`, `objective` (name), `value`, `eval`
            (metrics), `message` and `log`.
    """
    swept, columns = swept_keys(jobs), metric_names(jobs)
    objective = next((job["objective"] for job in jobs if job["objective"]), None)
    while True:
        text = table(
            ["job", *swept, "time", *columns],
            [
                [
                    job["number"],
                    *(_short(job["overrides"].get(name, "")) for name in swept),
                    duration(job["seconds"]) if job["status"] == "done" else job["status"],
                    *(_shown(job["value"] if name == objective else job["eval"].get(name)) for name in columns),
                ]
                for job in jobs
            ],
        )
        if max(map(len, text.split("\n"))) <= WIDTH or len(columns) < 2:
            break
        columns.pop()
    failed = [
        f"Job {job['number']} failed: {job['message']}\n  {job['log']}" for job in jobs if job["status"] == "failed"
    ]
    return "\n".join([text, *failed])


def _short(value: str) -> str:
    try:
        return min(value, f"{float(value):.4g}", key=len)
    except ValueError:
        return value


def _shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""
