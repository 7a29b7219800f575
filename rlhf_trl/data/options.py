"""Options that all sources share, and the rules of their values."""

from dataclasses import dataclass

from rlhf_trl.config.ranges import COUNT, POSITIVE
from rlhf_trl.data.dataset_types import SOURCES
from rlhf_trl.data.feedback.base import Feedback
from rlhf_trl.data.row_types import ROW_TYPES
from rlhf_trl.data.validation import type_problems
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import did_you_mean, names_of, sentences

LIMITS = {"max_samples": f"{COUNT}?", "max_eval_samples": f"{COUNT}?"}
ROWS = LIMITS | {"eval_size": f"{POSITIVE}?", "to_chat": "bool?"}
# By the dot path of a `_target_`; `checks/ranges.py` applies them to a config
RULES = {
    "rlhf_trl.data.load_files": ROWS,
    "rlhf_trl.data.load_hub": ROWS,
    "rlhf_trl.data.mix": LIMITS | {"repeat": "bool"},
    "rlhf_trl.data.filter_prompts": {"max_prompt_length": f"{COUNT}?"},
}
SPLIT_BY = ("prompt", "row")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """
    Options of `load_files` and `load_hub`.

    Args:
        row_type (`str`, *optional*): what the rows hold (a key of `ROW_TYPES`); `None` recognizes it by the columns.
        columns (`dict`, *optional*): our name of a column -> the file's, `{"prompt": "question"}`.
        system_prompt (`str`, *optional*): a system turn before every chat that has none.
        to_chat (`bool`, *optional*): whether text prompts become user turns, text completions assistant turns; `None`:
            if the rows are read for models with a chat template, see
            [`~rlhf_trl.data.chat_template.text_as_chat`].
        messages (`str`): `last_turn` takes a conversation's last assistant turn as the completion, `whole` keeps
            conversations as they are (for SFT: all turns are trained on).
        eval_size (`float` or `int`, *optional*): share (below 1) or number of prompts to hold out; `None`: none.
        split_by (`str`): `prompt` keeps rows with the same prompt on one side, the same one in every stage, and drops
            training rows whose prompt is held out; `row` doesn't, and `eval_size` then counts rows.
        bad_rows (`str`): `error` stops at malformed rows, `drop` drops and counts them.
        max_samples, max_eval_samples (`int`, *optional*): maximum number of rows per side, a random choice in the
            order of the file. Synthetic comparisons of `feedback` come on top of the training rows.
        feedback (`Feedback`, *optional*): the rows are feedback of this kind, which names its own columns (`row_type`,
            `columns` and `messages` don't apply). Splits are made before rows become comparisons, limits act after.
        image_urls (`bool`): whether images that are given as URLs are downloaded; else they are an error.

    Raises:
        ConfigError: for all values that an option can't have.
    """

    row_type: str | None = None
    columns: dict[str, str | list[str] | None] | None = None
    system_prompt: str | None = None
    to_chat: bool | None = None
    messages: str = "last_turn"
    eval_size: float | int | None = None
    split_by: str = "prompt"
    bad_rows: str = "error"
    max_samples: int | None = None
    max_eval_samples: int | None = None
    feedback: Feedback | None = None
    image_urls: bool = False

    def __post_init__(self):
        given = {"columns": self.columns, "system_prompt": self.system_prompt, "image_urls": self.image_urls}
        if wrong := type_problems(LoadOptions, given, "data"):
            raise ConfigError.join(wrong)
        problems = [
            *choice_problems("data.row_type", self.row_type, (None, *ROW_TYPES)),
            *choice_problems("data.messages", self.messages, ("last_turn", "whole")),
            *choice_problems("data.split_by", self.split_by, SPLIT_BY),
            *choice_problems("data.bad_rows", self.bad_rows, ("error", "drop")),
        ]
        for key in ("max_samples", "max_eval_samples"):
            value = getattr(self, key)
            if value is not None and value < 1:
                problems.append(f"`data.{key}={value}` keeps no rows. Set it to 1 or more, or to null for all.")
        size = self.eval_size
        if size is not None and (size < 0 or (size > 1 and size != int(size))):
            problems.append(f"`data.eval_size={size}` isn't a size. Set it to a share below 1, or a number of rows.")
        if self.feedback and (self.row_type is not None or any((self.columns or {}).values())):
            problems.append(
                "`data.row_type` and `data.columns` are of data without `data/feedback`. Name the columns of the "
                f"{self.feedback.name} in `data.feedback.columns`."
            )
        if problems:
            raise ConfigError.join(problems)


def check_dataset_type(dataset_type: str) -> None:
    """Raise a `ConfigError` for a dataset type that doesn't exist."""
    if problems := choice_problems("dataset_type", dataset_type, tuple(SOURCES)):
        raise ConfigError.join(problems)


def choice_problems(key: str, value: str | None, choices: tuple[str | None, ...]) -> list[str]:
    """Return the problem of a value that isn't one of the choices."""
    if value in choices:
        return []
    known = [choice for choice in choices if choice is not None]
    return [
        sentences(
            f"`{key}={value}` isn't known.",
            did_you_mean(str(value), known, listed=True),
            f"Set it to one of {names_of(known)}.",
        )
    ]
