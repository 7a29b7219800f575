"""Page of a sweep: parameters against metrics, averaged over seeds, with the Pareto set marked (`<sweep>/report`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rlhf_trl.report import plots
from rlhf_trl.report.fronts import FrontOptions
from rlhf_trl.report.page import Code, Details, Figure, Missing, Page, Section, Table, Text, write_page
from rlhf_trl.report.pareto import pareto
from rlhf_trl.report.plots import Series
from rlhf_trl.report.records import COSTS, load_run, metric_names, short_names, swept_keys
from rlhf_trl.report.seeds import Setting, contenders, estimate_of, is_seed, settings_of, spread, value_of
from rlhf_trl.report.sweep_fronts import SweepFront, front_of_jobs
from rlhf_trl.report.text import duration, interval, number, short_value
from rlhf_trl.runs.directions import MINIMIZE, direction_of
from rlhf_trl.runs.record import CONFIG_FILE, SWEEP_FILE, read_jobs, read_run
from rlhf_trl.runs.results import Estimate, SweepJob

METRICS_SHOWN = 5  # beside the parameters; the others are a click away
FORM = "{:.4g}"


@dataclass(frozen=True)
class Sweep:
    """
    Jobs of a sweep and what they are compared by.

    Attributes:
        jobs: all of them.
        settings: the jobs that differ in nothing but their seeds, together.
        keys: overrides in which they differ, seeds among them.
        metrics: names of the metrics.
        objective: name of the metric that counts; `None` where no job measured it.
        cost: name of the metric that it is paid with; `None`: time.
        direction: `minimize` or `maximize`; `None` where it isn't known.
        front: the settings by several rewards, where the weights of rewards or the bounds of constraints differ.
    """

    jobs: Sequence[SweepJob]
    settings: Sequence[Setting]
    keys: Sequence[str]
    metrics: Sequence[str]
    objective: str | None
    cost: str | None
    direction: str | None
    front: SweepFront | None = None

    @classmethod
    def of(cls, jobs: Sequence[SweepJob], front: FrontOptions | None = None) -> "Sweep":
        """Return the jobs with what they are compared by, and the front with its options."""
        metrics = metric_names(jobs)
        measured = next((job for job in jobs if job.done and job.value is not None), None)
        objective = measured.objective if measured else None
        cost = next((name for name in COSTS if name in metrics and name != objective), None)
        direction = (measured.direction if measured else None) or direction_of(objective)
        keys = swept_keys(jobs)
        found = cls(jobs, settings_of(jobs, objective), keys, metrics, objective, cost, direction)
        return replace(found, front=front_of_jobs(jobs, keys, found.label, front))

    @property
    def parameters(self) -> list[str]:
        """The keys that are no seeds."""
        return [key for key in self.keys if not is_seed(key)]

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
        return [job for job in self.jobs if value_of(job, self.objective) is not None]

    @property
    def lower_is_better(self) -> bool:
        """True where the objective is minimized."""
        return self.direction == MINIMIZE

    @property
    def paid(self) -> str:
        """The cost in words."""
        return self.cost or "time"

    def estimate(self, setting: Setting) -> Estimate | None:
        """Return the objective of a setting with its interval over seeds."""
        return estimate_of(setting, self.settings)

    def cost_of(self, setting: Setting) -> float | None:
        """Return the mean cost of a setting, `None` where it isn't known."""
        done = [job for job in setting.jobs if job.done]
        found = [value_of(job, self.cost) if self.cost else job.seconds for job in done]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known else None

    def is_best(self) -> list[bool]:
        """Return for each setting whether it is in the Pareto set: by the means no other one is as good for less."""
        if self.direction is None:
            return [False] * len(self.settings)
        sign = -1 if self.lower_is_better else 1
        return pareto(
            [sign * each.mean if each.values else None for each in self.settings],
            [self.cost_of(each) for each in self.settings],
        )

    def label(self, setting: Setting) -> str:
        """Return the overrides in which a setting differs from the others."""
        return _label(setting.overrides, self.parameters) or "all jobs"


def _label(overrides: dict[str, str], keys: Sequence[str]) -> str:
    return ", ".join(f"{name}={short_value(overrides.get(key, ''))}" for key, name in short_names(keys).items())


def write_sweep_report(folder: str | Path, front: FrontOptions | None = None) -> Path:
    """
    Write `report/index.html` and `report/report.md` into a sweep's folder, from its `sweep.json`, with the options of
    its front.
    """
    return write_page(sweep_page(Path(folder), front), Path(folder) / "report")


def sweep_page(folder: Path, front: FrontOptions | None = None) -> Page:
    """Return the page of the sweep in `folder`."""
    sweep = Sweep.of(read_jobs(folder / SWEEP_FILE), front)
    count, done, failed = len(sweep.jobs), sweep.done, sweep.failed
    # Where the weights of the rewards differ, so does the objective that is their sum: the front takes its place
    compared = sweep.front.blocks if sweep.front else _figures(sweep)
    sections = [
        Section("Front" if sweep.front else "Parameters against metrics", [*compared, *_tables(sweep)]),
        Section("Training", _curves(folder, sweep)),
        Section("Failed", [Missing(f"Job {job.number} {job.status}: {job.message}") for job in failed]),
        Section("Runs", [_details(folder, sweep, job) for job in done] or [Missing("No job is done.")]),
    ]
    return Page(
        title=folder.resolve().name,
        kicker=f"Sweep of the project {folder.resolve().parent.name}",
        lead=outcome(sweep),
        facts={
            "settings": str(len(sweep.settings)),
            "jobs": str(count),
            "done": str(len(done)),
            "failed": str(len(failed)),
        },
        sections=[section for section in sections if section.blocks],
        footer=f"Made {datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')} by rlhf_trl from {folder}.",
    )


def outcome(sweep: Sweep) -> str:
    """Return the result in words: a winner only where it is beyond the noise of the seeds."""
    count, failed = len(sweep.jobs), len(sweep.failed)
    if not sweep.measured:
        return f"None of the {count} jobs measured its objective. Look at what the failed ones say."
    said = [sweep.front.in_words if sweep.front else _winner(sweep)]
    if unhealthy := [job for job in sweep.done if job.health.startswith(("warn", "stop"))]:
        signs = sorted({sign for job in unhealthy for sign in job.health.split()[1:] if not sign.startswith("+")})
        said.append(f"The health monitor warned in {len(unhealthy)} of {len(sweep.done)} jobs ({', '.join(signs)}).")
    if failed:
        said.append(f"{failed} of {count} jobs failed.")
    return " ".join(said)


def _winner(sweep: Sweep) -> str:
    name, known = f"`{sweep.objective}`", [each for each in sweep.settings if each.values]
    if len(known) == 1:
        return f"{name} of {sweep.label(known[0])}: {_shown(sweep, known[0])}."
    if sweep.direction is None:
        return (
            f"Whether a high or a low {name} is better can't be told by its name, so no setting is named the best. "
            "Set `direction=maximize` or `direction=minimize`."
        )
    first, *near = contenders(known, sweep.lower_is_better)
    extreme = "lowest" if sweep.lower_is_better else "highest"
    if not spread(known)[1]:
        return (
            f"No winner is named: every setting has one seed, so the noise is unknown. The {extreme} {name} is that "
            f"of {sweep.label(first)}, {_shown(sweep, first)}; sweep over `seed=1,2,3` too to know whether that is "
            "more than chance."
        )
    if near:
        names = "; ".join(sweep.label(each) for each in near[:3])
        more = f" and {len(near) - 3} more" if len(near) > 3 else ""
        return (
            f"No winner: the {extreme} {name}, {_shown(sweep, first)} of {sweep.label(first)}, differs by no more "
            f"than the noise of the seeds from {names}{more}."
        )
    return f"{sweep.label(first)} has the {extreme} {name}, {_shown(sweep, first)}, beyond the noise of the seeds."


def _shown(sweep: Sweep, setting: Setting) -> str:
    seeds = f" over {len(setting.values)} seeds" if len(setting.values) > 1 else ""
    return f"{interval(sweep.estimate(setting), FORM)}{seeds}"


def _figures(sweep: Sweep) -> list:
    if sweep.objective is None:
        return [Missing("No job measured its objective.")]
    return [_frontier(sweep, sweep.objective), *_by_parameter(sweep, sweep.objective)]


def settings_table(sweep: Sweep) -> Table:
    """Return a row per setting: its seeds, the objective with its interval, the cost and the health of its jobs."""
    watched = any(job.health for job in sweep.jobs)
    headers = [*(sweep.parameters or ["setting"]), "seeds", f"{sweep.objective or 'objective'} [95 %]"]
    headers += [*([sweep.cost] if sweep.cost else []), "time", *(["health"] if watched else [])]
    rows = []
    for setting in sweep.settings:
        done = [job for job in setting.jobs if job.done]
        row = [short_value(setting.overrides.get(key, "")) for key in sweep.parameters] or ["all jobs"]
        row.append(str(len(done)) if len(done) == len(setting.jobs) else f"{len(done)} of {len(setting.jobs)}")
        row.append(interval(sweep.estimate(setting), FORM))
        row += [number(sweep.cost_of(setting), FORM)] if sweep.cost else []
        row.append(duration(sum(job.seconds for job in done) / len(done)) if done else "failed")
        row += [_worst_health(done)] if watched else []
        rows.append(row)
    note = f"Marked: by the means no other setting is as good by `{sweep.objective}` for as little `{sweep.paid}`."
    if spread(sweep.settings)[1]:
        note += " Intervals: Student's t over the seeds, with one standard deviation for all settings."
    marked = [i for i, is_best in enumerate(sweep.is_best()) if is_best]
    return Table(headers, rows, "Settings: means over seeds.", marked=marked, note=note if marked else "")


def _worst_health(jobs: Sequence[SweepJob]) -> str:
    levels = ("", "ok", "note", "warn", "stop")
    known = [job.health for job in jobs if job.health]
    worst = max(known, key=lambda health: levels.index(health.split()[0]), default="")
    same = sum(health.split()[0] == worst.split()[0] for health in known)
    return f"{worst} ({same} of {len(known)})" if worst not in ("", "ok") and len(known) > 1 else worst


def _tables(sweep: Sweep) -> list:
    first, more = sweep.metrics[:METRICS_SHOWN], sweep.metrics[METRICS_SHOWN:]
    watched = any(job.health for job in sweep.jobs)
    blocks: list = [] if sweep.front else [settings_table(sweep)]
    headers = ["job", *sweep.keys, "time", *first, *(["health"] if watched else [])]
    rows = [[*_row(sweep, job, sweep.keys, first), *([job.health] if watched else [])] for job in sweep.jobs]
    jobs = Table(headers, rows, "Parameters and metrics of every job.")
    blocks.append(Details("Every job", [jobs]))
    if more:
        rows = [_row(sweep, job, [], more) for job in sweep.jobs]
        blocks.append(Details("More metrics", [Table(["job", "time", *more], rows)]))
    return blocks


def _row(sweep: Sweep, job: SweepJob, keys: Sequence[str], metrics: Sequence[str]) -> list:
    return [
        job.number,
        *(short_value(job.overrides.get(key, "")) for key in keys),
        duration(job.seconds) if job.done else job.status,
        *(number(value_of(job, name), FORM) for name in metrics),
    ]


def _frontier(sweep: Sweep, objective: str) -> Figure:
    series, best = [], sweep.is_best()
    names = (("Pareto set", True, 0), ("others", False, 1)) if any(best) else (("settings", False, 0),)
    for name, wanted, color in names:
        chosen = [
            each for each, is_best in zip(sweep.settings, best, strict=True) if is_best == wanted and each.values
        ]
        ends = [sweep.estimate(each) for each in chosen]
        series.append(
            Series(
                name,
                x=[sweep.cost_of(each) for each in chosen],
                y=[each.mean for each in chosen],
                low=[end and end.low for end in ends],
                high=[end and end.high for end in ends],
                labels=[sweep.label(each) for each in chosen],
                line=False,
                hollow=not wanted,
                color=color,
            )
        )
    caption = f"`{objective}` of each setting against `{sweep.paid}`"
    if any(len(setting.values) > 1 for setting in sweep.settings):
        caption += ", means over seeds"
    if spread(sweep.settings)[1]:
        caption += " with 95 % intervals"
    if any(best):
        caption += "; filled: no other setting is as good for as little"
    return Figure(
        plots.frontier(
            [one for one in series if len(one.x)], "Objective against cost", sweep.cost or "time, s", objective
        ),
        f"{caption}.",
        wide=True,
    )


def _by_parameter(sweep: Sweep, objective: str) -> list[Figure]:
    """Return the objective over each swept parameter: a scatter of numbers, else a bar per value."""
    figures = []
    for key in sweep.parameters:
        short = key.rsplit(".", 1)[-1]
        given = [(job.overrides.get(key, ""), value_of(job, objective) or 0.0) for job in sweep.measured]
        if len({value for value, _ in given}) < 2:
            continue
        try:
            x = [float(value) for value, _ in given]
        except ValueError:
            values: dict[str, list[float]] = {}
            for value, measured in given:
                values.setdefault(value, []).append(measured)
            means = [sum(found) / len(found) for found in values.values()]
            lows, highs = [min(found) for found in values.values()], [max(found) for found in values.values()]
            drawn = plots.bars(list(values), means, lows, highs, title=short, x_label=objective, form=FORM)
            figures.append(Figure(drawn, f"`{objective}` by `{key}`: mean, lowest and highest of its jobs."))
            continue
        series = [Series(objective, x, [measured for _, measured in given], line=False)]
        scale = "log" if min(x) > 0 and max(x) / min(x) >= 8 else "linear"
        drawn = plots.frontier(series, short, short, objective, x_scale=scale, wide=False)
        figures.append(Figure(drawn, f"`{objective}` of every job by `{key}`."))
    return figures


def _curves(folder: Path, sweep: Sweep) -> list[Figure]:
    if (objective := sweep.objective) is None:
        return []
    series = []
    for place, setting in enumerate(sweep.settings[: len(plots.PALETTE)]):
        for job in setting.jobs:
            run = load_run(folder / str(job.number)) if job.done else None
            steps, values = run.curve(objective) if run else ([], [])
            if len(steps) > 1:
                series.append(Series(sweep.label(setting), steps, values, color=place))
    if not series:
        return []
    more = len(sweep.settings) - len(plots.PALETTE)
    note = f" The first {len(plots.PALETTE)} of {len(sweep.settings)} settings." if more > 0 else ""
    drawn = plots.curves(series, f"curves of {objective}", "optimizer step", objective, wide=True)
    return [Figure(drawn, f"`{objective}` of each job; the jobs of a setting have one color.{note}", wide=True)]


def _details(folder: Path, sweep: Sweep, job: SweepJob) -> Details:
    run_dir = folder / str(job.number)
    config, record = run_dir / CONFIG_FILE, read_run(run_dir)
    body = config.read_text(encoding="utf-8") if config.exists() else ""
    title = ": ".join(filter(None, [f"job {job.number}", _label(job.overrides, sweep.keys)]))
    return Details(title, [Code(record.command), Code(body)] if record else [Text(job.log)])
