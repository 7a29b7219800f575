"""
Noisy annotators of the embedded world, and rows of every kind of feedback that they give.

Each rater weights an answer's attributes differently and judges with Gaussian noise; one of the five prefers long
answers. Raters and noise depend on the seed only, so the same call gives the same rows.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_trl.data.dataset_types import comparisons_of
from rlhf_trl.tasks.demo.gold import WEIGHTS, gold_attributes, gold_reward
from rlhf_trl.tasks.demo.world import answer, prompts

Row = dict[str, Any]

RATERS = 5
# Standard deviations: of a judgement, in units of the gold reward, and of a rater's weights, relative to the gold ones
JUDGEMENT_STD, WEIGHT_STD = 0.5, 0.3
# Bonus per word by the rater who prefers long answers, in units of the gold reward
LENGTH_BIAS = 0.04
# Shares of the styles (see `world.answer`) of demonstrations, and of the answers that are rated, which vary more
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
    An annotator.

    Attributes:
        weights (`dict[str, float]`): weight of each attribute.
        per_word (`float`): bonus per word.
    """

    weights: dict[str, float]
    per_word: float

    def judge(self, prompt: str, completion: str, rng: random.Random) -> float:
        """Return a noisy judgement of an answer, in units of the gold reward."""
        attributes = gold_attributes(prompt, completion)
        value = sum(weight * attributes[name] for name, weight in self.weights.items())
        return value + self.per_word * len(completion.split()) + rng.gauss(0.0, JUDGEMENT_STD)


def raters(seed: int) -> list[Rater]:
    """Return the raters of a seed; the last one prefers long answers."""
    rng = random.Random(f"{seed}/raters")
    people = []
    for i in range(RATERS):
        weights = {name: weight * max(0.0, rng.gauss(1.0, WEIGHT_STD)) for name, weight in WEIGHTS.items()}
        people.append(Rater(weights, LENGTH_BIAS if i == RATERS - 1 else 0.0))
    return people


def draw_answer(prompt: str, styles: dict[str, float], rng: random.Random) -> str:
    """Draw an answer to a prompt, in a style drawn from `styles`."""
    return answer(prompts()[prompt], rng.choices(list(styles), list(styles.values()))[0], rng)


def draw_answers(prompt: str, count: int, rng: random.Random) -> list[str]:
    """Draw `count` different answers to a prompt, of the styles that are rated."""
    answers = []
    while len(answers) < count:
        new = draw_answer(prompt, ANSWERS, rng)
        if new not in answers:
            answers.append(new)
    return answers


def demonstration_row(prompt: str, people: Sequence[Rater], rng: random.Random) -> Row:
    """Return a demonstration, good or bad."""
    return {"prompt": prompt, "completion": draw_answer(prompt, DEMONSTRATIONS, rng)}


def pair_row(prompt: str, people: Sequence[Rater], rng: random.Random) -> Row:
    """Return a pair with the preferred answer (`a`, `b`, `tie`) and the strength, from 0 (tie) to 3 (strong)."""
    a, b = draw_answers(prompt, 2, rng)
    rater = rng.randrange(RATERS)
    difference = people[rater].judge(prompt, a, rng) - people[rater].judge(prompt, b, rng)
    strength = sum(abs(difference) > threshold for threshold in (0.4, 1.5, 3.0))
    preferred = "tie" if strength == 0 else "a" if difference > 0 else "b"
    return {
        "prompt": prompt,
        "completion_a": a,
        "completion_b": b,
        "preferred": preferred,
        "strength": strength,
        "rater": rater,
    }


def ranking_row(prompt: str, people: Sequence[Rater], rng: random.Random) -> Row:
    """Return a ranking of four answers: the smallest rank is best, equal ranks tie."""
    completions = draw_answers(prompt, 4, rng)
    rater = rng.randrange(RATERS)
    values = [people[rater].judge(prompt, completion, rng) for completion in completions]
    order = sorted(range(4), key=lambda i: -values[i])
    ranks, rank = [0] * 4, 1
    for place, i in enumerate(order):
        if place and values[order[place - 1]] - values[i] > 0.2:
            rank = place + 1
        ranks[i] = rank
    return {"prompt": prompt, "completions": completions, "ranks": ranks, "rater": rater}


def rating_row(prompt: str, people: Sequence[Rater], rng: random.Random) -> Row:
    """Return ratings of one answer from 1 to 5, by three to five raters."""
    completion = draw_answer(prompt, ANSWERS, rng)
    chosen = sorted(rng.sample(range(RATERS), rng.randint(3, RATERS)))
    stars = [max(1, min(5, round(2.5 + people[i].judge(prompt, completion, rng) / 1.6))) for i in chosen]
    kind = prompts()[prompt].kind
    return {"prompt": prompt, "completion": completion, "ratings": stars, "raters": chosen, "kind": kind}


def edit_row(prompt: str, people: Sequence[Rater], rng: random.Random) -> Row:
    """Return an answer and its edit: mostly the ideal answer, else a better one."""
    while True:
        original = draw_answer(prompt, ANSWERS, rng)
        edited = answer(prompts()[prompt], rng.choices(("ideal", "wordy", "partial"), (0.8, 0.1, 0.1))[0], rng)
        before, after = gold_reward([prompt] * 2, [original, edited])
        if after > before:
            return {"prompt": prompt, "original": original, "edited": edited}


def thumb_row(prompt: str, people: Sequence[Rater], rng: random.Random) -> Row:
    """Return thumbs up or down by one rater."""
    completion = draw_answer(prompt, ANSWERS, rng)
    rater = rng.randrange(RATERS)
    value = people[rater].judge(prompt, completion, rng)
    return {"prompt": prompt, "completion": completion, "thumb": value > 1.8, "rater": rater}


def attribute_row(prompt: str, people: Sequence[Rater], rng: random.Random) -> Row:
    """Return a score from -1 to 1 of each attribute, one in ten of them missing (None)."""
    completion = draw_answer(prompt, ANSWERS, rng)
    scores = {}
    for name, value in gold_attributes(prompt, completion).items():
        noisy = max(-1.0, min(1.0, value + rng.gauss(0.0, 0.2)))
        scores[name] = None if rng.random() < 0.1 else round(noisy, 2)
    return {"prompt": prompt, "completion": completion, **scores}


def preference_row(prompt: str, people: Sequence[Rater], rng: random.Random) -> Row:
    """Return a pair that isn't a tie, as chosen and rejected."""
    while True:
        row = pair_row(prompt, people, rng)
        if row["preferred"] != "tie":
            texts = row["completion_a"], row["completion_b"]
            chosen, rejected = texts if row["preferred"] == "a" else texts[::-1]
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def comparison_row(prompt: str, people: Sequence[Rater], rng: random.Random) -> Row:
    """Return the same as completions, of which the first is better."""
    return comparisons_of(preference_row(prompt, people, rng))


def unpaired_row(prompt: str, people: Sequence[Rater], rng: random.Random) -> Row:
    """Return a thumb as TRL's `label`."""
    row = thumb_row(prompt, people, rng)
    return {"prompt": prompt, "completion": row["completion"], "label": row["thumb"]}


def prompt_row(prompt: str, people: Sequence[Rater], rng: random.Random) -> Row:
    """Return a prompt, with the kind of its topic."""
    return {"prompt": prompt, "kind": prompts()[prompt].kind}
