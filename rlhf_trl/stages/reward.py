"""
Training of reward models (`stage=reward`), and of ensembles of them (`stage.members=4`).

The members of an ensemble are adapters on one base, each with its own score head, seed and order of the data
(arXiv 2310.02743). They are trained one after another, each as a run in its own folder (`member_0`, ...), so that a
resumed ensemble keeps the finished ones. `rlhf_trl.rewards.ModelReward` and `AdapterReward` take the path of the
ensemble.
"""

import gc
from pathlib import Path

import torch
from accelerate import PartialState
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.build import load_data
from rlhf_trl.config.values import plain
from rlhf_trl.data.lengths import head_names
from rlhf_trl.models.calibration import Calibration, write_calibration
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.reward_modeling.ensemble import evaluate_ensemble, mean_metrics
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.runs.checkpoints import last_checkpoint
from rlhf_trl.runs.directory import delete_backup, is_lengthened
from rlhf_trl.runs.paths import project_dir, resolve_path
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.runs.record import ENSEMBLE_FILE, is_done, read_metrics, write_json, write_metrics
from rlhf_trl.stages.base import open_run
from rlhf_trl.stages.train import train
from rlhf_trl.terminal import say


def reward(cfg: DictConfig) -> float | None:
    """
    Train a reward model, or `cfg.stage.members` of them as an ensemble.

    The folder of an ensemble holds its members' folders, `ensemble.json` with their names, `calibration.json` and
    `metrics.json`. Its metrics are the means of its members', but for `eval_accuracy`, which is that of the members'
    mean score; `eval_member_accuracy` is the mean of theirs, and `eval_disagreement` the mean standard deviation of a
    completion's scores over the members.

    Returns:
        `float` or `None`: as [`~rlhf_trl.stages.train.train`].
    """
    if cfg.stage.members == 1:
        return train(cfg)
    OmegaConf.resolve(cfg)
    members = [member_config(cfg, i, seed) for i, seed in enumerate(member_seeds(cfg))]
    with open_run(cfg, start=resolve_path(cfg.model.path, cfg.model.run, project_dir(cfg))):
        for i, member in enumerate(members):
            if cfg.resume and is_done(member.run_dir) and not is_lengthened(member.run_dir, plain(member)[0]):
                continue
            say(f"\nMember {i + 1} of {len(members)}: {member.run_dir}")
            member.resume = cfg.resume and last_checkpoint(member.run_dir) is not None
            member.overwrite = not member.resume  # one that ended before its first checkpoint
            train(member)
            if is_main_process():
                delete_backup(cfg.run_dir)
            gc.collect()  # trainers are in reference cycles, and the next one needs their memory
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        metrics = finish(cfg, [Path(member.run_dir) for member in members])
    return metrics.get(cfg.objective)


def member_seeds(cfg: DictConfig) -> list[int]:
    """Return the seeds of an ensemble's members: of the score head, the adapter and the order of the data."""
    return [cfg.stage.args.seed + i for i in range(cfg.stage.members)]


def member_config(cfg: DictConfig, number: int, seed: int) -> DictConfig:
    """Return the config, resolved, of one member: a run in a folder of its own. All have one split of the data."""
    member = cfg.copy()
    name = f"member_{number}"
    member.stage.members = 1
    member.run_name, member.run_dir = f"{cfg.run_name}/{name}", f"{cfg.run_dir}/{name}"
    args = member.stage.args
    args.seed, args.output_dir, args.run_name = seed, member.run_dir, f"{args.run_name}/{name}"
    return member


def finish(cfg: DictConfig, folders: list[Path]) -> dict[str, float]:
    """Score the held-out rows with all members, write the ensemble's files, and return its metrics."""
    metrics, calibrate_on = {}, cfg.stage.args.calibrate_on
    if is_main_process():
        write_json(Path(cfg.run_dir, ENSEMBLE_FILE), {"members": [folder.name for folder in folders]})
    PartialState().wait_for_everyone()
    dataset = load_data(cfg, load_tokenizer(str(folders[0])))
    split = "eval" if "eval" in dataset else "train"
    heads = head_names(dataset["train"]) or []
    reward = ModelReward(cfg.run_dir, head_weights=dict.fromkeys(heads, 1.0) if len(heads) > 1 else None)
    scores = evaluate_ensemble(reward, dataset[split], calibrate_on)
    if split == "eval":
        metrics = mean_metrics([(read_metrics(folder) or {})["eval"] for folder in folders])
        if "eval_accuracy" in metrics:
            metrics["eval_member_accuracy"] = metrics["eval_accuracy"]
        metrics |= scores.metrics
    if is_main_process():
        on = f"{calibrate_on} completions of {split}"
        write_calibration(cfg.run_dir, Calibration.of_ensemble(scores.references, reward.heads, on))
        write_metrics(cfg.run_dir, [metrics] if metrics else [])
        told = {
            key: metrics[key]
            for key in ("eval_accuracy", "eval_member_accuracy", "eval_disagreement")
            if key in metrics
        }
        print(f"\nEnsemble of {len(folders)} in {cfg.run_dir}: " + ", ".join(f"{k} {v:.3f}" for k, v in told.items()))
    PartialState().wait_for_everyone()
    return metrics
