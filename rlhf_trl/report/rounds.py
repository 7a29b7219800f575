"""
Rounds of a loop (`pipeline=iterated`): a table and a figure of what each one gained.

A round is known by the numbers that end the names of its runs: `label_2`, `quality_2`, `compare_2`. Of the policies of
a comparison whose names end in the number of a round, `control_2` is a control and the other one the round's.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rlhf_trl.report import plots
from rlhf_trl.report.page import Figure, Table
from rlhf_trl.report.plots import Series
from rlhf_trl.report.records import Run
from rlhf_trl.report.text import interval, number
from rlhf_trl.runs.record import read_comparison, read_promotions, read_quality, read_rounds
from rlhf_trl.runs.results import Comparison, PolicyResult, Promotion
from rlhf_trl.runs.reward_results import RewardQuality, RewardResult, SliceAccuracy

NUMBERED = re.compile(r"(.+)_(\d+)")
# The reward model before a refresh, in an evaluation of rewards
BEFORE, AFTER = "before", "after"
# In `metrics.json` of `stage=collect`
THUMBS = "eval_thumbs_of_users"
# A policy beside the round's, such as one of random completions beside one of the best
CONTROL = "control"


@dataclass(frozen=True)
class Round:
    """
    Measures of the runs of a round; `None` where one is missing.

    Attributes:
        number: from 1 on.
        comparison: of the policies so far, the one of this round among them.
        quality: of the round's reward model and, under the name `before`, of the one before it.
        labels: `metrics.json` of the labeling, and the name of its run.
        thumbs: number of users' thumbs that were collected.
        promotion: whether its policy became the current one.
    """

    number: int
    comparison: Comparison | None = None
    quality: RewardQuality | None = None
    labels: Mapping[str, float] | None = None
    labeled_by: str | None = None
    thumbs: float | None = None
    promotion: Promotion | None = None

    @property
    def policy(self) -> PolicyResult | None:
        """The policy of this round, by the number at the end of its name."""
        return next((result for name, result in self._policies() if not name.startswith(CONTROL)), None)

    @property
    def control(self) -> PolicyResult | None:
        """The control of this round."""
        return next((result for name, result in self._policies() if name.startswith(CONTROL)), None)

    def _policies(self) -> list[tuple[str, PolicyResult]]:
        policies = self.comparison.policies if self.comparison else {}
        return [(name, result) for name, result in policies.items() if number_of(name) == self.number]

    def reward(self, when: str) -> RewardResult | None:
        """Return the evaluation of the reward model before or after the refresh."""
        rewards = self.quality.rewards if self.quality else {}
        return next((each for name, each in rewards.items() if (name == BEFORE) == (when == BEFORE)), None)

    def accuracy(self, when: str, run: str | None) -> float | None:
        """
        Return the accuracy of the reward model before or after the refresh, on the labels of a run; on all where there
        are those of one run only.
        """
        if (result := self.reward(when)) is None:
            return None
        return self._of_run(result, run, result.accuracy.mean, lambda part: part.accuracy.mean)

    def ece(self, when: str, run: str | None) -> float | None:
        """Return the expected calibration error of the reward model before or after the refresh, likewise."""
        if (result := self.reward(when)) is None:
            return None
        return self._of_run(result, run, result.reliability.ece, lambda part: part.ece)

    @staticmethod
    def _of_run(
        result: RewardResult, run: str | None, whole: float, value: Callable[[SliceAccuracy], float | None]
    ) -> float | None:
        found = {part.name: value(part) for part in result.slices if part.n}
        return found.get(f"run: {run}", None if any(name.startswith("run: ") for name in found) else whole)


def number_of(name: str) -> int | None:
    """Return the number at the end of a name, `None` where there is none."""
    match = NUMBERED.fullmatch(name)
    return int(match.group(2)) if match else None


def rounds_of(runs: Sequence[Run]) -> list[Round]:
    """Return the rounds of a project, in order; none where no labeling and no thumbs of users belong to one."""
    found: dict[int, dict] = {}
    promotions = read_promotions(runs[0].folder.parent) if runs else None
    decided = {each.round: each for each in promotions.rounds} if promotions else {}
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
        elif stage == "collect":
            values["thumbs"] = ((run.metrics or {}).get("eval") or {}).get(THUMBS)
    rounds = [Round(number, **values, promotion=decided.get(number)) for number, values in sorted(found.items())]
    return rounds if any(each.labeled_by or each.thumbs for each in rounds) else []


def round_blocks(runs: Sequence[Run]) -> list:
    """Return the table and the figure of the rounds of a project; nothing where it has none."""
    rounds, early = rounds_of(runs), read_rounds(runs[0].folder.parent) if runs else None
    if not rounds and early:  # of a pipeline that labels nothing
        rows = [[name, number(value)] for name, value in early.values.items()]
        return [Table(["round", early.metric], rows, "What each round measured.", note=early.in_words)]
    if not rounds:
        return []
    first = next((each.labeled_by for each in rounds if each.labeled_by), None)
    promoted = [each.number for each in rounds if each.promotion and each.promotion.is_promoted]
    marks = {early.best: " (best)"} if early else {promoted[-1]: " (current)"} if promoted else {}
    columns: dict[str, list[str]] = {
        "round": [f"{each.number}{marks.get(each.number, '')}" for each in rounds],
        "reward [95 %]": [_interval(each.policy) for each in rounds],
        "win rate [95 %]": [interval(each.policy.win_rate) if each.policy else "" for each in rounds],
        "control [95 %]": [_interval(each.control) for each in rounds],
        "proxy": [number(_proxy(each.policy, each.comparison)) for each in rounds],
        "KL": [number(each.policy and each.policy.kl and each.policy.kl.mean) for each in rounds],
    }
    for title, run_of in (("", lambda each: each.labeled_by), ("1st: ", lambda each: first)):
        for when in (BEFORE, AFTER):
            columns[f"{title}{when}"] = [number(each.accuracy(when, run_of(each))) for each in rounds]
    for when in (BEFORE, AFTER):
        columns[f"ECE {when}"] = [number(each.ece(when, each.labeled_by)) for each in rounds]
    columns["labels"] = [number((each.labels or {}).get("eval_labels"), "{:,.0f}") for each in rounds]
    columns["alpha"] = [number((each.labels or {}).get("eval_alpha"), "{:.2f}") for each in rounds]
    columns["thumbs"] = [number(each.thumbs, "{:,.0f}") for each in rounds]
    notes = {
        "reward [95 %]": "Reward: of the round's policy, by the reward that counts in the comparison.",
        "win rate [95 %]": "Win rate: by the judge, against the baseline.",
        "proxy": "Proxy: by the reward model that it was trained on.",
        "KL": "KL: to the baseline, nats per completion.",
        BEFORE: "Before, after: accuracy of the reward model before and after the round's refresh, on the held-out "
        "labels of the round and of the first one. ECE: its expected calibration error on those of the round.",
        "alpha": "Alpha: Krippendorff's, of the labelers.",
        "control [95 %]": "Control: as many random completions in place of the best.",
        "thumbs": "Thumbs: those of users that no earlier round has used.",
    }
    # A judge may read the reward, so that one of both says enough
    wins = any(columns["win rate [95 %]"]) and not any(columns["reward [95 %]"])
    del columns["reward [95 %]" if wins else "win rate [95 %]"]
    always = () if first is None else {*columns} - {"control [95 %]", "thumbs"}
    columns = {title: cells for title, cells in columns.items() if title in always or any(cells)}
    sentences = [text for title, text in notes.items() if title in columns]
    note = " ".join([*sentences, *(each.in_words for each in (early, rounds[-1].promotion) if each)])
    rows = [list(cells) for cells in zip(*columns.values(), strict=True)]
    numbers = [float(each.number) for each in rounds]
    measured = [(each.policy.win_rate if wins else each.policy.reward) if each.policy else None for each in rounds]
    kl = [each.policy.kl.mean if each.policy and each.policy.kl else None for each in rounds]
    accuracies = {when: [each.accuracy(when, each.labeled_by) for each in rounds] for when in (BEFORE, AFTER)}
    kept = {when: values for when, values in accuracies.items() if any(value is not None for value in values)}
    series, said = [], []
    if any(each is not None for each in measured):
        means = [each.mean if each else None for each in measured]
        lows, highs = ([getattr(each, end) if each else None for each in measured] for end in ("low", "high"))
        series.append(Series("win rate" if wins else "reward", numbers, means, lows, highs, color=0))
        said.append(f"{'Win rate' if wins else 'Reward'} of the policy of each round.")
    series += [
        Series(f"accuracy {when} the refresh", numbers, values, color=2, hollow=when == BEFORE)
        for when, values in kept.items()
    ]
    if kept:
        said.append(f"Accuracy of the reward model on the labels of each round, {' and '.join(kept)} its refresh.")
    if len(kept) > 1:
        said.append(
            "Before it a reward model hasn't seen such completions; the gap to the line after it is what the labels "
            "brought."
        )
    if any(value is not None for value in kl):
        series.append(Series("KL to the baseline", numbers, kl, color=3))
        said.append("KL of the policy to the baseline, nats per completion.")
    figure = plots.curves(series, "rounds", "round", "", wide=True)
    return [
        Table(list(columns), rows, "What each round gained.", note=note),
        *([Figure(figure, " ".join(said), wide=True)] if series else []),
    ]


def _interval(policy: PolicyResult | None) -> str:
    return interval(policy.reward) if policy else ""


def _proxy(policy: PolicyResult | None, comparison: Comparison | None) -> float | None:
    """Return a policy's mean of the reward that doesn't count in a comparison, its proxy."""
    if policy is None or comparison is None:
        return None
    idle = [name for name, weight in comparison.weights.items() if weight == 0]
    return policy.rewards.get(idle[0]) if idle else None
