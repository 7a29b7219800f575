"""Answers to the questions about candidates (`stage=label`)."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from rlhf_trl.build import instantiated
from rlhf_trl.errors import Interrupted
from rlhf_trl.labels.agreement import agreement, quality
from rlhf_trl.labels.candidates import CANDIDATES_FILE, read_candidates
from rlhf_trl.labels.store import LabelStore
from rlhf_trl.runs.directory import delete_backup
from rlhf_trl.runs.paths import is_run_name, project_dir
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.runs.record import LABELS_FILE, write_metrics
from rlhf_trl.stages.base import command, open_run
from rlhf_trl.terminal import say


def label(cfg: DictConfig) -> None:
    """
    Let `cfg.labeler` answer the questions of `cfg.stage.candidates`, into `labels.jsonl` in the run directory. The run
    is done when every answer that was asked for is given.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there is nothing to ask, or the labeler can't start.
        [`~rlhf_trl.errors.Interrupted`]: if the labeler ended before all was answered.
    """
    OmegaConf.resolve(cfg)
    stage = cfg.stage
    rows = read_candidates(candidates_file(cfg))
    labeler = instantiated(cfg.labeler)
    with open_run(cfg, start=None):
        if not is_main_process():
            return  # one rank labels and writes
        store = LabelStore(Path(cfg.run_dir, LABELS_FILE))
        store.create()  # from now on the run is resumed, not started again
        delete_backup(cfg.run_dir)
        is_filled = labeler(rows, store, form=stage.ask, budget=stage.budget, overlap=stage.overlap, seed=cfg.seed)
        write_metrics(cfg.run_dir, [measures(store, stage.ask)])
        if not is_filled:
            say(f"Continue with `{command(cfg, 'resume=true')}`")
            raise Interrupted


def candidates_file(cfg: DictConfig) -> Path:
    """Return the file that `cfg.stage.candidates` names: that of a run of the project, or a path."""
    place, runs = cfg.stage.candidates, project_dir(cfg)
    return runs / place / CANDIDATES_FILE if is_run_name(place, runs) else Path(place).expanduser()


def measures(store: LabelStore, form: str) -> dict[str, float]:
    """Return what `metrics.json` says of the labels: their number, the labelers, agreement, and medians of time."""
    labels = [label for label in store.read() if label.form == form]
    found = agreement(labels, form)
    made = {
        "eval_labels": sum(label.answer is not None for label in labels),
        "eval_skipped": sum(label.skipped is not None for label in labels),
        "eval_labelers": len({label.labeler for label in labels}),
        "eval_alpha": found.alpha,
        "eval_alpha_units": found.units,
    }
    return made | {f"eval_seconds/{name}": one.seconds for name, one in quality(labels).items()}
