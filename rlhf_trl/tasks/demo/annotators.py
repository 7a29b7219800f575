"""
Noisy annotators of the embedded world, and the feedback of every kind that they give.

A rater sees an answer's attributes through weights of their own and is off by Gaussian noise in each judgement; one of
the five likes length. Raters and noise depend on the seed alone, so the same call gives the same rows.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset, DatasetDict

from rlhf_trl.data.build import build
from rlhf_trl.data.dataset_types import comparisons_of
from rlhf_trl.data.feedback import Feedback, Ratings
from rlhf_trl.errors import DataError
from rlhf_trl.tasks.demo.gold import WEIGHTS, gold_attributes, gold_reward
from rlhf_trl.tasks.demo.world import answer, draw_prompts, prompts

RATERS = 5
# Standard deviations of a rater's judgement, in units of the gold reward, and of a rater's weights, as a factor.
NOISE, TASTE = 0.5, 0.3
# What the rater who likes length gives for each word.
LENGTH_BIAS = 0.04
# Prompts and demonstrations are fewer than judgements, which are cheaper to give.
DEMONSTRATION_ROWS, FEEDBACK_ROWS, EVAL_ROWS = 3000, 6000, 256
# How people who write demonstrations answer (see `world.answer`), and what gets rated: a wider range.
DEMONSTRATIONS = {
    "ideal": 0.30, "partial": 0.22, "wrong": 0.18, "curt": 0.08, "rude": 0.08, "wordy": 0.05, "padded": 0.03,
    "dodge": 0.06,
}  # fmt: skip
ANSWERS = {
    "ideal": 0.20, "partial": 0.16, "wrong": 0.14, "curt": 0.06, "rude": 0.08, "wordy": 0.06, "padded": 0.08,
    "dodge": 0.06, "astray": 0.05, "broken": 0.05, "rambling": 0.06,
}  # fmt: skip


@dataclass(frozen=True)
class Rater:
    """
    One annotator.

    Attributes:
        weights (`dict[str, float]`): what each attribute is worth to this rater.
        per_word (`float`): what each word is worth to this rater.
    """

    weights: dict[str, float]
    per_word: float

    def judge(self, prompt: str, completion: str, rng: random.Random) -> float:
        """How much the rater likes an answer this time, in units of the gold reward."""
        attributes = gold_attributes(prompt, completion)
        liked = sum(weight * attributes[name] for name, weight in self.weights.items())
        return liked + self.per_word * len(completion.split()) + rng.gauss(0.0, NOISE)


def raters(seed: int) -> list[Rater]:
    """The raters of a seed; the last one likes length."""
    rng = random.Random(f"{seed}/raters")
    people = []
    for i in range(RATERS):
        weights = {name: weight * max(0.0, rng.gauss(1.0, TASTE)) for name, weight in WEIGHTS.items()}
        people.append(Rater(weights, LENGTH_BIAS if i == RATERS - 1 else 0.0))
    return people


def an_answer(prompt: str, styles: dict[str, float], rng: random.Random) -> str:
    """An answer in a style drawn from `styles`."""
    return answer(prompts()[prompt], rng.choices(list(styles), list(styles.values()))[0], rng)


def some_answers(prompt: str, count: int, rng: random.Random) -> list[str]:
    """`count` different answers of the range that gets rated."""
    answers = []
    while len(answers) < count:
        new = an_answer(prompt, ANSWERS, rng)
        if new not in answers:
            answers.append(new)
    return answers


def demonstration_row(prompt, people, rng):
    """What somebody answered, well or badly."""
    return {"prompt": prompt, "completion": an_answer(prompt, DEMONSTRATIONS, rng)}


def pair_row(prompt, people, rng):
    """A comparison: who is preferred (`a`, `b`, `tie`) and how strongly (0 a tie, 1 slightly, 2 clearly, 3 much)."""
    a, b = some_answers(prompt, 2, rng)
    rater = rng.randrange(RATERS)
    gap = people[rater].judge(prompt, a, rng) - people[rater].judge(prompt, b, rng)
    strength = sum(abs(gap) > threshold for threshold in (0.4, 1.5, 3.0))
    preferred = "tie" if strength == 0 else "a" if gap > 0 else "b"
    return {
        "prompt": prompt,
        "completion_a": a,
        "completion_b": b,
        "preferred": preferred,
        "strength": strength,
        "rater": rater,
    }


def ranking_row(prompt, people, rng):
    """A ranking of four: the smallest rank is best, equal ranks tie."""
    completions = some_answers(prompt, 4, rng)
    rater = rng.randrange(RATERS)
    liked = [people[rater].judge(prompt, completion, rng) for completion in completions]
    order = sorted(range(4), key=lambda i: -liked[i])
    ranks, rank = [0] * 4, 1
    for place, i in enumerate(order):
        if place and liked[order[place - 1]] - liked[i] > 0.2:
            rank = place + 1
        ranks[i] = rank
    return {"prompt": prompt, "completions": completions, "ranks": ranks, "rater": rater}


def rating_row(prompt, people, rng):
    """Stars from 1 to 5 by three to five raters."""
    completion = an_answer(prompt, ANSWERS, rng)
    who = sorted(rng.sample(range(RATERS), rng.randint(3, RATERS)))
    stars = [max(1, min(5, round(2.5 + people[i].judge(prompt, completion, rng) / 1.6))) for i in who]
    kind = prompts()[prompt].kind
    return {"prompt": prompt, "completion": completion, "ratings": stars, "raters": who, "kind": kind}


def edit_row(prompt, people, rng):
    """An answer and what a person made of it: mostly the ideal answer, else a better one."""
    while True:
        original = an_answer(prompt, ANSWERS, rng)
        edited = answer(prompts()[prompt], rng.choices(("ideal", "wordy", "partial"), (0.8, 0.1, 0.1))[0], rng)
        before, after = gold_reward([prompt] * 2, [original, edited])
        if after > before:
            return {"prompt": prompt, "original": original, "edited": edited}


def thumb_row(prompt, people, rng):
    """Thumbs up or down by one rater."""
    completion = an_answer(prompt, ANSWERS, rng)
    rater = rng.randrange(RATERS)
    liked = people[rater].judge(prompt, completion, rng)
    return {"prompt": prompt, "completion": completion, "thumb": liked > 1.8, "rater": rater}


def attribute_row(prompt, people, rng):
    """Scores from -1 to 1 for each attribute, one in ten of them left out (None)."""
    completion = an_answer(prompt, ANSWERS, rng)
    scores = {}
    for name, value in gold_attributes(prompt, completion).items():
        noisy = max(-1.0, min(1.0, value + rng.gauss(0.0, 0.2)))
        scores[name] = None if rng.random() < 0.1 else round(noisy, 2)
    return {"prompt": prompt, "completion": completion, **scores}


def preference_row(prompt, people, rng):
    """A comparison that isn't a tie, as chosen and rejected."""
    while True:
        row = pair_row(prompt, people, rng)
        if row["preferred"] != "tie":
            texts = row["completion_a"], row["completion_b"]
            chosen, rejected = texts if row["preferred"] == "a" else texts[::-1]
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def comparison_row(prompt, people, rng):
    """The same as completions of which the first is better."""
    return comparisons_of(preference_row(prompt, people, rng))


def unpaired_row(prompt, people, rng):
    """A thumb as TRL's `label`."""
    row = thumb_row(prompt, people, rng)
    return {"prompt": prompt, "completion": row["completion"], "label": row["thumb"]}


def prompt_row(prompt, people, rng):
    """A prompt alone, with the kind of its topic."""
    return {"prompt": prompt, "kind": prompts()[prompt].kind}


# Completions per prompt where each is rated alone, so that they can be compared
COMPLETIONS_PER_PROMPT = {"ratings": 4, "thumbs": 4, "attributes": 4, "annotated": 4}
# TRL's dataset types first, then the feedback as people give it.
FORMS: dict[str, Callable] = {
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


def as_chat(role: str, text: str) -> list[dict[str, str]]:
    """A chat of one message."""
    return [{"role": role, "content": text}]


def render(row: dict, conversational: bool) -> dict:
    """The row's prompt and completions as chat messages, or as text: `Question: ... Answer:`."""
    rendered = dict(row)
    for name in filter(row.__contains__, COMPLETION_COLUMNS):
        many = row[name] if isinstance(row[name], list) else [row[name]]
        many = [as_chat("assistant", text) if conversational else f" {text}" for text in many]
        rendered[name] = many if isinstance(row[name], list) else many[0]
    text = row["prompt"]
    rendered["prompt"] = as_chat("user", text) if conversational else f"Question: {text} Answer:"
    return rendered


def split_size(dataset_type: str, held_out: bool) -> int:
    """Return the number of rows of one split."""
    if held_out:
        return EVAL_ROWS * (COMPLETIONS_PER_PROMPT["annotated"] if dataset_type == "annotated" else 1)
    return DEMONSTRATION_ROWS if dataset_type in ("prompt", "prompt_completion") else FEEDBACK_ROWS


def rows(dataset_type: str, seed: int, held_out: bool, count: int) -> list[dict]:
    """Return the first `count` rows of one split, prompts and completions as plain words."""
    rng = random.Random(f"{seed}/{SEED_NAMES.get(dataset_type, dataset_type)}/{held_out}")
    people = raters(seed)
    # The prompts are drawn for the whole split, so that a smaller `count` gives the first rows of a larger one.
    alike = COMPLETIONS_PER_PROMPT.get(dataset_type, 1)
    drawn = draw_prompts(rng, split_size(dataset_type, held_out) // alike, held_out)
    drawn = [prompt for prompt in drawn for _ in range(alike)]
    return [FORMS[dataset_type](prompt, people, rng) for prompt in drawn[:count]]


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
        dataset_type (`str`): what a stage trains on: `prompt_completion`, `preference`, `unpaired`, `comparisons`,
            `prompt`; `annotated` for evaluation (ratings of four answers to each of 256 held-out prompts); or a kind
            of feedback: `pairs`, `rankings`, `ratings`, `edits`, `thumbs`, `attributes`.
        seed (`int`): draws prompts, answers, raters and their noise. Which prompts are held out doesn't depend on it.
        max_samples (`int`, *optional*): the first rows of those for training: 3,000 prompts or demonstrations, or
            6,000 rows of any other dataset type (of feedback: before they become rows of `dataset_type`).
        max_eval_samples (`int`, *optional*): the first rows of the 256 for evaluation.
        conversational (`bool`, *optional*, defaults to `True`): chat messages; else text, `Question: ... Answer:`.
        feedback (`Feedback`, *optional*): make the rows of feedback of this kind, as `load_files` does.

    Returns:
        [`~datasets.DatasetDict`]: `train` and `eval`, over disjoint prompts.

    Raises:
        `DataError`: if there is no such dataset_type, or a number of rows is below 1.
    """
    if dataset_type not in FORMS:
        raise DataError(
            f"`dataset_type={dataset_type}` is none that the embedded world has. Use one of: {', '.join(FORMS)}."
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
    return build(dataset_type, seed, train, held_out, feedback=feedback)
