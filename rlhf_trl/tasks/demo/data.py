"""Data of the embedded world, of every dataset type and kind of feedback (`data=demo`)."""

import random
from collections.abc import Callable, Sequence

from datasets import Dataset, DatasetDict

from rlhf_trl.data.build import build_dataset
from rlhf_trl.data.feedback import Feedback, Ratings
from rlhf_trl.data.messages import as_chat
from rlhf_trl.errors import DataError
from rlhf_trl.tasks.demo.annotators import (
    Rater,
    Row,
    attribute_row,
    comparison_row,
    demonstration_row,
    edit_row,
    pair_row,
    preference_row,
    prompt_row,
    ranking_row,
    raters,
    rating_row,
    thumb_row,
    unpaired_row,
)
from rlhf_trl.tasks.demo.world import draw_prompts

# There are fewer prompts and demonstrations than judgements, which are cheaper
DEMONSTRATION_ROWS, FEEDBACK_ROWS, EVAL_ROWS = 3000, 6000, 256
# Rows of one prompt where each completion is rated alone, so that they can be compared
COMPLETIONS_PER_PROMPT = {"ratings": 4, "thumbs": 4, "attributes": 4, "annotated": 4}
# Function that makes a row, by dataset type of TRL or kind of feedback
ROW_MAKERS: dict[str, Callable[[str, Sequence[Rater], random.Random], Row]] = {
    "prompt_completion": demonstration_row,
    "preference": preference_row,
    "unpaired": unpaired_row,
    "comparisons": comparison_row,
    "prompt": prompt_row,
    "annotated": rating_row,
    "pairs": pair_row,
    "rankings": ranking_row,
    "ratings": rating_row,
    "edits": edit_row,
    "thumbs": thumb_row,
    "attributes": attribute_row,
}
# Dataset types with another name in the seed: comparisons are the same pairs in another shape, and annotated rows stay
# those that they were under their former name
SEED_NAMES = {"comparisons": "preference", "annotated": "judged"}
COMPLETION_COLUMNS = (
    "completion", "completions", "completion_a", "completion_b", "chosen", "rejected", "original", "edited"
)  # fmt: skip


def render(row: Row, conversational: bool) -> Row:
    """Return a row with prompt and completions as chat messages, or as text: `Question: ... Answer:`."""
    rendered = dict(row)
    for name in filter(row.__contains__, COMPLETION_COLUMNS):
        texts = row[name] if isinstance(row[name], list) else [row[name]]
        texts = [as_chat(text, "assistant") if conversational else f" {text}" for text in texts]
        rendered[name] = texts if isinstance(row[name], list) else texts[0]
    text = row["prompt"]
    rendered["prompt"] = as_chat(text, "user") if conversational else f"Question: {text} Answer:"
    return rendered


def split_size(dataset_type: str, held_out: bool) -> int:
    """Return the number of rows of one split."""
    if held_out:
        return EVAL_ROWS * (COMPLETIONS_PER_PROMPT["annotated"] if dataset_type == "annotated" else 1)
    return DEMONSTRATION_ROWS if dataset_type in ("prompt", "prompt_completion") else FEEDBACK_ROWS


def rows(dataset_type: str, seed: int, held_out: bool, count: int) -> list[Row]:
    """Return the first `count` rows of one split, prompts and completions as plain text."""
    rng = random.Random(f"{seed}/{SEED_NAMES.get(dataset_type, dataset_type)}/{held_out}")
    people = raters(seed)
    # The prompts are drawn for the whole split, so that a smaller `count` gives the first rows of a larger one
    repeats = COMPLETIONS_PER_PROMPT.get(dataset_type, 1)
    drawn = draw_prompts(rng, split_size(dataset_type, held_out) // repeats, held_out)
    drawn = [prompt for prompt in drawn for _ in range(repeats)]
    return [ROW_MAKERS[dataset_type](prompt, people, rng) for prompt in drawn[:count]]


def load(
    dataset_type: str,
    seed: int,
    max_samples: int | None = None,
    max_eval_samples: int | None = None,
    conversational: bool = True,
    feedback: Feedback | None = None,
) -> DatasetDict:
    """
    Load the embedded world's data of one dataset type, or of one kind of feedback.

    Args:
        dataset_type (`str`): dataset type of a stage: `prompt_completion`, `preference`, `unpaired`, `comparisons`,
            `prompt`; `annotated` for evaluation (ratings of four answers to each of 256 held-out prompts); or a kind
            of feedback: `pairs`, `rankings`, `ratings`, `edits`, `thumbs`, `attributes`.
        seed (`int`): draws prompts, answers, raters and their noise. Which prompts are held out doesn't depend on it.
        max_samples (`int`, *optional*): number of training rows, the first of 3,000 prompts or demonstrations or of
            6,000 rows of any other kind (counted before feedback is converted to `dataset_type`).
        max_eval_samples (`int`, *optional*): number of evaluation rows, the first of 256.
        conversational (`bool`, *optional*, defaults to `True`): whether rows hold chat messages; else they hold text,
            `Question: ... Answer:`.
        feedback (`Feedback`, *optional*): kind of feedback that is converted to `dataset_type`, as by `load_files`.

    Returns:
        [`~datasets.DatasetDict`]: `train` and `eval`, over disjoint prompts.

    Raises:
        [`~rlhf_trl.errors.DataError`]: if there is no such dataset type, or a number of rows is below 1.
    """
    if dataset_type not in ROW_MAKERS:
        raise DataError(
            f"`dataset_type={dataset_type}` is not in the embedded world. Use one of: {', '.join(ROW_MAKERS)}."
        )
    for name, limit in (("max_samples", max_samples), ("max_eval_samples", max_eval_samples)):
        if limit is not None and limit < 1:
            raise DataError(f"`data.{name}={limit}` leaves no row. Use 1 or more, or null for all rows.")
    raw = feedback.name if feedback else dataset_type
    if dataset_type == "annotated" and not feedback:
        feedback = Ratings()
    limits = {"train": max_samples, "eval": max_eval_samples}
    sizes = {name: split_size(raw, name == "eval") for name in limits}
    splits = {
        name: [
            render(row, conversational)
            for row in rows(raw, seed, name == "eval", min(limit or sizes[name], sizes[name]))
        ]
        for name, limit in limits.items()
    }
    if not feedback:
        return DatasetDict({name: Dataset.from_list(made) for name, made in splits.items()})
    train, held_out = (
        [(f"demo ({name})", ((f"demo ({name}), row {i}", row) for i, row in enumerate(made, 1)))]
        for name, made in splits.items()
    )
    return build_dataset(dataset_type, seed, train, held_out, feedback=feedback, to_chat=False)
