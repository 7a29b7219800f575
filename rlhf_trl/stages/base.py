"""The frame of every stage: a claimed run directory, its record, and the command that made it."""

import contextlib
import functools
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.config.command_line import as_typed, config_dirs
from rlhf_trl.config.values import plain
from rlhf_trl.errors import ConfigError, disk_is_full
from rlhf_trl.models.adapters import adapter_config, base_path
from rlhf_trl.models.fingerprints import weights_fingerprint
from rlhf_trl.models.quantization import start_quantization
from rlhf_trl.runs.checkpoints import clear_unfinished, last_checkpoint, last_whole_checkpoint
from rlhf_trl.runs.conflicts import run_directory_problems
from rlhf_trl.runs.directory import claimed, discard_old, holds_old, put_back, recover, set_aside
from rlhf_trl.runs.ranks import raise_everywhere
from rlhf_trl.runs.record import CONFIG_FILE, finish_run, read_run, start_run
from rlhf_trl.stages.inputs import resume_problems


def claims_directory(stage: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """
    Let a stage begin only when its run directory is this process's alone, and used as the config says, see
    `rlhf_trl.runs.directory`. Every rank calls it; rank 0 claims for all.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: on every rank, if another process has claimed the directory, or an earlier
            run in it doesn't allow this one: it may have begun since the checks.
    """

    @functools.wraps(stage)
    def claimed_stage(cfg: DictConfig) -> Any:
        with contextlib.ExitStack() as stack:
            problems = []
            if PartialState().is_main_process:
                try:
                    stack.enter_context(claimed(cfg.run_dir))
                    recover(cfg.run_dir)
                    problems = run_directory_problems(plain(cfg)[0])
                except ConfigError as error:
                    problems = [str(error)]
            raise_everywhere(problems)
            return stage(cfg)

    return claimed_stage


def begin(cfg: DictConfig, path: str, inputs: Mapping[str, Any] | None = None) -> str | None:
    """
    Makes the run directory ready and leaves the config and `run.json` in it. An earlier run that is overwritten is set
    aside until this one has begun.

    Args:
        path (`str`): what the run starts from.
        inputs (`Mapping`, *optional*): what else its result depends on, see [`~rlhf_trl.stages.inputs.inputs_of`].

    Returns:
        `str` or `None`: the checkpoint to go on from.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a resumed run depends on something that has changed since.
    """
    state, run_dir = PartialState(), Path(cfg.run_dir)
    checkpoint, damaged = last_whole_checkpoint(run_dir) if cfg.resume else (None, {})
    lacking = [f"`{path}` isn't whole ({', '.join(files)} missing or cut off)" for path, files in damaged.items()]
    problems = []
    state.wait_for_everyone()  # no rank may look at the directory after rank 0 has changed it
    if state.is_main_process:
        record = read_run(run_dir)
        if checkpoint:
            problems = resume_problems(run_dir, record.inputs if record else {}, inputs or {})
        elif lacking:
            problems = [f"No checkpoint can be resumed: {'; '.join(lacking)}. Start again: `overwrite=true`."]
        elif record is not None and not cfg.resume:
            set_aside(run_dir)
    raise_everywhere(problems)
    if state.is_main_process:
        if checkpoint:
            for text in lacking:
                print(f"{text}, so the one before it is taken.")
            print(f"Going on from {checkpoint}.")
        start_run(
            run_dir,
            stage=cfg.stage.name,
            command=command(cfg),
            model=path,
            inputs=inputs,
            quantization=quantization(cfg, path),
        )
        OmegaConf.save(cfg, run_dir / CONFIG_FILE)
    state.wait_for_everyone()
    return checkpoint


def quantization(cfg: DictConfig, path: str) -> dict[str, Any] | None:
    """How the base under the adapter of a run that starts from `path` is quantized; `None` where it isn't."""
    if not (adapter := cfg.get("adapter")) or adapter.peft is None:
        return None
    found = start_quantization(path, instantiate(adapter.quantization))
    return found and found.to_dict()


def end(cfg: DictConfig, status: str, **extra) -> None:
    """Writes on rank 0 how the run ended; of an adapter also its base, and a hash of a local one."""
    if PartialState().is_main_process:
        adapter = adapter_config(cfg.run_dir) if status == "done" else None
        if adapter is not None:
            extra["base"] = adapter.base_model_name_or_path
            extra["base_fingerprint"] = weights_fingerprint(base_path(cfg.run_dir, adapter))
        discard_old(cfg.run_dir)  # of a stage that takes no steps
        finish_run(cfg.run_dir, status, **extra)


def fail(cfg: DictConfig, error: BaseException) -> None:
    """
    Writes on rank 0 what ended the run. One that didn't begin leaves the directory as it was: with the earlier run
    that it was to overwrite, or, where the config was wrong, free.
    """
    if not PartialState().is_main_process:
        return
    is_wrong = isinstance(error, ConfigError) and not cfg.resume and last_checkpoint(cfg.run_dir) is None
    if is_wrong or holds_old(cfg.run_dir):
        put_back(cfg.run_dir)
    else:
        if disk_is_full(error):  # room for the record: what was half written is of no use
            clear_unfinished(cfg.run_dir)
        end(
            cfg,
            "stopped" if isinstance(error, KeyboardInterrupt) else "failed",
            error=f"{type(error).__name__}: {error}",
        )


def command(cfg: DictConfig, *added: str) -> str:
    """The command of this run as one would type it, with `added` instead of how it was begun."""
    if HydraConfig.initialized():
        given = [*config_dirs(), *as_typed(HydraConfig.get().overrides.task)]
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # this job alone: its name is not in what was typed
            given = [*(word for word in given if not word.startswith("run_name=")), f"run_name={cfg.run_name}"]
    else:
        given = [f"stage={cfg.stage.name}", f"project={cfg.project}"]
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "RANK" in os.environ
    words = ["accelerate", "launch", "train.py"] if launched else ["python", "train.py"]
    if added:
        given = [word for word in given if not word.startswith(("resume=", "overwrite="))]
    return shlex.join([*words, *given, *added])
