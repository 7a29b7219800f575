"""The project's page (`stage=report`)."""

from omegaconf import DictConfig

from rlhf_trl.report.project import write_report
from rlhf_trl.runs.paths import project_dir
from rlhf_trl.runs.ranks import is_main_process


def report(cfg: DictConfig) -> None:
    """
    Write the report of `cfg.project` again, with the evaluation that `cfg.stage.evaluation` names or the newest one.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the project has no run, or no evaluation of that name.
    """
    if is_main_process():
        print(f"Report: {write_report(project_dir(cfg), cfg.stage.evaluation)}")
