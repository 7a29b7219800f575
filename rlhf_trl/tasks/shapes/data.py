"""Data of the world of shapes, of every dataset type (`data=demo_shapes`)."""

import random
from collections.abc import Iterator

from datasets import DatasetDict

from rlhf_trl.data.build import build_dataset
from rlhf_trl.data.rows import Row, Source
from rlhf_trl.errors import DataError
from rlhf_trl.tasks.shapes.world import draw_question, draw_shapes, paint

TRAIN_ROWS, EVAL_ROWS = 6000, 256
# Share of the demonstrations that are right, and of the judgements that prefer the right answer: people make mistakes,
# more of them where they write than where they compare
RIGHT_DEMONSTRATIONS, RIGHT_JUDGEMENTS = 0.5, 0.97
TYPES = ("prompt_completion", "preference", "unpaired", "comparisons", "prompt", "annotated")


def rows(dataset_type: str, seed: int, held_out: bool, count: int) -> Iterator[Row]:
    """Yield the first `count` rows of one split, each with its place."""
    name = "eval" if held_out else "train"
    pairs = dataset_type not in ("prompt", "prompt_completion")
    rng = random.Random(f"{seed}/shapes/{'pairs' if pairs else dataset_type}/{held_out}")
    for number in range(1, count + 1):
        shapes = draw_shapes(rng)
        question = draw_question(shapes, rng)
        row = {"prompt": question.text, "image": paint(shapes, rng), "answer": question.answer}
        row["topic"] = question.topic
        wrong, chance = rng.choice(question.others), rng.random()
        if pairs:
            answers = [question.answer, wrong]
            row["chosen"], row["rejected"] = answers if held_out or chance < RIGHT_JUDGEMENTS else answers[::-1]
        elif dataset_type == "prompt_completion":
            row["completion"] = question.answer if chance < RIGHT_DEMONSTRATIONS else wrong
        yield f"demo_shapes ({name}), row {number}", row


def load(
    dataset_type: str, seed: int, max_samples: int | None = None, max_eval_samples: int | None = None
) -> DatasetDict:
    """
    Load pictures of shapes with questions, of one dataset type. Rows have the columns `answer`, the right one, and
    `topic` where the type keeps further columns.

    Args:
        dataset_type (`str`): dataset type of a stage: `prompt_completion`, `preference`, `unpaired`, `comparisons`,
            `prompt` or `annotated`.
        seed (`int`): draws pictures, questions, answers and mistakes.
        max_samples (`int`, *optional*): number of training rows, the first of 6,000.
        max_eval_samples (`int`, *optional*): number of evaluation rows, the first of 256.

    Returns:
        [`~datasets.DatasetDict`]: `train` and `eval`.

    Raises:
        [`~rlhf_trl.errors.DataError`]: if there is no such dataset type, or a number of rows is below 1.
    """
    if dataset_type not in TYPES:
        raise DataError(f"`dataset_type={dataset_type}` is not in the world of shapes. Use one of {', '.join(TYPES)}.")
    sides: dict[bool, list[Source]] = {}
    for held_out, key, limit, size in (
        (False, "max_samples", max_samples, TRAIN_ROWS),
        (True, "max_eval_samples", max_eval_samples, EVAL_ROWS),
    ):
        if limit is not None and limit < 1:
            raise DataError(f"`data.{key}={limit}` leaves no row. Use 1 or more, or null for all rows.")
        count = min(limit or size, size)
        sides[held_out] = [("demo_shapes", rows(dataset_type, seed, held_out, count))]
    return build_dataset(dataset_type, seed, sides[False], sides[True], to_chat=True, split_by="prompt")
