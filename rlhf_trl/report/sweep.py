"""The report of a sweep: parameters against metrics, with the Pareto set marked (`<sweep>/report`)."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from rlhf_trl.report import plots
from rlhf_trl.report.page import Code, Details, Figure, Gap, Page, Section, Table, Text, write_page
from rlhf_trl.report.pareto import pareto
from rlhf_trl.report.plots import Series
from rlhf_trl.report.records import COSTS, metric_names, read_run, swept_keys
from rlhf_trl.report.text import duration
from rlhf_trl.runs import record

METRICS_SHOWN = 5  # beside the parameters; the others are a click away


def write_sweep_report(folder: str | Path) -> Path:
    """Writes `report/index.html` and `report/report.md` into a sweep's folder, from its `sweep.json`."""
    return write_page(sweep_page(Path(folder)), Path(folder) / "report")


def sweep_page(folder: Path) -> Page:
    """The page of a sweep."""
    jobs = record.read_json(folder / record.SWEEP_FILE) or []
    done = [job for job in jobs if job["status"] == "done"]
    failed = [job for job in jobs if job["status"] != "done"]
    keys, metrics = swept_keys(jobs), metric_names(jobs)
    measured = [job for job in done if job["value"] is not None]
    objective = measured[0]["objective"] if measured else None
    lower = objective is not None and objective.endswith("loss")  # else more is better
    cost = next((name for name in COSTS if name in metrics and name != objective), None)
    gains = [_gain(job, lower) for job in jobs]
    costs = [(job["eval"].get(cost) if cost else job["seconds"]) if job["status"] == "done" else None for job in jobs]
    best = pareto(gains, costs)
    paid = cost or "time"
    blocks: list = []
    if measured:
        blocks += [_frontier(jobs, keys, objective, paid, costs, best), *_by_parameter(measured, keys, objective)]
    else:
        blocks.append(Gap("No job measured its objective."))
    note = f"Marked: no other job is as good by `{objective}` for as little `{paid}`." if objective else ""
    marked = [i for i, is_best in enumerate(best) if is_best]
    rows = [_row(job, keys, metrics[:METRICS_SHOWN], objective) for job in jobs]
    headers = ["job", *keys, "time", *metrics[:METRICS_SHOWN]]
    blocks.append(Table(headers, rows, "Parameters and metrics.", marked=marked, note=note))
    if metrics[METRICS_SHOWN:]:
        rows = [_row(job, [], metrics[METRICS_SHOWN:], objective) for job in jobs]
        blocks.append(Details("More metrics", [Table(["job", "time", *metrics[METRICS_SHOWN:]], rows, marked=marked)]))
    sections = [Section("Parameters against metrics", blocks)]
    if curves := _curves(folder, done, keys, objective):
        sections.append(Section("Training", curves))
    if failed:
        sections.append(
            Section("Failed", [Gap(f"Job {job['number']} {job['status']}: {job['message']}") for job in failed])
        )
    sections.append(Section("Runs", [_details(folder, job) for job in done] or [Gap("No job is done.")]))
    return Page(
        title=folder.resolve().name,
        kicker=f"Sweep of the project {folder.resolve().parent.name}",
        lead=_lead(measured, len(jobs), len(failed), keys, objective, lower, paid, best, jobs),
        facts={"jobs": str(len(jobs)), "done": str(len(done)), "failed": str(len(failed))},
        sections=sections,
        footer=f"Made {datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')} by rlhf_trl from {folder}.",
    )


def _row(job: dict[str, Any], keys, metrics, objective) -> list:
    return [
        job["number"],
        *(job["overrides"].get(key, "") for key in keys),
        duration(job["seconds"]) if job["status"] == "done" else job["status"],
        *(_shown(job["value"] if name == objective else job["eval"].get(name)) for name in metrics),
    ]


def _lead(measured, count, failed, keys, objective, lower, paid, best, jobs) -> str:
    if not measured:
        return f"None of the {count} jobs measured its objective. Look at what the failed ones say."
    top = max(measured, key=lambda job: cast(float, _gain(job, lower)))
    worth = [_label(job, keys) for job, is_best in zip(jobs, best, strict=True) if is_best]
    return (
        f"{'Lowest' if lower else 'Highest'} `{objective}`: {_shown(top['value'])} with {_label(top, keys)}. "
        f"No other job is as good for as little `{paid}` as {'; '.join(worth)}."
        + (f" {failed} of {count} jobs failed." if failed else "")
    )


def _gain(job: dict[str, Any], lower: bool) -> float | None:
    if job["status"] != "done" or job["value"] is None:
        return None
    return -job["value"] if lower else job["value"]


def _frontier(jobs, keys, objective, paid, costs, best) -> Figure:
    series = []
    for name, wanted, color in (("Pareto set", True, 0), ("others", False, 1)):
        chosen = [i for i, is_best in enumerate(best) if is_best == wanted and jobs[i]["value"] is not None]
        series.append(
            Series(
                name,
                x=[costs[i] for i in chosen],
                y=[jobs[i]["value"] for i in chosen],
                labels=[_label(jobs[i], keys) for i in chosen],
                line=False,
                hollow=not wanted,
                color=color,
            )
        )
    label = "time, s" if paid == "time" else paid
    return Figure(
        plots.frontier([one for one in series if len(one.x)], "Objective against cost", label, objective),
        f"`{objective}` of each job against `{paid}`; filled: no other job is as good for as little.",
        wide=True,
    )


def _by_parameter(jobs, keys, objective) -> list[Figure]:
    """The objective over each swept parameter: a scatter of numbers, else a bar a value."""
    figures = []
    for key in keys:
        given = [job["overrides"].get(key, "") for job in jobs]
        short = key.rsplit(".", 1)[-1]
        try:
            x = [float(value) for value in given]
        except ValueError:
            values: dict[str, list[float]] = {}
            for value, job in zip(given, jobs, strict=True):
                values.setdefault(value, []).append(job["value"])
            means = [sum(found) / len(found) for found in values.values()]
            lows, highs = [min(found) for found in values.values()], [max(found) for found in values.values()]
            drawn = plots.bars(list(values), means, lows, highs, title=short, x_label=objective, form="{:.4g}")
            figures.append(Figure(drawn, f"`{objective}` by `{key}`: mean, lowest and highest of its jobs."))
            continue
        if len(set(x)) > 1:
            series = [Series(objective, x, [job["value"] for job in jobs], line=False)]
            scale = "log" if min(x) > 0 and max(x) / min(x) >= 8 else "linear"
            drawn = plots.frontier(series, short, short, objective, x_scale=scale, wide=False)
            figures.append(Figure(drawn, f"`{objective}` by `{key}`."))
    return figures


def _curves(folder: Path, jobs, keys, objective) -> list:
    series = []
    for job in jobs if objective else ():
        run_dir = folder / str(job["number"])
        steps, values = read_run(run_dir).curve(objective) if (run_dir / record.RUN_FILE).exists() else ([], [])
        if len(steps) > 1:
            series.append(Series(_label(job, keys), steps, values))
    if not series:
        return []
    shown = series[: len(plots.PALETTE)]
    note = f" The first {len(shown)} of {len(series)} jobs." if len(series) > len(shown) else ""
    drawn = plots.curves(shown, f"curves of {objective}", "optimizer step", objective, wide=True)
    return [Figure(drawn, f"`{objective}` of each job.{note}", wide=True)]


def _details(folder: Path, job) -> Details:
    run_dir = folder / str(job["number"])
    config = run_dir / "config.yaml"
    begun = record.read_run(run_dir) or {}
    body = config.read_text(encoding="utf-8") if config.exists() else ""
    return Details(
        f"job {job['number']}", [Code(begun.get("command", "")), Code(body)] if begun else [Text(job["log"])]
    )


def _label(job, keys) -> str:
    return (
        ", ".join(f"{key.rsplit('.', 1)[-1]}={job['overrides'].get(key, '')}" for key in keys)
        or f"job {job['number']}"
    )


def _shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""
