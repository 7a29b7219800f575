"""Score heads of reward models."""

import re

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import count_of
from rlhf_trl.models.adapters import adapter_weights
from rlhf_trl.models.calibration import read_calibration

# Names of output layers: of a language model, and of sequence classifiers
HEADS = {"lm_head", "score", "classifier"}


def score_heads(model: PreTrainedModel | PeftModel) -> list[nn.Linear]:
    """Return the layers that give a classifier's scores; under an adapter the original and the trained copy."""
    labels = model.config.num_labels
    return [
        module
        for name, module in model.named_modules()
        if {"score", "classifier"} & set(name.split("."))
        and isinstance(module, nn.Linear)
        and module.out_features == labels
    ]


def adapter_head_names(path: str, revision: str | None = None) -> list[str]:
    """Return the names of the heads of a reward model's adapter, whose files hold no model config."""
    weights = adapter_weights(path, revision)
    count = next(
        (len(weight) for name, weight in weights.items() if re.search(r"\.(score|classifier)\.weight$", name)), 1
    )
    calibration = read_calibration(path)
    if calibration is not None and len(calibration.heads) == count:
        return calibration.heads
    return ["score"] if count == 1 else [f"LABEL_{i}" for i in range(count)]


def check_head_count(path: str, count: int, wanted: int) -> None:
    """
    Check that the reward model at `path` has as many heads as the data has targets.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if it hasn't.
    """
    if count != wanted:
        raise ConfigError(
            f"The reward model `{path}` gives {count_of(count, 'score')} per completion, and the data is for "
            f"{wanted}. Start from a policy, or use the data that the reward model was trained on."
        )
