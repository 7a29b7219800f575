"""
Former names of config keys and of dot paths.

Whoever renames a key that a config may set, or moves what a `_target_` may name, adds a row to one of the two tables.
A config or a command line that still has the old name ends in an error that names the new one: [`renamed_problems`]
looks at the composed config, `overrides` at the command line. `tests/integration/test_configs.py` and
`tests/unit/checks/test_renamed.py` hold that every new name exists and no old one does.
"""

import re
from typing import Any

from rlhf_trl.config.values import at, flatten

# Old key: new key, with all keys below it; `*` stands for one name. None: the key is gone, and nothing is in its place
RENAMED_KEYS: dict[str, str | None] = {
    "data.format": "data.row_type",
    "health.signs.critic_blind": "health.signs.low_explained_variance",
    "health.signs.eos_missing": "health.signs.missing_eos",
    "health.signs.length_reward": "health.signs.length_bias",
    "health.signs.reward_flat": "health.signs.constant_reward",
    "health.signs.template": "health.signs.mode_collapse",
    "reward.format.kwargs.whole": "reward.format.kwargs.fullmatch",
    "reward.length.kwargs.least": "reward.length.kwargs.min_length",
    "reward.length.kwargs.most": "reward.length.kwargs.max_length",
    "stage.auto_class": None,
    "stage.form": "stage.dataset_type",
}
# Old dot path: new dot path, of a class, a function, or a module with everything in it
RENAMED_DOT_PATHS: dict[str, str] = {
    "rlhf_trl.callbacks.sections.WandbSections": "rlhf_trl.callbacks.wandb_sections.WandbSections",
    "rlhf_trl.chat.chat": "rlhf_trl.stages.chat.chat",
    "rlhf_trl.data.load": "rlhf_trl.data",
    "rlhf_trl.data.mixture": "rlhf_trl.data",
    "rlhf_trl.data.reviews": "rlhf_trl.tasks.reviews",
    "rlhf_trl.data.tokens": "rlhf_trl.data",
    "rlhf_trl.demo": "rlhf_trl.tasks.demo",
    "rlhf_trl.ensemble.train": "rlhf_trl.stages.reward.reward",
    "rlhf_trl.evaluation.evaluate.evaluate": "rlhf_trl.stages.evaluate.evaluate",
    "rlhf_trl.evaluation.evaluate_reward.evaluate_reward": "rlhf_trl.stages.evaluate_reward.evaluate_reward",
    "rlhf_trl.evaluation.judge": "rlhf_trl.evaluation.judges",
    "rlhf_trl.evaluation.sweep_report.SweepReport": "rlhf_trl.cli.sweep_report.SweepReport",
    "rlhf_trl.generate.generate": "rlhf_trl.stages.generate.generate",
    "rlhf_trl.gguf": "rlhf_trl.models.gguf",
    "rlhf_trl.judges": "rlhf_trl.tasks.reviews.judges",
    "rlhf_trl.loggers": "rlhf_trl.callbacks.loggers",
    "rlhf_trl.packing.SFTTrainer": "rlhf_trl.trainers.SFTTrainer",
    "rlhf_trl.report.project.report": "rlhf_trl.stages.report.report",
    "rlhf_trl.reward_model.RewardConfig": "rlhf_trl.reward_modeling.RewardConfig",
    "rlhf_trl.reward_model.RewardTrainer": "rlhf_trl.reward_modeling.RewardTrainer",
    "rlhf_trl.rollouts.GRPOTrainer": "rlhf_trl.trainers.GRPOTrainer",
    "rlhf_trl.rollouts.RLOOTrainer": "rlhf_trl.trainers.RLOOTrainer",
    "rlhf_trl.run.merge": "rlhf_trl.stages.merge.merge",
    "rlhf_trl.run.train": "rlhf_trl.stages.train.train",
    "rlhf_trl.scratch.init": "rlhf_trl.stages.init.init",
    "rlhf_trl.scratch.word_tokenizer": "rlhf_trl.models.scratch.word_tokenizer",
    "rlhf_trl.serve.serve_reward": "rlhf_trl.stages.serve_reward.serve_reward",
}


def renamed_key(path: str) -> tuple[str, str | None] | None:
    """
    Return the old and the new name of a key, or of the key above it that was renamed; `None` if no row has it. The new
    name is `None` for a key that is gone.
    """
    for old, new in RENAMED_KEYS.items():
        pattern = re.escape(old).replace(re.escape("*"), "([^.]+)")
        if found := re.match(rf"{pattern}(?=\.|$)", path):
            for name in found.groups():
                new = new and new.replace("*", name, 1)
            return found[0], new
    return None


def renamed_problems(values: dict[str, Any]) -> list[str]:
    """Return the problem of each key of the config that has another name now, or none."""
    found = dict(names for path in flatten(values) if (names := renamed_key(path)))
    own = not str(at(values, "stage.run._target_")).startswith("rlhf_trl.")  # which may read any key
    return [renamed_problem(old, new) for old, new in found.items() if new or not own]


def renamed_problem(old: str, new: str | None) -> str:
    """Return the problem of a key by its old and its new name."""
    if new is None:
        return f"`{old}` was removed: nothing reads it. Remove it."
    return f"`{old}` was renamed to `{new}`. Use the new name."


def dot_path_problem(path: str) -> str | None:
    """Return the problem of a dot path that has another name now, or `None` for one that is in no row."""
    for old, new in sorted(RENAMED_DOT_PATHS.items(), key=lambda row: -len(row[0])):
        if path == old or path.startswith(f"{old}."):
            return f"`{path}` was moved. Use `{new}{path.removeprefix(old)}`."
    return None
