"""
Loggers: none, Weights & Biases, or TensorBoard, in addition to `metrics.json`.

Each logger is a context manager around the construction and the training of a trainer, with the same three arguments,
so that a config can name any of them. The trainer's `report_to` adds the callback of `transformers` that uses it.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_trl.config.shareable import hide_secrets, without_secrets
from rlhf_trl.errors import ConfigError
from rlhf_trl.health.signs import signs_seen
from rlhf_trl.hints import did_you_mean
from rlhf_trl.models.hub import model_files
from rlhf_trl.patches.profiling import without_wandb_profiling
from rlhf_trl.report.plots import Drawing
from rlhf_trl.report.tables import Rows
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.runs.record import CONFIG_FILE, read_metrics
from rlhf_trl.terminal import say

WANDB_MODES = ("online", "offline", "disabled", "shared", "run", "dryrun")
WANDB_OFFLINE = "To keep the run here instead: `unset WANDB_MODE`."


@contextmanager
def no_logger(run_dir: str, name: str, config: dict) -> Iterator[None]:
    """Log to `metrics.json` and the terminal only."""
    yield


@contextmanager
def tensorboard(run_dir: str, name: str, config: dict) -> Iterator[None]:
    """
    Write TensorBoard's event files to `<run_dir>/tensorboard`.

    Args:
        run_dir (`str`):
            Directory of the run.
        name (`str`):
            Name of the run; TensorBoard shows the directory's.
        config (`dict`):
            The resolved config; the trainer's arguments are in the event files already.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if TensorBoard is not installed.
    """
    _require("tensorboard")
    # Read by `transformers.integrations.TensorBoardCallback` when the trainer creates it
    with _environment("TENSORBOARD_LOGGING_DIR", str(Path(run_dir, "tensorboard"))):
        yield


@contextmanager
def wandb(
    run_dir: str,
    name: str,
    config: dict,
    project: str,
    group: str | None = None,
    tags: Sequence[str] = (),
    entity: str | None = None,
    log_model: bool = False,
) -> Iterator[None]:
    """
    Open a Weights & Biases run, which `rlhf_trl.callbacks.wandb_sections.WandbSections`, the sample table and
    [`log_images`] write to.

    It needs no account: the run is kept in `<run_dir>/wandb` unless `WANDB_MODE=online` is set. A resumed run keeps
    its id. Ranks other than 0 do nothing.

    At the end the summary gets the values that runs can be sorted by: `objective` (the last value of the metric that
    a sweep gets back) with `objective_name`, `health/worst` (0 to 3) and `health/signs`.

    Args:
        run_dir (`str`):
            Directory of the run.
        name (`str`):
            Name of the run, `project/run_name`.
        config (`dict`):
            The resolved config.
        project (`str`):
            W&B project.
        group (`str`, *optional*):
            W&B group; by default the beginning of the name: the project (`demo` of
            `demo/ppo`), or the sweep (`demo/ppo_sweep` of `demo/ppo_sweep/3`). The stage is its job type.
        tags (`Sequence[str]`, *optional*):
            Labels to filter by.
        entity (`str`, *optional*):
            W&B user or team; the account's default if unset.
        log_model (`bool`):
            Whether to log the model of the finished run as an artifact, as plain `transformers` or `peft` load it.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if W&B is not installed, or its server can't be reached.
    """
    _require("wandb")
    if not is_main_process():
        yield
        return
    import wandb

    mode: Any = wandb_mode()  # `wandb.init` takes a literal type
    # One line of ours replaces W&B's. The warning that would come offline is that there is no URL: TRL asks for it at
    # each checkpoint. `transformers` defines the x-axis of all metrics, `train/global_step`.
    try:
        with _arguments_without_secrets():
            wandb.setup(wandb.Settings(silent=True, show_warnings=mode != "offline"))
            run = wandb.init(
                dir=run_dir,
                project=project,
                name=name,
                group=group or name.rpartition("/")[0] or None,
                job_type=config.get("stage", {}).get("name"),
                tags=list(tags),
                entity=entity,
                config=without_secrets(config),
                mode=mode,
                id=earlier_id(run_dir),
                resume="allow",
            )
    except wandb.Error as error:
        raise ConfigError(f"W&B can't begin a run: {error} {WANDB_OFFLINE}") from error
    here = Path(run.dir).parent
    where = run.url or f"{here} (offline; to upload it: wandb sync {here})"
    say("W&B keeps nothing (WANDB_MODE=disabled)." if mode == "disabled" else f"W&B run: {where}")
    failed = True
    try:
        # Tables wait there for their upload: in the run's directory and not in the user's home
        data = _environment("WANDB_DATA_DIR", str(Path(run_dir, "wandb").absolute()))
        with data, without_wandb_profiling():
            yield
            for key, value in summary_of(run_dir, config.get("objective")).items():
                run.summary[key] = value
            if log_model:
                log_model_artifact(run, run_dir, name)
        failed = False
    finally:
        wandb.finish(exit_code=int(failed))


def wandb_mode() -> str:
    """Return `WANDB_MODE`, `offline` where it isn't set."""
    return os.environ.get("WANDB_MODE", "").lower() or "offline"


def wandb_problem() -> str | None:
    """Return what keeps W&B from a run in `WANDB_MODE`, or `None`. Online it asks for a key in a terminal."""
    mode = wandb_mode()
    if mode not in WANDB_MODES:
        hint = did_you_mean(mode, WANDB_MODES) or f"Use one of: {', '.join(WANDB_MODES)}."
        return f"The environment variable `WANDB_MODE` is `{mode}`. {hint}"
    if mode not in ("online", "run", "shared") or not is_main_process():
        return None
    import wandb

    try:
        wandb.login()
    except wandb.Error as error:
        return f"`logger=wandb` with `WANDB_MODE={mode}`: {error} Or set `WANDB_API_KEY`. {WANDB_OFFLINE}"
    return None


def summary_of(run_dir: str, objective: str | None) -> dict[str, float | str]:
    """
    Return the values that a run with a `metrics.json` can be sorted by.

    Args:
        run_dir (`str`): directory of the run. objective (`str`, *optional*): name of the metric that counts.
    """
    metrics = read_metrics(run_dir)
    if metrics is None:
        return {}
    history = metrics["history"]
    found = {}
    values = [entry[objective] for entry in history if entry.get(objective) is not None]
    if values:
        found = {"objective": values[-1], "objective_name": objective}
    if any("health/level" in entry for entry in history):
        seen = signs_seen(history)
        found["health/worst"] = max((sign.level for sign in seen), default=0)
        found["health/signs"] = " ".join(sign.sign for sign in seen)
    return found


def log_model_artifact(run, run_dir: str, name: str) -> None:
    """Log the model in `run_dir`, if there is a finished one, as an artifact of a W&B run."""
    import wandb

    files = model_files(run_dir)
    if not any(path.suffix == ".safetensors" for path in files):
        return  # a run that was stopped has checkpoints only
    artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "-", f"model-{name}"), type="model", metadata={"run_dir": run_dir})
    for path in files:
        if path.name != CONFIG_FILE:
            artifact.add_file(str(path))
            continue
        with artifact.new_file(path.name, encoding="utf-8") as file:
            file.write(hide_secrets(path.read_text(encoding="utf-8")))
    run.log_artifact(artifact, aliases=["final"])


def log_summary(values: Mapping[str, float]) -> None:
    """Add numbers to the summary of the active W&B run; do nothing without one."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.run.summary.update(dict(values))


def log_images(drawings: "Mapping[str, Drawing]") -> None:
    """
    Log figures as images to the active W&B run; do nothing without one.

    Args:
        drawings (`dict`):
            `{name: drawing}`, drawings from `rlhf_trl.report.plots`. The part of a name before a slash is its section.
    """
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.log({name: wandb.Image(drawing.pixels()) for name, drawing in drawings.items()})


def log_tables(tables: "Mapping[str, Rows]") -> None:
    """Log tables of `rlhf_trl.report.tables` by name to the active W&B run; do nothing without one."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.log({name: wandb.Table(columns=table.columns, data=table.rows) for name, table in tables.items()})


def earlier_id(run_dir: str) -> str | None:
    """Return the W&B id of the earlier run in `run_dir`, or `None`."""
    runs = sorted(Path(run_dir, "wandb").glob("*run-*-*"), key=lambda path: path.name.split("run-")[1])
    return runs[-1].name.rsplit("-", 1)[1] if runs else None


@contextmanager
def _arguments_without_secrets() -> Iterator[None]:
    """Hide the secrets of the command line, which W&B records as it finds it in `sys.argv`."""
    given = sys.argv
    sys.argv = [hide_secrets(word) for word in given]
    try:
        yield
    finally:
        sys.argv = given


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable within a context, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"`logger={package}` needs the package `{package}`, which is not installed. "
            f"Install it with `pip install {package}`, or set `logger=none`."
        )
