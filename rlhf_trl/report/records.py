"""What runs left on disk, read without importing torch."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from rlhf_trl.runs import record

NOT_OF_INTEREST = ("_runtime", "_per_second", "epoch", "step", "num_tokens")
# What a run pays with: the first of these that was measured, else its time
COSTS = ("eval_objective/kl", "eval_kl")


@dataclass(frozen=True)
class Run:
    """
    A run directory.

    Attributes:
        name: its folder's name.
        record: `run.json`.
        config: `config.yaml`; empty where there is none.
        metrics: `metrics.json`; `None` where there is none.
    """

    name: str
    record: dict[str, Any]
    config: dict[str, Any]
    metrics: dict[str, Any] | None
    folder: Path

    @property
    def history(self) -> list[dict[str, Any]]:
        """All log entries."""
        return self.metrics["history"] if self.metrics else []

    @property
    def seconds(self) -> float | None:
        """From start to end; `None` while it runs."""
        if not self.record.get("ended"):
            return None
        begun, ended = (datetime.fromisoformat(self.record[key]) for key in ("started", "ended"))
        return (ended - begun).total_seconds()

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric."""
        logged = enumerate(self.history)
        points = [(entry.get("step", i), entry[key]) for i, entry in logged if entry.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]


def read_run(folder: Path) -> Run:
    """The run in a folder with a `run.json`."""
    config = folder / "config.yaml"
    return Run(
        name=folder.name,
        record=record.read_run(folder),
        config=yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {},
        metrics=record.read_metrics(folder),
        folder=folder,
    )


def read_runs(project_dir: Path) -> list[Run]:
    """The runs of a project, by the time they were started."""
    runs = [read_run(path.parent) for path in project_dir.glob("*/run.json")]
    return sorted(runs, key=lambda run: run.record["started"])


def without_gaps(value: Any) -> Any:
    """What a JSON file holds, with `None` for an estimate that has no mean: one that could not be made."""
    if isinstance(value, dict):
        if "mean" in value and value["mean"] is None:
            return None
        return {key: without_gaps(item) for key, item in value.items()}
    return [without_gaps(item) for item in value] if isinstance(value, list) else value


def swept_keys(jobs: list[dict]) -> list[str]:
    """The overrides in which the jobs of a sweep differ; all of them where they don't."""
    names = list(dict.fromkeys(name for job in jobs for name in job["overrides"]))
    return [name for name in names if len({job["overrides"].get(name) for job in jobs}) > 1] or names


def metric_names(jobs: list[dict]) -> list[str]:
    """What the jobs of a sweep measured: the objective first, then what it is paid with."""
    objectives = [job["objective"] for job in jobs if job["objective"]]
    measured = list(dict.fromkeys(name for job in jobs for name in job["eval"] if not name.endswith(NOT_OF_INTEREST)))
    return list(dict.fromkeys([*objectives[:1], *(name for name in COSTS if name in measured), *measured]))
