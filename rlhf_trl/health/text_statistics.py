"""Statistics of the completions of a rollout. Imports nothing heavy."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

# A word, a character of a script that is written without spaces, or a punctuation mark
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")


def rollout_measures(prompts: Sequence[str], completions: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """
    Compute the statistics of a rollout that signs are based on.

    Args:
        prompts (`Sequence[str]`), completions (`Sequence[str]`):
            Texts, one pair per row.
        scores (`Sequence[float]`):
            Combined reward of each; NaN where there is none.

    Returns:
        `dict[str, float]`: `completions/repetition`, the mean share of a completion's word trigrams that it repeats;
        `completions/similarity`, the mean share of a completion's trigrams that are in the answer to another prompt,
        averaged over the other prompts; `objective/length_correlation` of the score and the length in characters;
        `objective/most_common_score`, the share of the completions with the most common score. NaN where there is
        nothing to measure.
    """
    trigrams = [_trigrams(text) for text in completions]
    first_of_prompt = dict(reversed(list(zip(prompts, trigrams, strict=True))))
    scored = [(score, len(text)) for score, text in zip(scores, completions, strict=True) if math.isfinite(score)]
    return {
        "completions/repetition": fmean(1 - len(set(row)) / len(row) if row else 0.0 for row in trigrams),
        "completions/similarity": _similarity([set(row) for row in first_of_prompt.values()]),
        "objective/length_correlation": _correlation(scored),
        "objective/most_common_score": (
            Counter(score for score, _ in scored).most_common(1)[0][1] / len(scored) if scored else math.nan
        ),
    }


def _trigrams(text: str) -> list[tuple[str, ...]]:
    words = WORDS.findall(text.lower())
    return list(zip(words, words[1:], words[2:], strict=False)) or ([tuple(words)] if words else [])


def _similarity(answers: Sequence[set]) -> float:
    if len(answers) < 2:
        return math.nan
    count = Counter(trigram for answer in answers for trigram in answer)
    others = len(answers) - 1
    return fmean(fmean((count[trigram] - 1) / others for trigram in answer) if answer else 0.0 for answer in answers)


def _correlation(pairs: Sequence[tuple[float, float]]) -> float:
    if len(pairs) < 3:
        return math.nan
    xs, ys = zip(*pairs, strict=True)
    mean_x, mean_y = fmean(xs), fmean(ys)
    covariance = fmean((x - mean_x) * (y - mean_y) for x, y in pairs)
    spread = math.sqrt(fmean((x - mean_x) ** 2 for x in xs) * fmean((y - mean_y) ** 2 for y in ys))
    # A score that differs by rounding only has no correlation with anything
    return covariance / spread if spread > 1e-9 * max(1.0, abs(mean_x)) else math.nan
