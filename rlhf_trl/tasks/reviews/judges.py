"""
Judges of review sentences (`data=reviews`) as reward functions, independent of reward models of that data.

Both read prompt and completion as one text; of a chat, whose prompt is a request, the completion. They return its
score or, with a `threshold`, 1 if the score is above it and else 0; the mean of the latter over prompts is the share
of positive texts.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import exp

from rlhf_trl.data.messages import as_text
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
    Return the probability that people find each text positive, by an [`NgramClassifier`].

    The classifier is fitted to the ratings of the product reviews and of the share of movie sentences that
    [`~rlhf_trl.tasks.reviews.load`] keeps out of training. With the same `path` and `judge_share` it shares no
    sentence with policies or reward models.

    Args:
        prompts (`list[str]`), completions (`list[str]`): texts, one of each per row.
        path (`str`): see [`~rlhf_trl.tasks.reviews.load`].
        judge_share (`float`): see [`~rlhf_trl.tasks.reviews.load`].
        prompt (`str`): fixed prompt, which is removed from the text to judge.
        threshold (`float`, *optional*): return 1 above it and else 0, instead of the probability.
    """
    judge = _classifier(path, judge_share)
    return _scores(judge, prompts, completions, prompt, threshold)


def vader(
    prompts: list, completions: list, prompt: str = "", threshold: float | None = None, **columns
) -> list[float]:
    """
    Return the compound score of each text by `vaderSentiment`, from -1 to 1.

    It is a lexicon with rules, made without these ratings; its authors call a text positive from 0.05 on. A policy
    that it rewards learns to repeat its words.

    Args:
        prompts, completions, prompt, threshold: as in [`sentiment`].

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the package is not installed.
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
    return _scores(lambda text: analyzer.polarity_scores(text)["compound"], prompts, completions, prompt, threshold)


class NgramClassifier:
    """
    Logistic regression on the words and pairs of words in a text, fitted until convergence and without randomness.

    The target of a sentence is the share of positive ratings among its ratings that aren't 0.

    Args:
        rows (`list[dict]`): sentences with `text` and `ratings`.
        min_count (`int`): features in fewer sentences are dropped.
        penalty (`float`): coefficient of the squared weights (half of it), as in ridge regression.
    """

    def __init__(self, rows: Sequence[Row], min_count: int = 2, penalty: float = 1.0):
        import torch

        rows = [row for row in rows if any(row["ratings"])]
        found = [features(row["text"]) for row in rows]
        counts = Counter(feature for each in found for feature in each)
        self.index = {feature: i for i, feature in enumerate(sorted(f for f, n in counts.items() if n >= min_count))}
        known = [(row, self.index[f]) for row, each in enumerate(found) for f in sorted(each) if f in self.index]
        row_of, feature_of = torch.tensor(known).T
        target = torch.tensor([positive_share(row["ratings"]) for row in rows], dtype=torch.float64)
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
        """Return the probability that a text is positive."""
        logit = self.weights[-1] + sum(self.weights[self.index[f]] for f in features(text) if f in self.index)
        return 1 / (1 + exp(-logit))


def features(text: str) -> set[str]:
    """Return the words of a text and its pairs of consecutive words."""
    words = WORD.findall(text.lower())
    return {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}


@functools.cache
def _classifier(path: str, judge_share: float) -> NgramClassifier:
    reviews = read(path, judge_share)
    return NgramClassifier(reviews.judge + reviews.products)


def positive_share(ratings: Sequence[int]) -> float:
    """Return the share of positive ratings among those that aren't 0, of which there is one."""
    return sum(rating > 0 for rating in ratings) / sum(rating != 0 for rating in ratings)


def _scores(
    judge: Callable[[str], float], prompts: list, completions: list, prompt: str, threshold: float | None
) -> list[float]:
    texts = [
        (f"{start}{end}".removeprefix(prompt) if isinstance(end, str) else as_text(end)).strip()
        for start, end in zip(prompts, completions, strict=True)
    ]
    scores = [judge(text) for text in texts]
    return scores if threshold is None else [float(score > threshold) for score in scores]
