"""Trial call of reward functions on a few rows of the data, and the scales of rewards that are summed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, TrainerState

from rlhf_trl.config.dotpaths import signature
from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.messages import as_text, is_chat
from rlhf_trl.data.splits import prompt_key
from rlhf_trl.data.tokenize import split_row_ids
from rlhf_trl.errors import ConfigError, user_traceback
from rlhf_trl.models.calibration import Moments, read_calibration
from rlhf_trl.rewards.base import Reward, WrappedReward
from rlhf_trl.rewards.conditioned import ConditionedReward
from rlhf_trl.rewards.conditions import NOT_COLUMNS
from rlhf_trl.rewards.function import FunctionReward

ROWS = 4
# Written where the data has no completions
COMPLETION = "I am not sure."
# A reward whose spread is less than this share of another one's has next to no say in their sum
SMALL = 0.05


class Sample(NamedTuple):
    """
    A few rows as reward functions get them.

    Attributes:
        prompts, completions (`list`): texts or messages.
        completion_ids (`list[list[int]]`): tokens of the completions, with the end token.
        columns (`dict[str, list]`): the other columns.
        is_real (`bool`): whether the completions are the data's own.
    """

    prompts: list
    completions: list
    completion_ids: list[list[int]]
    columns: dict[str, list]
    is_real: bool

    def of(self, rows: Sequence[int]) -> "Sample":
        """Return some of the rows."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        prompts, completions = ([values[i] for i in rows] for values in (self.prompts, self.completions))
        return Sample(prompts, completions, [self.completion_ids[i] for i in rows], columns, self.is_real)


class Scale(NamedTuple):
    """
    Mean and standard deviation of a reward, and where they were measured.

    Attributes:
        moments ([`~rlhf_trl.models.calibration.Moments`]): mean and standard deviation.
        source (`str`): what they were measured on.
        is_real (`bool`): whether that was completions of the data.
    """

    moments: Moments
    source: str
    is_real: bool = True


def sample_of(
    rows: Iterable[dict[str, Any]], answered: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase | None
) -> Sample:
    """
    Return the first rows of the data with completions of its own, or with a made-up one where it has none.

    Args:
        rows (`Iterable[dict]`): a dataset with `prompt` and the columns that reward functions may read.
        answered (`Iterable[dict]`): rows with `prompt` and `completion` of the same source; empty where it has none.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the policy's; without it completions have no ids.
    """
    known = {}
    for row in answered:
        known.setdefault(prompt_key(row["prompt"]), row["completion"])
    found = list(islice((row for row in rows if prompt_key(row["prompt"]) in known), ROWS)) if known else []
    is_real, found = bool(found), found or list(islice(rows, ROWS))
    completions = []
    for row in found:
        made = [{"role": "assistant", "content": COMPLETION}] if is_chat(row) else f" {COMPLETION}"
        completions.append(known[prompt_key(row["prompt"])] if is_real else made)
    ids = [
        split_row_ids(tokenizer, row["prompt"], completion, **template_kwargs(row))[1] if tokenizer else []
        for row, completion in zip(found, completions, strict=True)
    ]
    names = sorted(set().union(*found) - {"completion_ids", *NOT_COLUMNS})
    columns = {name: [row.get(name) for row in found] for name in names}
    return Sample([row["prompt"] for row in found], completions, ids, columns, is_real)


def trial_call(reward: Reward, sample: Sample, finite: bool = True) -> list[float | None] | None:
    """
    Call a reward function once, as a trainer does.

    Args:
        reward ([`~rlhf_trl.rewards.Reward`]): a reward of any kind.
        sample ([`Sample`]): rows that it is called on.
        finite (`bool`): whether NaN and infinity are errors.

    Returns:
        `list[float]` or `None`: its values on the rows that it counts for; `None` if there is none among them, for
        rewards of other kinds, and for a function that needs the environments of a training.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with the row, if it raises an error, returns a wrong number of values, or
            something that is no finite number.
    """
    function = reward
    while isinstance(function, WrappedReward):
        if isinstance(function, ConditionedReward):
            sample = sample.of(function.rows(sample.columns))
        function = function.reward
    if (
        not sample.prompts
        or not isinstance(function, FunctionReward)
        or any(parameter.name == "environments" for parameter in signature(function.function))
    ):
        return None
    try:
        values = _call(function, sample)
    except (Exception, SystemExit) as error:
        place = next((i for i in range(len(sample.prompts)) if _raises(function, sample.of([i]))), 0)
        raise ConfigError(f"{_message(reward, error)}\n{_shown(sample, place)}") from error
    for place, value in enumerate(values):
        if finite and value is not None and not math.isfinite(value):
            raise ConfigError(
                f"The reward function of `reward.{reward.__name__}` returned {value}, which is no finite number. Fix "
                f"it, or let it return None where it doesn't apply.\n{_shown(sample, place)}"
            )
    return values


def _call(function: FunctionReward, sample: Sample) -> list[float | None]:
    trainers = {"trainer_state": TrainerState(), "log_extra": _ignore, "log_metric": _ignore}
    columns: dict[str, Any] = trainers | sample.columns
    return function(sample.prompts, sample.completions, completion_ids=sample.completion_ids, **columns)


def _ignore(*_: Any) -> None:
    """Take what a reward function logs."""


def _raises(function: FunctionReward, sample: Sample) -> bool:
    try:
        _call(function, sample)
    except (Exception, SystemExit):
        return True
    return False


def _message(reward: Reward, error: BaseException) -> str:
    if isinstance(error, ConfigError):
        return f"`reward.{reward.__name__}`: {error}"
    raised = f"raised {type(error).__name__}: {error}"
    return f"The reward function of `reward.{reward.__name__}`: {user_traceback(error) or raised}"


def _shown(sample: Sample, i: int) -> str:
    """Return row `i` of the sample as lines of a message."""
    made = "" if sample.is_real else " (made up, since the data has none)"
    parts = {"prompt": as_text(sample.prompts[i]), f"completion{made}": as_text(sample.completions[i])}
    parts |= {name: str(values[i]) for name, values in sample.columns.items()}
    lines = [f"    {name}: {text[:200]!r}{'...' if len(text) > 200 else ''}" for name, text in parts.items()]
    return "\n".join([f"  It was called on {len(sample.prompts)} rows of the data. Row {i + 1} of them:", *lines])


def moments_of(values: Sequence[float | None]) -> Moments | None:
    """Return mean and standard deviation of the values of a reward, `None` if it applied to no row."""
    found = [value for value in values if value is not None]
    return Moments(fmean(found), pstdev(found)) if found else None


def recorded_moments(path: str, head_weights: Mapping[str, float] | None) -> Moments | None:
    """
    Return mean and standard deviation of a reward model's scores of reference answers, from its `calibration.json`
    alone; `None` if it has none. Of an ensemble they are those of the mean of its members.
    """
    calibration = read_calibration(path)
    if calibration is None:
        return None
    weights = torch.tensor([(head_weights or {}).get(name, 0.0) for name in calibration.heads] or [1.0])
    return calibration.moments(weights, lambda scores: scores.mean(dim=0))


def scale_problem(stds: Mapping[str, float], weights: Mapping[str, float]) -> str | None:
    """
    Return what is to be expected of a sum of rewards on very different scales, `None` if they are alike.

    Args:
        stds (`Mapping[str, float]`): standard deviation of each reward whose scale is known, by name.
        weights (`Mapping[str, float]`): weight of each.
    """
    spread = {name: abs(weights[name]) * std for name, std in stds.items() if weights[name] and std > 0}
    if len(spread) < 2:
        return None
    largest, smallest = max(spread, key=spread.__getitem__), min(spread, key=spread.__getitem__)
    if spread[smallest] >= SMALL * spread[largest]:
        return None
    return (
        f"`reward.{smallest}` varies by {stds[smallest]:.2g} (standard deviation) x {weights[smallest]:g}, and "
        f"`reward.{largest}` by {stds[largest]:.2g} x {weights[largest]:g}: in their sum the first hardly counts. "
        f"Set the weights (`reward.{smallest}.weight=...`), or bring them to one scale with `reward_norm=running`."
    )
