"""Results of the benchmarks of the loop: their file, and the measures that its tables are made of."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_trl.evaluation.statistics import bootstrap_mean, percentile_ends
from rlhf_trl.runs.results import Estimate

Point = tuple[float, float]  # KL to the first policy, and gold reward


class Results:
    """
    A file of results, a line of JSON each: those of an interrupted benchmark are kept.

    Args:
        path (`Path`): the file, which is made with the first result.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self, bench: str, setting: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the results of a benchmark with this setting, by the name of what was measured, the last of each."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        rows = map(json.loads, lines)
        return {row["of"]: row for row in rows if row["bench"] == bench and row["setting"] == dict(setting)}

    def add(self, bench: str, setting: Mapping[str, Any], of: str, **measured: Any) -> None:
        """Append a result."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {"bench": bench, "of": of, **measured, "setting": dict(setting)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def at_kl(path: Sequence[Point], kl: float) -> float:
    """
    Return the gold reward of a run at a KL, between its measured points: linear in the square root of the KL (in which
    Gao et al., arXiv 2210.10760, find the gold reward to rise and fall), and constant outside of them.

    Args:
        path (`Sequence[Point]`): (KL, gold reward) along the run. Of points with the same KL the mean counts.
        kl (`float`): in nats per completion.
    """
    found: dict[float, list[float]] = {}
    for x, gold in path:
        found.setdefault(float(np.sqrt(max(x, 0.0))), []).append(gold)
    distances = sorted(found)
    return float(np.interp(np.sqrt(max(kl, 0.0)), distances, [np.mean(found[each]) for each in distances]))


def compare_paths(path: Sequence[Point], baseline: Sequence[Point], steps: int = 20) -> dict[str, float]:
    """
    Return the gold reward of one run minus that of another at equal KL.

    Args:
        path, baseline (`Sequence[Point]`): both runs, the first policy among their points.
        steps (`int`): number of KLs that `mean` is of.

    Returns:
        `dict[str, float]`: `kl`, the largest that both reach; `end`, the difference there; `mean`, that over the path
        to it, at equal distances in the square root of the KL; `last`, the difference of the last policies, at
        whatever KL they have.
    """
    kl = min(max(x for x, _ in path), max(x for x, _ in baseline))
    grid = [kl * (i / steps) ** 2 for i in range(1, steps + 1)]
    gaps = [at_kl(path, each) - at_kl(baseline, each) for each in grid]
    return {"kl": kl, "end": gaps[-1], "mean": float(np.mean(gaps)), "last": path[-1][1] - baseline[-1][1]}


def pair_accuracy(prompts: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """
    Return the share of the pairs of completions of the same prompt that a reward model orders as the gold reward does;
    pairs of equal gold reward don't count, equal scores count half.

    Args:
        prompts: for each prompt the gold rewards and the scores of its completions.

    Returns:
        `float`, *optional*: `None` without a pair of unequal gold reward.
    """
    right = count = 0.0
    for gold, scores in prompts:
        for i, j in combinations(range(len(gold)), 2):
            if gold[i] != gold[j]:
                gap = (scores[i] - scores[j]) * (1 if gold[i] > gold[j] else -1)
                right += 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
                count += 1
    return right / count if count else None


def labels_to_reach(curve: Sequence[Point], target: float) -> float | None:
    """
    Return the number of labels at which a curve first reaches a value, between its points on a straight line over the
    logarithm of the labels.

    Args:
        curve (`Sequence[Point]`): (labels, value), by rising number of labels.
        target (`float`): the value.

    Returns:
        `float`, *optional*: `None` if it doesn't get there.
    """
    for place, (labels, value) in enumerate(curve):
        if value >= target:
            if not place:
                return float(labels)
            before, lower = curve[place - 1]
            return float(before * (labels / before) ** ((target - lower) / (value - lower)))
    return None


def share_of_labels(
    labels: Sequence[int], curves: np.ndarray, baseline: np.ndarray, resamples: int = 5_000, seed: int = 0
) -> Estimate:
    """
    Return the share of the labels with which the mean curve of some seeds reaches the end of the baseline's, and its
    percentile bootstrap interval: seeds are drawn with replacement, each with both of its curves. Of fewer than 20
    seeds the percentiles are expanded to the width of Student's interval (Hesterberg 2015, arXiv 1411.5279, section
    3.2).

    Args:
        labels (`Sequence[int]`): the numbers of labels that the curves are at.
        curves, baseline (`np.ndarray` of shape `(seeds, len(labels))`): their values.
        resamples (`int`), seed (`int`): number and seed of the draws.

    Returns:
        [`Estimate`]: infinite where the curve doesn't get there; NaN as the ends of the interval for a single seed.
    """

    def share(drawn: np.ndarray) -> float:
        mean, target = curves[drawn].mean(axis=0).tolist(), float(baseline[drawn, -1].mean())
        needed = labels_to_reach(list(zip(labels, mean, strict=True)), target)
        return math.inf if needed is None else needed / labels[-1]

    n = len(curves)
    if n == 1:
        return Estimate(share(np.arange(n)), math.nan, math.nan)
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    # An end is one of the shares: between a finite one and infinity there is no other
    low, high = percentile_ends(np.array([share(each) for each in drawn]), n, method="nearest")
    return Estimate(share(np.arange(n)), float(low), float(high))


def interval(values: Sequence[float], digits: int = 2, sign: bool = False) -> str:
    """Return the mean of one value per seed with its 95 % interval (Student's, for few seeds); `-` without values."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    found = estimate(known)
    form = f"{'+' if sign else ''}.{digits}f"
    if len(known) == 1:
        return f"{found.mean:{form}}"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of one value per seed with its interval."""
    return bootstrap_mean(np.asarray(values, dtype=float))


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
