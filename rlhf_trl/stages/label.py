"""Answers to the questions about candidates (`stage=label`)."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_trl.build import instantiated, reward_functions
from rlhf_trl.config.dotpaths import signature
from rlhf_trl.errors import Interrupted
from rlhf_trl.labels.agreement import agreement, quality
from rlhf_trl.labels.candidates import CANDIDATES_FILE, Candidates, read_candidates
from rlhf_trl.labels.feedback import write_feedback
from rlhf_trl.labels.machine import MachineLabeler
from rlhf_trl.labels.store import Label, LabelStore, read
from rlhf_trl.runs.directory import delete_backup
from rlhf_trl.runs.paths import is_run_name, project_dir
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.runs.record import LABELS_FILE, write_metrics
from rlhf_trl.stages.base import command, files_of, open_run
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
    others = [label for file in files_of(cfg, stage.compare, "stage.compare", LABELS_FILE) for label in read(file)]
    with open_run(cfg, start=None):
        if not is_main_process():
            return  # one rank labels and writes
        labeler = labeler_of(cfg, rows)
        store = LabelStore(Path(cfg.run_dir, LABELS_FILE))
        store.create()  # from now on the run is resumed, not started again
        delete_backup(cfg.run_dir)
        is_filled = labeler(rows, store, form=stage.ask, budget=stage.budget, overlap=stage.overlap, seed=cfg.seed)
        found = measures(store, stage.ask)
        if isinstance(labeler, MachineLabeler):
            found |= labeler.measures
        found |= compared(store, others, stage.ask)
        write_metrics(cfg.run_dir, [found])
        write_rows_of(cfg, rows, store)
        if not is_filled:
            say(f"Continue with `{command(cfg, 'resume=true')}`")
            raise Interrupted


def labeler_of(cfg: DictConfig, rows: Sequence[Candidates]) -> Callable[..., bool]:
    """Return the labeler, with the rewards of the group `reward` and the judge of `judge` where it takes them."""
    labeler = instantiated(cfg.labeler)
    if not isinstance(labeler, partial):
        return labeler
    takes = [parameter.name for parameter in signature(labeler.func)]
    given: dict[str, Any] = {}
    if "rewards" in takes:
        columns = sorted({name for row in rows for name in row.extra})
        given["rewards"] = reward_functions(cfg, None, columns=columns)
    if "judge" in takes:
        given["judge"] = instantiated(cfg.judge)
    return labeler(**given)


def compared(store: LabelStore, others: Sequence[Label], form: str) -> dict[str, float]:
    """Return, and print, how the labels of this run agree with those of `cfg.stage.compare`, by pair of labelers."""
    own = store.read()
    mine = {label.labeler for label in own}
    found = agreement([*own, *(label for label in others if label.labeler not in mine)], form)
    made = {}
    for (one, other), (units, same, kappa) in found.pairs.items():
        if (one in mine) != (other in mine):
            made |= {f"eval_same/{one}/{other}": same, f"eval_kappa/{one}/{other}": kappa}
            say(f"{one} and {other}: {same:.1%} of {units:,} values are the same, Cohen's kappa {kappa:.2f}")
    if others and not made:
        say("`stage.compare` has no label of another labeler on these questions.")
    return made


def write_rows_of(cfg: DictConfig, rows: Sequence[Candidates], store: LabelStore) -> None:
    """Write the feedback of all labels, and say what it is of."""
    notes: Counter[str] = Counter()
    files = write_feedback(cfg.run_dir, rows, store.read(), cfg.stage.ask, notes)
    for kind, file in files.items():
        say(f"{notes.pop(kind):,} rows, for `data=files data.paths={file} data/feedback={kind}`")
    if noted := "; ".join(f"{note}: {count:,}" for note, count in notes.items() if count):
        say(f"  {noted}")


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
