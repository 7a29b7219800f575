"""
Rounds of a loop (`pipeline=iterated`): a table and a figure of what each one gained.

A round is known by the numbers that end the names of its runs: `label_2`, `quality_2`, `compare_2`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_trl.report import plots
from rlhf_trl.report.page import Figure, Table
from rlhf_trl.report.plots import Series
from rlhf_trl.report.records import Run
from rlhf_trl.report.text import interval, number
from rlhf_trl.runs.record import read_comparison, read_quality
from rlhf_trl.runs.results import Comparison, PolicyResult
from rlhf_trl.runs.reward_results import RewardQuality

NUMBERED = re.compile(r"(.+)_(\d+)")
# The reward model before a refresh, in an evaluation of rewards
BEFORE = "before"


@dataclass(frozen=True)
class Round:
    """
    Measures of the runs of a round; `None` where one is missing.

    Attributes:
        number: from 1 on.
        comparison: of the policies so far, the one of this round among them.
        quality: of the round's reward model and, under the name `before`, of the one before it.
        labels: `metrics.json` of the labeling, and the name of its run.
    """

    number: int
    comparison: Comparison | None = None
    quality: RewardQuality | None = None
    labels: Mapping[str, float] | None = None
    labeled_by: str | None = None

    @property
    def policy(self) -> PolicyResult | None:
        """The policy of this round, by the number at the end of its name."""
        policies = self.comparison.policies if self.comparison else {}
        return next((result for name, result in policies.items() if number_of(name) == self.number), None)

    def accuracy(self, when: str, run: str | None) -> float | None:
        """
        Return the accuracy of the reward model `before` or `after` the refresh, on the labels of a run; on all where
        there are those of one run only.
        """
        rewards = self.quality.rewards if self.quality else {}
        result = next((each for name, each in rewards.items() if (name == BEFORE) == (when == BEFORE)), None)
        if result is None:
            return None
        found = {part.name: part.accuracy.mean for part in result.slices if part.n}
        return found.get(
            f"run: {run}", None if any(name.startswith("run: ") for name in found) else result.accuracy.mean
        )


def number_of(name: str) -> int | None:
    """Return the number at the end of a name, `None` where there is none."""
    match = NUMBERED.fullmatch(name)
    return int(match.group(2)) if match else None


def rounds_of(runs: Sequence[Run]) -> list[Round]:
    """Return the rounds of a project, in order; none where no labeling belongs to one."""
    found: dict[int, dict] = {}
    for run in runs:
        number, stage = number_of(run.name), run.record.stage
        if number is None or number < 1:
            continue
        values = found.setdefault(number, {})
        if stage == "evaluate":
            values["comparison"] = read_comparison(run.folder)
        elif stage == "evaluate_reward":
            values["quality"] = read_quality(run.folder)
        elif stage == "label":
            values |= {"labels": (run.metrics or {}).get("eval"), "labeled_by": run.name}
    rounds = [Round(number, **values) for number, values in sorted(found.items())]
    return rounds if any(each.labeled_by for each in rounds) else []


def round_blocks(runs: Sequence[Run]) -> list:
    """Return the table and the figure of the rounds of a project; nothing where it has none."""
    rounds = rounds_of(runs)
    if not rounds:
        return []
    first = rounds[0].labeled_by
    proxies = [_proxy(each.policy, each.comparison) for each in rounds]
    rows = [
        [
            each.number,
            interval(each.policy.reward) if each.policy else "",
            number(proxy),
            number(each.policy and each.policy.kl and each.policy.kl.mean),
            number(each.accuracy(BEFORE, each.labeled_by)),
            number(each.accuracy("after", each.labeled_by)),
            number(each.accuracy(BEFORE, first)),
            number(each.accuracy("after", first)),
            number((each.labels or {}).get("eval_labels"), "{:,.0f}"),
            number((each.labels or {}).get("eval_alpha"), "{:.2f}"),
        ]
        for each, proxy in zip(rounds, proxies, strict=True)
    ]
    headers = [
        "round",
        "reward [95 %]",
        "proxy",
        "KL",
        "before",
        "after",
        "1st: before",
        "1st: after",
        "labels",
        "alpha",
    ]
    note = (
        "Reward: of the round's policy, by the reward that counts in the comparison; proxy: by the reward model that "
        "it was trained on. KL: to the baseline, nats per completion. Before, after: accuracy of the "
        "reward model before and after the round's refresh, on the held-out labels of the round and of the first one. "
        "Alpha: Krippendorff's, of the labelers."
    )
    numbers = [float(each.number) for each in rounds]
    rewards = [each.policy.reward if each.policy else None for each in rounds]
    kl = [each.policy.kl.mean if each.policy and each.policy.kl else None for each in rounds]
    accuracies = {when: [each.accuracy(when, each.labeled_by) for each in rounds] for when in (BEFORE, "after")}
    series = [
        Series(f"accuracy {when} the refresh", numbers, values, color=2, hollow=when == BEFORE)
        for when, values in accuracies.items()
        if any(value is not None for value in values)
    ]
    if any(reward is not None for reward in rewards):
        means = [reward.mean if reward else None for reward in rewards]
        lows, highs = ([getattr(r, end) if r else None for r in rewards] for end in ("low", "high"))
        series.insert(0, Series("reward", numbers, means, lows, highs, color=0))
    if any(value is not None for value in kl):
        series.append(Series("KL to the baseline", numbers, kl, color=3))
    figure = plots.curves(series, "rounds", "round", "", wide=True)
    caption = (
        "Reward of the policy, its KL, and the accuracy of the reward model on the labels of each round. Before its "
        "refresh a reward model hasn't seen such completions; the gap to the line after it is what the labels brought."
    )
    return [
        Table(headers, rows, "What each round gained.", note=note),
        *([Figure(figure, caption, wide=True)] if series else []),
    ]


def _proxy(policy: PolicyResult | None, comparison: Comparison | None) -> float | None:
    """Return a policy's mean of the reward that doesn't count in a comparison, its proxy."""
    if policy is None or comparison is None:
        return None
    idle = [name for name, weight in comparison.weights.items() if weight == 0]
    return policy.rewards.get(idle[0]) if idle else None
