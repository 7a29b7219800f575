"""
Forecasts of the KL at which the gold reward peaks, from the start of a run of PPO, and rules for stopping.

The first 64 completions of a rollout are those that a rule may look at; what a policy is worth is the mean gold reward
of the others, over five rollouts around it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.loop.results import interval, markdown
from bench.overoptimization.curves import FORMS, LOG, SQUARE, fit, highest
from bench.overoptimization.jobs import ENSEMBLES, SINGLE, WARM, Setting, name_of
from bench.overoptimization.report import Found, curves, smooth

PARTS = (0.3, 0.5)  # of a run that a forecast is made from
TOLERANCE = 0.25
CONSTANT = "the median peak of the other runs"
Row = Mapping[str, Any]


def tables(found: Found, setting: Setting, seeds: Sequence[int]) -> str:
    """Return both tables, as far as runs were measured."""
    ensembles = [
        {"seed": seed, "kind": "ppo", "noise": noise, "size": setting.ensemble_of, "aggregation": "mean"}
        for noise in setting.noises
        for seed in seeds
    ]
    watched = [condition for condition in ensembles if name_of(**condition) in found]
    every = [
        found[name]
        for seed in seeds
        for noise in setting.noises
        for size in setting.comparisons
        for each in (SINGLE, *ENSEMBLES, WARM)
        if (name := name_of(seed, noise, size, "ppo", each)) in found
    ]
    parts = [_forecasts(found, watched)] if len(watched) > 1 else []
    return "\n\n".join([*parts, *([_rules(every)] if every else [])])


def _forecasts(found: Found, conditions: Sequence[dict[str, Any]]) -> str:
    rows = [found[name_of(**condition)] for condition in conditions]
    peaks = []
    for condition in conditions:
        seed, others = condition["seed"], {key: value for key, value in condition.items() if key != "seed"}
        (run,) = curves(found, [seed], "gold", **others)
        peaks.append(highest(smooth(run))[0] ** 2)
    lines = []
    for part in PARTS:
        made = [forecasts(row, part) for row in rows]
        constant = [float(np.median([*peaks[:i], *peaks[i + 1 :]])) for i in range(len(peaks))]
        for name in (*made[0], CONSTANT):
            guesses = constant if name == CONSTANT else [each[name] for each in made]
            errors = [abs(guess - peak) / peak for guess, peak in zip(guesses, peaks, strict=True)]
            stopped = [worth(row)[first_above(row, guess, part)] for row, guess in zip(rows, guesses, strict=True)]
            hits = sum(error <= TOLERANCE for error in errors)
            middle = float(np.median(errors))
            median = f"{middle:.0%}" if middle < 10 else "over tenfold" if np.isfinite(middle) else "no peak"
            lines.append([f"{part:.0%}", name, f"{hits} of {len(errors)}", median, interval(stopped)])
    headers = ["from the first", "forecast of the gold reward's peak", f"within {TOLERANCE:.0%}", "median error in KL"]
    return markdown([*headers, "gold reward if stopped there"], lines)


def forecasts(row: Row, part: float) -> dict[str, float]:
    """
    Return forecasts of the KL of the peak: where a form fitted to the first points has its own.

    Args:
        row: result of a run.
        part (`float`): share of its rollouts that is known.

    Returns:
        `dict[str, float]`: KL by forecast, infinite where the form doesn't fall.
    """
    known = row["points"][: max(4, int(part * len(row["points"])))]
    kl, proxy, few, spread = (_values(known, key) for key in ("kl", "proxy", "gold_64", "disagreement"))
    distances = np.sqrt(np.maximum(kl, 0))
    gains = {f"proxy, {form}": (proxy - row["start"]["proxy"], form) for form in FORMS}
    for count in (1, 2, 4):
        gain = proxy - row["start"]["proxy"] - count * (spread - spread[0])
        gains[f"proxy - {count} x disagreement, {SQUARE}"] = (gain, SQUARE)
    gains |= {f"64 gold rewards per rollout, {form}": (few - row["start"]["gold"], form) for form in (SQUARE, LOG)}
    return {name: fit(distances, gain, form).peak ** 2 for name, (gain, form) in gains.items()}


def worth(row: Row) -> np.ndarray:
    """Return the gold reward of the policy at each rollout, from completions that no rule looks at."""
    points = row["points"]
    others = 2 * _values(points, "gold") - _values(points, "gold_64")
    return np.array([others[max(i - 2, 0) : i + 3].mean() for i in range(len(others))])


def first_above(row: Row, kl: float, part: float = 0.0) -> int:
    """Return the first rollout at or above a KL, none before the known part of the run; the last one if none is."""
    values = _values(row["points"], "kl")
    above = np.flatnonzero(values >= kl)
    return max(int(part * len(values)), int(above[0]) if len(above) else len(values) - 1)


def _rules(rows: Sequence[Row]) -> str:
    few = [_values(row["points"], "gold_64") for row in rows]
    means = [np.convolve(np.pad(each, 1, mode="edge"), np.ones(3) / 3, mode="valid") for each in few]
    chosen = {
        "the last": [len(each) - 1 for each in few],
        **{f"the first at a KL of {kl}": [first_above(row, kl) for row in rows] for kl in (1, 2, 3, 4)},
        "the best by 64 gold rewards of every rollout": [int(each.argmax()) for each in few],
        "the best by 64 gold rewards of every fourth": [int(4 * each[::4].argmax()) for each in few],
        "the best by the mean of 64 gold rewards of three rollouts": [int(each.argmax()) for each in means],
    }
    values = [worth(row) for row in rows]
    last = [value[-1] for value in values]
    lines = []
    for name, places in chosen.items():
        reached = [float(value[place]) for value, place in zip(values, places, strict=True)]
        gap = interval([a - b for a, b in zip(reached, last, strict=True)], sign=True) if name != "the last" else ""
        lost = interval([value.max() - each for value, each in zip(values, reached, strict=True)])
        lines.append([name, interval(reached), gap, lost])
    return markdown(
        [f"policy of a run ({len(rows)} runs)", "gold reward", "more than the last", "below its best"], lines
    )


def _values(points: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    return np.array([point.get(key, np.nan) for point in points])
