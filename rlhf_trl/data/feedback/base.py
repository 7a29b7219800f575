"""Options that all kinds of feedback share, types of checked rows, and checks of single values."""

import contextlib
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NotRequired, TypedDict, TypeVar

from rlhf_trl.data.columns import Theirs, roots_of
from rlhf_trl.data.images import IMAGE_COLUMNS
from rlhf_trl.data.messages import as_chat, check_text_or_chat, check_turns
from rlhf_trl.data.rows import RowError, type_of
from rlhf_trl.data.validation import type_problems
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.hints import names_of

AGREEMENT = (None, "weights", "smoothing")
# Options that make or choose comparisons of training rows, see `rlhf_trl.data.feedback.synthetic`
SYNTHETIC = ("negatives", "matched", "truncated", "perturbed", "weaker", "paraphrased")
ALIKE = ("length_ratio", "same_style")
Text = str | list[dict]


class Comparison(NamedTuple):
    """
    Two completions of which one is better.

    Args:
        better, worse (`int`): indices of the completions.
        gap (`float`): by how much it is better, in the unit of the feedback (strength, ranks, or ratings).
        share (`float`, *optional*): share of the raters who agree, where it was asked for.
        source (`str`): `feedback` for what people said, else the option that made it.
    """

    better: int
    worse: int
    gap: float = 1.0
    share: float | None = None
    source: str = "feedback"


class ComparedRow(TypedDict):
    """Checked row that compares several completions of one prompt (pairs, rankings, edits)."""

    prompt: Text
    completions: list[Text]
    wins: list[Comparison]
    ties: list[tuple[int, int]]
    both_bad: NotRequired[bool]
    safe: NotRequired[list[float | None]]
    rater: NotRequired[Any]
    confidence: NotRequired[float]
    columns: NotRequired[dict[str, Any]]


class RatedRow(TypedDict):
    """
    Checked row that rates one completion (ratings, thumbs, attributes), with its ratings by dimension, and where
    `agreement` reads them the confidences in its ratings.
    """

    prompt: Text
    completion: Text
    ratings: dict[str, list[float]]
    rater: NotRequired[Any]
    confidences: NotRequired[list[float]]
    columns: NotRequired[dict[str, Any]]


CheckedRow = TypeVar("CheckedRow", ComparedRow, RatedRow)


class Group(NamedTuple):
    """
    Completions of one prompt that become one row.

    Args:
        prompt (`str` or `list[dict]`): text or chat.
        completions (`list`): text or chats.
        comparisons (`list[Comparison]`): those of the completions.
        targets (`list[dict]`, *optional*): regression targets of each completion, by dimension.
        ratings (`list[dict]`, *optional*): all ratings of each completion, by dimension.
        columns (`dict`, *optional*): other columns of the source.
        safe (`list`, *optional*): for each completion 1 if it is safe, -1 if it is unsafe, `None` without a label.
    """

    prompt: Text
    completions: list[Text]
    comparisons: list[Comparison]
    targets: list[dict[str, float | None] | None] | None = None
    ratings: list[dict[str, list[float]]] | None = None
    columns: dict[str, Any] | None = None
    safe: list[float | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Feedback(ABC):
    """
    Options of all kinds of feedback. A subclass reads one kind: it names its columns and checks a row.

    Args:
        columns (`dict`, *optional*): our name of a column -> the file's, a path into one, or a list of these (see
            [`~rlhf_trl.data.columns`]); null for one that the file doesn't have.
        margin (`float`): margin of the reward model's loss per unit by which one completion is better (of strength,
            rank, or rating), 0 for none (Llama 2, arXiv 2307.09288, equation 2).
        max_pairs (`int`, *optional*): maximum number of comparisons per prompt, including those with negatives; a
            random choice beyond it.
        negatives (`int`): number of completions of other prompts per row, worse than the row's best. This and the
            next ones are for training rows, and mark each comparison in a column `source`.
        matched (`int`): the same, of about the length and of the style of the best.
        truncated (`int`), perturbed (`int`): number of copies of the best completion that end early, or have words
            dropped, shuffled or repeated.
        weaker (`str` or `list[str]`, *optional*): files of completions of weaker policies (`stage=generate` or
            `stage=collect`), of which each row gets one per file.
        paraphrased (`str` or `list[str]`, *optional*): files of `stage=paraphrase`: each row is added once more per
            paraphrase of its prompt.
        length_ratio (`float`, *optional*): drop comparisons of completions of which one is more than this many times
            as long.
        same_style (`bool`): drop comparisons of completions of two styles, see `style_of`.
        shuffle (`bool`): shuffle the completions of a row, so that their order carries no information.
        drop_duplicates (`bool`): drop rows that repeat another one, of the same rater where rows name one. Rows on
            one completion that name no rater are never duplicates: they may be another person's.
        pairwise_rows (`bool`): make a row of two completions per comparison, instead of one row per prompt.

    Raises:
        ConfigError: for a value that an option can't have.
    """

    NEEDED: ClassVar[tuple[str, ...]]
    OPTIONAL: ClassVar[tuple[str, ...]] = ("rater",)
    NULLABLE: ClassVar[tuple[str, ...]] = ()  # of the needed ones
    # Whether `agreement` counts rows as votes, and so has to know whose they are
    ROWS_ARE_VOTES: ClassVar[bool] = False
    # Of which rows comparisons can be made, for the message where there are none
    ADVICE: ClassVar[str] = "Give rows of which some completion is better than another one of its prompt."
    agreement: ClassVar[str | None] = None

    columns: dict[str, str | list[str] | None] | None = None
    margin: float = 0.0
    max_pairs: int | None = None
    negatives: int = 0
    matched: int = 0
    truncated: int = 0
    perturbed: int = 0
    weaker: str | list[str] | None = None
    paraphrased: str | list[str] | None = None
    length_ratio: float | None = None
    same_style: bool = False
    shuffle: bool = True
    drop_duplicates: bool = True
    pairwise_rows: bool = False

    def __post_init__(self):
        if wrong := type_problems(type(self), vars(self), "data.feedback"):
            raise ConfigError.join(wrong)
        problems = [
            f"`data.feedback.columns.{name}` is no column of {self.name}. Use one of: {names_of(self.known)}."
            for name in self.columns or {}
            if name not in self.known
        ]
        problems += [
            f"`data.feedback.columns.{name}` is null, and {self.name} needs it. Set it to the file's column."
            for name, theirs in (self.columns or {}).items()
            if theirs is None and name in self.NEEDED and name not in self.NULLABLE
        ]
        if self.agreement not in AGREEMENT:
            problems.append(f"`data.feedback.agreement` is {self.agreement!r}. Use weights, smoothing or null.")
        minimums = dict.fromkeys(("margin", "negatives", "matched", "truncated", "perturbed"), 0)
        for name, minimum in (*minimums.items(), ("max_pairs", 1), ("length_ratio", 1), *self._minimums()):
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                problems.append(f"`data.feedback.{name}` is {value}. Set it to {minimum} or more.")
        if problems:
            raise ConfigError.join(problems)

    def _minimums(self) -> tuple[tuple[str, float], ...]:
        """Return (option, its minimum) of the options that a subclass adds."""
        return ()

    @property
    def marks_sources(self) -> bool:
        """Whether there are synthetic comparisons, so that each says where it comes from."""
        return any(getattr(self, name) for name in SYNTHETIC)

    @property
    def name(self) -> str:
        """Name of the kind of feedback, as in the config."""
        return type(self).__name__.lower()

    @property
    def known(self) -> tuple[str, ...]:
        """Our names of the columns that are read."""
        return (*self.NEEDED, *self.OPTIONAL, *IMAGE_COLUMNS)

    def mapping(self, source: str, found: list[str]) -> dict[str, Theirs]:
        """
        Map our names of the columns to the file's, for those that the source has.

        Args:
            source (`str`): name of the source, for the message.
            found (`list[str]`): its columns.

        Raises:
            DataError: if a column that is needed, or that was named, is missing.
        """
        wanted: dict[str, Theirs | None] = {name: name for name in self.known} | dict(self.columns or {})
        given = {
            ours: theirs
            for ours, theirs in wanted.items()
            if theirs is not None and all(root in found for root in roots_of(theirs, found))
        }
        missing = {
            ours: [root for root in roots_of(theirs, found) if root not in found]
            for ours, theirs in wanted.items()
            if theirs is not None and ours not in given and (ours in self.NEEDED or ours != theirs)
        }
        if not self.agreement:
            given.pop("confidence", None)  # which nothing else reads
        if missing:
            typed = " ".join(f"data.feedback.columns.{ours}=NAME" for ours in missing)
            names = dict.fromkeys(root for roots in missing.values() for root in roots)
            raise DataError(
                f"{source} can't be read as {self.name}: it has no column {names_of(names)}, but "
                f"{names_of(found)}. Set `{typed}` to say which column is which."
            )
        if self.agreement and self.ROWS_ARE_VOTES and self.drop_duplicates and "rater" not in given:
            raise DataError(
                f"{source} doesn't say who gave the feedback, which `data.feedback.agreement={self.agreement}` needs. "
                "Set `data.feedback.columns.rater=NAME`, or `data.feedback.drop_duplicates=false` to count every row "
                "as another rater's."
            )
        return given

    @abstractmethod
    def read(self, row: dict, notes: Counter) -> ComparedRow | RatedRow:
        """
        Check a row.

        Args:
            row (`dict`): the row, by our names of the columns.
            notes (`Counter`): counts what was changed.

        Raises:
            RowError: if the row is malformed.
        """

    def idle(self, dataset_type: str) -> list[str]:
        """Return the options that were set and change nothing in rows of `dataset_type`."""
        names = [] if dataset_type == "comparisons" else ["margin", "pairwise_rows"]
        names += [] if dataset_type in ("comparisons", "preference") else ["agreement", *SYNTHETIC, *ALIKE]
        names += [] if dataset_type in ("comparisons", "preference", "annotated") else ["max_pairs", "min_gap"]
        return [name for name in names if getattr(self, name, None)]


def key_of(value: Text) -> str:
    """Return a key by which prompts and completions, text or chat, are compared."""
    return value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True)


def add_rater(checked: CheckedRow, row: dict) -> CheckedRow:
    """Return a checked row with the rater of `row`, where that names one."""
    if row.get("rater") is not None:
        checked["rater"] = row["rater"]
    return checked


def confidence_in(row: dict) -> float | None:
    """
    Return the confidence in a row's answer, `None` where it has none.

    Raises:
        RowError: if it is no number from 0 to 1.
    """
    if row.get("confidence") is None:
        return None
    number = check_number(row["confidence"], "confidence")
    if not 0 <= number <= 1:
        raise RowError(
            "confidence",
            f"is {number:g}, where a number from 0.5 (a guess) to 1 (sure) should be "
            "(`data.feedback.columns.confidence=null` ignores it)",
        )
    return number


def certainty(confidence: float) -> float:
    """
    Return the weight c' = 2c - 1 of an answer with confidence c, the probability that it is right: its expected vote.
    One below 1/2, as of an ensemble whose mean most members contradict, is 1/2: a guess.
    """
    return max(0.0, 2 * confidence - 1)


def check_texts(row: dict, fields: list[str], notes: Counter) -> tuple[Text, list[Text]]:
    """Return the checked prompt and completions of a row, all text or all chat."""
    prompt = check_text_or_chat(row, "prompt")
    given = {field: check_text_or_chat(row, field) for field in fields}
    if isinstance(prompt, list) or any(isinstance(value, list) for value in given.values()):
        if any(isinstance(value, str) for value in (prompt, *given.values())):
            notes["text beside chat became turns"] += 1
        prompt, given = as_chat(prompt, "user"), {name: as_chat(value, "assistant") for name, value in given.items()}
    check_turns(prompt, given)
    return prompt, list(given.values())


def check_list(value: Any, field: str) -> list:
    """Return a list, or the list in JSON text (a CSV file has no other way); raise a `RowError` for anything else."""
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise RowError(field, "is missing" if value is None else f"is {type_of(value)}, where a list should be")
    return value


def check_number(value: Any, field: str) -> float:
    """Return a finite number, also of text; raise a `RowError` for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        shown = "null" if value is None else repr(value)
        raise RowError(field, f"is {shown}, where a number should be") from None
    if not math.isfinite(number):
        raise RowError(field, f"is {value!r}, where a finite number should be")
    return number


def check_flag(value: Any, field: str) -> bool | None:
    """Return a truth value, also of text or of 1 and 0, `None` of null; raise a `RowError` for anything else."""
    text = str(value).strip().lower()
    if value is None or text == "":
        return None
    if text not in ("true", "false", "1", "0", "1.0", "0.0"):
        raise RowError(field, f"is {value!r}, where true or false should be")
    return text in ("true", "1", "1.0")
