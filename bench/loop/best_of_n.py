"""
Refreshed against static reward models, with policies that are the best of n completions of the first policy.

The static reward model has all its labels of pairs of the first policy's completions. The refreshed one has as many:
those of the first round are the same. Each of a later round compares two completions of the policy of the round
before, which is the best of n by the reward model of then. All reward models of a seed start from one network and take
as many steps. At the end both reward models have as many labels, and the gold rewards of the best of n by them are
compared at equal KL to the first policy. The accuracies on the policies' own completions stand beside those of the
labeler, and of reward models all of whose labels are of these.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from random import Random
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from bench.loop.best_of import Pool, Scorer, accuracy, best_shares, differences, gold_path, labeler_accuracy
from bench.loop.results import at_kl, compare_paths, interval, markdown
from bench.loop.steps import Steps
from bench.overoptimization.samples import Pair, Sample, Sizes, make, read, samples_file
from bench.overoptimization.training import Members, reward_model, start

ARMS = ("static", "refreshed")


@dataclass(frozen=True)
class Setting:
    """
    Sizes of the comparison.

    Attributes:
        labels: of each round.
        noise: of the answers, see `conf/labeler/gold.yaml`.
        steps, batch, rate: of a reward model: optimizer steps, pairs of each, learning rate.
        own: share of the later labels with both completions by the policy, see [`labels`].
        counts: the n of the policy after each round; the first round labels the first policy.
        measured: the n that are measured.
        sizes: prompts of labels and completions of each, and held-out ones; the same for all seeds.
    """

    sizes: Sizes
    labels: int = 1024
    noise: float = 0.5
    steps: int = 250
    batch: int = 32
    rate: float = 1e-3
    own: float = 1.0
    counts: tuple[int, ...] = (16, 16, 64)
    measured: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


FULL = Setting(Sizes(compared=1024, drawn=64, prompts=32, samples=512))
QUICK = Setting(
    Sizes(compared=64, drawn=5, prompts=4, samples=16), labels=16, steps=2, counts=(2, 4), measured=(1, 2, 4)
)
PASSES = 20  # over the prompts, to draw the pairs of a round
GROUPED = 25  # batches whose pairs are sorted by length
ORDER = {"train_sampling_strategy": "sequential"}  # that of `ordered`


def measure(steps: Steps, setting: Setting) -> dict[str, Any]:
    """
    Run a seed.

    Returns:
        `dict[str, Any]`: for each arm `path`, (KL, gold reward) of the best of each n by its last reward model, and by
        round from the first policy on, of pairs of the policy's own completions: `accuracy` of the reward model, of
        the refreshed one after the refresh with labels of this policy and `before` it; `equal`, the same with the
        differences of gold reward of the first policy's pairs; `labeler`, the accuracy of the answers. `ceiling` is
        the accuracy of a reward model all of whose labels are of such pairs, as many and with as many steps, and
        `another` that of a first reward model with other labels and another start.
    """
    path = samples_file(steps.folder, setting.sizes)
    seed = int(steps.every[0].removeprefix("seed="))
    return steps.compute("best_of_n", functools.partial(_run, setting, path, seed))


def _run(setting: Setting, path, seed: int) -> dict[str, Any]:
    make(path, setting.sizes)
    return run(setting, read(path), seed)


def run(setting: Setting, samples: Mapping[str, list[list[Sample]]], seed: int) -> dict[str, Any]:
    """Return what [`measure`] does, from completions of the first policy."""
    asked, pool, head = samples["compared"], samples["best_of_n"], start(seed)
    rounds = len(setting.counts)

    def train(pairs: Sequence[Pair], first: PreTrainedModel = head) -> Scorer:
        rows = ordered(pairs, setting.steps, setting.batch, seed)
        return Scorer(Members([reward_model(rows, first, setting.steps, setting.batch, setting.rate, seed, **ORDER)]))

    def asks(reward: Scorer | None, n: int, count: int, name: str | int, own: float = setting.own) -> list[Pair]:
        return labels(asked, reward, n, count, setting.noise, f"{seed}/{name}", own)

    every = asks(None, 1, rounds * setting.labels, "first")
    made = every[: setting.labels]
    static, refreshed = train(every), [train(made)]
    for n in setting.counts[:-1]:
        made = made + asks(refreshed[-1], n, setting.labels, len(refreshed))
        refreshed.append(train(made))
    policies = list(zip((refreshed[0], *refreshed), (1, *setting.counts), strict=True))
    theirs = [asks(by, n, len(every), f"ceiling {i}", 1.0) for i, (by, n) in enumerate(policies[1:rounds], 1)]
    ceiling = [static, *map(train, theirs)]
    another = train(asks(None, 1, setting.labels, "another"), start(seed + 1000))  # no seed of the benchmark
    like = differences(pool, None, 1)
    fixed = [(static, n) for _, n in policies]

    def right(judges: Sequence[Scorer], of=policies, like: np.ndarray | None = None) -> list[float | None]:
        return [accuracy(pool, by, n, judge, like) for (by, n), judge in zip(of, judges, strict=False)]

    return {
        "static": {
            "labeler": [labeler_accuracy(pool, by, n, setting.noise) for by, n in fixed],
            "accuracy": right([static] * len(fixed), fixed),
            "equal": right([static] * len(fixed), fixed, like),
            "path": gold_path(pool, static, setting.measured),
        },
        "refreshed": {
            "labeler": [labeler_accuracy(pool, by, n, setting.noise) for by, n in policies],
            "before": [None, *right(refreshed, policies[1:])],
            "accuracy": right(refreshed),
            "equal": right(refreshed, like=like),
            "another": right([another] * len(policies)),
            "ceiling": right(ceiling),
            "path": gold_path(pool, refreshed[-1], setting.measured),
        },
        "first_round": {"path": gold_path(pool, refreshed[0], setting.measured)},
    }


def ordered(pairs: Sequence[Pair], steps: int, batch: int, seed: int) -> list[Pair]:
    """Return the pairs of all steps: passes over the pairs, in batches of like lengths, which take half the time."""
    rng, count = Random(f"order/{seed}"), steps * batch
    rows = [pair for _ in range(0, count, len(pairs)) for pair in rng.sample(pairs, len(pairs))][:count]
    batches = []
    for i in range(0, count, batch * GROUPED):
        near = sorted(rows[i : i + batch * GROUPED], key=lambda pair: max(len(each.ids) for each in pair))
        batches += [near[j : j + batch] for j in range(0, len(near), batch)]
    rng.shuffle(batches)
    return [pair for each in batches for pair in each]


def labels(
    groups: Pool, reward: Scorer | None, n: int, count: int, noise: float, seed: str, own: float = 1.0
) -> list[Pair]:
    """
    Return labels of pairs of completions of a policy, the preferred one first.

    Args:
        groups: completions of each prompt by the first policy.
        reward ([`Scorer`], *optional*): by which the policy is the best of n of them; not needed for n = 1, the first
            policy itself.
        n (`int`): of the best of n.
        count (`int`): number of labels. The prompts take turns. Equal gold rewards are a tie, and no label.
        noise (`float`): of the answers, see [`Setting`].
        seed (`str`): of pairs and answers.
        own (`float`): share of the pairs with both completions by the policy; the others have one by the first policy.

    Raises:
        ValueError: if too few of the pairs that are drawn have unequal gold rewards.
    """
    rng = Random(f"labels/{seed}")
    if reward:
        reward([each for group in groups for each in group])  # in large batches
    known = [best_shares(group, reward, n) for group in groups]
    order, made = rng.sample(range(len(groups)), len(groups)), []
    for place in order * PASSES:
        samples, shares, chosen = known[place]
        (one,) = rng.choices(samples, weights=chosen)
        (other,) = rng.choices(samples, weights=chosen if rng.random() < own else shares)
        if one.gold != other.gold:
            wins = rng.random() < 1 / (1 + math.exp((other.gold - one.gold) / noise))
            made.append((one, other) if wins else (other, one))
        if len(made) == count:
            return made
    raise ValueError(f"The completions of {len(groups)} prompts gave {len(made)} labels, and {count} are asked for.")


def report(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> str:
    """Return the tables, from the results of each seed."""
    gaps = {seed: compare_paths(each["refreshed"]["path"], each["static"]["path"]) for seed, each in found.items()}
    rows = [
        [
            f"seed {seed}",
            f"{each['static']['path'][0][1]:.2f}",
            *(f"{max(gold for _, gold in each[arm]['path']):.2f}" for arm in ARMS),
            *(f"{each[arm]['path'][-1][1]:.2f} at {each[arm]['path'][-1][0]:.2f}" for arm in ARMS),
            *(f"{gaps[seed][key]:+.2f}" for key in ("end", "mean")),
        ]
        for seed, each in found.items()
    ]
    means = [interval([gap[key] for gap in gaps.values()], sign=True) for key in ("end", "mean")]
    rows.append(["mean [95 %]", "", "", "", "", "", *means])
    headers = ["", "start", *(f"{arm}: highest" for arm in ARMS)]
    headers += [*(f"{arm}: gold at KL" for arm in ARMS), "difference at the largest common KL", "on the way"]
    parts = [markdown(headers, rows)]
    grid = [each for each in (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0) if each <= min(gap["kl"] for gap in gaps.values())]
    cells = [
        interval([at_kl(each["refreshed"]["path"], kl) - at_kl(each["static"]["path"], kl) for each in found.values()])
        for kl in grid
    ]
    if grid:
        parts.append(markdown(["KL", *map(str, grid)], [["refreshed - static", *cells]]))
    return "\n\n".join([*parts, *accuracies(found, (1, *setting.counts))])


COLUMNS = {
    "static": {"labeler": "labeler", "accuracy": "static", "equal": "at equal differences"},
    "refreshed": {
        "labeler": "labeler",
        "before": "refreshed, before",
        "accuracy": "refreshed, after",
        "equal": "at equal differences",
        "another": "another of round 1",
        "ceiling": "all labels of the policy",
    },
}


def accuracies(found: Mapping[str, Mapping[str, Any]], counts: Sequence[int]) -> list[str]:
    """Return the tables of accuracies on the policies' own completions, and of their changes."""
    parts, last = [], len(counts) - 2
    for arm, columns in COLUMNS.items():
        rows = []
        for number, n in enumerate(counts):
            known = {key: [each[arm][key][number : number + 1] for each in found.values()] for key in columns}
            cells = [interval([value for (value,) in filter(None, known[key])], 3) for key in columns]
            rows.append([f"{number}: best of {n}", *cells])
        parts.append(markdown([f"after round, completions of ({arm})", *columns.values()], rows))
    rows = []
    for begin, end in combinations(range(last + 1), 2):
        for arm, columns in COLUMNS.items():
            gone = {
                key: np.array([each[arm][key][end] - each[arm][key][begin] for each in found.values()])
                for key in columns
                if key != "before"
            }
            changes = [gone["accuracy"], gone["equal"], gone["accuracy"] - gone["labeler"]]
            if "ceiling" in gone:
                changes.append(gone["accuracy"] - gone["ceiling"])
            cells = [interval(each.tolist(), 3, True) for each in changes]
            rows.append([f"{arm}, after round {end} - after {begin}", *cells, *[""] * (4 - len(cells))])
    headers = ["accuracy", "at equal differences", "less the labeler's", "less that with all labels of the policy"]
    return [*parts, markdown(["change", *headers], rows)]


def settings_of(quick: bool) -> tuple[Setting, dict[str, Any]]:
    """Return the setting, and what stands of it in the file of results."""
    setting = QUICK if quick else FULL
    return setting, json.loads(json.dumps(asdict(setting)))
