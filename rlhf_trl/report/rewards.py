"""Page and tables of an evaluation of rewards (`stage=evaluate_reward`)."""

import math
import textwrap
from collections.abc import Mapping, Sequence

from rlhf_trl.hints import count_of
from rlhf_trl.report import plots
from rlhf_trl.report.page import Code, Details, Figure, Missing, Page, Section, SideBySide, Table, Text
from rlhf_trl.report.plots import Drawing, Series
from rlhf_trl.report.reward_reading import reading
from rlhf_trl.report.text import WIDTH, interval, number, table
from rlhf_trl.runs.reward_results import BestOfNGain, LengthBias, RatingCorrelation, RewardQuality


def reward_page(quality: RewardQuality, title: str, command: str) -> Page:
    """
    Return the page of an evaluation of rewards.

    Args:
        quality (`RewardQuality`): the results.
        title (`str`): title of the page.
        command (`str`): command line of the run.
    """
    sections = [
        Section("In short", [summary_table(quality), *_readings(quality), *_notes(quality)]),
        Section("Accuracy by slice", [_slices(quality), *_slice_figures(quality)]),
        Section("Reliability", _reliability(quality)),
        *_border(quality),
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
        lead=_summary(quality),
        kicker="Evaluation of rewards",
        sections=sections,
        facts={
            "comparisons": f"{quality.comparisons:,}",
            "completions": f"{quality.completions:,}",
            "prompts": f"{quality.prompts:,}",
        },
    )


def reward_text(quality: RewardQuality) -> str:
    """Return the two main tables and what they mean, for a terminal."""
    parts = [
        f"{count_of(quality.comparisons, 'comparison')} of {count_of(quality.completions, 'completion')} of "
        f"{count_of(quality.prompts, 'prompt')}",
        *quality.notes,
    ]
    for one in (
        summary_table(quality),
        _slices(quality),
        *(block for each in [*_border(quality), *_rewardbench(quality)] for block in each.blocks),
    ):
        parts.append("\n" + table(one.headers, one.cells))
    parts += ["", *(textwrap.fill(text.text.replace("`", ""), WIDTH) for text in _readings(quality))]
    return "\n".join(parts)


def _summary(quality: RewardQuality) -> str:
    said = [
        f"{name} agrees with people on {interval(entry.accuracy, '{:.1%}')} of the comparisons"
        for name, entry in quality.rewards.items()
    ]
    if quality.raters:
        said.append(f"one rater agrees with the others on {quality.raters.one_rater.accuracy:.1%}")
    return "; ".join(said) + "."


def summary_table(quality: RewardQuality) -> Table:
    """Return one row per reward: its accuracy, and the other measures that are one number."""
    headers = ["reward", "accuracy [95 %]", "like length", "ECE", "r length", "r ratings", "best of n", "no score"]
    rows = []
    for name, entry in quality.rewards.items():
        ratings, best = entry.ratings, (entry.best_of_n or [])[-1:]
        rows.append(
            [
                name,
                interval(entry.accuracy),
                number(entry.slice("like length").accuracy.mean),
                number(entry.reliability.ece),
                number(entry.length.spearman, "{:+.2f}"),
                number(ratings and ratings.spearman, "{:+.2f}"),
                f"{best[0].gain.mean:+.2f} ({best[0].n})" if best and best[0].n > 1 else "",
                entry.completions_without_score or "",
            ]
        )
    if quality.raters:
        one = quality.raters.one_rater
        rows.append(["(one rater)", number(one.accuracy), "", "", "", number(one.spearman, "{:+.2f}"), "", ""])
    note = (
        "Accuracy: share of comparisons with the higher score on the completion that people prefer; like length: "
        "of those whose lengths are alike. ECE: expected calibration error. r: rank correlation. Best of n: gain in "
        "gold reward over one completion at the largest n, which is in brackets."
    )
    if not any(row[-1] for row in rows):
        return Table(headers[:-1], [row[:-1] for row in rows], note=note)
    return Table(headers, rows, note=f"{note} No score: completions that got none, dropped.")


def _readings(quality: RewardQuality) -> list[Text]:
    """Return what the figures mean, a paragraph per sentence."""
    several = len(quality.rewards) > 1
    return [
        Text(f"`{name}`: {sentence}" if several else sentence)
        for name in quality.rewards
        for sentence in reading(quality, name)
    ]


def _slices(quality: RewardQuality) -> Table:
    results = list(quality.rewards.values())
    rows = [
        [parts[0].name, f"{parts[0].n:,}", *(interval(part.accuracy) for part in parts)]
        for parts in zip(*(result.slices for result in results), strict=True)
    ]
    if number(results[0].top_one.mean):
        rows.append(["best of a row of 3 or more", "", *(interval(result.top_one) for result in results)])
    return Table(["comparisons", "number", *quality.rewards], rows)


def _slice_figures(quality: RewardQuality) -> list[Figure]:
    figures = []
    for reward, entry in quality.rewards.items():
        parts = {"all": entry.accuracy} | {part.name: part.accuracy for part in entry.slices if part.n}
        svg = plots.bars(
            list(parts),
            [accuracy.mean for accuracy in parts.values()],
            [accuracy.low for accuracy in parts.values()],
            [accuracy.high for accuracy in parts.values()],
            title=f"accuracy of {reward} by slice",
            x_label="accuracy",
            middle=0.5,
            wide=True,
        )
        figures.append(Figure(svg, f"Accuracy of `{reward}` with 95 % intervals; one half is chance.", wide=True))
    return figures


def _reliability(quality: RewardQuality) -> list:
    series = [Series("perfect reliability", [0.5, 1], [0.5, 1], hollow=True, color=7)]
    for i, (name, entry) in enumerate(quality.rewards.items()):
        bins = entry.reliability.bins
        series.append(Series(name, [b.predicted for b in bins], [b.observed for b in bins], color=i))
    svg = plots.curves(series, "reliability", "predicted share of raters, sigmoid of the margin", "observed share")
    text = Text(
        "Each comparison from the side that the reward prefers: the share of raters that sigmoid of the difference of "
        "scores predicts, and the share that prefers that side. Below the line the reward is surer than people are. A "
        "reward that wasn't trained on comparisons has a scale of its own and needn't lie on it."
    )
    errors = ", ".join(f"{name} {entry.reliability.ece:.3f}" for name, entry in quality.rewards.items())
    return [text, Figure(svg, f"Expected calibration error: {errors}.")]


def _border(quality: RewardQuality) -> list[Section]:
    found = {name: entry.border for name, entry in quality.rewards.items() if entry.border}
    rows = [
        [name, f"{each.completions:,}", f"{each.safe:.0%}", interval(each.accuracy), number(each.ece)]
        for name, each in found.items()
    ]
    headers = ["border", "completions", "safe", "right side of 0 [95 %]", "ECE"]
    note = "Of completions with a label: a cost model's score is above 0 where a completion is safe. ECE: calibration "
    note += "error of sigmoid(score) as the probability of being safe. The zero of another reward means nothing."
    return [Section("Border between safe and unsafe", [Table(headers, rows, note=note)])] if found else []


def _length(quality: RewardQuality) -> list:
    rows = [
        [
            name,
            number(entry.length.pearson, "{:+.2f}"),
            number(entry.length.spearman, "{:+.2f}"),
            _share(entry.length.longer_preferred),
        ]
        for name, entry in quality.rewards.items()
    ]
    rows.append(["(people)", "", "", _share(quality.longer_preferred)])
    headers = ["reward", "Pearson", "Spearman", "the longer one is preferred"]
    note = "Correlation of score and number of characters over all completions. A reward that prefers the longer one "
    note += "more often than people do has learned length."
    svg = _curves("characters", {name: entry.length for name, entry in quality.rewards.items()})
    return [
        Table(headers, rows, note=note),
        Figure(svg, "Score against length: median and quartiles of up to eight parts."),
    ]


def _ratings(quality: RewardQuality) -> list:
    rows = [
        [
            name,
            *(number(value, "{:+.2f}") for value in (rated.pearson, rated.spearman, rated.pearson_within_prompts)),
            "",
            "",
        ]
        for name, entry in quality.rewards.items()
        if (rated := entry.ratings)
    ]
    if not rows:
        return [
            Missing(
                "The data has no ratings. With `data/feedback=ratings` scores are held beside people's mean rating."
            )
        ]
    note = ""
    if raters := quality.raters:
        for words, one, all_raters in (
            ("(one rater, the others)", raters.one_rater, None),
            ("(half of the raters, the other half)", raters.half, raters.half.spearman_brown),
        ):
            correlations = [number(value, "{:+.2f}") for value in (one.pearson, one.spearman)]
            rows.append([words, *correlations, "", number(all_raters, "{:+.2f}"), number(one.accuracy)])
        note = (
            f"The raters' own rows are of {raters.completions:,} completions with {raters.raters:.1f} raters on "
            f"average, and their accuracy of {raters.comparisons:,} comparisons: how often they put two "
            "completions into the order of the others. All raters: the halves' correlation for as many raters as "
            "there are (Spearman and Brown)."
        )
    headers = ["with the mean rating", "Pearson", "Spearman", "within prompts", "all raters", "accuracy"]
    svg = _curves("mean rating", {name: entry.ratings for name, entry in quality.rewards.items()})
    return [
        Table(headers, rows, note=note),
        Figure(svg, "Score against mean rating: median and quartiles of up to eight parts."),
    ]


def _curves(x_label: str, measured: Mapping[str, LengthBias | RatingCorrelation | None]) -> Drawing:
    series = []
    for name, each in measured.items():
        points = each.curve if each else []
        low, high = [point.low for point in points], [point.high for point in points]
        series.append(Series(name, [point.x for point in points], [point.y for point in points], low, high))
    return plots.curves(series, f"score against {x_label}", x_label, "score")


def _best_of_n(quality: RewardQuality) -> list:
    found = {name: points for name, entry in quality.rewards.items() if len(points := entry.best_of_n or []) > 1}
    if not found:
        return [
            Missing(
                "There is no gold reward, or no prompt with several completions. Give ratings, or name a reward that "
                "is the truth: `stage.gold=NAME`; `stage.policy=sft` lets a policy write the completions."
            )
        ]
    first = max(found.values(), key=len)
    series = [_gains(name, points) for name, points in found.items()]
    best = [point.best_gain.mean for point in first]
    series.append(Series("the best there is", [point.kl for point in first], best, hollow=True, color=7))
    rows = [
        [point.n, f"{point.kl:.2f}", point.prompts]
        + [interval(points[i].gain, "{:+.2f}") if i < len(points) else "" for points in found.values()]
        + [interval(point.best_gain, "{:+.2f}")]
        for i, point in enumerate(first)
    ]
    headers = ["n", "KL", "prompts", *found, "the best there is"]
    return [
        Text(
            "Of n completions of a prompt the one with the highest score is taken; the gain over one completion is in "
            f"{quality.gold}, estimated over all subsets of n. Where a curve bends down the reward can be fooled."
        ),
        Figure(
            plots.curves(series, "best of n", "KL, log n - (n - 1) / n", "gain in gold reward"),
            "Gain of best-of-n with 95 % intervals, n from 1.",
        ),
        Table(headers, rows, note="KL to the policy that wrote the completions: log n - (n - 1) / n nats."),
    ]


def _gains(name: str, points: Sequence[BestOfNGain]) -> Series:
    means = [point.gain.mean for point in points]
    # Of a single prompt there is no interval
    low, high = (
        [mean if math.isnan(end) else end for mean, end in zip(means, ends, strict=True)]
        for ends in zip(*((point.gain.low, point.gain.high) for point in points), strict=True)
    )
    return Series(name, [point.kl for point in points], means, low, high)


def _disagreement(quality: RewardQuality) -> list[Section]:
    blocks = []
    for name, entry in quality.rewards.items():
        if found := entry.disagreement:
            rows = [[f"member {i}", "", interval(accuracy)] for i, accuracy in enumerate(found.members, 1)]
            rows += [
                [f"{word} disagreement", f"{part.margin_std:.2f}", interval(part.accuracy)]
                for word, part in zip(("least", "middle", "most"), found.slices, strict=False)
            ]
            caption = f"{name}: the members' scores of a completion have a standard deviation of {found.std:.2f}."
            blocks.append(Table(["", "std of the margin", "accuracy [95 %]"], rows, caption))
    return [Section("Ensemble", blocks)] if blocks else []


def _rewardbench(quality: RewardQuality) -> list[Section]:
    found = {name: entry.rewardbench for name, entry in quality.rewards.items() if entry.rewardbench}
    if not found:
        return []
    first = next(iter(found.values()))
    rows = [[section, *(_share(each.sections[section]) for each in found.values())] for section in first.sections]
    rows.append(["Score", *(_share(each.score) for each in found.values())])
    missing = f"No comparisons of {', '.join(first.missing)}: no score over all. " if first.missing else ""
    note = f"{missing}Sections as in RewardBench (arXiv 2403.13787); equal scores are no success there."
    return [Section("RewardBench", [Table(["section", *found], rows, note=note)])]


def _mistakes(quality: RewardQuality) -> list:
    blocks = []
    for name, entry in quality.rewards.items():
        samples = [
            SideBySide(
                one.prompt,
                {
                    f"people prefer (score {one.scores[0]:.2f})": one.preferred,
                    f"`{name}` prefers (score {one.scores[1]:.2f})".replace("`", ""): one.other,
                },
                images=one.images or (),
            )
            for one in entry.mistakes
        ]
        if samples:
            blocks.append(Details(f"Where {name} is surest of what people don't prefer", samples))
    return blocks or [Text("There are none.")]


def _notes(quality: RewardQuality) -> list:
    return [Missing(note + ".") for note in quality.notes]


def _share(value: float | None) -> str:
    return number(value, "{:.1%}")
