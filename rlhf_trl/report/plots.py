"""
Figures as inline SVG, by matplotlib.

Text, axes and rules are drawn in `currentColor` and series in the page's own colors (`var(--c0)` ...), so that a
figure reads in light and in dark mode. Series also differ by dash and marker: nothing is told by color alone. Outside
a page the colors fall back to a palette after Okabe and Ito (2008) that any kind of color vision tells apart.
"""

import hashlib
import html
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_trl.report.text import FORBIDDEN

PALETTE = ("#0072b2", "#d55e00", "#00845f", "#b4558c", "#b07800", "#2f8fc9", "#6b6ecf", "#7a6a53")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#010203"  # stands for currentColor until the SVG is written
LARGE, SMALL = (8.0, 4.2), (3.75, 3.3)  # inches at 96 px: of a wide figure, and of any figure on a phone
HALF = (5.0, 3.5)
# Names and values are shown as they are: `$` begins no formula
LITERAL: dict[Any, Any] = {"text.parse_math": False, "text.usetex": False}


class Drawing(str):
    """The SVG of a figure, which can also be drawn in pixels, for what takes nothing else."""

    draw: Callable
    size: tuple[float, float]
    title: str

    def pixels(self) -> np.ndarray:
        """Return the figure in dark letters on white, shape `(height, width, 4)`, `uint8`."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        with matplotlib.rc_context(LITERAL):  # ticks are made when they are drawn
            figure = _figure(self.draw, self.size, small=False)
            figure.set_facecolor("white")
            figure.set_dpi(150)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            return np.asarray(canvas.buffer_rgba())


@dataclass(frozen=True)
class Series:
    """
    Named points.

    Args:
        name (`str`):
            In the legend, and beside the point where there is but one.
        x, y (`Sequence[float]`):
            Points; NaN and None are dropped.
        low, high (`Sequence[float]`, *optional*):
            Lower and upper end of an interval around each `y`.
        left, right (`Sequence[float]`, *optional*):
            The same around each `x`, of points.
        line (`bool`):
            Whether the points are joined.
        color (`int`, *optional*):
            Which color; `None`: by its place among the series.
        joined (`bool`):
            Points with a thin line through them: runs that differ in one thing.
        hollow (`bool`):
            Hollow markers and a dashed line: for the second of two readings of one thing.
        labels (`Sequence[str]`):
            A few words beside each point.
    """

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    line: bool = True
    joined: bool = False
    color: int | None = None
    hollow: bool = False
    labels: Sequence[str] = ()
    left: Sequence[float | None] | None = None
    right: Sequence[float | None] | None = None


def curves(series: Sequence[Series], title: str, x_label: str, y_label: str = "", wide: bool = False) -> Drawing:
    """Draw lines, with a band where there is an interval: training curves, reliability, accuracy against size."""

    def draw(axes, small):
        for i, one in enumerate(series):
            x, y, low, high = _points(one)
            color = _color(one, i)
            dash = DASHES[1] if one.hollow else DASHES[i // len(PALETTE) % len(DASHES)] if i else "-"
            axes.plot(
                x, y, color=color, linestyle=dash, label=_shown(one.name), zorder=3, **_marks(one, i, color, len(x))
            )
            if low is not None:
                axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0, zorder=2)
        _name(axes, x_label, y_label)
        _legend(axes)

    return _svg(draw, title, wide)


def frontier(
    series: Sequence[Series], title: str, x_label: str, y_label: str, x_scale: str = "linear", wide: bool = True
) -> Drawing:
    """
    Draw points with their intervals and names, and curves between them: reward against KL, metrics of a sweep.

    Args:
        series (`Sequence[Series]`):
            Those with `line=False` are points.
        x_scale (`str`):
            `linear`, `log`, or `sqrt` where the points crowd near 0.
    """

    def draw(axes, small):
        taken = []
        for i, one in enumerate(series):
            x, y, low, high = _points(one)
            color = _color(one, i)
            style = _marks(one, i, color, len(x), always=True)
            # A point with its name beside it needs no legend
            style["label"] = _shown(one.name) if one.line or len(x) > 1 or not one.labels else "_"
            if one.line:
                axes.plot(x, y, color=color, linestyle=DASHES[1] if one.hollow else "-", **style)
            else:
                axes.plot(x, y, linestyle="none", color=color, zorder=4, **style)
                if one.joined:
                    axes.plot(x, y, linestyle=DASHES[2], color=color, linewidth=1.2, alpha=0.7)
            if low is not None:
                if one.line:
                    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
                else:
                    axes.vlines(x, low, high, color=color, linewidth=1.2, alpha=0.7, zorder=3)
            if one.left is not None and one.right is not None:
                ends = np.isfinite(_numbers(one.x)) & np.isfinite(_numbers(one.y))
                axes.hlines(
                    y, _numbers(one.left)[ends], _numbers(one.right)[ends], color=color, linewidth=1.2, alpha=0.7
                )
            taken += list(zip(x, y, one.labels, strict=False))
        if x_scale == "sqrt":
            # With its sign, as an estimate of a small KL may be below 0
            axes.set_xscale(
                "function", functions=(lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda v: np.sign(v) * np.square(v))
            )
        elif x_scale == "log":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")  # matplotlib's own are formulas
            places = sorted({float(x) for one in series for x in one.x if x is not None})
            if len(places) <= 8:  # the values of a sweep
                axes.set_xticks(places, [f"{place:.4g}" for place in places])
            axes.minorticks_off()
        axes.margins(x=0.06, y=0.12)
        _name(axes, x_label, y_label)
        _legend(axes)
        _labels(axes, taken, small)

    return _svg(draw, title, wide)


def bars(
    names: Sequence[str],
    values: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    title: str = "",
    x_label: str = "",
    middle: float | None = None,
    form: str = "{:.2f}",
    wide: bool = False,
    colors: Sequence[int] | None = None,
) -> Drawing:
    """
    Draw a horizontal bar per name, with its interval.

    Args:
        colors (`Sequence[int]`, *optional*):
            Which color each bar has; `None`: all one, as the names tell them apart.
        middle (`float`, *optional*):
            Where bars begin (a win rate: 0.5), with a rule; `None`: at 0.
        form (`str`):
            How the value beside a bar is written.
    """
    start = 0.0 if middle is None else middle

    def draw(axes, small):
        places = np.arange(len(names))[::-1]
        values_, ends = np.asarray(values, float), np.asarray(high if high is not None else values, float)
        lengths = values_ - start
        drawn = [PALETTE[color % len(PALETTE)] for color in colors or [0] * len(names)]
        axes.barh(places, lengths, left=start, height=0.55, color=drawn, alpha=0.75, linewidth=0, zorder=2)
        if low is not None:
            axes.hlines(places, low, high, color=INK, linewidth=1.4, zorder=3)
        axes.axvline(start, color=INK, linewidth=0.8, alpha=0.6)
        for place, value, end in zip(places, values_, ends, strict=True):
            if np.isfinite(value):
                right = np.nanmax([value, end, start])
                axes.annotate(
                    form.format(value), (right, place), xytext=(6, 0), textcoords="offset points", va="center"
                )
        axes.set_yticks(places, [_text(name) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.18, y=0.08)
        if form.endswith("%}"):
            axes.xaxis.set_major_formatter(lambda value, place: form.format(value))
        _name(axes, x_label, "")

    height = max(1.2, 0.8 + 0.42 * len(names))
    return _svg(draw, title, wide, height=height)


def histogram(
    samples: dict[str, Sequence[float]],
    title: str,
    x_label: str,
    bins: int = 24,
    wide: bool = False,
    colors: dict[str, int] | None = None,
) -> Drawing:
    """
    Draw the shares of the values of each sample in common bins, as outlines: before and after, for example.

    Args:
        colors (`dict[str, int]`, *optional*):
            Which color each sample has; `None`: by its place among them.
    """
    kept = {name: np.asarray(values, float) for name, values in samples.items()}
    kept = {name: values[np.isfinite(values)] for name, values in kept.items()}
    kept = {name: values for name, values in kept.items() if len(values)}
    together = np.concatenate(list(kept.values())) if kept else np.array([0.0])
    low, high = (together.min(), together.max()) if np.ptp(together) > 0 else (together[0] - 0.5, together[0] + 0.5)
    edges = np.linspace(low, high, bins + 1)

    def draw(axes, small):
        for i, (name, values) in enumerate(kept.items()):
            shares = np.histogram(values, edges)[0] / len(values)
            color = PALETTE[(colors[name] if colors else i) % len(PALETTE)]
            dash = DASHES[i % len(DASHES)]
            axes.stairs(shares, edges, color=color, linewidth=1.6, linestyle=dash, label=_shown(name), zorder=3)
            axes.stairs(shares, edges, color=color, alpha=0.1, fill=True, zorder=2)
            axes.axvline(values.mean(), color=color, linewidth=1.2, linestyle=dash, zorder=4)
        axes.yaxis.set_major_formatter(lambda value, place: f"{100 * value:.3g}%")
        axes.set_ylim(bottom=0)
        _name(axes, x_label, "")
        _legend(axes)

    return _svg(draw, title, wide)


def _points(series: Series) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    x, y = _numbers(series.x), _numbers(series.y)
    keep = np.isfinite(x) & np.isfinite(y)
    low, high = (None if ends is None else _numbers(ends)[keep] for ends in (series.low, series.high))
    return x[keep], y[keep], low, high


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)


def _color(series: Series, place: int) -> str:
    return PALETTE[(place if series.color is None else series.color) % len(PALETTE)]


def _marks(series: Series, place: int, color: str, points: int, always: bool = False) -> dict:
    marker = MARKERS[(place if series.color is None else series.color) % len(MARKERS)]
    style = {"markersize": 6 if always and not series.line else 3.5, "linewidth": 1.7}
    if series.hollow:
        style |= {"markerfacecolor": "none", "markeredgecolor": color}
    return style | {"marker": marker if always or points <= 40 else ""}


def _name(axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(_text(x_label))
    if y_label:
        # Above the axis and level: nobody tilts the head
        axes.set_title(_text(y_label), loc="left", fontsize=10, fontweight="normal", pad=8)


def _text(text: str) -> str:
    """Return a name or value as it can be drawn: valid UTF-8, and short enough to leave room for the axes."""
    text = FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(text))
    return text if len(text) <= 60 else f"{text[:40]}…{text[-19:]}"


def _shown(name: str) -> str:
    """Return a name as a label: matplotlib drops labels that begin with `_` from the legend."""
    return f" {_text(name)}"


def _legend(axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    names = [name[1:] for name in names]
    first = dict(reversed(list(zip(names, handles, strict=True))))
    shown = list(dict.fromkeys(names))
    if len(shown) > 1:
        figure = axes.figure
        figure.legend(
            [first[name] for name in shown],
            shown,
            loc="outside lower left",
            ncols=max(1, min(len(shown), int(figure.get_figwidth() / (0.55 + 0.085 * max(map(len, shown)))))),
            frameon=False,
            handlelength=2.2,
            columnspacing=1.4,
        )


def _labels(axes, points: list[tuple], small: bool) -> None:
    """
    Draw names beside points, each at the place that overlaps least with other names, points and lines. In a small
    figure a name that would cover another one or leave the axes is left to the table.
    """
    if not points:
        return
    axes.figure.draw_without_rendering()  # places the axes
    inside, boxes = axes.get_window_extent(), []
    centers = [tuple(axes.transData.transform((x, y))) for x, y, _ in points]
    lines = [line.get_xydata() for line in axes.lines if line.get_linestyle() != "None" and len(line.get_xydata()) > 1]
    passed = [point for line in lines for point in _along(axes.transData.transform(line))]
    for (x, y, text), center in zip(points, centers, strict=True):
        if not text:
            continue

        def note(place, x=x, y=y, text=text):
            dx, dy, ha, va = place
            options = {"xytext": (dx, dy), "textcoords": "offset points", "ha": ha, "va": va, "fontsize": 10}
            return axes.annotate(_text(text), (x, y), **options)

        def trouble(place, center=center, note=note):
            shown = note(place)
            box = shown.get_window_extent()
            shown.remove()
            outside = box.x1 > inside.x1 or box.x0 < inside.x0 or box.y1 > inside.y1 or box.y0 < inside.y0
            names = sum(box.overlaps(other) for other in boxes)
            marks = sum(box.contains(*other) for other in centers if other != center)
            crossed = any(box.contains(*point) for point in passed)
            far = max(abs(place[0]), abs(place[1])) > 10
            return 8 * outside + 6 * names + 4 * marks + 2 * crossed + far

        best = min(SIDES, key=trouble)
        if small and trouble(best) >= 6:
            continue
        found = note(best)
        boxes.append(found.get_window_extent())


def _along(line: np.ndarray, step: float = 4.0) -> list[tuple[float, float]]:
    """Return points along a line, `step` pixels apart."""
    found = []
    for start, end in itertools.pairwise(line):
        count = max(1, int(np.hypot(*(end - start)) / step))
        found += [tuple(start + (end - start) * i / count) for i in range(count)]
    return found


# Where a name may stand, in points from its mark
SIDES = [
    (dx * far, dy * far, ha, va)
    for far in (1, 2.4)
    for dx, dy, ha, va in (
        (8, 0, "left", "center"),
        (0, 8, "center", "bottom"),
        (0, -8, "center", "top"),
        (-8, 0, "right", "center"),
        (7, 7, "left", "bottom"),
        (7, -7, "left", "top"),
        (-7, 7, "right", "bottom"),
        (-7, -7, "right", "top"),
    )
]


def _svg(draw: Callable, title: str, wide: bool, height: float | None = None) -> Drawing:
    """Return the figure twice: for a wide screen, and for a phone, where the letters would be too small to read."""
    sizes = [("large-screen", LARGE if wide else HALF), ("small-screen", SMALL)]
    drawing = Drawing("\n".join(_drawn(draw, title, (width, height or tall), name) for name, (width, tall) in sizes))
    drawing.draw, drawing.size, drawing.title = draw, (sizes[0][1][0], height or sizes[0][1][1]), title
    return drawing


def _drawn(draw: Callable, title: str, size: tuple[float, float], name: str) -> str:
    import io

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    settings: dict[Any, Any] = LITERAL | {
        "svg.fonttype": "none",  # letters stay text, in the page's font
        # Names of clip paths must differ between the figures of a page, and not between two runs
        "svg.hashsalt": hashlib.sha256(f"{title} {name}".encode(errors="replace")).hexdigest(),
    }
    with matplotlib.rc_context(settings):
        figure = _figure(draw, size, small=name == "small-screen")
        FigureCanvasSVG(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue(), title, name)


def _figure(draw: Callable, size: tuple[float, float], small: bool):
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": INK,
        "grid.alpha": 0.12,
        "grid.linewidth": 0.7,
        "legend.fontsize": 10,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.locator_params(axis="x", nbins=max(4, int(size[0] * 1.1)))
        draw(axes, small)
    return figure


def _inline(svg: str, title: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    svg = re.sub("<[^>]+>", _in_page_style, svg)  # not the texts between
    head, body = svg.split(">", 1)
    box = head[head.index('viewBox="') :].split('"')[1]
    label = html.escape(FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", title))
    head = f'<svg class="{name}" viewBox="{box}" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"{head}>{body.strip()}"


def _in_page_style(tag: re.Match) -> str:
    text = re.sub(r'<g id="[^"]*"', "<g", tag.group())  # `axes_1` would be there once a figure
    text = re.sub(r"font: [^;\"]*?(\d[\d.]*px)[^;\"]*;", r"font-size: \1;", text)
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    text = text.replace(INK, "currentColor")
    for i, color in enumerate(PALETTE):
        text = text.replace(color, f"var(--c{i}, {color})")
    return text
