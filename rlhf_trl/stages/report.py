"""The project's page (`stage=report`)."""

from pathlib import Path

from omegaconf import DictConfig

from rlhf_trl.report.project import write_report


def report(cfg: DictConfig) -> None:
    """
    `stage=report`: makes the report of `cfg.project` anew.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the project has no run.
    """
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(f"Report: {write_report(Path(cfg.runs_dir, cfg.project))}")
