"""
Ensembles of reward models (`stage=reward stage.members=4`): adapters on one base, each with a score head, a seed and
an order of the data of its own (arXiv 2310.02743). They are trained one after another, each as a run in a folder of
its own (`member_0`, ...), so that a resumed ensemble keeps the finished ones. `rlhf_trl.rewards.ModelReward` and
`AdapterReward` take the path of the whole.
"""

import gc
from pathlib import Path

import torch
from accelerate import PartialState
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.build import load_data, project_dir
from rlhf_trl.data.lengths import head_names
from rlhf_trl.models.calibration import calibration_of, write_calibration
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.reward_modeling.ensemble import mean_of, score
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.runs.checkpoints import last_checkpoint
from rlhf_trl.runs.directory import discard_old
from rlhf_trl.runs.paths import ENSEMBLE_FILE, resolve_path
from rlhf_trl.runs.record import is_done, read_metrics, write_json, write_metrics
from rlhf_trl.stages.base import begin, claims_directory, end, fail
from rlhf_trl.stages.train import train_claimed


@claims_directory
def train(cfg: DictConfig) -> float | None:
    """
    Trains a reward model, or `cfg.stage.members` of them as an ensemble.

    In the folder of an ensemble are its members' folders, `ensemble.json` with their names, `calibration.json` and
    `metrics.json`. Its metrics are the means of its members', but for `eval_accuracy`, which is that of the members'
    mean score; `eval_member_accuracy` is the mean of theirs, and `eval_disagreement` the mean standard deviation of a
    completion's scores over the members.

    Returns:
        `float` or `None`: as [`~rlhf_trl.stages.train.train`].
    """
    if cfg.stage.members == 1:
        return train_claimed(cfg)
    OmegaConf.resolve(cfg)
    members = [member_config(cfg, i, seed) for i, seed in enumerate(member_seeds(cfg))]
    begin(cfg, resolve_path(cfg.model.path, cfg.model.run, project_dir(cfg)))
    try:
        for i, member in enumerate(members):
            if cfg.resume and is_done(member.run_dir):
                continue
            if PartialState().is_main_process:
                print(f"\nMember {i + 1} of {len(members)}: {member.run_dir}")
            member.resume = cfg.resume and last_checkpoint(member.run_dir) is not None
            train_claimed(member)
            if PartialState().is_main_process:
                discard_old(cfg.run_dir)
            gc.collect()  # trainers are in reference cycles, and the next one needs their memory
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        metrics = finish(cfg, [Path(member.run_dir) for member in members])
    except BaseException as error:
        if isinstance(error, SystemExit):  # of a member, after Ctrl-C
            end(cfg, "stopped")
        elif any(has_begun(member.run_dir) for member in members):
            stopped = isinstance(error, KeyboardInterrupt)
            end(cfg, "stopped" if stopped else "failed", error=f"{type(error).__name__}: {error}")
        else:
            fail(cfg, error)
        raise
    end(cfg, "done")
    return metrics.get(cfg.objective)


def has_begun(run_dir: str) -> bool:
    """Whether a member has left something to go on from."""
    return is_done(run_dir) or last_checkpoint(run_dir) is not None


def member_seeds(cfg: DictConfig) -> list[int]:
    """The seeds of an ensemble's members: of the score head, the adapter and the order of the data."""
    return [cfg.stage.args.seed + i for i in range(cfg.stage.members)]


def member_config(cfg: DictConfig, number: int, seed: int) -> DictConfig:
    """The config, resolved, of one member: a run in a folder of its own. All have one split of the data."""
    member = cfg.copy()
    name = f"member_{number}"
    member.stage.members = 1
    member.run_name, member.run_dir = f"{cfg.run_name}/{name}", f"{cfg.run_dir}/{name}"
    args = member.stage.args
    args.seed, args.output_dir, args.run_name = seed, member.run_dir, f"{args.run_name}/{name}"
    return member


def finish(cfg: DictConfig, folders: list[Path]) -> dict[str, float]:
    """Scores the held-out rows with all members and writes the ensemble's files; returns its metrics."""
    state, metrics, calibrate_on = PartialState(), {}, cfg.stage.args.calibrate_on
    if state.is_main_process:
        write_json(Path(cfg.run_dir, ENSEMBLE_FILE), {"members": [folder.name for folder in folders]})
    state.wait_for_everyone()
    dataset = load_data(cfg, load_tokenizer(str(folders[0])))
    split = "eval" if "eval" in dataset else "train"
    heads = head_names(dataset["train"]) or []
    reward = ModelReward(cfg.run_dir, head_weights=dict.fromkeys(heads, 1.0) if len(heads) > 1 else None)
    references, found = score(reward, dataset[split], calibrate_on)
    if split == "eval":
        metrics = mean_of([read_metrics(folder)["eval"] for folder in folders])
        if "eval_accuracy" in metrics:
            metrics["eval_member_accuracy"] = metrics["eval_accuracy"]
        metrics |= found
    if state.is_main_process:
        of_mean = calibration_of(references.mean(dim=0), reward.heads, f"{calibrate_on} completions of {split}")
        write_calibration(cfg.run_dir, of_mean | {"members": references.tolist()})
        write_metrics(cfg.run_dir, [metrics] if metrics else [])
        told = {
            key: metrics[key]
            for key in ("eval_accuracy", "eval_member_accuracy", "eval_disagreement")
            if key in metrics
        }
        print(f"\nEnsemble of {len(folders)} in {cfg.run_dir}: " + ", ".join(f"{k} {v:.3f}" for k, v in told.items()))
    state.wait_for_everyone()
    return metrics
