"""Results that others published of a recipe, beside those of its run."""

from collections.abc import Sequence

from rlhf_trl.report.page import Table
from rlhf_trl.report.records import Run
from rlhf_trl.report.text import compact_number, number


def published_tables(runs: Sequence[Run]) -> list[Table]:
    """Return a table of published and own results; nothing where no run's experiment names any."""
    rows = []
    for run in runs:
        measured = run.metrics["eval"] if run.metrics else {}
        for metric, entry in run.record.published.items():
            value = entry["value"]
            theirs = " to ".join(map(compact_number, value if isinstance(value, list) else [value]))
            ours = number(measured.get(metric), "{:.3g}") or "not measured"
            rows.append([run.name, metric, theirs, ours, entry["source"]])
    headers = ["run", "metric", "published", "here", "source of the published value"]
    return [Table(headers, rows, "Published results of the recipes, and what these runs measured.")] if rows else []
