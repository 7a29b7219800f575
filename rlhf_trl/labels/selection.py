"""
Choice of the pairs of candidates that are worth a label: the options of the group `select`.

Legend: E members of an ensemble, N candidates of a prompt, r[e, i] the score of candidate i by member e, d the size of
a candidate's features. Each function gets all prompts and returns the pairs to ask about, the most wanted first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.random import Generator


@dataclass(frozen=True)
class Pool:
    """
    Candidates of a prompt, by their scores and features.

    Attributes:
        scores (`np.ndarray`, *optional*): r, shape (E, N).
        features (`np.ndarray`, *optional*): shape (N, d).
        size (`int`): N.
    """

    size: int
    scores: np.ndarray | None = None
    features: np.ndarray | None = None


class Pair(NamedTuple):
    """
    Two candidates of a prompt to ask about.

    Attributes:
        prompt (`int`): index of the prompt.
        first, second (`int`): indices of the candidates.
        value (`float`): by how much the pair is wanted, in the unit of the selection; 0 where it draws at random.
    """

    prompt: int
    first: int
    second: int
    value: float = 0.0


def random_pairs(pools: Sequence[Pool], budget: int | None, per_prompt: int, rng: Generator) -> list[Pair]:
    """Return random pairs of random prompts: the control of every other selection."""

    def pairs(pool: Pool) -> Iterator[tuple[int, int]]:
        every = list(combinations(range(pool.size), 2))
        yield from (every[i] for i in rng.permutation(len(every)))

    return _by_prompt(pools, pairs, budget, per_prompt, rng)


def best_worst(pools: Sequence[Pool], budget: int | None, per_prompt: int, rng: Generator) -> list[Pair]:
    """
    Return the candidates with the highest and the lowest mean score of each prompt, then those next to them.

    Args:
        pools (`Sequence[Pool]`): with scores. Prompts are drawn at random where the budget doesn't suffice for all.
    """

    def pairs(pool: Pool) -> Iterator[tuple[int, int]]:
        order = np.argsort(-_scores(pool).mean(axis=0), kind="stable").tolist()
        yield from zip(order[: pool.size // 2], order[::-1], strict=False)

    return _by_prompt(pools, pairs, budget, per_prompt, rng)


def uncertainty(
    pools: Sequence[Pool],
    budget: int | None,
    per_prompt: int,
    rng: Generator,
    measure: str = "scores",
    temperature: float = 1.0,
) -> list[Pair]:
    """
    Return the pairs that the members disagree on most, over all prompts.

    Args:
        pools (`Sequence[Pool]`): with scores.
        measure (`str`): see [`pair_uncertainty`].
        temperature (`float`): likewise.
    """
    found = []
    for number, pool in enumerate(pools):
        values = pair_uncertainty(_scores(pool), measure, temperature)
        pairs = [Pair(number, i, j, float(values[i, j])) for i, j in combinations(range(pool.size), 2)]
        found += sorted(pairs, key=lambda pair: -pair.value)[:per_prompt]
    return sorted(found, key=lambda pair: -pair.value)[:budget]


def pair_uncertainty(scores: np.ndarray, measure: str = "scores", temperature: float = 1.0) -> np.ndarray:
    """
    Return the uncertainty about each pair, shape (N, N).

    Args:
        scores (`np.ndarray`): r, shape (E, N).
        measure (`str`):
            `scores`: Var_e(r[e, i] - r[e, j]). `probabilities`: Var_e(p) with p = sigmoid((r[e, i] - r[e, j]) / T).
            `bernoulli`: m (1 - m) with the mean m of p over the members, which one member has too. Variances are over
            the members, not unbiased.
        temperature (`float`): T.
    """
    gaps = scores[:, :, None] - scores[:, None, :]
    if measure == "scores":
        return gaps.var(axis=0)
    chances = 0.5 * (1 + np.tanh(gaps / temperature / 2))  # a sigmoid that doesn't overflow
    if measure == "probabilities":
        return chances.var(axis=0)
    mean = chances.mean(axis=0)
    return mean * (1 - mean)


def thompson(
    pools: Sequence[Pool],
    budget: int | None,
    per_prompt: int,
    rng: Generator,
    rule: str = "best_arm",
) -> list[Pair]:
    """
    Return pairs by Thompson sampling from the members of an ensemble.

    Args:
        pools (`Sequence[Pool]`): with scores. Prompts are drawn at random where the budget doesn't suffice for all.
        rule (`str`): `double`, see [`double_thompson`], or `best_arm`, see [`best_arm_thompson`].
    """
    draw = double_thompson if rule == "double" else best_arm_thompson

    def pairs(pool: Pool) -> Iterator[tuple[int, int]]:
        for _ in range(20 * per_prompt):  # distinct ones of random draws
            yield draw(_scores(pool), rng.permutation(_scores(pool).shape[0]))

    return _by_prompt(pools, pairs, budget, per_prompt, rng)


def double_thompson(scores: np.ndarray, members: Sequence[int] | np.ndarray) -> tuple[int, int]:
    """
    Return the best candidate by the first member, and the best by the next one that prefers another (double Thompson
    sampling, Wu and Liu 2016; for language models Dwaracherla et al., arXiv 2402.00396). If all agree, the second is
    the second best by the mean of the members: asking about one candidate alone tells nothing.

    Args:
        scores (`np.ndarray`): r, shape (E, N).
        members (`Sequence[int]`): members in the order in which they are drawn, without replacement.
    """
    first = int(scores[members[0]].argmax())
    for member in members[1:]:
        if (second := int(scores[member].argmax())) != first:
            return first, second
    mean = scores.mean(axis=0).copy()
    mean[first] = -np.inf
    return first, int(mean.argmax())


def best_arm_thompson(scores: np.ndarray, members: Sequence[int] | np.ndarray) -> tuple[int, int]:
    """
    Return the best candidate by a random member, and the one whose difference to it the members know least about:
    argmax_j Var_e(r[e, first] - r[e, j]) (best-arm identification, Liu et al., arXiv 2411.01493).

    Args:
        scores (`np.ndarray`): r, shape (E, N).
        members (`Sequence[int]`): members; the first one chooses.
    """
    first = int(scores[members[0]].argmax())
    variance = (scores[:, [first]] - scores).var(axis=0)
    variance[first] = -1.0
    return first, int(variance.argmax())


def d_optimal(
    pools: Sequence[Pool],
    budget: int | None,
    per_prompt: int,
    rng: Generator,
    ridge: float = 1.0,
) -> list[Pair]:
    """
    Return the pairs that tell most about a reward that is linear in the features: greedily the one with the largest
    z' V^-1 z for z = phi_i - phi_j, after which V becomes V + z z'. It maximizes the determinant of V.

    Args:
        pools (`Sequence[Pool]`): with features. They are scaled so that z'z has mean 1.
        ridge (`float`): V is `ridge` times the identity at first.
    """
    pairs = [(n, i, j) for n, pool in enumerate(pools) for i, j in combinations(range(pool.size), 2)]
    if not pairs:
        return []
    features = [_features(pool) for pool in pools]
    z = np.stack([features[n][i] - features[n][j] for n, i, j in pairs]).astype(np.float64)
    scale = np.sqrt((z**2).sum(axis=1).mean())
    z = z / scale if scale > 0 else z
    left = np.full(len(pools), per_prompt)
    found = []
    for row, value in greedy_d_optimal(z, ridge, lambda row: left[pairs[row][0]] > 0):
        if budget is not None and len(found) >= budget:
            break
        left[pairs[row][0]] -= 1
        found.append(Pair(*pairs[row], value))
    return found


def greedy_d_optimal(z: np.ndarray, ridge: float, allowed: Callable[[int], bool]) -> Iterator[tuple[int, float]]:
    """
    Yield rows of `z`, shape (M, d), with their z' V^-1 z, each the largest that is left and `allowed`. The inverse is
    updated by the formula of Sherman and Morrison.
    """
    inverse = np.eye(z.shape[1]) / ridge
    values = (z**2).sum(axis=1) / ridge
    for _ in range(len(z)):
        row = int(values.argmax())
        while np.isfinite(values[row]) and not allowed(row):
            values[row] = -np.inf
            row = int(values.argmax())
        if not np.isfinite(values[row]):
            return
        value = float(values[row])
        yield row, value
        direction = inverse @ z[row]
        inverse -= np.outer(direction, direction) / (1 + value)
        values -= (z @ direction) ** 2 / (1 + value)
        values[row] = -np.inf


def member_scores(scores: Sequence[dict[str, list[float | None]]], weights: dict[str, float]) -> np.ndarray:
    """
    Return the weighted sum of several rewards for each member, shape (E, N): NaN where one doesn't apply. A reward of
    one member counts in each member of another one.

    Args:
        scores (`Sequence[dict]`): of N candidates, by reward a score per member.
        weights (`dict[str, float]`): by reward.

    Raises:
        ValueError: if two rewards have several members, and not the same number of them.
    """
    total = np.zeros((1, len(scores)))
    for name, weight in weights.items():
        values = np.array([[np.nan if score is None else score for score in each[name]] for each in scores], float).T
        if 1 not in (len(values), len(total)) and len(values) != len(total):
            raise ValueError(f"`{name}` has {len(values)} members, and another reward has {len(total)}")
        total = total + weight * values
    return total


def _by_prompt(
    pools: Sequence[Pool],
    pairs: Callable[[Pool], Iterator[tuple[int, int]]],
    budget: int | None,
    per_prompt: int,
    rng: Generator,
) -> list[Pair]:
    """Take a pair of each prompt in random order, then a second one of each, and so on."""
    order = rng.permutation(len(pools)).tolist()
    streams = {number: pairs(pools[number]) for number in order}
    asked: dict[int, set[frozenset[int]]] = {number: set() for number in order}
    found: list[Pair] = []
    for _ in range(per_prompt):
        for number in order:
            if budget is not None and len(found) >= budget:
                return found
            fresh = (pair for pair in streams[number] if frozenset(pair) not in asked[number])
            if (pair := next(fresh, None)) is not None:
                asked[number].add(frozenset(pair))
                found.append(Pair(number, *pair))
    return found


def _scores(pool: Pool) -> np.ndarray:
    assert pool.scores is not None  # `stage=collect` has refused a selection by scores without a reward
    return pool.scores


def _features(pool: Pool) -> np.ndarray:
    assert pool.features is not None
    return pool.features
