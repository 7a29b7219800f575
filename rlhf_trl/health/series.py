"""Metrics of an RL run in the order in which they were logged, and how much they scatter. Imports nothing heavy."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, median

BASELINE, WINDOW = 4, 3
# Of one degree of freedom: median of the squares of values with mean 0 and variance 1
CHI_SQUARED_MEDIAN = 0.4549


class Series:
    """
    Values of each metric in the order they were logged. None, NaN and infinite ones are dropped.

    Args:
        baseline (`int`): number of values at the start that later ones are compared with.
        window (`int`): number of newest values that are averaged.
        watched (`Sequence[str]`): names of reward functions of weight 0.

    Attributes:
        log_steps (`int`): number of training's log steps.
    """

    def __init__(self, baseline: int = BASELINE, window: int = WINDOW, watched: Sequence[str] = ()):
        self.baseline, self.window = baseline, window
        self.watched = list(watched)
        self.log_steps = 0
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, logs: Mapping[str, float | None]) -> None:
        """Add a call of `Trainer.log`."""
        self.log_steps += not any(name.startswith("eval_") for name in logs)
        for name, value in logs.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._values[name].append(float(value))

    def values(self, *names: str) -> list[float]:
        """Return the values of the first of `names` that was logged."""
        return next((self._values[name] for name in names if name in self._values), [])

    def stems(self, start: str, end: str) -> list[str]:
        """Return the names that begin with `start` and end with `end`, without that end."""
        return [name.removesuffix(end) for name in self._values if name.startswith(start) and name.endswith(end)]

    def recent(self, *names: str) -> float | None:
        """Return the mean of the newest `window` values, `None` until there are as many besides the baseline."""
        values = self.values(*names)
        return fmean(values[-self.window :]) if len(values) >= self.baseline + self.window else None

    def start(self, *names: str) -> float:
        """Return the mean of the first `baseline` values."""
        return fmean(self.values(*names)[: self.baseline])

    def rise(self, *names: str) -> float | None:
        """Return the difference of the newest values to the first ones."""
        recent = self.recent(*names)
        return None if recent is None else recent - self.start(*names)


def sampling_noise(values: Sequence[float]) -> float:
    """
    Return the standard deviation of a log step's value around its trend, such as the sampling error of the mean of a
    small rollout.

    It is estimated from second differences, whose variance is six times that of the values (compare von Neumann et al.
    1941, "The mean square successive difference"), so that a steady rise or fall doesn't count as noise; from their
    median, so that a collapse doesn't. An estimate from few values may be far too small, hence the last factor.
    """
    triples = zip(values, values[1:], values[2:], strict=False)
    squares = [(a - 2 * b + c) ** 2 for a, b, c in triples]
    if not squares:
        return 0.0
    variance = median(squares) / CHI_SQUARED_MEDIAN / 6
    return math.sqrt(variance) * (1 + 8 / len(squares))
