"""Policies that are the best of n completions by a reward model, and their exact measures over completions."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bench.loop.results import Point
from bench.overoptimization.samples import Sample
from bench.overoptimization.training import Members, scores

Pool = Sequence[Sequence[Sample]]  # completions of the first policy, a list for each prompt
Scores = Callable[[Sequence[Sample]], np.ndarray]  # of completions, shape (N,)

# Between differences of gold reward, in quarters of the first policy's pairs, and at none that is common
EDGES = (1.1, 2.3, 3.5)


class Scorer:
    """
    The scores of a reward model, each completion read once.

    Args:
        reward (`Members`): the reward model.
    """

    def __init__(self, reward: Members):
        self.reward, self.known = reward, dict[Sample, float]()

    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the scores of completions, shape (N,)."""
        if new := sorted((each for each in dict.fromkeys(samples) if each not in self.known), key=_length):
            self.known |= dict(zip(new, scores(self.reward, new).tolist(), strict=True))
        return np.array([self.known[each] for each in samples])


def _length(each: Sample) -> int:
    return len(each.ids)


def best_shares(group: Sequence[Sample], reward: Scores | None, n: int) -> tuple[list[Sample], np.ndarray, np.ndarray]:
    """
    Return the different completions of a prompt, the share of each among them all, and its probability to be the best
    of n that are drawn from them; without a reward these are in the order of the completions, for n = 1.
    """
    counts: dict[Sample, int] = {}
    for each in group:
        counts[each] = counts.get(each, 0) + 1
    different = list(counts)
    order = np.argsort(reward(different), kind="stable") if reward else np.arange(len(different))
    shares = np.array(list(counts.values()))[order] / len(group)
    return [different[i] for i in order], shares, np.diff(np.minimum(shares.cumsum(), 1.0) ** n, prepend=0.0)


def gold_path(pool: Pool, reward: Scores, counts: Sequence[int]) -> list[Point]:
    """Return the KL of the best of n to the first policy, in nats, and its mean gold reward, for each n."""
    path = []
    for n in counts:
        found = []
        for group in pool:
            samples, shares, chosen = best_shares(group, reward, n)
            some = chosen > 0
            kl = (chosen[some] * np.log(chosen[some] / shares[some])).sum()
            found.append((kl, chosen @ np.array([each.gold for each in samples])))
        path.append(tuple(round(float(value), 4) for value in np.mean(found, axis=0)))
    return path


def accuracy(pool: Pool, by: Scores | None, n: int, judge: Scores, like: np.ndarray | None = None) -> float | None:
    """
    Return the probability that a reward model orders two of the best of n by `by`, of unequal gold reward, as the gold
    reward does; `None` where there is no such pair.

    Args:
        pool: completions of the first policy.
        by, n: of the policy, see [`best_shares`].
        judge (`Scores`): the reward model.
        like (`np.ndarray`, *optional*): shares of pairs by their difference, as of [`differences`]; the accuracy is
            then that of pairs with these.
    """
    right, total = np.zeros(len(EDGES) + 1), np.zeros(len(EDGES) + 1)
    for samples, gaps, chosen in _pairs(pool, by, n):
        scored = judge(samples)
        said = np.sign(scored[:, None] - scored[None, :])
        bins = np.digitize(np.abs(gaps), EDGES).ravel()
        correct = chosen * ((np.sign(gaps) == said) + 0.5 * (said == 0))
        right += np.bincount(bins, correct.ravel(), len(right))
        total += np.bincount(bins, chosen.ravel(), len(total))
    shares, known = total if like is None else like, total > 0
    if not shares[known].any():
        return None
    return round(float((shares[known] * right[known] / total[known]).sum() / shares[known].sum()), 4)


def differences(pool: Pool, by: Scores | None, n: int) -> np.ndarray:
    """Return the shares of the pairs of the best of n whose gold rewards differ by up to the first of `EDGES`, ..."""
    total = np.zeros(len(EDGES) + 1)
    for _, gaps, chosen in _pairs(pool, by, n):
        total += np.bincount(np.digitize(np.abs(gaps), EDGES).ravel(), chosen.ravel(), len(total))
    return total / total.sum()


def labeler_accuracy(pool: Pool, by: Scores | None, n: int, noise: float) -> float:
    """Return the probability that an answer with noise (`conf/labeler/gold.yaml`) orders such a pair rightly."""
    right = total = 0.0
    for _, gaps, chosen in _pairs(pool, by, n):
        right += float((chosen / (1 + np.exp(-np.abs(gaps) / noise))).sum())
        total += float(chosen.sum())
    return round(right / total, 4)


def _pairs(pool: Pool, by: Scores | None, n: int) -> Iterator[tuple[list[Sample], np.ndarray, np.ndarray]]:
    """Yield the completions of each prompt, the differences of their gold rewards, and the weights of the pairs."""
    for group in pool:
        samples, _, chosen = best_shares(group, by, n)
        golds = np.array([each.gold for each in samples])
        gaps = golds[:, None] - golds[None, :]
        yield samples, gaps, np.outer(chosen, chosen) * (gaps != 0)
