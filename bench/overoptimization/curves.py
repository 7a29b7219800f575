"""
Curves of rewards against the distance from the first policy, d = sqrt(KL), and the forms of Gao et al. (arXiv
2210.10760, section 3.1) fitted to them: d (a - b d) and d (a - b log d). Pure functions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_trl.evaluation.statistics import best_of_n, best_of_n_kl

Curve = tuple[np.ndarray, np.ndarray]  # distances, rising, and gains in reward over the first policy
SQUARE, LOG = "d (a - b d)", "d (a - b log d)"
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    SQUARE: lambda d: -(d**2),
    LOG: lambda d: -d * np.log(np.where(d > 0, d, 1.0)),
}


@dataclass(frozen=True)
class Fit:
    """
    A form fitted to a curve by least squares.

    Attributes:
        form (`str`): name of the form.
        a, b (`float`): its coefficients.
        r2 (`float`): share of the variance of the gains that it explains; NaN where they don't vary.
    """

    form: str
    a: float
    b: float
    r2: float

    def __call__(self, distances: np.ndarray) -> np.ndarray:
        """Return the gains at some distances."""
        distances = np.asarray(distances, dtype=float)
        return self.a * distances + self.b * FORMS[self.form](distances)

    @property
    def peak(self) -> float:
        """Distance at which the gain is largest; infinite where the form never falls."""
        if self.b <= 0:
            return np.inf
        return max(0.0, self.a / (2 * self.b)) if self.form == SQUARE else float(np.exp(self.a / self.b - 1))


def fit(distances: np.ndarray, gains: np.ndarray, form: str) -> Fit:
    """
    Fit a form to a curve by least squares.

    Args:
        distances, gains (`np.ndarray` of shape `(N,)`): the curve, two points or more.
        form (`str`): one of `FORMS`.
    """
    distances, gains = np.asarray(distances, dtype=float), np.asarray(gains, dtype=float)
    columns = np.stack([distances, FORMS[form](distances)], axis=1)
    (a, b), *_ = np.linalg.lstsq(columns, gains, rcond=None)
    total = ((gains - gains.mean()) ** 2).sum()
    r2 = 1 - ((gains - columns @ [a, b]) ** 2).sum() / total if total > 0 else np.nan
    return Fit(form, float(a), float(b), float(r2))


def mean_curve(runs: Sequence[Curve], width: float) -> Curve:
    """
    Return the mean of several runs' curves: of the points of a run within an interval of distances the mean counts, a
    run without one there is interpolated between its others, and an interval counts that half of the runs reach.

    Args:
        runs (`Sequence[Curve]`): the curves.
        width (`float`): of the intervals.
    """
    last = int(max(distances.max() for distances, _ in runs) / width)
    table = np.full((len(runs), last + 1, 2), np.nan)
    for row, (distances, gains) in zip(table, runs, strict=True):
        places = (distances / width).astype(int)
        for place in np.unique(places):
            inside = places == place
            row[place] = distances[inside].mean(), gains[inside].mean()
        seen = np.isfinite(row[:, 0])
        centers = (np.arange(len(row)) + 0.5) * width
        between = ~seen & (centers > row[seen, 0].min()) & (centers < row[seen, 0].max())
        filled = np.interp(centers[between], row[seen, 0], row[seen, 1])
        row[between] = np.stack([centers[between], filled], axis=1)
    known = np.isfinite(table[:, :, 0]).sum(axis=0)
    distances, gains = np.nanmean(table[:, 2 * known >= len(runs)], axis=0).T
    return distances, gains


def bootstrap(
    runs: Sequence[Curve], value: Callable[[Sequence[Curve]], float], resamples: int = 200, level: float = 0.95
) -> tuple[float, float]:
    """
    Return the percentile interval of a value of runs that are drawn with replacement.

    Args:
        runs (`Sequence[Curve]`): the runs, such as those of several seeds.
        value (callable): of some runs.
        resamples (`int`), level (`float`): see [`~rlhf_trl.evaluation.statistics.bootstrap_mean`].
    """
    rng = np.random.default_rng(0)
    found = [value([runs[i] for i in rng.integers(len(runs), size=len(runs))]) for _ in range(resamples)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low), float(high)


def highest(curve: Curve, width: float = 0.5) -> tuple[float, float]:
    """
    Return distance and gain at the highest point of a curve: that of a parabola through the points around it.

    Args:
        curve (`Curve`): the curve.
        width (`float`): largest distance of those points from the highest one, of running means of three.
    """
    distances, gains = curve
    running = np.convolve(np.pad(gains, 1, mode="edge"), np.ones(3) / 3, mode="valid")
    at = int(running.argmax())
    near = np.abs(distances - distances[at]) <= width
    if near.sum() >= 3:
        square, line, constant = np.polyfit(distances[near], gains[near], 2)
        if square < 0:
            top = float(np.clip(-line / (2 * square), distances[near].min(), distances[near].max()))
            return top, float(square * top**2 + line * top + constant)
    return float(distances[at]), float(running[at])


def best_of_n_curves(select: np.ndarray, rewards: Mapping[str, np.ndarray], counts: Sequence[int]) -> dict[str, Curve]:
    """
    Return the gains of best-of-n over one sample.

    Args:
        select (`np.ndarray` of shape `(prompts, samples)`): scores that choose the best.
        rewards (`Mapping[str, np.ndarray]`): of the samples, of the same shape, by name.
        counts (`Sequence[int]`): the n.
    """
    distances = np.sqrt([best_of_n_kl(n) for n in counts])
    return {
        name: (distances, np.array([best_of_n(select, values, n).mean() for n in counts]) - values.mean())
        for name, values in rewards.items()
    }
