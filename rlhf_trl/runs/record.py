"""
The JSON files of a run (`run.json`, `metrics.json`) and of a project, written whole and read with a word about damage:
the only reader and writer of them. Imports nothing heavy.
"""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_trl.errors import ConfigError

RUN_FILE = "run.json"
METRICS_FILE = "metrics.json"
COMPARISON_FILE = "comparison.json"
QUALITY_FILE = "reward_quality.json"
SWEEP_FILE = "sweep.json"
PACKAGES = ("rlhf_trl", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "hydra-core", "bitsandbytes")
# What every such file holds
HELD = {
    RUN_FILE: {"status": str},
    METRICS_FILE: {"eval": dict, "history": list},
    COMPARISON_FILE: {"baseline": str, "policies": dict, "samples": list},
    QUALITY_FILE: {"rewards": dict},
}
REMEDIES = {
    RUN_FILE: "Put back a copy of it, or delete the folder of that run and run it again.",
    METRICS_FILE: "Delete it: the run then counts as one without metrics.",
    COMPARISON_FILE: "Delete it, and make it again with `stage=evaluate`.",
    QUALITY_FILE: "Delete it, and make it again with `stage=evaluate_reward`.",
    SWEEP_FILE: "Delete it, and run the sweep again: jobs that are done are not run twice.",
}


def write_json(path: str | os.PathLike, content: dict | list) -> None:
    """
    Writes a JSON file that is there whole or not at all, whenever the process is killed.

    Numbers that JSON lacks (NaN, infinity) become `null`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    # Half of a surrogate pair, which UTF-8 lacks, stands as JSON's own escape of it
    with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(_finite(content), file, indent=2, ensure_ascii=False, allow_nan=False, default=float)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | os.PathLike) -> Any:
    """
    Return the content of a JSON file that a run has left, `None` where there is none.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the file can't be read, is no JSON, or lacks what every such file holds;
            the message says what to do about it.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"`{path}` can't be read ({error}). {_remedy(path)}") from error
    for key, kind in HELD.get(path.name, {}).items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise ConfigError(f"`{path}` is damaged: it holds no `{key}`. {_remedy(path)}")
    if path.name == METRICS_FILE and not all(isinstance(entry, dict) for entry in content["history"]):
        raise ConfigError(f"`{path}` is damaged: its `history` isn't a list of metrics. {_remedy(path)}")
    return content


def _remedy(path: Path) -> str:
    return REMEDIES.get(path.name, "Delete it, and make it again.")


def read_run(run_dir: str | os.PathLike) -> dict[str, Any] | None:
    """
    Return the content of `run.json`, `None` where no run was started in `run_dir`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the file is damaged.
    """
    return read_json(Path(run_dir, RUN_FILE))


def read_metrics(run_dir: str | os.PathLike) -> dict[str, Any] | None:
    """
    Return the content of `metrics.json`, see [`write_metrics`]; `None` where there is none.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the file is damaged.
    """
    return read_json(Path(run_dir, METRICS_FILE))


def start_run(
    run_dir: str | os.PathLike,
    stage: str,
    command: str,
    model: str | None,
    inputs: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes `run.json` with status `running`. Call it on rank 0, after the checks.

    Args:
        run_dir (`str`):
            Directory of the run; made if need be.
        stage (`str`):
            Name of the stage.
        command (`str`):
            The command that starts this run, as one would type it.
        model (`str`, *optional*):
            Path or hub id of the model that the run starts from.
        inputs (`Mapping`, *optional*):
            What else its result depends on, see [`~rlhf_trl.stages.inputs.inputs_of`]. A resumed run keeps those that
            it began with.
        quantization (`Mapping`, *optional*):
            How the base under its adapter is quantized: whoever loads the adapter loads the base so.
    """
    os.makedirs(run_dir, exist_ok=True)
    earlier = read_run(run_dir) or {}
    content = {
        "stage": stage,
        "command": command,
        "status": "running",
        "model": model,
        "pid": os.getpid(),
        # A resumed run keeps the time of its first start
        "started": earlier.get("started", _now()),
        "ended": None,
        "versions": versions(),
        "inputs": {**(inputs or {}), **earlier.get("inputs", {})},
        "quantization": quantization,
    }
    write_json(Path(run_dir, RUN_FILE), content)


def finish_run(run_dir: str | os.PathLike, status: str, **extra) -> None:
    """
    Writes how a run ended into its `run.json`. Call it on rank 0, after everything else has been written.

    Args:
        run_dir (`str`):
            Directory of the run.
        status (`str`):
            `done`, `stopped` (by a signal; it can be resumed) or `failed`.
        **extra:
            What else is worth keeping, such as `error`.
    """
    write_json(Path(run_dir, RUN_FILE), {**read_run(run_dir), "status": status, "ended": _now(), **extra})


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # optional, or run from a checkout
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_metrics(run_dir: str | os.PathLike, history: list[dict]) -> None:
    """
    Writes `metrics.json`: `{"train": {...}, "eval": {...}, "history": [...]}`, the last value of each metric and all.

    Args:
        run_dir (`str`):
            Directory of the run.
        history (`list[dict]`):
            `trainer.state.log_history`: one dict a call of `Trainer.log`, with its `step`. Those of evaluations have
            keys that begin with `eval_`.
    """
    last = {"train": {}, "eval": {}}
    for entry in history:
        evaluation = any(key.startswith("eval_") for key in entry)
        last["eval" if evaluation else "train"].update(entry)
    write_json(Path(run_dir, METRICS_FILE), {**last, "history": history})
