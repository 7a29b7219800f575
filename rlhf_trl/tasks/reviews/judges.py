"""
Judges of review sentences (`data=reviews`) that a reward model of that data has no part in, as reward functions.

Both read the prompt and the completion as one text, and return its score or, with a `threshold`, 1 if the score is
above it and else 0, whose mean over prompts is the share of positive texts.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import exp

from rlhf_trl.errors import ConfigError
from rlhf_trl.tasks.reviews.data import Row, read

WORD = re.compile(r"[a-z0-9']+|[!?]")


def sentiment(
    prompts: list,
    completions: list,
    path: str,
    judge_share: float = 0.3,
    prompt: str = "",
    threshold: float | None = None,
    **columns,
) -> list[float]:
    """
    Probability that people find a text positive: a classifier on words and pairs of words (`NgramClassifier`), fitted
    to the ratings of the product reviews and of the share of movie sentences that `rlhf_trl.tasks.reviews.data.load`
    keeps out of training. It shares no sentence with policies or reward models, if `path` and `judge_share` are the
    same.

    Args:
        prompts, completions (`list[str]`): Texts, one each a row.
        path (`str`): See `rlhf_trl.tasks.reviews.data.load`.
        judge_share (`float`): Likewise.
        prompt (`str`): The fixed prompt, which is no part of the text to judge.
        threshold (`float`, *optional*): Return 1 above it and else 0, instead of the probability.
    """
    judge = _judge(path, judge_share)
    return _judged(judge, prompts, completions, prompt, threshold)


def vader(
    prompts: list, completions: list, prompt: str = "", threshold: float | None = None, **columns
) -> list[float]:
    """
    The compound score, -1 to 1, of `vaderSentiment`, a lexicon with rules that was made without these ratings. Its
    authors call a text positive from 0.05 on. A policy that it rewards learns to repeat its words.

    Args:
        prompts, completions, prompt, threshold: As in `sentiment`.

    Raises:
        `ConfigError`: the package is not installed.
    """
    try:
        # Of the extra `reviews`, which no other extra brings
        from vaderSentiment.vaderSentiment import (  # pyright: ignore[reportMissingImports]
            SentimentIntensityAnalyzer,
        )
    except ImportError:
        raise ConfigError(
            "`vader` needs the package `vaderSentiment`. Install it with `pip install vaderSentiment==3.3.2`."
        ) from None
    analyzer = SentimentIntensityAnalyzer()
    return _judged(lambda text: analyzer.polarity_scores(text)["compound"], prompts, completions, prompt, threshold)


class NgramClassifier:
    """
    Logistic regression on the words and pairs of words in a text, fitted to the end and without randomness.

    The target of a sentence is the share of positive ratings among its ratings that aren't 0.

    Args:
        rows (`list[dict]`): Sentences with `text` and `ratings`.
        min_count (`int`): Features in fewer sentences are left out.
        penalty (`float`): Of the squared weights (half of it), as in ridge regression.
    """

    def __init__(self, rows: Sequence[Row], min_count: int = 2, penalty: float = 1.0):
        import torch

        rows = [row for row in rows if any(row["ratings"])]
        found = [features(row["text"]) for row in rows]
        counts = Counter(feature for each in found for feature in each)
        self.index = {feature: i for i, feature in enumerate(sorted(f for f, n in counts.items() if n >= min_count))}
        known = [(row, self.index[f]) for row, each in enumerate(found) for f in sorted(each) if f in self.index]
        row_of, feature_of = torch.tensor(known).T
        target = torch.tensor([_positive_share(row["ratings"]) for row in rows], dtype=torch.float64)
        weights = torch.zeros(len(self.index) + 1, dtype=torch.float64, requires_grad=True)  # the last one is the bias
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            logits = torch.zeros_like(target).index_add(0, row_of, weights[feature_of]) + weights[-1]
            value = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
            value = value + penalty / 2 * weights[:-1].square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        self.weights = weights.tolist()

    def __call__(self, text: str) -> float:
        """Probability that the text is positive."""
        logit = self.weights[-1] + sum(self.weights[self.index[f]] for f in features(text) if f in self.index)
        return 1 / (1 + exp(-logit))


def features(text: str) -> set[str]:
    """The words of a text, and the pairs of words that follow each other."""
    words = WORD.findall(text.lower())
    return {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}


@functools.cache
def _judge(path: str, judge_share: float) -> NgramClassifier:
    reviews = read(path, judge_share)
    return NgramClassifier(reviews.judge + reviews.products)


def _positive_share(ratings: Sequence[int]) -> float:
    return sum(rating > 0 for rating in ratings) / sum(rating != 0 for rating in ratings)


def _judged(
    judge: Callable[[str], float], prompts: list, completions: list, prompt: str, threshold: float | None
) -> list[float]:
    texts = [f"{start}{end}".removeprefix(prompt).strip() for start, end in zip(prompts, completions, strict=True)]
    scores = [judge(text) for text in texts]
    return scores if threshold is None else [float(score > threshold) for score in scores]
