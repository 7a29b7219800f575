"""Page of a sweep: parameters against metrics, with the Pareto set marked (`<sweep>/report`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rlhf_trl.report import plots
from rlhf_trl.report.page import Code, Details, Figure, Missing, Page, Section, Table, Text, write_page
from rlhf_trl.report.pareto import pareto
from rlhf_trl.report.plots import Series
from rlhf_trl.report.records import COSTS, load_run, metric_names, swept_keys
from rlhf_trl.report.text import duration, number
from rlhf_trl.runs.record import CONFIG_FILE, SWEEP_FILE, read_jobs, read_run
from rlhf_trl.runs.results import SweepJob

METRICS_SHOWN = 5  # beside the parameters; the others are a click away


@dataclass(frozen=True)
class Sweep:
    """
    Jobs of a sweep and what they are compared by.

    Attributes:
        jobs: all of them.
        keys: overrides in which they differ.
        metrics: names of the metrics.
        objective: name of the metric that counts; `None` where no job measured it.
        cost: name of the metric that it is paid with; `None`: time.
    """

    jobs: Sequence[SweepJob]
    keys: Sequence[str]
    metrics: Sequence[str]
    objective: str | None
    cost: str | None

    @classmethod
    def of(cls, jobs: Sequence[SweepJob]) -> "Sweep":
        """Return the jobs with what they are compared by."""
        metrics = metric_names(jobs)
        objective = next((job.objective for job in jobs if job.done and job.value is not None), None)
        cost = next((name for name in COSTS if name in metrics and name != objective), None)
        return cls(jobs, swept_keys(jobs), metrics, objective, cost)

    @property
    def done(self) -> list[SweepJob]:
        """The jobs that ended well."""
        return [job for job in self.jobs if job.done]

    @property
    def failed(self) -> list[SweepJob]:
        """The other jobs."""
        return [job for job in self.jobs if not job.done]

    @property
    def measured(self) -> list[SweepJob]:
        """The jobs that measured the objective."""
        return [job for job in self.done if job.value is not None]

    @property
    def lower_is_better(self) -> bool:
        """True where the objective is a loss."""
        return self.objective is not None and self.objective.endswith("loss")

    @property
    def paid(self) -> str:
        """The cost in words."""
        return self.cost or "time"

    def gain(self, job: SweepJob) -> float | None:
        """Return the objective of a job, more is better; `None` where it was not measured."""
        if not job.done or job.value is None:
            return None
        return -job.value if self.lower_is_better else job.value

    def cost_of(self, job: SweepJob) -> float | None:
        """Return the cost of a job, `None` where it isn't done."""
        if not job.done:
            return None
        return job.eval.get(self.cost) if self.cost else job.seconds

    def is_best(self) -> list[bool]:
        """Return for each job whether it is in the Pareto set: no other one is as good at no more cost."""
        return pareto([self.gain(job) for job in self.jobs], [self.cost_of(job) for job in self.jobs])

    def label(self, job: SweepJob) -> str:
        """Return the overrides in which a job differs from the others."""
        words = [f"{key.rsplit('.', 1)[-1]}={job.overrides.get(key, '')}" for key in self.keys]
        return ", ".join(words) or f"job {job.number}"


def write_sweep_report(folder: str | Path) -> Path:
    """Write `report/index.html` and `report/report.md` into a sweep's folder, from its `sweep.json`."""
    return write_page(sweep_page(Path(folder)), Path(folder) / "report")


def sweep_page(folder: Path) -> Page:
    """Return the page of the sweep in `folder`."""
    sweep = Sweep.of(read_jobs(folder / SWEEP_FILE))
    count, done, failed = len(sweep.jobs), sweep.done, sweep.failed
    sections = [
        Section("Parameters against metrics", [*_figures(sweep), *_tables(sweep)]),
        Section("Training", _curves(folder, sweep)),
        Section("Failed", [Missing(f"Job {job.number} {job.status}: {job.message}") for job in failed]),
        Section("Runs", [_details(folder, job) for job in done] or [Missing("No job is done.")]),
    ]
    return Page(
        title=folder.resolve().name,
        kicker=f"Sweep of the project {folder.resolve().parent.name}",
        lead=_lead(sweep),
        facts={"jobs": str(count), "done": str(len(done)), "failed": str(len(failed))},
        sections=[section for section in sections if section.blocks],
        footer=f"Made {datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')} by rlhf_trl from {folder}.",
    )


def _lead(sweep: Sweep) -> str:
    count, failed = len(sweep.jobs), len(sweep.failed)
    if not sweep.measured:
        return f"None of the {count} jobs measured its objective. Look at what the failed ones say."
    top = max(sweep.measured, key=lambda job: sweep.gain(job) or 0.0)
    worth = [sweep.label(job) for job, is_best in zip(sweep.jobs, sweep.is_best(), strict=True) if is_best]
    return (
        f"{'Lowest' if sweep.lower_is_better else 'Highest'} `{sweep.objective}`: {_shown(top.value)} with "
        f"{sweep.label(top)}. No other job is as good for as little `{sweep.paid}` as {'; '.join(worth)}."
        + (f" {failed} of {count} jobs failed." if failed else "")
    )


def _figures(sweep: Sweep) -> list:
    if sweep.objective is None:
        return [Missing("No job measured its objective.")]
    return [_frontier(sweep, sweep.objective), *_by_parameter(sweep, sweep.objective)]


def _tables(sweep: Sweep) -> list:
    best = sweep.is_best()
    marked = [i for i, is_best in enumerate(best) if is_best]
    first, more = sweep.metrics[:METRICS_SHOWN], sweep.metrics[METRICS_SHOWN:]
    note = f"Marked: no other job is as good by `{sweep.objective}` for as little `{sweep.paid}`."
    rows = [_row(sweep, job, sweep.keys, first) for job in sweep.jobs]
    headers = ["job", *sweep.keys, "time", *first]
    blocks: list = [
        Table(headers, rows, "Parameters and metrics.", marked=marked, note=note if sweep.objective else "")
    ]
    if more:
        rows = [_row(sweep, job, [], more) for job in sweep.jobs]
        blocks.append(Details("More metrics", [Table(["job", "time", *more], rows, marked=marked)]))
    return blocks


def _row(sweep: Sweep, job: SweepJob, keys: Sequence[str], metrics: Sequence[str]) -> list:
    return [
        job.number,
        *(job.overrides.get(key, "") for key in keys),
        duration(job.seconds) if job.done else job.status,
        *(_shown(job.value if name == sweep.objective else job.eval.get(name)) for name in metrics),
    ]


def _frontier(sweep: Sweep, objective: str) -> Figure:
    series, best = [], sweep.is_best()
    for name, wanted, color in (("Pareto set", True, 0), ("others", False, 1)):
        chosen = [
            job for job, is_best in zip(sweep.jobs, best, strict=True) if is_best == wanted and job.value is not None
        ]
        series.append(
            Series(
                name,
                x=[sweep.cost_of(job) for job in chosen],
                y=[job.value for job in chosen],
                labels=[sweep.label(job) for job in chosen],
                line=False,
                hollow=not wanted,
                color=color,
            )
        )
    return Figure(
        plots.frontier(
            [one for one in series if len(one.x)], "Objective against cost", sweep.cost or "time, s", objective
        ),
        f"`{objective}` of each job against `{sweep.paid}`; filled: no other job is as good for as little.",
        wide=True,
    )


def _by_parameter(sweep: Sweep, objective: str) -> list[Figure]:
    """Return the objective over each swept parameter: a scatter of numbers, else a bar per value."""
    figures = []
    for key in sweep.keys:
        short = key.rsplit(".", 1)[-1]
        given = [(job.overrides.get(key, ""), job.value or 0.0) for job in sweep.measured]
        try:
            x = [float(value) for value, _ in given]
        except ValueError:
            values: dict[str, list[float]] = {}
            for value, measured in given:
                values.setdefault(value, []).append(measured)
            means = [sum(found) / len(found) for found in values.values()]
            lows, highs = [min(found) for found in values.values()], [max(found) for found in values.values()]
            drawn = plots.bars(list(values), means, lows, highs, title=short, x_label=objective, form="{:.4g}")
            figures.append(Figure(drawn, f"`{objective}` by `{key}`: mean, lowest and highest of its jobs."))
            continue
        if len(set(x)) > 1:
            series = [Series(objective, x, [measured for _, measured in given], line=False)]
            scale = "log" if min(x) > 0 and max(x) / min(x) >= 8 else "linear"
            drawn = plots.frontier(series, short, short, objective, x_scale=scale, wide=False)
            figures.append(Figure(drawn, f"`{objective}` by `{key}`."))
    return figures


def _curves(folder: Path, sweep: Sweep) -> list[Figure]:
    if (objective := sweep.objective) is None:
        return []
    series = []
    for job in sweep.done:
        run = load_run(folder / str(job.number))
        steps, values = run.curve(objective) if run else ([], [])
        if len(steps) > 1:
            series.append(Series(sweep.label(job), steps, values))
    if not series:
        return []
    shown = series[: len(plots.PALETTE)]
    note = f" The first {len(shown)} of {len(series)} jobs." if len(series) > len(shown) else ""
    drawn = plots.curves(shown, f"curves of {objective}", "optimizer step", objective, wide=True)
    return [Figure(drawn, f"`{objective}` of each job.{note}", wide=True)]


def _details(folder: Path, job: SweepJob) -> Details:
    run_dir = folder / str(job.number)
    config, record = run_dir / CONFIG_FILE, read_run(run_dir)
    body = config.read_text(encoding="utf-8") if config.exists() else ""
    return Details(f"job {job.number}", [Code(record.command), Code(body)] if record else [Text(job.log)])


def _shown(value: object) -> str:
    return number(value, "{:.4g}")
