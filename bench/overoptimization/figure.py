"""The figure of the benchmark, after figure 1 of Gao et al. (arXiv 2210.10760)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.overoptimization.curves import SQUARE, fit
from bench.overoptimization.jobs import ENSEMBLES, SINGLE, WARM, Setting
from bench.overoptimization.report import KINDS, Found, curves, mean_of

NAMES = {
    SINGLE: "one reward model",
    "mean": "mean",
    "min": "min",
    "mean_minus_std": "mean - std",
    "mean_minus_var": "mean - 2 var",
    WARM: "WARM",
}


def draw(found: Found, setting: Setting, seeds: Sequence[int], path: Path) -> None:
    """
    Write the figure as PNG: above best-of-n, PPO and DPO by the number of comparisons; below the aggregations of an
    ensemble for best-of-n and PPO, and PPO's beta.
    """
    import matplotlib
    from matplotlib.figure import Figure

    at = {"noise": max(setting.noises), "size": setting.ensemble_of}
    settings: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(13, 7.5), layout="constrained", dpi=100)
        grid = figure.subplots(2, 3)
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(setting.comparisons)))
        own = {"best_of_n": 0.0, "ppo": setting.betas[0], "dpo": setting.dpo_beta}
        for axes, (kind, beta) in zip(grid[0], own.items(), strict=True):
            for size, color in zip(setting.comparisons, colors, strict=True):
                condition = {"kind": kind, "noise": at["noise"], "size": size, "beta": beta}
                _lines(axes, found, seeds, condition, color, f"{size:,} comparisons", True)
            axes.set_title(f"{KINDS[kind]}{f', beta {beta:g}' if kind != 'best_of_n' else ''}")
        for axes, kind in zip(grid[1], ("best_of_n", "ppo"), strict=False):
            for i, each in enumerate((SINGLE, *ENSEMBLES, WARM)):
                condition = {"kind": kind, **at, "beta": own[kind], "aggregation": each}
                _lines(axes, found, seeds, condition, f"C{i}", NAMES[each], False)
            axes.set_title(f"{KINDS[kind]}: ensembles of {setting.members}, {at['size']:,} comparisons")
        for i, beta in enumerate(setting.betas):
            _lines(grid[1][2], found, seeds, {"kind": "ppo", **at, "beta": beta}, f"C{i}", f"beta {beta:g}", False)
        grid[1][2].set_title(f"PPO: KL coefficient, {at['size']:,} comparisons")
        for axes in grid.flat:
            axes.axhline(0, color="0.7", linewidth=0.7)
            axes.set_xlabel("d = sqrt(KL to the first policy)")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8)
        for axes in grid[:, 0]:
            axes.set_ylabel("gain in reward (in units of the gold reward)")
        figure.suptitle(
            f"{at['noise']:.0%} of the comparisons reversed. Solid: gold, dashed: proxy, dotted: d (a - b d)"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    # A third of the size
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


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
