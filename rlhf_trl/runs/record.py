"""
Reader and writer of the files that runs leave: JSON that is written whole or not at all. Imports nothing heavy.

A damaged file is an error that names the file and what to do about it.
"""

import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.results import Comparison, Promotions, Rounds, RunRecord, SweepJob
from rlhf_trl.runs.reward_results import RewardQuality
from rlhf_trl.runs.serialization import JsonDataclass, encode

# Start of a run in place of a model (`stage=init`)
RANDOM_WEIGHTS = "random weights"
RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
COMPARISON_FILE = "comparison.json"
QUALITY_FILE = "reward_quality.json"
SWEEP_FILE = "sweep.json"
# In the folder of a project: what is known of the rounds of its pipeline
ROUNDS_FILE = "rounds.json"
PROMOTIONS_FILE = "promotions.json"
ENSEMBLE_FILE = "ensemble.json"
SAMPLES_FILE = "samples.jsonl"
# The answers of `stage=label`, and the completions that a `stage=collect` has drawn so far
LABELS_FILE = "labels.jsonl"
DRAWS_FILE = "draws.partial"
PACKAGES = ("rlhf_trl", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "hydra-core", "bitsandbytes")
Result = TypeVar("Result", bound=JsonDataclass)
REMEDIES = {
    RUN_FILE: "Put back a copy of it, or delete the folder of that run and run it again.",
    METRICS_FILE: "Delete it: the run then counts as one without metrics.",
    COMPARISON_FILE: "Delete it, and make it again with `stage=evaluate`.",
    QUALITY_FILE: "Delete it, and make it again with `stage=evaluate_reward`.",
    ROUNDS_FILE: "Delete it: the next call of the pipeline writes it again.",
    PROMOTIONS_FILE: "Delete it: the next call of the pipeline writes it again.",
    SWEEP_FILE: "Delete it, and run the sweep again: jobs that are done are not run twice.",
}


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[TextIO]:
    """Open a text file that is there whole or not at all, whenever the process is killed, to write it anew."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # A lone surrogate, which UTF-8 lacks, is written as JSON's own escape of it
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:  # a full disk
        partial.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, content: Any) -> None:
    """
    Write a JSON file that is there whole or not at all, whenever the process is killed.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        content:
            Dicts, lists, numbers, texts and [`~rlhf_trl.runs.serialization.JsonDataclass`]es; numbers that JSON lacks
            (NaN, infinity) become `null`.
    """
    with replacing(path) as file:
        json.dump(encode(content), file, indent=2, ensure_ascii=False, allow_nan=False, default=float)


def read_json(path: str | os.PathLike) -> Any:
    """
    Return the content of a JSON file that a run has left, `None` where there is none.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the file can't be read or is no JSON; the message says what to do about
            it.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"`{path}` can't be read ({error}). {_remedy(path)}") from error


def _read_result(path: Path, kind: type[Result]) -> Result | None:
    content = read_json(path)
    try:
        return None if content is None and not path.exists() else kind.from_json(content)
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> ConfigError:
    return ConfigError(f"`{path}` is damaged: {why}. {_remedy(path)}")


def _remedy(path: Path) -> str:
    return REMEDIES.get(path.name, "Delete it, and make it again.")


def read_run(run_dir: str | os.PathLike) -> RunRecord | None:
    """
    Return the record of the run in `run_dir`, `None` where none was started.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the file is damaged.
    """
    return _read_result(Path(run_dir, RUN_FILE), RunRecord)


def is_done(run_dir: str | os.PathLike) -> bool:
    """
    Return whether a run in `run_dir` ended well.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if its record is damaged.
    """
    record = read_run(run_dir)
    return record is not None and record.status == "done"


def read_metrics(run_dir: str | os.PathLike) -> dict[str, Any] | None:
    """
    Return the content of `metrics.json`, see [`write_metrics`]; `None` where there is none.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the file is damaged.
    """
    path = Path(run_dir, METRICS_FILE)
    if not path.exists():
        return None
    content = read_json(path)
    for key, kind in (("eval", dict), ("history", list)):
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise _damaged(path, f"it holds no `{key}`")
    if not all(isinstance(entry, dict) for entry in content["history"]):
        raise _damaged(path, "its `history` isn't a list of metrics")
    return content


def read_comparison(run_dir: str | os.PathLike) -> Comparison | None:
    """
    Return the comparison of policies that a run made, `None` where there is none.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the file is damaged.
    """
    return _read_result(Path(run_dir, COMPARISON_FILE), Comparison)


def read_quality(run_dir: str | os.PathLike) -> RewardQuality | None:
    """
    Return what a run measured of its rewards, `None` where there is nothing.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the file is damaged.
    """
    return _read_result(Path(run_dir, QUALITY_FILE), RewardQuality)


def read_rounds(project_dir: str | os.PathLike) -> Rounds | None:
    """
    Return what is known of the rounds of a project's pipeline, `None` where they don't stop early.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the file is damaged.
    """
    return _read_result(Path(project_dir, ROUNDS_FILE), Rounds)


def read_promotions(project_dir: str | os.PathLike) -> Promotions | None:
    """
    Return which policies the rounds of a project's pipeline promoted, `None` where nothing is decided.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the file is damaged.
    """
    return _read_result(Path(project_dir, PROMOTIONS_FILE), Promotions)


def read_jobs(path: str | os.PathLike) -> list[SweepJob]:
    """
    Return the jobs in a file of one (`<number>.json`) or of all (`sweep.json`), none where there is no such file.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the file is damaged.
    """
    path = Path(path)
    content = read_json(path) or []
    try:
        return [SweepJob.from_json(job) for job in (content if isinstance(content, list) else [content])]
    except ValueError as error:
        raise _damaged(path, error) from error


def start_run(
    run_dir: str | os.PathLike,
    stage: str,
    command: str,
    model: str | None,
    inputs: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
    published: Mapping[str, Any] | None = None,
) -> None:
    """
    Write `run.json` with status `running`. Call it on rank 0, after the checks.

    Args:
        run_dir (`str`):
            Directory of the run; created if missing.
        stage (`str`):
            Name of the stage.
        command (`str`):
            Command line of the run.
        model (`str`, *optional*):
            Path or hub id of the model that the run starts from.
        inputs (`Mapping`, *optional*):
            What its result depends on besides the config, see [`~rlhf_trl.stages.train.inputs_of`]. A resumed run
            keeps those that it began with.
        quantization (`Mapping`, *optional*):
            Quantization of the base under its adapter: whoever loads the adapter loads the base so.
        published (`Mapping`, *optional*):
            Results of others, see [`~rlhf_trl.runs.results.RunRecord`].
    """
    os.makedirs(run_dir, exist_ok=True)
    earlier = read_run(run_dir)
    record = RunRecord(
        stage=stage,
        command=command,
        status="running",
        model=model,
        pid=os.getpid(),
        host=socket.gethostname(),
        # A resumed run keeps the time of its first start
        started=(earlier and earlier.started) or _now(),
        versions=versions(),
        inputs={**(inputs or {}), **(earlier.inputs if earlier else {})},
        quantization=None if quantization is None else dict(quantization),
        published=dict(published or {}),
    )
    write_json(Path(run_dir, RUN_FILE), record)


def finish_run(run_dir: str | os.PathLike, status: str, **extra: Any) -> None:
    """
    Write into `run.json` how a run ended. Call it on rank 0, after everything else has been written.

    Args:
        run_dir (`str`):
            Directory of the run.
        status (`str`):
            `done`, `stopped` (by Ctrl-C), `preempted` (by a signal of a scheduler) or `failed`.
        **extra:
            Further fields of [`~rlhf_trl.runs.results.RunRecord`], such as `error`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there is no record.
    """
    record = read_run(run_dir)
    if record is None:
        raise ConfigError(f"`{Path(run_dir, RUN_FILE)}` is gone, so it can't be said there how the run ended.")
    record = replace(record, status=status, ended=_now(), **extra)
    write_json(Path(run_dir, RUN_FILE), record)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a result depends on."""
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
    Write `metrics.json`: `{"train": {...}, "eval": {...}, "history": [...]}`, the last value of each metric and all.

    Args:
        run_dir (`str`):
            Directory of the run.
        history (`list[dict]`):
            `trainer.state.log_history`: one dict per call of `Trainer.log`, with its `step`. Those of evaluations have
            keys that begin with `eval_`.
    """
    last = {"train": {}, "eval": {}}
    for entry in history:
        evaluation = any(key.startswith("eval_") for key in entry)
        last["eval" if evaluation else "train"].update(entry)
    write_json(Path(run_dir, METRICS_FILE), {**last, "history": history})
