"""
Refreshed against static reward models, with policies that are the best of n completions of the first policy.

The static reward model has all its labels of pairs of the first policy's completions. The refreshed one has as many:
those of the first round are the same. Each of a later round compares a completion of the policy of the round before,
which is the best of n by the reward model of then, with another one of it or with one of the first policy. All reward
models of a seed start from one network and take as many steps. At the end both reward models have as many labels, and
the gold rewards of the best of n by them are compared at equal KL to the first policy.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import numpy as np

from bench.loop.results import Point, at_kl, compare_paths, interval, markdown
from bench.loop.steps import Steps
from bench.overoptimization.samples import Pair, Sample, Sizes, make, read
from bench.overoptimization.training import Members, reward_model, scores, start

ARMS = ("static", "refreshed")


@dataclass(frozen=True)
class Setting:
    """
    Sizes of the comparison.

    Attributes:
        labels: of each round.
        noise: of the answers, see `conf/labeler/gold.yaml`.
        steps, batch, rate: of a reward model: optimizer steps, pairs of each, learning rate.
        counts: the n of the policy after each round; the first round labels the first policy.
        measured: the n that are measured.
        sizes: prompts of labels and completions of each, and held-out ones; the same for all seeds.
    """

    sizes: Sizes
    labels: int = 1024
    noise: float = 0.5
    steps: int = 250
    batch: int = 32
    rate: float = 5e-4
    counts: tuple[int, ...] = (16, 16, 64)
    measured: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


FULL = Setting(Sizes(compared=1024, drawn=64, prompts=32, samples=512))
QUICK = Setting(
    Sizes(compared=64, drawn=5, prompts=4, samples=16), labels=16, steps=2, counts=(2, 4), measured=(1, 2, 4)
)
PASSES = 20  # over the prompts, to draw the pairs of a round


class Scorer:
    """
    The scores of a reward model, each completion read once.

    Args:
        reward (`Members`): the reward model.
    """

    def __init__(self, reward: Members):
        self.reward, self.known = reward, dict[Sample, float]()

    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the scores of completions, shape (N,)."""
        if new := [each for each in dict.fromkeys(samples) if each not in self.known]:
            self.known |= dict(zip(new, scores(self.reward, new).tolist(), strict=True))
        return np.array([self.known[each] for each in samples])


def measure(steps: Steps, setting: Setting) -> dict[str, Any]:
    """
    Run a seed.

    Returns:
        `dict[str, Any]`: for each arm `path`, (KL, gold reward) of the best of each n by its last reward model, and by
        round from the first policy on `accuracy`, that of a reward model on pairs of the policy's own completions: of
        the refreshed one after the refresh with labels of this policy, and `before` it.
    """
    path = steps.folder / f"samples_{'_'.join(map(str, asdict(setting.sizes).values()))}.json"
    seed = int(steps.every[0].removeprefix("seed="))
    return steps.compute("best_of_n", functools.partial(_run, setting, path, seed))


def _run(setting: Setting, path, seed: int) -> dict[str, Any]:
    make(path, setting.sizes)
    return run(setting, read(path), seed)


def run(setting: Setting, samples: Mapping[str, list[list[Sample]]], seed: int) -> dict[str, Any]:
    """Return what [`measure`] does, from completions of the first policy."""
    asked, head = samples["compared"], start(seed)
    rounds = len(setting.counts)

    def train(pairs: Sequence[Pair]) -> Scorer:
        return Scorer(Members([reward_model(pairs, head, setting.steps, setting.batch, setting.rate, seed)]))

    first = labels(asked, None, 1, rounds * setting.labels, setting.noise, f"{seed}/first")
    made = first[: setting.labels]
    static, refreshed = train(first), [train(made)]
    for n in setting.counts[:-1]:
        made = made + labels(asked, refreshed[-1], n, setting.labels, setting.noise, f"{seed}/{len(refreshed)}")
        refreshed.append(train(made))
    counts, pool = (1, *setting.counts), samples["best_of_n"]
    own = [static, *[static] * rounds]
    mine = [refreshed[0], *refreshed]  # the reward model that each policy maximizes
    return {
        "static": {
            "accuracy": [accuracy(pool, by, n, by) for by, n in zip(own, counts, strict=True)],
            "path": gold_path(pool, static, setting.measured),
        },
        "refreshed": {
            "before": [None, *(accuracy(pool, by, n, by) for by, n in zip(mine[1:], counts[1:], strict=True))],
            "accuracy": [accuracy(pool, by, n, after) for by, n, after in zip(mine, counts, refreshed, strict=False)],
            "path": gold_path(pool, refreshed[-1], setting.measured),
        },
        "first_round": {"path": gold_path(pool, refreshed[0], setting.measured)},
    }


def labels(
    groups: Sequence[Sequence[Sample]], reward: Scorer | None, n: int, count: int, noise: float, seed: str
) -> list[Pair]:
    """
    Return labels of pairs, the preferred completion first: of a completion of a policy and, half of the time each,
    another one of it or one of the first policy.

    Args:
        groups: completions of each prompt by the first policy.
        reward ([`Scorer`], *optional*): by which the policy is the best of n of them; not needed for n = 1, the first
            policy itself.
        n (`int`): of the best of n.
        count (`int`): number of labels. The prompts take turns. Equal gold rewards are a tie, and no label.
        noise (`float`): of the answers, see [`Setting`].
        seed (`str`): of pairs and answers.

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
        (other,) = rng.choices(samples, weights=chosen if rng.random() < 0.5 else shares)
        if one.gold != other.gold:
            wins = rng.random() < 1 / (1 + math.exp((other.gold - one.gold) / noise))
            made.append((one, other) if wins else (other, one))
        if len(made) == count:
            return made
    raise ValueError(f"The completions of {len(groups)} prompts gave {len(made)} labels, and {count} are asked for.")


def best_shares(group: Sequence[Sample], reward: Scorer | None, n: int) -> tuple[list[Sample], np.ndarray, np.ndarray]:
    """
    Return the different completions of a prompt, the share of each among them all, and its probability to be the best
    of n that are drawn from them; without a reward these are in the order of the completions, for n = 1.
    """
    counts: dict[Sample, int] = {}
    for each in group:
        counts[each] = counts.get(each, 0) + 1
    different = list(counts)
    order = np.argsort(reward(different), kind="stable") if reward else np.arange(len(different))
    shares = np.array(list(counts.values()))[order] / len(group)
    return [different[i] for i in order], shares, np.diff(np.minimum(shares.cumsum(), 1.0) ** n, prepend=0.0)


def gold_path(pool: Sequence[Sequence[Sample]], reward: Scorer, counts: Sequence[int]) -> list[Point]:
    """Return the KL of the best of n to the first policy, in nats, and its mean gold reward, for each n."""
    path = []
    for n in counts:
        found = []
        for group in pool:
            samples, shares, chosen = best_shares(group, reward, n)
            some = chosen > 0
            kl = (chosen[some] * np.log(chosen[some] / shares[some])).sum()
            found.append((kl, chosen @ np.array([each.gold for each in samples])))
        path.append(tuple(round(float(value), 4) for value in np.mean(found, axis=0)))
    return path


def accuracy(pool: Sequence[Sequence[Sample]], by: Scorer, n: int, judge: Scorer) -> float | None:
    """
    Return the probability that a reward model orders two of the best of n by `by`, of unequal gold reward, as the gold
    reward does; `None` where all are equal.
    """
    right = total = 0.0
    for group in pool:
        samples, _, chosen = best_shares(group, by, n)
        values = np.array([each.gold for each in samples]), judge(samples)
        golds, gaps = (np.sign(value[:, None] - value[None, :]) for value in values)
        unequal = np.outer(chosen, chosen) * (golds != 0)
        right += float((unequal * ((golds == gaps) + 0.5 * (gaps == 0))).sum())
        total += float(unequal.sum())
    return round(right / total, 4) if total else None


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
    rounds = len(setting.counts)
    keys = (("static", "accuracy"), ("refreshed", "before"), ("refreshed", "accuracy"))
    rows = [
        [
            f"{number}: best of {n}",
            *(
                interval([each[arm][key][number] for each in found.values() if number < len(each[arm][key])], 3)
                for arm, key in keys
            ),
        ]
        for number, n in enumerate((1, *setting.counts))
    ]
    for begin in range(min(2, rounds - 1)):
        changes = [
            interval(
                [each[arm]["accuracy"][rounds - 1] - each[arm]["accuracy"][begin] for each in found.values()], 3, True
            )
            for arm in ARMS
        ]
        rows.append([f"after round {rounds - 1} - after {begin}", changes[0], "", changes[1]])
    columns = ["after round, completions of", "static", "refreshed, before", "refreshed, after"]
    parts.append(markdown(columns, rows))
    return "\n\n".join(parts)


def settings_of(quick: bool) -> tuple[Setting, dict[str, Any]]:
    """Return the setting, and what stands of it in the file of results."""
    setting = QUICK if quick else FULL
    return setting, json.loads(json.dumps(asdict(setting)))
