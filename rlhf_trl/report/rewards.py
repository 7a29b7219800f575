"""What `stage=evaluate_reward` found, as a page and as the tables that it prints."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_trl.hints import count_of
from rlhf_trl.report import plots
from rlhf_trl.report.page import Code, Details, Figure, Gap, Page, Section, SideBySide, Table, Text
from rlhf_trl.report.plots import Series
from rlhf_trl.report.text import table

Quality = dict[str, Any]  # what `reward_quality.json` holds


def reward_page(quality: Quality, title: str, command: str) -> Page:
    """
    The page of an evaluation of rewards.

    Args:
        quality (`dict`): what `rlhf_trl.evaluation.rewards.measure` gives.
        title (`str`): of which run it is.
        command (`str`): how it was made.
    """
    sections = [
        Section("In short", [summary_table(quality), *_notes(quality)]),
        Section("Accuracy by slice", [_slices(quality), *_slice_figures(quality)]),
        Section("Calibration", _calibration(quality)),
        Section("Length", _length(quality)),
        Section("People's ratings", _ratings(quality)),
        Section("Best of n", _best_of_n(quality)),
        *_disagreement(quality),
        *_rewardbench(quality),
        Section("Surest mistakes", _mistakes(quality)),
        Section("How it was made", [Code(command)]),
    ]
    return Page(
        title=title,
        lead=_lead(quality),
        kicker="Evaluation of rewards",
        sections=sections,
        facts={
            "comparisons": f"{quality['comparisons']:,}",
            "completions": f"{quality['completions']:,}",
            "prompts": f"{quality['prompts']:,}",
        },
    )


def reward_text(quality: Quality) -> str:
    """The two main tables, for a terminal."""
    parts = [
        " of ".join(count_of(quality[f"{name}s"], name) for name in ("comparison", "completion", "prompt")),
        *quality["notes"],
    ]
    for one in (
        summary_table(quality),
        _slices(quality),
        *(block for each in _rewardbench(quality) for block in each.blocks),
    ):
        parts.append("\n" + table(one.headers, one.cells))
    return "\n".join(parts)


def _lead(quality: Quality) -> str:
    said = [
        f"{name} agrees with people on {_percent(entry['accuracy'])} of the comparisons"
        for name, entry in quality["rewards"].items()
    ]
    if quality["raters"]:
        said.append(f"one rater agrees with the others on {quality['raters']['one_rater']['accuracy']:.1%}")
    return "; ".join(said) + "."


def summary_table(quality: Quality) -> Table:
    """A row a reward: its accuracy and what else is one number, as it was measured or as it was read from the file."""
    headers = ["reward", "accuracy [95 %]", "like length", "ECE", "r length", "r ratings", "best of n", "no score"]
    rows = []
    for name, entry in quality["rewards"].items():
        ratings, best = entry["ratings"], entry.get("best_of_n", [])[-1:]
        rows.append(
            [
                name,
                _interval(entry["accuracy"]),
                _number(_slice_of(entry, "like length")["mean"]),
                _number(entry["calibration"]["ece"]),
                _number(entry["length"]["spearman"], "{:+.2f}"),
                _number(ratings and ratings["spearman"], "{:+.2f}"),
                f"{best[0]['gain']['mean']:+.2f} ({best[0]['n']})" if best and best[0]["n"] > 1 else "",
                entry["completions_without_score"] or "",
            ]
        )
    if quality["raters"]:
        one = quality["raters"]["one_rater"]
        rows.append(["(one rater)", _number(one["accuracy"]), "", "", "", _number(one["spearman"], "{:+.2f}"), "", ""])
    return Table(
        headers,
        rows,
        note="Accuracy: share of comparisons with the higher score on the completion that people prefer; like length: "
        "of those whose lengths are alike. ECE: expected calibration error. r: rank correlation. Best of n: gain in "
        "gold reward over one completion at the largest n, which is in brackets. No score: completions that got none, "
        "left out.",
    )


def _slices(quality: Quality) -> Table:
    names = list(quality["rewards"])
    slices = [part["slice"] for part in quality["rewards"][names[0]]["slices"]]
    rows = []
    for i, name in enumerate(slices):
        parts = [quality["rewards"][reward]["slices"][i] for reward in names]
        rows.append([name, f"{parts[0]['n']:,}", *(_interval(part["accuracy"]) for part in parts)])
    ranked = [quality["rewards"][reward]["top_one"] for reward in names]
    if ranked[0]["mean"] == ranked[0]["mean"]:
        rows.append(["best of a row of 3 or more", "", *map(_interval, ranked)])
    return Table(["comparisons", "number", *names], rows)


def _slice_figures(quality: Quality) -> list[Figure]:
    figures = []
    for reward, entry in quality["rewards"].items():
        parts = [{"slice": "all", "accuracy": entry["accuracy"]}] + [part for part in entry["slices"] if part["n"]]
        low, high = ([part["accuracy"][end] for part in parts] for end in ("low", "high"))
        svg = plots.bars(
            [part["slice"] for part in parts],
            [part["accuracy"]["mean"] for part in parts],
            low,
            high,
            title=f"accuracy of {reward} by slice",
            x_label="accuracy",
            middle=0.5,
            wide=True,
        )
        figures.append(Figure(svg, f"Accuracy of `{reward}` with 95 % intervals; one half is chance.", wide=True))
    return figures


def _calibration(quality: Quality) -> list:
    series = [Series("calibrated", [0.5, 1], [0.5, 1], hollow=True, color=7)]
    for i, (name, entry) in enumerate(quality["rewards"].items()):
        bins = entry["calibration"]["bins"]
        series.append(Series(name, [b["predicted"] for b in bins], [b["observed"] for b in bins], color=i))
    svg = plots.curves(series, "calibration", "predicted share of raters, sigmoid of the lead", "observed share")
    text = Text(
        "Each comparison from the side that the reward prefers: the share of raters that sigmoid of the difference of "
        "scores predicts, and the share that prefers that side. Below the line the reward is surer than people are. A "
        "reward that wasn't trained on comparisons has a scale of its own and needn't lie on it."
    )
    errors = ", ".join(f"{name} {entry['calibration']['ece']:.3f}" for name, entry in quality["rewards"].items())
    return [text, Figure(svg, f"Expected calibration error: {errors}.")]


def _length(quality: Quality) -> list:
    rows = [
        [
            name,
            _number(each["pearson"], "{:+.2f}"),
            _number(each["spearman"], "{:+.2f}"),
            _share(each["longer_preferred"]),
        ]
        for name, entry in quality["rewards"].items()
        for each in [entry["length"]]
    ]
    rows.append(["(people)", "", "", _share(quality["longer_preferred"])])
    headers = ["reward", "Pearson", "Spearman", "the longer one is preferred"]
    note = "Correlation of score and number of characters over all completions. A reward that prefers the longer one "
    note += "more often than people do has learned length."
    svg = _curves(quality, "length", "characters")
    return [Table(headers, rows, note=note), Figure(svg, "Score against length: median and quartiles of eight parts.")]


def _ratings(quality: Quality) -> list:
    if not any(entry["ratings"] for entry in quality["rewards"].values()):
        return [
            Gap("The data has no ratings. With `data/feedback=ratings` scores are held beside people's mean rating.")
        ]
    kinds = ("pearson", "spearman", "pearson_within_prompts")
    rows = [
        [name, *(_number(entry["ratings"][key], "{:+.2f}") for key in kinds), "", ""]
        for name, entry in quality["rewards"].items()
        if entry["ratings"]
    ]
    raters, note = quality["raters"], ""
    if raters:
        for name, words in (
            ("one_rater", "(one rater, the others)"),
            ("half", "(half of the raters, the other half)"),
        ):
            one = raters[name]
            whole = _number(one.get("spearman_brown"), "{:+.2f}")
            rows.append(
                [
                    words,
                    _number(one["pearson"], "{:+.2f}"),
                    _number(one["spearman"], "{:+.2f}"),
                    "",
                    whole,
                    _number(one["accuracy"]),
                ]
            )
        note = (
            f"The raters' own rows are of {raters['completions']:,} completions with {raters['raters']:.1f} raters on "
            f"average, and their accuracy of {raters['comparisons']:,} comparisons: how often they put two "
            "completions into the order of the others. All raters: the halves' correlation for as many raters as "
            "there are (Spearman and Brown)."
        )
    headers = ["with the mean rating", "Pearson", "Spearman", "within prompts", "all raters", "accuracy"]
    svg = _curves(quality, "ratings", "mean rating")
    return [
        Table(headers, rows, note=note),
        Figure(svg, "Score against mean rating: median and quartiles of eight parts."),
    ]


def _curves(quality: Quality, key: str, x_label: str) -> str:
    series = []
    for name, entry in quality["rewards"].items():
        curve = entry[key]["curve"] if entry[key] else []
        columns = [[point[end] for point in curve] for end in ("x", "y", "low", "high")]
        series.append(Series(name, *columns))
    return plots.curves(series, f"score against {x_label}", x_label, "score")


def _best_of_n(quality: Quality) -> list:
    found = {
        name: entry["best_of_n"] for name, entry in quality["rewards"].items() if len(entry.get("best_of_n", [])) > 1
    }
    if not found:
        return [
            Gap(
                "There is no gold reward, or no prompt with several completions. Give ratings, or name a reward that "
                "is the truth: `stage.gold=NAME`; `stage.policy=sft` lets a policy write the completions."
            )
        ]
    first = max(found.values(), key=len)
    series = [_gains(name, points) for name, points in found.items()]
    series.append(
        Series(
            "the best there is",
            [p["kl"] for p in first],
            [p["best_gain"]["mean"] for p in first],
            hollow=True,
            color=7,
        )
    )
    rows = [
        [point["n"], f"{point['kl']:.2f}", point["prompts"]]
        + [_interval(points[i]["gain"], "{:+.2f}") if i < len(points) else "" for points in found.values()]
        + [_interval(point["best_gain"], "{:+.2f}")]
        for i, point in enumerate(first)
    ]
    headers = ["n", "KL", "prompts", *found, "the best there is"]
    return [
        Text(
            "Of n completions of a prompt the one with the highest score is taken; the gain over one completion is in "
            f"{quality['gold']}, estimated over all subsets of n. Where a curve bends down the reward can be fooled."
        ),
        Figure(
            plots.curves(series, "best of n", "KL, log n - (n - 1) / n", "gain in gold reward"),
            "Gain of best-of-n with 95 % intervals, n from 1.",
        ),
        Table(headers, rows, note="KL to the policy that wrote the completions: log n - (n - 1) / n nats."),
    ]


def _gains(name: str, points: Sequence[dict]) -> Series:
    columns = [[point["gain"][end] for point in points] for end in ("mean", "low", "high")]
    low, high = ([m if end != end else end for m, end in zip(columns[0], side, strict=True)] for side in columns[1:])
    return Series(name, [point["kl"] for point in points], columns[0], low, high)


def _disagreement(quality: Quality) -> list[Section]:
    blocks = []
    for name, entry in quality["rewards"].items():
        if "disagreement" in entry:
            found = entry["disagreement"]
            rows = [[f"member {i}", "", _interval(each)] for i, each in enumerate(found["members"], 1)]
            words = ("least", "middle", "most")
            rows += [
                [f"{word} disagreement", f"{part['lead_std']:.2f}", _interval(part["accuracy"])]
                for word, part in zip(words, found["slices"], strict=False)
            ]
            caption = f"{name}: the members' scores of a completion have a standard deviation of {found['std']:.2f}."
            blocks.append(Table(["", "std of the lead", "accuracy [95 %]"], rows, caption))
    return [Section("Ensemble", blocks)] if blocks else []


def _rewardbench(quality: Quality) -> list[Section]:
    found = {name: entry["rewardbench"] for name, entry in quality["rewards"].items() if "rewardbench" in entry}
    if not found:
        return []
    first = next(iter(found.values()))
    rows = [
        [section, *(_share(each["sections"][section]) for each in found.values())] for section in first["sections"]
    ]
    rows.append(["Score", *(_share(each["score"]) for each in found.values())])
    missing = f"No comparisons of {', '.join(first['missing'])}: no score over all. " if first["missing"] else ""
    note = f"{missing}Sections as in RewardBench (arXiv 2403.13787); equal scores are no success there."
    return [Section("RewardBench", [Table(["section", *found], rows, note=note)])]


def _mistakes(quality: Quality) -> list:
    blocks = []
    for name, entry in quality["rewards"].items():
        samples = [
            SideBySide(
                one["prompt"],
                {
                    f"people prefer (score {one['scores'][0]:.2f})": one["preferred"],
                    f"`{name}` prefers (score {one['scores'][1]:.2f})".replace("`", ""): one["other"],
                },
            )
            for one in entry["mistakes"]
        ]
        if samples:
            blocks.append(Details(f"Where {name} is surest of what people don't prefer", samples))
    return blocks or [Text("There are none.")]


def _notes(quality: Quality) -> list:
    return [Gap(note + ".") for note in quality["notes"]]


def _slice_of(entry: dict, name: str) -> dict:
    return next(part["accuracy"] for part in entry["slices"] if part["slice"] == name)


def _interval(estimate: dict, form: str = "{:.3f}") -> str:
    mean, low, high = (np.nan if estimate[key] is None else estimate[key] for key in ("mean", "low", "high"))
    if mean != mean:
        return ""
    shown = form.format(mean)
    return shown if low != low else f"{shown} [{form.format(low)}, {form.format(high)}]"


def _percent(estimate: dict) -> str:
    mean, low, high = (np.nan if estimate[key] is None else estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:.1%}" + ("" if low != low else f" [{low:.1%}, {high:.1%}]")


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return "" if value is None or value != value else form.format(value)


def _share(value: float | None) -> str:
    return _number(value, "{:.1%}")
