"""Setup of a comparison in a few lines: models and their size, data, rewards with their scale, judge, sampling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_trl.hints import size_of
from rlhf_trl.report.measures import names_in_words
from rlhf_trl.report.records import Evaluation
from rlhf_trl.report.text import number
from rlhf_trl.runs.record import RUN_FILE, read_run
from rlhf_trl.runs.results import Comparison

EMBEDDED = "tasks/demo/checkpoints/"


def setup_of(evaluation: Evaluation) -> dict[str, str]:
    """Return, by a word for each, what an evaluation compared, on which data, by which rewards and judge."""
    comparison = evaluation.comparison
    config = evaluation.run.config if evaluation.run else {}
    data = describe_data(config.get("data") or {})
    sampling = (
        f"one answer per prompt at temperature {comparison.temperature:g}" if comparison.temperature else "greedy"
    )
    if comparison.max_completion_length:
        sampling += f", up to {comparison.max_completion_length} tokens"
    return {
        "Policies": _policies(comparison),
        "Data": f"{comparison.prompts:,} held-out prompts{f' of {data}' if data else ''}",
        "Reward": _rewards(comparison),
        "Judge": comparison.judge,
        "Sampling": sampling,
        "Evaluation": f"`{evaluation.name}`",
    }


def _policies(comparison: Comparison) -> str:
    sizes = {name: result.parameters for name, result in comparison.policies.items() if result.parameters}
    told = f"{comparison.baseline} (the baseline, from `{model_origin(comparison.base.path)}`)"
    if comparison.others:
        names = list(comparison.others)
        told += f", {names_in_words(names)}" if len(names) <= 4 else f" and {len(names)} others"
    if len(set(sizes.values())) == 1:
        told += f"; {size_of(next(iter(sizes.values())))} parameters each"
    elif sizes:
        told += "; parameters: " + ", ".join(f"{name} {size_of(size)}" for name, size in sizes.items())
    return told


def _rewards(comparison: Comparison) -> str:
    counted = [name for name, weight in comparison.weights.items() if weight]
    combined = len(counted) > 1 or comparison.combine != "weighted_sum"
    values = [value for sample in comparison.samples for value in sample.rewards.values() if value is not None]
    told = []
    for name, weight in comparison.weights.items():
        mean, std = comparison.base.rewards.get(name), comparison.base.reward_std.get(name)
        scale = f"{number(mean, '{:.2f}')} ± {number(std, '{:.2f}')} (standard deviation)" if mean is not None else ""
        role = f"weight {weight:g}" if combined and weight else "" if weight else "reported only"
        told.append(", ".join(filter(None, [f"`{name}`", role, scale and f"{comparison.baseline} {scale}"])))
    text = "; ".join(told) or "none"
    if combined:
        text += f"; combined by {comparison.combine}"
    return text + (f"; from {min(values):.2f} to {max(values):.2f} over all answers" if values else "")


def model_origin(path: str) -> str:
    """Return the model that a chain of runs started from: a hub id, `demo:base`, or the name of a folder."""
    seen: set[str] = set()
    while path not in seen and Path(path, RUN_FILE).is_file():
        seen.add(path)
        record = read_run(path)
        path = (record.model if record else None) or path
    if EMBEDDED in Path(path).as_posix():
        return f"demo:{Path(path).name}"
    return Path(path).name if Path(path).is_absolute() else path


def describe_data(node: Mapping[str, Any]) -> str:
    """Return where the rows of a `data` node are from; empty where it doesn't tell."""
    sources = node.get("sources")
    if isinstance(sources, Mapping):
        return " and ".join(found for each in sources.values() if (found := describe_data(each)))
    for key in ("eval_paths", "paths", "path"):
        if found := node.get(key):
            is_hub_id = key == "path" and not Path(str(found)).is_absolute()
            names = [str(each) if is_hub_id else Path(str(each)).name for each in _listed(found)]
            return ", ".join(f"`{name}`" for name in names[:3]) + (" ..." if len(names) > 3 else "")
    parts = str(node.get("_target_") or "").split(".")
    return f"`{parts[-2]}`" if len(parts) > 1 else ""


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]
