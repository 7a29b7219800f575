"""The report at the end of a sweep, a table of parameters and metrics."""

import sys
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from rlhf_trl.config.values import as_dict
from rlhf_trl.report.fronts import FrontOptions
from rlhf_trl.report.seeds import value_of
from rlhf_trl.report.sweep import Sweep, outcome, settings_table, write_sweep_report
from rlhf_trl.report.text import WIDTH, duration, front_text, number, short_value, table
from rlhf_trl.runs.record import SWEEP_FILE, read_jobs, write_json
from rlhf_trl.runs.results import SweepJob


class SweepReport(Callback):
    """
    A Hydra callback of `launch/sweep.py` that writes `sweep.json` and the report when all jobs have ended, and prints
    the tables.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        """Remember the records of an earlier sweep in the same directory."""
        self.earlier = {path: path.stat().st_mtime_ns for path in _records(config.hydra.sweep.dir)}

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        """
        Read the records of all jobs, whichever launcher ran them, and write the report.

        Raises:
            SystemExit: if a job failed.
        """
        folder = Path(config.hydra.sweep.dir)
        paths = [path for path in _records(folder) if self.earlier.get(path) != path.stat().st_mtime_ns]
        jobs = [job for path in paths for job in read_jobs(path)]
        write_json(folder / SWEEP_FILE, jobs)
        front = front_options(config)
        page = write_sweep_report(folder, front)
        print("\n" + report(jobs, front) + f"\n\n{folder / SWEEP_FILE}\nReport: {page}", flush=True)
        if not all(job.done for job in jobs):
            sys.exit(1)


def _records(folder: str | Path) -> list[Path]:
    return sorted(
        (path for path in Path(folder).glob("*.json") if path.stem.isdigit()), key=lambda path: int(path.stem)
    )


def front_options(config: DictConfig) -> FrontOptions | None:
    """Return the options of the front of `sweep=pareto`, `None` for another sweep."""
    if (pareto := config.get("pareto")) is None:
        return None
    pareto = as_dict(pareto)
    return FrontOptions(reference_point=pareto["reference_point"], choose=pareto["choose"])


def report(jobs: list[SweepJob], front: FrontOptions | None = None) -> str:
    """
    Return a table of the jobs, one of the settings where they have several seeds, the front by several rewards where
    their weights or bounds vary, and what failed.
    """
    sweep = Sweep.of(jobs, front)
    columns, watched = list(sweep.metrics), any(job.health for job in jobs)
    while True:
        text = table(
            ["job", *sweep.keys, "time", *columns, *(["health"] if watched else [])],
            [
                [
                    str(job.number),
                    *(short_value(job.overrides.get(name, "")) for name in sweep.keys),
                    duration(job.seconds) if job.done else job.status,
                    *(number(value_of(job, name), "{:.4g}") for name in columns),
                    *([job.health] if watched else []),
                ]
                for job in jobs
            ],
        )
        if max(map(len, text.split("\n"))) <= WIDTH or len(columns) < 2:
            break
        columns.pop()
    failed = [f"Job {job.number} failed: {job.message}\n  {job.log}" for job in jobs if not job.done]
    settings = settings_table(sweep)
    averaged = ["\n" + table(settings.headers, settings.cells)] if len(sweep.settings) < len(jobs) else []
    if sweep.front:
        averaged = ["\n" + front_text(sweep.front.front, sweep.front.points), ""]
    return "\n".join([text, *averaged, *failed, "\n" + outcome(sweep).replace("`", "")])
