"""Completions of the first policy, comparisons of them by the gold reward, and samples of best-of-n."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_trl.data.tokenize import prompt_ids
from rlhf_trl.evaluation.generation import sample
from rlhf_trl.models.loading import load_model
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.runs.paths import find_policy
from rlhf_trl.tasks.demo import gold_reward
from rlhf_trl.tasks.demo.world import is_held_out, prompts

POLICY = find_policy("demo:sft", ".")
LONGEST = 40  # tokens of a completion


@dataclass(frozen=True)
class Sample:
    """
    A completion.

    Attributes:
        prompt (`str`): the question.
        ids (`tuple[int, ...]`): token ids of prompt and completion, as reward models read them.
        start (`int`): number of the prompt's ids.
        gold (`float`): gold reward.
    """

    prompt: str
    ids: tuple[int, ...]
    start: int
    gold: float


Pair = tuple[Sample, Sample]  # the preferred one first


@dataclass(frozen=True)
class Sizes:
    """Numbers of prompts and of samples of each: of those compared, and of those that best-of-n chooses from."""

    compared: int
    drawn: int
    prompts: int
    samples: int


def chat(text: str) -> list[dict[str, str]]:
    """Return a question as a chat."""
    return [{"role": "user", "content": text}]


def parts() -> tuple[list[str], list[str], list[str]]:
    """Return three sets of prompts in a fixed order: those of comparisons, those of PPO, and held-out ones."""
    training, held_out = ([p for p in prompts() if is_held_out(p) == held] for held in (False, True))
    for each in (training, held_out):
        Random(0).shuffle(each)
    return training[::2], training[1::2], held_out


def draw(questions: Sequence[str], count: int, seed: int) -> list[list[Sample]]:
    """Return `count` completions of the first policy to each question."""
    tokenizer = load_tokenizer(POLICY)
    model = load_model(POLICY, dtype="float32").eval()
    starts = [prompt_ids(tokenizer, chat(text)) for text in questions for _ in range(count)]
    written = sample(model, tokenizer, starts, LONGEST, 1.0, 512, seed)
    return [
        rated(tokenizer, [text] * count, starts[i * count : (i + 1) * count], written[i * count : (i + 1) * count])
        for i, text in enumerate(questions)
    ]


def rated(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], starts: Sequence[list[int]], written: Sequence[list[int]]
) -> list[Sample]:
    """Return completions with their gold reward."""
    gold = gold_reward(list(texts), tokenizer.batch_decode(list(written), skip_special_tokens=True))
    rows = zip(texts, starts, written, gold, strict=True)
    return [Sample(text, (*start, *ids), len(start), value) for text, start, ids, value in rows]


def samples_file(folder: Path, sizes: Sizes) -> Path:
    """Return the file of the samples of these sizes in a folder."""
    return folder / f"samples_{sizes.compared}_{sizes.drawn}_{sizes.prompts}_{sizes.samples}.json"


def make(path: Path, sizes: Sizes) -> None:
    """Write the samples of all runs, unless they are there."""
    if path.is_file():
        return
    compared, _, held_out = parts()
    found = {
        "compared": draw(compared[: sizes.compared], sizes.drawn, 0),
        "best_of_n": draw(held_out[: sizes.prompts], sizes.samples, 1),
    }
    rows = {
        name: [[[s.prompt, s.ids, s.start, s.gold] for s in each] for each in groups] for name, groups in found.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(rows), encoding="utf-8")
    part.rename(path)


def read(path: Path) -> dict[str, list[list[Sample]]]:
    """Return the samples `compared` and `best_of_n`, a list for each prompt."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: [[Sample(text, tuple(ids), start, gold) for text, ids, start, gold in each] for each in groups]
        for name, groups in rows.items()
    }


def comparisons(groups: Sequence[Sequence[Sample]], count: int, noise: float, seed: int) -> list[Pair]:
    """
    Return comparisons of different completions of a prompt, the preferred one first.

    Args:
        groups: completions of each prompt.
        count (`int`): number of comparisons. Those of a larger number begin with those of a smaller one.
        noise (`float`): share of the comparisons that are the wrong way round, drawn for each.
        seed (`int`): of the comparisons and their noise.

    Raises:
        ValueError: if there are fewer.
    """
    rng = Random(f"comparisons/{seed}")
    pairs = [
        (a, b) if a.gold > b.gold else (b, a)
        for group in groups
        for a, b in combinations(dict.fromkeys(group), 2)
        if a.gold != b.gold
    ]
    if len(pairs) < count:
        raise ValueError(f"The samples have {len(pairs)} comparisons, and {count} are asked for.")
    rng.shuffle(pairs)
    # As many draws for every noise, so that the same comparisons are the wrong way round at more of it
    return [pair[::-1] if rng.random() < noise else pair for pair in pairs[:count]]  # pyright: ignore[reportReturnType]


def reward_rows(pairs: Sequence[Pair]) -> Dataset:
    """Return comparisons as the reward trainer's rows."""
    ids = [[list(a.ids), list(b.ids)] for a, b in pairs]
    return Dataset.from_dict(
        {
            "completion_ids": ids,
            "length": [max(map(len, row)) for row in ids],
            "better": [[0]] * len(ids),
            "worse": [[1]] * len(ids),
        }
    )


def gold_array(groups: Sequence[Sequence[Sample]]) -> np.ndarray:
    """Return gold rewards, shape (prompts, samples)."""
    return np.array([[each.gold for each in group] for group in groups])
