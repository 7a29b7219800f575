"""Upload of the model of a run to the hub (`stage=push`)."""

from pathlib import Path

from omegaconf import DictConfig

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.hub import upload_model
from rlhf_trl.report.card import write_card
from rlhf_trl.runs.paths import project_dir, resolve_path
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.terminal import say


def push(cfg: DictConfig) -> None:
    """
    Write the model card of the run that `cfg.model.run` names, and upload its model to `cfg.stage.repo`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if no run is named, it is not finished, its model is of no use to others, or
            the hub refuses it.
    """
    if cfg.model.run is None:
        raise ConfigError("`stage=push` uploads the model of a run. Name it: `model.run=ppo`.")
    run_dir = Path(resolve_path(None, cfg.model.run, project_dir(cfg)))
    folder = run_dir / "merged" if cfg.stage.merged else run_dir
    if not folder.is_dir():
        raise ConfigError(
            f"`stage.merged=true` uploads `{folder}`, which doesn't exist. Write it with `stage=merge "
            f"model.run={cfg.model.run}`."
        )
    if is_main_process():
        write_card(run_dir, folder, cfg.stage.repo, figure=True)
        message = f"{cfg.project}/{cfg.model.run}"
        url = upload_model(folder, cfg.stage.repo, message, private=cfg.stage.private, revision=cfg.stage.revision)
        say(f"Uploaded to {url}")
