"""The figure of the benchmark, after figure 1 of Gao et al. (arXiv 2210.10760)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.overoptimization.curves import SQUARE, fit
from bench.overoptimization.jobs import ENSEMBLES, SINGLE, WARM, Setting
from bench.overoptimization.report import Found, curves, mean_of

NAMES = {
    SINGLE: "one reward model",
    "mean": "mean of four",
    "min": "min",
    "mean_minus_std": "mean - std",
    "mean_minus_var": "mean - 2 var",
    WARM: "WARM",
}


def draw(found: Found, setting: Setting, seeds: Sequence[int], path: Path) -> None:
    """
    Write the figure as PNG: best-of-n to the left and PPO to the right; above by the number of comparisons, below by
    the aggregation of an ensemble. Solid: gold reward, and dotted its fit; dashed: proxy.
    """
    import matplotlib
    from matplotlib.figure import Figure

    noise = max(setting.noises)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 7.5), layout="constrained", dpi=120)
        grid = figure.subplots(2, 2, sharey="row")
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(setting.comparisons)))
        for column, (kind, title) in enumerate({"best_of_n": "Best of n", "ppo": "PPO, beta 0"}.items()):
            above, below = grid[0][column], grid[1][column]
            for size, color in zip(setting.comparisons, colors, strict=True):
                condition = {"kind": kind, "noise": noise, "size": size}
                _lines(above, found, seeds, condition, color, f"{size:,} comparisons", True)
            for i, each in enumerate((SINGLE, *ENSEMBLES, WARM)):
                condition = {"kind": kind, "noise": noise, "size": setting.ensemble_of, "aggregation": each}
                _lines(below, found, seeds, condition, f"C{i}", NAMES[each], False)
            above.set_title(f"{title}: number of comparisons, {noise:.0%} of them reversed")
            below.set_title(f"{title}: ensembles, {setting.ensemble_of:,} comparisons, {noise:.0%} reversed")
            for axes in (above, below):
                axes.axhline(0, color="0.7", linewidth=0.7)
                axes.set_xlabel("d = sqrt(KL to the first policy)")
                axes.legend(frameon=False, fontsize=8)
        for axes in (grid[0][0], grid[1][0]):
            axes.set_ylabel("gain in reward (units of gold)")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _lines(axes, found: Found, seeds: Sequence[int], condition: dict, color, label: str, whole: bool) -> None:
    gold = curves(found, seeds, "gold", **condition)
    if not gold:
        return
    distances, gains = mean_of(gold)
    axes.plot(distances, gains, color=color, label=label, marker=".", markersize=3, linewidth=1.4)
    if whole:
        grid = np.linspace(0, distances.max(), 100)
        axes.plot(grid, fit(distances, gains, SQUARE)(grid), color=color, linestyle=":", linewidth=1)
        proxy = mean_of(curves(found, seeds, "proxy", **condition))
        axes.plot(*proxy, color=color, linestyle="--", linewidth=1)
