"""Runs and sweeps as their pages read them from disk, without importing torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import names_of
from rlhf_trl.runs.record import COMPARISON_FILE, CONFIG_FILE, RUN_FILE, read_comparison, read_metrics, read_run
from rlhf_trl.runs.results import Comparison, RunRecord, SweepJob

NOT_OF_INTEREST = ("_runtime", "_per_second", "epoch", "step", "num_tokens")
# Cost of a run: the first of these that was measured, else its time
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
        folder: the directory.
    """

    name: str
    record: RunRecord
    config: dict[str, Any]
    metrics: dict[str, Any] | None
    folder: Path

    @property
    def history(self) -> list[dict[str, Any]]:
        """Log entries."""
        return self.metrics["history"] if self.metrics else []

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Return the steps and the values of a metric."""
        logged = enumerate(self.history)
        points = [(entry.get("step", i), entry[key]) for i, entry in logged if entry.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]


def load_run(folder: Path) -> Run | None:
    """
    Return the run in a folder, `None` where none was started.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if one of its files is damaged.
    """
    record, config = read_run(folder), folder / CONFIG_FILE
    if record is None:
        return None
    return Run(
        name=folder.name,
        record=record,
        config=yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {},
        metrics=read_metrics(folder),
        folder=folder,
    )


def load_runs(project_dir: Path) -> list[Run]:
    """
    Return the runs of a project, by the time they were started.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if one of their files is damaged.
    """
    runs = [load_run(path.parent) for path in project_dir.glob(f"*/{RUN_FILE}")]
    return sorted((run for run in runs if run), key=lambda run: run.record.started or "")


@dataclass(frozen=True)
class Evaluation:
    """
    A comparison of policies in the directory of the run that made it.

    Attributes:
        name: name of the run.
        comparison: `comparison.json`.
        run: the run; `None` where only its comparison is left.
    """

    name: str
    comparison: Comparison
    run: Run | None


def load_evaluations(project_dir: Path) -> list[Evaluation]:
    """
    Return the evaluations of a project, by the time they were started.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if one of their files is damaged.
    """
    found = []
    for path in project_dir.rglob(COMPARISON_FILE):
        name = path.parent.relative_to(project_dir)
        # A hidden folder is the backup of a run that is being overwritten
        if not name.parts or any(part.startswith(".") for part in name.parts):
            continue
        if comparison := read_comparison(path.parent):
            evaluation = Evaluation(name.as_posix(), comparison, load_run(path.parent))
            started = evaluation.run.record.started if evaluation.run else None
            found.append((started or "", path.stat().st_mtime, evaluation.name, evaluation))
    return [evaluation for *_, evaluation in sorted(found, key=lambda entry: entry[:3])]


def chosen_evaluation(evaluations: Sequence[Evaluation], name: str | None) -> Evaluation | None:
    """
    Return the evaluation of a name, the newest one without a name; `None` where there is none at all.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if none has the name.
    """
    if name is None:
        return evaluations[-1] if evaluations else None
    found = next((each for each in evaluations if each.name == name), None)
    if found is None:
        have = names_of([each.name for each in evaluations]) or "none"
        raise ConfigError(f"`stage.evaluation` is `{name}`, and the evaluations of this project are: {have}.")
    return found


def swept_keys(jobs: Sequence[SweepJob]) -> list[str]:
    """Return the overrides in which the jobs of a sweep differ; all of them where they don't."""
    names = list(dict.fromkeys(name for job in jobs for name in job.overrides))
    return [name for name in names if len({job.overrides.get(name) for job in jobs}) > 1] or names


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each key, or where several have the same one the part before it: `beta`, `gold`."""
    parts = {key: key.split(".") for key in keys}
    last = [part[-1] for part in parts.values()]
    before = [part[-2] for part in parts.values() if len(part) > 1]
    return {
        key: part[-1]
        if last.count(part[-1]) == 1
        else part[-2]
        if before.count(part[-2]) == 1
        else ".".join(part[-2:])
        for key, part in parts.items()
    }


def metric_names(jobs: Sequence[SweepJob]) -> list[str]:
    """Return the names of the metrics of a sweep: the objective first, then its cost."""
    objectives = [job.objective for job in jobs if job.objective]
    measured = list(dict.fromkeys(name for job in jobs for name in job.eval if not name.endswith(NOT_OF_INTEREST)))
    return list(dict.fromkeys([*objectives[:1], *(name for name in COSTS if name in measured), *measured]))
