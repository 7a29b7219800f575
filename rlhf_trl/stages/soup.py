"""
Weighted averages of models that were trained from one start (`stage=soup`).

Without a grid the run directory holds one model, as that of a training does. With one, each combination of weights is
a run in a folder of its own (`0`, `1`, ...), and `sweep.json` lists them, so that `stage=evaluate stage.sweeps=[soup]`
compares them as it does the runs of a sweep. A soup of reward models is calibrated on the held-out answers that its
first model with a record was calibrated on, since the scores of averaged weights aren't the averages of the scores.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.build import load_data
from rlhf_trl.config.values import as_dict
from rlhf_trl.data.lengths import head_names
from rlhf_trl.hints import names_of
from rlhf_trl.models.adapters import adapter_config, model_fingerprint
from rlhf_trl.models.calibration import Calibration, write_calibration
from rlhf_trl.models.lineage import common_start
from rlhf_trl.models.loading import task_type
from rlhf_trl.models.options import soup_points
from rlhf_trl.models.quantization import trained_quantization
from rlhf_trl.models.soup import write_soups
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.reward_modeling.ensemble import evaluate_ensemble
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.runs.paths import project_dir, soup_models
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.runs.record import CONFIG_FILE, SWEEP_FILE, finish_run, start_run, write_json, write_metrics
from rlhf_trl.runs.results import SweepJob
from rlhf_trl.stages.base import adapter_base, command, open_run
from rlhf_trl.terminal import say


def soup(cfg: DictConfig) -> None:
    """
    Write the weighted average of the models of `cfg.stage`, or one for each combination of weights of its grid.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a model is missing, or its files can't be read.
    """
    OmegaConf.resolve(cfg)
    stage = as_dict(cfg.stage)
    paths = soup_models(stage["models"], project_dir(cfg))
    points = soup_points(list(paths), stage["weights"], stage["grid"])
    run_dir, start = Path(cfg.run_dir), common_start(paths)
    folders = [run_dir / str(number) for number in range(len(points))] if stage["grid"] else [run_dir]
    inputs: dict[str, Any] = {f"stage.models.{name}": model_fingerprint(path) for name, path in paths.items()}
    if start is not None and start.fingerprint:
        inputs["model"] = start.fingerprint
    if start is None and stage["assume_shared_start"]:
        say("No records say that the models share a start: `stage.assume_shared_start=true` takes it for granted.")
    with open_run(cfg, start=start and start.path, inputs=inputs) as run:
        members = list(paths.values())
        if is_main_process():
            lambdas = {str(folder): list(point.values()) for folder, point in zip(folders, points, strict=True)}
            write_soups(members, lambdas, stage["trust_remote_code"])
        PartialState().wait_for_everyone()
        for folder, point in zip(folders, points, strict=True):
            metrics = measure(str(folder), members) if task_type(str(folder)) == "SEQ_CLS" else {}
            # The base of an adapter is as it was in training, which the record says
            quantization = trained_quantization(members[0]) if adapter_config(str(folder)) is not None else None
            recorded = {"quantization": quantization and quantization.to_dict()}
            if folder == run_dir:
                run.record |= recorded
            elif is_main_process():
                start_run(folder, "soup", command(cfg), start and start.path, {**inputs, "weights": point}, **recorded)
                finish_run(folder, "done", **adapter_base(str(folder)))
            told = [f"{name} {share:g}" for name, share in point.items()]
            say(f"{folder}: {', '.join(told + [f'{name} {value:.3f}' for name, value in metrics.items()])}")
        if stage["grid"] and is_main_process():
            write_json(run_dir / SWEEP_FILE, [_job(number, point) for number, point in enumerate(points)])


def _job(number: int, weights: Mapping[str, float]) -> SweepJob:
    return SweepJob(number=number, overrides={name: f"{share:g}" for name, share in weights.items()}, status="done")


def measure(folder: str, models: Sequence[str]) -> dict[str, float]:
    """
    Write `calibration.json` and `metrics.json` of the soup of reward models in `folder`, from the held-out rows of the
    first of its models that a run has trained. Call it on all ranks.

    Returns:
        `dict[str, float]`: `eval_accuracy`; nothing where no model has the config of its training, which is said.
    """
    configs = [OmegaConf.load(file) for model in models if (file := Path(model, CONFIG_FILE)).is_file()]
    # Soups and merged models have configs that train on no rows
    cfg = next((each for each in configs if OmegaConf.select(each, "stage.args.calibrate_on") is not None), None)
    if not isinstance(cfg, DictConfig):
        say(
            f"None of {names_of(models)} has a `{CONFIG_FILE}` that names its held-out rows, so `{folder}` has no "
            "calibration."
        )
        return {}
    dataset = load_data(cfg, load_tokenizer(folder))
    split = "eval" if "eval" in dataset else "train"
    heads, calibrate_on = head_names(dataset["train"]) or [], cfg.stage.args.calibrate_on
    reward = ModelReward(folder, head_weights=dict.fromkeys(heads, 1.0) if len(heads) > 1 else None)
    scores = evaluate_ensemble(reward, dataset[split], calibrate_on)  # of one member
    metrics = {key: value for key, value in scores.metrics.items() if key == "eval_accuracy" and split == "eval"}
    if is_main_process():
        on = f"{calibrate_on} completions of {split}"
        write_calibration(folder, Calibration.of(scores.references[0], reward.heads, on))
        write_metrics(folder, [metrics] if metrics else [])
    return metrics
