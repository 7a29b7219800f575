"""
Where metrics go beside `metrics.json`: nowhere, Weights & Biases, or TensorBoard.

Each logger is a context around the making of the trainer and its training, with the same three arguments, so that a
configuration can name any of them. The trainer's `report_to` adds the callback of `transformers` that uses it.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf_trl.errors import ConfigError


def is_first_rank() -> bool:
    """Whether this process is the one that writes and prints, by what the launcher says."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def no_logger(run_dir: str, name: str, config: dict) -> Iterator[None]:
    """Metrics go to `metrics.json` and to the terminal only."""
    yield


@contextmanager
def tensorboard(run_dir: str, name: str, config: dict) -> Iterator[None]:
    """
    Writes TensorBoard's event files to `<run_dir>/tensorboard`.

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
    # Read by `transformers.integrations.TensorBoardCallback` when the trainer makes it
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
) -> Iterator[None]:
    """
    A Weights & Biases run, which `transformers.integrations.WandbCallback` and the sample table then write to.

    Needs no account: it is kept in `<run_dir>/wandb` unless `WANDB_MODE=online` is set. A resumed run goes on under
    its old id. Ranks other than the first do nothing.

    Args:
        run_dir (`str`):
            Directory of the run.
        name (`str`):
            Name of the run.
        config (`dict`):
            The resolved config.
        project (`str`):
            W&B project.
        group (`str`, *optional*):
            What the run is shown together with, such as the stages of one pipeline.
        tags (`Sequence[str]`, *optional*):
            Labels to filter by.
        entity (`str`, *optional*):
            W&B user or team; the account's default if unset.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if W&B is not installed.
    """
    _require("wandb")
    if not is_first_rank():
        yield
        return
    import wandb

    mode = os.environ.get("WANDB_MODE", "offline")
    # One line of ours replaces W&B's. The warning that would come offline is that there is no URL: TRL asks for it at
    # each checkpoint. `transformers` defines the x-axis of all metrics, `train/global_step`.
    wandb.setup(wandb.Settings(silent=True, show_warnings=mode != "offline"))
    run = wandb.init(
        dir=run_dir,
        project=project,
        name=name,
        group=group,
        tags=list(tags),
        entity=entity,
        config=config,
        mode=mode,
        id=earlier_id(run_dir),
        resume="allow",
    )
    here = Path(run.dir).parent
    print(f"W&B run: {run.url or f'{here} (offline; to upload it: wandb sync {here})'}", flush=True)
    failed = True
    try:
        # Tables wait there for their upload: in the run's directory and not in the user's home
        with _environment("WANDB_DATA_DIR", str(Path(run_dir, "wandb").absolute())):
            yield
        failed = False
    finally:
        wandb.finish(exit_code=int(failed))


def earlier_id(run_dir: str) -> str | None:
    """The W&B id of the run that was kept in `run_dir` before, or `None`."""
    runs = sorted(Path(run_dir, "wandb").glob("*run-*-*"), key=lambda path: path.name.split("run-")[1])
    return runs[-1].name.rsplit("-", 1)[1] if runs else None


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable for a while, unless the user has set it."""
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
            f"Install it with `pip install {package}`, or take `logger=none`."
        )
