"""Tables of the benchmark."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.loop.results import compare_paths, interval, markdown
from bench.overoptimization.curves import FORMS, SQUARE, Curve, bootstrap, fit, highest, mean_curve
from bench.overoptimization.jobs import ENSEMBLES, SINGLE, WARM, Setting, name_of
from rlhf_trl.evaluation.statistics import best_of_n_kl

WIDTH = 0.2  # of the intervals of sqrt(KL) that rollouts are averaged over
KINDS = {"best_of_n": "best of n", "ppo": "PPO", "dpo": "DPO"}
Found = Mapping[str, Mapping[str, Any]]


def curves(found: Found, seeds: Sequence[int], reward: str, **condition: Any) -> list[Curve]:
    """
    Return a condition's curves of a reward's gain over the first policy, one of each seed that was measured.

    Args:
        found: results by name.
        seeds (`Sequence[int]`): the seeds.
        reward (`str`): `gold`, or `proxy` in units of the gold reward: times the ratio of their standard deviations
            over the first policy's completions.
        condition: see [`~bench.overoptimization.jobs.name_of`].
    """
    rows = [found[name] for seed in seeds if (name := name_of(seed, **condition)) in found]
    return [_curve(row, reward) for row in rows]


def _curve(row: Mapping[str, Any], reward: str) -> Curve:
    scale = 1.0 if reward == "gold" else row["start"]["gold_std"] / row["start"]["proxy_std"]
    if "points" not in row:
        distances = np.sqrt([best_of_n_kl(n) for n in row["n"]])
        return distances, scale * np.array(row[reward])
    points = sorted(row["points"], key=lambda point: point["kl"])
    distances = np.sqrt([max(point["kl"], 0.0) for point in points])
    return distances, scale * (np.array([point[reward] for point in points]) - row["start"][reward])


def mean_of(runs: Sequence[Curve]) -> Curve:
    """Return the mean curve of the seeds."""
    same = all(np.array_equal(distances, runs[0][0]) for distances, _ in runs)
    if same:
        return runs[0][0], np.mean([gains for _, gains in runs], axis=0)
    return mean_curve(runs, WIDTH)


def at_the_end(curve: Curve) -> float:
    """Return the gain over the last tenth of a curve's distances."""
    distances, gains = curve
    return float(gains[distances >= 0.9 * distances.max()].mean())


def fitted(runs: Sequence[Curve], form: str):
    """Return the fit of the mean curve of some runs."""
    return fit(*mean_of(runs), form)


def report(found: Found, setting: Setting, seeds: Sequence[int]) -> str:
    """Return the tables."""
    sizes = [
        {"kind": kind, "noise": noise, "size": size, **({"beta": setting.dpo_beta} if kind == "dpo" else {})}
        for kind in KINDS
        for noise in setting.noises
        for size in setting.comparisons
    ]
    at = {"noise": max(setting.noises), "size": setting.ensemble_of}
    betas = [{"kind": "ppo", **at, "beta": beta} for beta in setting.betas]
    return "\n\n".join(
        part
        for part in (
            _fits(found, seeds, sizes),
            _ensembles(found, seeds, setting),
            _peaks(found, seeds, betas, "PPO's beta", lambda each: f"{each['beta']:g}"),
        )
        if part
    )


def _fits(found: Found, seeds: Sequence[int], conditions: Sequence[dict[str, Any]]) -> str:
    rows = []
    for condition in conditions:
        runs = curves(found, seeds, "gold", **condition)
        if not runs:
            continue
        distance, gain = highest(mean_of(runs))
        cells = [KINDS[condition["kind"]], f"{condition['noise']:.0%}", f"{condition['size']:,}"]
        best = {**condition, "kind": "best_of_n", "beta": 0.0}
        cells.append(
            interval([found[n]["accuracy"] for s in seeds if (n := name_of(s, **best)) in found], 3)
            if condition["kind"] == "best_of_n"
            else ""
        )
        cells += [
            f"{gain:+.2f} at {distance:.2f}",
            f"{at_the_end(mean_of(runs)):+.2f} at {mean_of(runs)[0].max():.2f}",
        ]
        for form in FORMS:
            whole = fitted(runs, form)
            low, high = bootstrap(runs, functools.partial(_coefficient, form=form))
            cells.append(f"{whole.a:.2f}, {whole.b:.2f} [{low:.2f}, {high:.2f}], {whole.r2:.2f}")
        square = fitted(runs, SQUARE)
        cells.append(f"{max(square.a / square.b, 0.0):.2f}" if square.b > 0 else "-")
        rows.append(cells)
    headers = ["", "noise", "comparisons", "accuracy [95 %]", "highest gold gain at d", "gain at the end"]
    headers += [*(f"{form}: a, b [95 %], R²" for form in FORMS), "no gain from d = a / b on"]
    return markdown(headers, rows)


def _coefficient(runs: Sequence[Curve], form: str) -> float:
    return fitted(runs, form).b


def _ensembles(found: Found, seeds: Sequence[int], setting: Setting) -> str:
    rows = []
    for kind in ("best_of_n", "ppo"):
        for noise in setting.noises:
            base = {"kind": kind, "noise": noise, "size": setting.ensemble_of}
            complete = [
                seed
                for seed in seeds
                if all(name_of(seed, **base, aggregation=each) in found for each in (SINGLE, "mean"))
            ]
            singles = curves(found, complete, "gold", **base, aggregation=SINGLE)
            for each in (SINGLE, *ENSEMBLES, WARM):
                runs = curves(found, complete, "gold", **base, aggregation=each)
                if not runs or len(runs) != len(singles):
                    continue
                tops, others = ([highest(smooth(run)) for run in each_runs] for each_runs in (runs, singles))
                gaps = [compare_paths(_path(run), _path(other)) for run, other in zip(runs, singles, strict=True)]
                more = [[top[i] - other[i] for top, other in zip(tops, others, strict=True)] for i in (0, 1)]
                more += [[gap[key] for gap in gaps] for key in ("mean", "end")]
                rows.append(
                    [
                        *(KINDS[kind], f"{noise:.0%}", each),
                        *(interval([top[i] for top in tops]) for i in (0, 1)),
                        *("" if each == SINGLE else interval(values, sign=True) for values in more),
                    ]
                )
    headers = ["", "noise", "reward", "gold peak at d", "gain there", "shift of the peak", "more gain there"]
    headers += ["more on the way", "more at the largest common d"]
    return markdown(headers, rows) if rows else ""


def smooth(run: Curve) -> Curve:
    """Return a run's means over intervals of distances."""
    return mean_curve([run], WIDTH)


def _path(run: Curve) -> list[tuple[float, float]]:
    return [(float(distance) ** 2, float(gain)) for distance, gain in zip(*smooth(run), strict=True)]


def _summary(run: Curve) -> tuple[float, float, float]:
    """Return distance and gain of the highest point of a run, and its gain at the end."""
    return *highest(smooth(run)), at_the_end(smooth(run))


def _peaks(found, seeds, conditions, title, name) -> str:
    rows = []
    for condition in conditions:
        runs = curves(found, seeds, "gold", **condition)
        if runs:
            values = [_summary(run) for run in runs]
            last = [float(run[0].max()) for run in runs]
            rows.append([name(condition), *(interval([v[i] for v in values]) for i in range(3)), interval(last)])
    headers = [title, "gold peak at d", "gold gain there", "at the end", "largest d"]
    return markdown(headers, rows) if rows else ""
