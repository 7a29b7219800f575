"""The frame of every stage that writes: its run directory, opened and closed, and the command that repeats it."""

import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.callbacks.interrupt import ignoring_signals, raising_preempted
from rlhf_trl.config.command_line import config_dirs, unquote_text
from rlhf_trl.config.program import program
from rlhf_trl.config.values import as_dict, plain
from rlhf_trl.data.file_rows import resolve_paths
from rlhf_trl.errors import ConfigError, Interrupted, Preempted
from rlhf_trl.hints import count_of
from rlhf_trl.models.adapters import adapter_config, base_path
from rlhf_trl.models.fingerprints import weights_fingerprint
from rlhf_trl.models.quantization import start_quantization
from rlhf_trl.runs.checkpoints import clear_unfinished, last_whole_checkpoint
from rlhf_trl.runs.directory import (
    back_up,
    delete_backup,
    has_backup,
    has_begun,
    input_changes,
    is_empty,
    recover,
    restore_backup,
    run_directory_problems,
)
from rlhf_trl.runs.lock import locked
from rlhf_trl.runs.nodes import check_shared
from rlhf_trl.runs.paths import is_run_name, project_dir
from rlhf_trl.runs.ranks import is_main_process, raise_on_all_ranks, world_size
from rlhf_trl.runs.record import CONFIG_FILE, finish_run, read_run, start_run

# By which a rank that doesn't record the end of a run tells the one that does why it left
PREEMPTED_FILE = ".preempted"


@dataclass
class Run:
    """
    An open run.

    Attributes:
        checkpoint (`str`, *optional*): path of the checkpoint to resume from.
        record (`dict`): what else `run.json` is to hold when the run has ended, such as `reason`.
    """

    checkpoint: str | None = None
    record: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def open_run(cfg: DictConfig, start: str | None, inputs: Mapping[str, Any] | None = None) -> Iterator[Run]:
    """
    Open the run directory of a stage, and record in its `run.json` how the run ended. Every rank calls it.

    On entry rank 0 locks the directory, checks that it is free to use as the config says (it may have been taken since
    the checks), moves an earlier run that is overwritten out of the way, and writes `run.json` and `config.yaml`. On
    exit the status becomes `done`, `stopped` (by Ctrl-C), `preempted` (by a scheduler) or `failed`. A run that failed
    before its first step leaves the directory as it was: with the earlier run that it was to overwrite, or, where the
    config was wrong, free. A run without a checkpoint or a result doesn't keep the next one from its directory.

    Args:
        cfg (`DictConfig`):
            The config, resolved.
        start (`str`, *optional*):
            Path or hub id of the model that the run starts from.
        inputs (`Mapping`, *optional*):
            What else its result depends on, see [`~rlhf_trl.stages.train.inputs_of`].

    Yields:
        [`Run`]: the checkpoint to resume from, and the record to add to.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: on every rank, if another process has locked the directory, an earlier run in
            it doesn't allow this one, or a resumed run depends on something that has changed since.
    """
    with _locked(cfg):
        run = Run(_begin(cfg, start, inputs))
        with raising_preempted():
            try:
                yield run
            except BaseException as error:
                with ignoring_signals():
                    elsewhere = isinstance(error, Exception) and _is_preempted_elsewhere(cfg)
                    _fail(cfg, run, Preempted() if elsewhere else error)
                if elsewhere:
                    raise Preempted from error
                raise
            with ignoring_signals():
                _end(cfg, "done", run.record)


@contextlib.contextmanager
def _locked(cfg: DictConfig) -> Iterator[None]:
    """Lock the directory on rank 0, if it may be used as the config says."""
    with contextlib.ExitStack() as stack:
        problems = []
        if is_main_process():
            try:
                stack.enter_context(locked(cfg.run_dir))
                recover(cfg.run_dir)
                problems = run_directory_problems(plain(cfg)[0])
            except ConfigError as error:
                problems = [str(error)]
        raise_on_all_ranks(problems)
        check_shared(cfg.run_dir)
        yield


def _begin(cfg: DictConfig, start: str | None, inputs: Mapping[str, Any] | None) -> str | None:
    """Write the config and `run.json`, and return the checkpoint to resume from."""
    run_dir = Path(cfg.run_dir)
    checkpoint, damaged = last_whole_checkpoint(run_dir) if cfg.resume else (None, {})
    incomplete = [
        f"`{path}` is incomplete ({', '.join(files)} missing or truncated)" for path, files in damaged.items()
    ]
    problems, moved = [], None
    PartialState().wait_for_everyone()  # no rank may look at the directory after rank 0 has changed it
    if is_main_process():
        record = read_run(run_dir)
        if checkpoint and record is not None:
            problems = input_changes(run_dir, record.inputs, inputs or {})
            moved = record.inputs.get("ranks") != (inputs or {}).get("ranks") and record.inputs.get("ranks")
        elif incomplete:
            problems = [f"No checkpoint can be resumed: {'; '.join(incomplete)}. Start again: `overwrite=true`."]
        elif record is not None and not cfg.resume:
            empty = is_empty(run_dir, record)
            back_up(run_dir)
            if empty:  # a failure of the new run is to be recorded as its own
                delete_backup(run_dir)
    raise_on_all_ranks(problems)
    # A node may see an older state of a shared folder, and its ranks would begin elsewhere than the others
    (checkpoint,) = broadcast_object_list([checkpoint])
    if is_main_process():
        if checkpoint:
            for text in incomplete:
                print(f"{text}, so the one before it is used.")
            print(f"Resuming from {checkpoint}.")
            if moved:
                print(f"It began on {count_of(moved, 'rank')}. What is drawn at random, such as completions, differs.")
        Path(run_dir, PREEMPTED_FILE).unlink(missing_ok=True)
        start_run(
            run_dir,
            stage=cfg.stage.name,
            command=command(cfg),
            model=start,
            inputs=inputs,
            quantization=base_quantization(cfg, start),
            published=as_dict(cfg.published) if cfg.published else None,
        )
        OmegaConf.save(cfg, run_dir / CONFIG_FILE)
    PartialState().wait_for_everyone()
    return checkpoint


def base_quantization(cfg: DictConfig, start: str | None) -> dict[str, Any] | None:
    """Return how the base under the adapter of a run is quantized, `None` where it isn't."""
    if start is None or not (adapter := cfg.get("adapter")) or adapter.peft is None:
        return None
    found = start_quantization(start, instantiate(adapter.quantization))
    return found and found.to_dict()


def _end(cfg: DictConfig, status: str, record: Mapping[str, Any]) -> None:
    """Record on rank 0 how the run ended; for an adapter also its base, and a hash of a local one."""
    if not is_main_process():
        return
    base = adapter_base(cfg.run_dir) if status == "done" else {}
    delete_backup(cfg.run_dir)  # of a stage that takes no steps
    Path(cfg.run_dir, PREEMPTED_FILE).unlink(missing_ok=True)
    finish_run(cfg.run_dir, status, **base, **record)


def adapter_base(folder: str) -> dict[str, str | None]:
    """Return what the record of a run says of the base of the adapter in its folder; nothing where there is none."""
    if (adapter := adapter_config(folder)) is None:
        return {}
    fingerprint = weights_fingerprint(base_path(folder, adapter))
    return {"base": adapter.base_model_name_or_path, "base_fingerprint": fingerprint}


def _fail(cfg: DictConfig, run: Run, error: BaseException) -> None:
    """Record on rank 0 what ended the run, or leave the directory as it was before."""
    if isinstance(error, Interrupted):
        return _end(cfg, "stopped", run.record)
    if not is_main_process():
        if isinstance(error, Preempted):
            with contextlib.suppress(OSError):  # a full disk
                Path(cfg.run_dir, PREEMPTED_FILE).touch()
        return None
    is_wrong = isinstance(error, ConfigError) and not cfg.resume
    if (is_wrong or has_backup(cfg.run_dir)) and not has_begun(cfg.run_dir):
        return restore_backup(cfg.run_dir)
    clear_unfinished(cfg.run_dir)  # of no use, and a full disk needs room for the record
    if isinstance(error, Preempted):
        return _end(cfg, "preempted", run.record)
    status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
    return _end(cfg, status, run.record | {"error": f"{type(error).__name__}: {error}"})


def _is_preempted_elsewhere(cfg: DictConfig) -> bool:
    """
    Return whether a scheduler's signal has ended another rank, by which what this one sees is a lost connection: a
    rank that stands outside of the training steps leaves at once, without agreement.
    """
    if world_size() == 1:
        return False
    record = read_run(cfg.run_dir)
    return Path(cfg.run_dir, PREEMPTED_FILE).is_file() or (record is not None and record.status == "preempted")


def files_of(cfg: DictConfig, places: str | Sequence[str], key: str, name: str) -> list[str]:
    """
    Return the files that `places`, the value of `key`, names: those called `name` of runs of the project, and paths
    and globs.

    Raises:
        [`~rlhf_trl.errors.DataError`]: for a path or a glob of no file.
    """
    runs, listed = project_dir(cfg), [places] if isinstance(places, str) else list(places)
    files = [str(runs / place / name) if is_run_name(place, runs) else place for place in listed]
    return resolve_paths(files, key) if files else []


def command(cfg: DictConfig, *added: str) -> str:
    """Return the command line of this run, with `added` in place of `resume` and `overwrite`."""
    if HydraConfig.initialized():
        given = [*config_dirs(), *unquote_text(HydraConfig.get().overrides.task)]
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # this job alone: its name is not on the command line
            given = [*(word for word in given if not word.startswith("run_name=")), f"run_name={cfg.run_name}"]
    else:
        given = [f"stage={cfg.stage.name}", f"project={cfg.project}"]
    if added:
        given = [word for word in given if not word.startswith(("resume=", "overwrite="))]
    return shlex.join([*program(), *given, *added])
