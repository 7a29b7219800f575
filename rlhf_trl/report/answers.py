"""Blocks of a page that show what the policies wrote: rewards prompt by prompt, kinds of prompts, answers."""

import random

import numpy as np

from rlhf_trl.report import plots
from rlhf_trl.report.measures import among, is_rewarded, policy_colors
from rlhf_trl.report.page import Figure, SideBySide, Table, Text
from rlhf_trl.report.text import interval, with_rewards
from rlhf_trl.runs.results import Comparison, PromptSample

RANDOM_SHOWN, DIFFERENT_SHOWN = 5, 10
FEWEST = 20  # prompts of a kind on which a policy may be called worse


def distribution_blocks(comparison: Comparison) -> list:
    """Return histograms and quantiles of the rewards, where any counts."""
    if not is_rewarded(comparison):
        return []
    base, policies, colors = comparison.baseline, comparison.policies, policy_colors(comparison)
    rewards = {
        name: [value for sample in comparison.samples if (value := sample.rewards[name]) is not None]
        for name in policies
    }
    main = [name for name, result in policies.items() if (result.family or name) == name]
    blocks: list = [
        Figure(
            plots.histogram(
                {base: rewards[base], name: rewards[name]}, f"Rewards of {base} and {name}", "reward", colors=colors
            ),
            f"{base} and {name}; the upright lines are the means.",
        )
        for name in main
        if name != base and rewards[base] and rewards[name]
    ]
    rows = [
        [
            name,
            *(f"{value:.2f}" for value in np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])),
            f"{np.mean(values):.2f}",
        ]
        for name, values in rewards.items()
        if values
    ]
    return [
        *blocks,
        Table(["policy", "5 %", "25 %", "median", "75 %", "95 %", "mean"], rows, "Quantiles of the reward."),
    ]


def slice_blocks(comparison: Comparison) -> list:
    """Return the rewards by kind of prompt: a table for each column of the data that parts the prompts."""
    base, blocks = comparison.baseline, []
    enough = [part for part in comparison.slices if part.prompts >= FEWEST]
    count = sum(len(part.differences) for part in enough)
    for column in dict.fromkeys(part.column for part in comparison.slices):
        parts = [part for part in comparison.slices if part.column == column]
        rows = [
            [
                part.value,
                part.prompts,
                interval(part.rewards.get(base), "{:.2f}"),
                *(interval(part.differences.get(name), "{:+.2f}") for name in comparison.others),
            ]
            for part in parts
        ]
        headers = [column, "prompts", f"reward of {base} [95 %]", *(f"{name} - {base}" for name in comparison.others)]
        worse = [
            f"{name} on `{part.value}`"
            for part in parts
            if part in enough
            for name, found in part.differences.items()
            if among(found, count).high < 0
        ]
        note = (
            f"Worse than {base} beyond chance, one of {count} differences or not: {'; '.join(worse)}." if worse else ""
        )
        blocks.append(Table(headers, rows, f"Rewards by `{column}`, a column of the data.", note=note))
    return blocks


def answer_blocks(comparison: Comparison) -> list:
    """Return a few prompts drawn at random, then those on which the policies' rewards are furthest apart."""
    if not comparison.samples:
        return []
    # The same ones whenever the page is made again
    drawn = random.Random(comparison.seed or 0).sample(
        range(len(comparison.samples)), min(RANDOM_SHOWN, len(comparison.samples))
    )
    values = [value for sample in comparison.samples for value in sample.rewards.values()]
    rewarded = is_rewarded(comparison) and any(value is not None for value in values)
    brackets = " Rewards are in brackets." if rewarded else ""
    blocks: list = [Text(f"{len(drawn)} prompts drawn at random.{brackets}")]
    blocks += [_side_by_side(comparison.samples[place]) for place in sorted(drawn)]
    differing = [
        sample
        for place, sample in enumerate(comparison.samples)
        if place not in drawn and len(set(sample.completions.values())) > 1
    ]
    if not differing:
        return [*blocks, Text("To the other prompts all policies gave the same answer.")]
    if not rewarded:
        shown = differing[:DIFFERENT_SHOWN]
        return [*blocks, Text(f"Of the others {len(shown)} with different answers."), *map(_side_by_side, shown)]
    shown = sorted(differing, key=_spread, reverse=True)[:DIFFERENT_SHOWN]
    return [
        *blocks,
        Text(f"Of the others the {len(shown)} on which the policies' rewards are furthest apart."),
        *(_side_by_side(sample, f"rewards differ by {_spread(sample):.2f}") for sample in shown),
    ]


def _spread(sample: PromptSample) -> float:
    values = [value for value in sample.rewards.values() if value is not None]
    return max(values) - min(values) if values else 0.0


def _side_by_side(sample: PromptSample, note: str = "") -> SideBySide:
    return SideBySide(sample.prompt, with_rewards(sample), note=note, images=sample.images or ())
