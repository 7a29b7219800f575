"""Findings of a dry run about the data, the rewards and the disk."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from rlhf_trl.build import instantiate_data, models_of, reward_functions
from rlhf_trl.checks.disk import DiskNeed, bytes_text
from rlhf_trl.checks.outputs import nearest_folder
from rlhf_trl.checks.reward_calls import Sample, Scale, moments_of, recorded_moments, scale_problem, trial_call
from rlhf_trl.config.values import as_dict, at
from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.tokenize import split_row_ids
from rlhf_trl.data.unknown import check_known
from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.classifier import classifier_config
from rlhf_trl.rewards.options import CLASSIFIER
from rlhf_trl.runs.paths import project_dir, resolve_path

ROWS = 256  # that lengths are measured on


class Collected:
    """Problems and warnings of a plan, found one after another."""

    def __init__(self):
        self.problems: list[str] = []
        self.warnings: list[str] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Collect the message of a [`~rlhf_trl.errors.ConfigError`] that is raised in the block."""
        try:
            yield
        except ConfigError as error:
            self.problems.append(str(error))

    def note(self, problem: str | None) -> None:
        """Collect a problem, if it is one."""
        self.problems += [problem] if problem else []

    def warn(self, warning: str | None) -> None:
        """Collect a warning, if it is one."""
        self.warnings += [warning] if warning else []

    def stop(self) -> None:
        """Raise an error with all problems, if there is any."""
        if self.problems:
            raise ConfigError.join(list(dict.fromkeys(self.problems)))


def check_other_tokenizers(
    cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, rows: Dataset, found: Collected
) -> None:
    """Check that reward models and critics with another tokenizer than the trained model's know the data."""
    for model in models_of(as_dict(cfg)):
        with found():
            other = model.load_tokenizer()
            if other.get_vocab() != tokenizer.get_vocab():
                check_known(rows, other, model.path, f"Set `{model.key}` to a model of their language.")


def own_answers(cfg: DictConfig, tokenizers: list[PreTrainedTokenizerBase]) -> list[dict[str, Any]]:
    """Return the first rows of each split with answers of the data's own, `prompt` and `completion`, if it has any."""
    with contextlib.redirect_stdout(io.StringIO()):  # what was read is said once
        try:
            splits = instantiate_data(cfg, "prompt_completion", tokenizers)
        except Exception:  # a source of the user's own may know prompts alone
            return []
    answered = [rows for rows in splits.values() if {"prompt", "completion"} <= set(rows.column_names)]
    return [row for rows in answered for row in first_rows(rows)]


def chosen_answers(dataset: Dataset) -> list[dict[str, Any]]:
    """Return the first rows of pairs with their chosen answers as `completion`; none of other rows."""
    rows = first_rows(dataset) if "chosen" in dataset.column_names else []
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def first_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """Return the first rows of a dataset."""
    return dataset.select(range(min(ROWS, len(dataset)))).to_list()


def completion_lengths(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> list[int]:
    """Return the tokens of each row's completion, with the end token."""
    return [len(split_row_ids(tokenizer, row["prompt"], row["completion"], **template_kwargs(row))[1]) for row in rows]


def reward_scales(
    cfg: DictConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    columns: list[str] | None,
    sample: Sample | None,
    found: Collected,
    finite: bool = True,
) -> dict[str, Scale]:
    """
    Check the rewards of a config, and return the scales of those that have a known one: recorded with a reward model,
    or of the values that a function gives to a few rows.

    Args:
        columns (`list[str]`, *optional*): those of the data, where the rewards are given any.
        sample ([`~rlhf_trl.checks.reward_calls.Sample`], *optional*): rows that functions are called on.
        found ([`Collected`]): gets the problems.
        finite (`bool`): whether NaN and infinity are problems.
    """
    scales = {}
    with found():
        for reward in reward_functions(cfg, tokenizer, columns, models=False):
            with found():
                reward.check()
                values = trial_call(reward, sample, finite) if sample is not None else None
                if sample is not None and values and (moments := moments_of(values)):
                    scales[reward.__name__] = Scale(moments, f"{len(values)} rows of the data", sample.is_real)
    for name, node in cfg.reward.items():
        if node._target_ == CLASSIFIER:
            with found():
                classifier_config(f"reward.{name}", node.path, node.label, bool(node.trust_remote_code))
        if "run" in node and "head_weights" in node:
            with found():
                path = resolve_path(node.path, node.run, project_dir(cfg))
                if moments := recorded_moments(path, node.head_weights):
                    scales[str(name)] = Scale(moments, "its calibration")
    return scales


def scale_warning(cfg: DictConfig, args: Any, scales: dict[str, Scale]) -> str | None:
    """Return what is to be expected of rewards on different scales, where they are summed as they are."""
    normalizer = str(at(as_dict(cfg), "reward_norm._target_") or "RewardNorm")
    summed = str(at(as_dict(cfg), "combine._target_") or "weighted_sum").endswith("weighted_sum")
    if not summed or normalizer.rsplit(".", 1)[-1] != "RewardNorm":
        return None
    if getattr(args, "multi_objective_aggregation", None) == "normalize_then_sum":
        return None
    stds = {name: scale.moments.std for name, scale in scales.items() if scale.is_real}
    return scale_problem(stds, {str(name): node.weight for name, node in cfg.reward.items()})


def disk_text(cfg: DictConfig, need: DiskNeed, found: Collected) -> str:
    """Return the disk space that a run needs beside what is free; too little of it is a problem."""
    folder = nearest_folder(Path(cfg.run_dir))
    free, copies = shutil.disk_usage(folder).free, cfg.stage.get("members", 1)
    checkpoints = f"{need.checkpoints} checkpoint(s) of {bytes_text(need.checkpoint)}"
    parts = f"{checkpoints} and {bytes_text(need.result)} of trained weights"
    if copies * need.total > free:
        found.note(
            f"The run needs about {bytes_text(copies * need.total)} ({parts}), and the disk of `{folder}` has "
            f"{bytes_text(free)} free. Make room, set another `runs_dir=...`, or keep less: "
            "`stage.args.save_total_limit=1`, `+stage.args.save_only_model=true` (no resuming), or "
            "`stage.args.save_strategy=no`."
        )
    return f"about {bytes_text(copies * need.total)} needed ({parts}), {bytes_text(free)} free"
