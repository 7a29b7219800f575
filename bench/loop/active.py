"""
Labels that the selections of `stage=collect` need for what random pairs reach, with policies that are the best of n.

Each selection begins with the same labels of random pairs. In each round it chooses more pairs, of prompts that have
no label yet, by an ensemble of reward models of its labels so far, and a new ensemble is trained on all of them. The
policy of a number of labels is the best of n completions of the first policy by the ensemble's mean. All ensembles of
a seed start from the same networks and take as many steps.
"""

import functools
import gc
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from bench.loop.best_of import accuracy, gold_path
from bench.loop.results import interval, markdown, share_of_labels
from bench.loop.steps import Steps
from bench.overoptimization.samples import Pair, Sample, Sizes, make, read, samples_file
from bench.overoptimization.training import Members, reward_model, start
from rlhf_trl.labels.collection import Select
from rlhf_trl.labels.selection import Pool, best_worst, pair_uncertainty, random_pairs, thompson, uncertainty
from rlhf_trl.runs.results import Estimate

AIM = 0.6
Question = tuple[int, Sample, Sample]  # number of the prompt, and two of its completions


class Arm(NamedTuple):
    """A selection, and whether the labels that it gets have noise."""

    select: Select
    is_noisy: bool = True


RANDOM, EXACT = "random", "random, no noise"
ARMS = {
    RANDOM: Arm(random_pairs),
    "uncertainty": Arm(uncertainty),
    "thompson": Arm(thompson),
    "bernoulli": Arm(functools.partial(uncertainty, measure="bernoulli")),
    "best_worst": Arm(best_worst),
    EXACT: Arm(random_pairs, False),
    "uncertainty, no noise": Arm(uncertainty, False),
    "thompson, no noise": Arm(thompson, False),
}
MEASURES = ("scores", "probabilities", "bernoulli")


@dataclass(frozen=True)
class Setting:
    """
    Sizes of the comparison.

    Attributes:
        rounds: labels of each; those of the first one are of random pairs.
        pool: prompts that a selection chooses from, for each label.
        noise: of the answers, see `conf/labeler/gold.yaml`.
        members: of an ensemble.
        steps, batch, rate: of a member: optimizer steps, pairs of each, learning rate.
        best_of: the n of the best of n; the aim is about the first of them.
        sizes: prompts of labels and completions of each, and held-out ones; the same for all seeds.
        arms: of `ARMS`.
    """

    sizes: Sizes
    rounds: tuple[int, ...] = (64, 64, 128)
    pool: int = 2
    noise: float = 0.5
    members: int = 4
    steps: int = 40
    batch: int = 16
    rate: float = 1e-3
    best_of: tuple[int, ...] = (4, 8)
    arms: tuple[str, ...] = (RANDOM, "uncertainty", "thompson")


FULL = Setting(Sizes(compared=512, drawn=16, prompts=64, samples=128))
QUICK = Setting(
    Sizes(compared=48, drawn=5, prompts=4, samples=16), rounds=(8, 8), members=2, steps=1, batch=8, best_of=(2, 4)
)


class Ensemble:
    """
    The scores of an ensemble, each completion read once.

    Args:
        reward (`Members`): its members.
    """

    def __init__(self, reward: Members):
        self.reward, self.known = reward, dict[Sample, np.ndarray]()

    def members(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the scores of completions by each member, shape (E, N)."""
        if new := [each for each in dict.fromkeys(samples) if each not in self.known]:
            found = self.reward.member_scores([list(each.ids) for each in new]).numpy()
            self.known |= dict(zip(new, found.T, strict=True))
        return np.stack([self.known[each] for each in samples], axis=1)

    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return their means over the members, shape (N,)."""
        return self.members(samples).mean(axis=0)


def measure(steps: Steps, setting: Setting) -> dict[str, Any]:
    """
    Run a seed.

    Returns:
        `dict[str, Any]`: of each arm `rounds`, what [`quality`] says of the ensemble after each, with its number of
        `labels`; and `asked`, what [`describe`] says of the pairs that it chose in each round but the first.
    """
    path = samples_file(steps.folder, setting.sizes)
    seed = int(steps.every[0].removeprefix("seed="))
    return steps.compute("active", functools.partial(_run, setting, path, seed))


def _run(setting: Setting, path: Path, seed: int) -> dict[str, Any]:
    make(path, setting.sizes)
    gc.freeze()  # a trainer begins with a collection of garbage, which would walk over all libraries each time
    return run(setting, read(path), seed)


def run(setting: Setting, samples: Mapping[str, list[list[Sample]]], seed: int) -> dict[str, Any]:
    """Return what [`measure`] does, from completions of the first policy."""
    heads = [start(seed * 100 + member) for member in range(setting.members)]
    groups = [list(dict.fromkeys(group)) for group in samples["compared"]]
    order = Random(f"prompts/{seed}").sample(range(len(groups)), len(groups))

    def train(asked: Sequence[Question], noise: float) -> Ensemble:
        rows = [row for question in asked if (row := answer(question, noise, seed))]
        sizes = (setting.steps, setting.batch, setting.rate)
        return Ensemble(Members([reward_model(rows, each, *sizes, seed * 100 + i) for i, each in enumerate(heads)]))

    def choose(select: Select, asked: Sequence[Question], count: int, reward: Ensemble | None) -> list[Question]:
        done = {prompt for prompt, *_ in asked}
        left = [i for i in order if i not in done and len(groups[i]) > 1][: setting.pool * count]
        if reward:
            reward([each for i in left for each in groups[i]])  # in large batches
        pools = [Pool(len(groups[i]), reward.members(groups[i]) if reward else None) for i in left]
        pairs = select(pools, count, 1, np.random.default_rng([seed, len(asked)]))
        return [(left[pair.prompt], *(groups[left[pair.prompt]][i] for i in pair[1:3])) for pair in pairs]

    first = choose(random_pairs, [], setting.rounds[0], None)
    begun = functools.cache(functools.partial(train, first))
    found: dict[str, Any] = {}
    for name in setting.arms:
        select, is_noisy = ARMS[name]
        noise = setting.noise if is_noisy else 0.0
        asked, reward = first, begun(noise)
        rounds, chosen = [quality(samples["best_of_n"], reward, setting) | {"labels": len(asked)}], []
        for count in setting.rounds[1:]:
            new = choose(select, asked, count, None if select is random_pairs else reward)
            chosen.append(describe([pair for _, *pair in new], reward, setting.noise))
            asked = asked + new
            reward = train(asked, noise)
            rounds.append(quality(samples["best_of_n"], reward, setting) | {"labels": len(asked)})
        found[name] = {"rounds": rounds, "asked": chosen}
    return found


def answer(question: Question, noise: float, seed: int) -> Pair | None:
    """
    Return a label as of `labeler=gold`, the preferred completion first: the same for every arm that asks. Equal gold
    rewards are a tie without noise, and no label; with noise they are decided by chance.
    """
    prompt, *pair = question
    one, other = sorted(pair, key=lambda each: each.ids)
    if not noise:
        return None if one.gold == other.gold else (one, other) if one.gold > other.gold else (other, one)
    chance = 1 / (1 + math.exp((other.gold - one.gold) / noise))
    wins = Random(f"answer/{seed}/{prompt}/{one.ids}/{other.ids}").random() < chance
    return (one, other) if wins else (other, one)


def quality(pool: Sequence[Sequence[Sample]], reward: Ensemble, setting: Setting) -> dict[str, Any]:
    """
    Measure an ensemble on completions of held-out prompts.

    Returns:
        `dict[str, Any]`: `best of N`, the mean gold reward of the best of n for each n; `accuracy` on pairs of
        completions; and of the pairs of different ones of unequal gold reward `wrong` and `noise`, the rank
        correlations of each measure of uncertainty with whether the mean has the wrong order, and with the probability
        of a wrong label; and `agreed`, the share of the pairs of wrong order that all members order so.
    """
    reward([each for group in pool for each in group])  # in large batches
    path = gold_path(pool, reward, setting.best_of)
    gold = {f"best of {n}": value for n, (_, value) in zip(setting.best_of, path, strict=True)}
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*MEASURES, "wrong", "noise", "agreed")}
    for group in map(list, map(dict.fromkeys, pool)):
        i, j = np.triu_indices(len(group), 1)
        values, scores = np.array([each.gold for each in group]), reward.members(group)
        some = values[i] != values[j]
        i, j = i[some], j[some]
        gaps, differences = values[i] - values[j], scores[:, i] - scores[:, j]
        for name in MEASURES:
            found[name].append(pair_uncertainty(scores, name)[i, j])
        found["wrong"].append(differences.mean(axis=0) * gaps <= 0)
        found["noise"].append(chance_of_error(gaps, setting.noise))
        found["agreed"].append((differences * gaps <= 0).all(axis=0)[found["wrong"][-1]])
    joined = {name: np.concatenate(each) for name, each in found.items()}
    ranks = {
        of: {name: round(rank_correlation(joined[name], joined[of]), 4) for name in MEASURES}
        for of in ("wrong", "noise")
    }
    more = {"accuracy": accuracy(pool, reward, 1, reward), "agreed": round(float(joined["agreed"].mean()), 4)}
    return gold | more | ranks


def chance_of_error(gaps: np.ndarray, noise: float) -> np.ndarray:
    """Return the probability that a label contradicts the gold rewards, from their difference; 0.5 for equal ones."""
    return 1 / (1 + np.exp(np.abs(gaps) / noise))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation; equal values have the mean of their ranks."""
    ranks = []
    for values in (x, y):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[places])
    return float(np.corrcoef(*ranks)[0, 1])


def describe(pairs: Sequence[Sequence[Sample]], reward: Ensemble, noise: float) -> dict[str, float]:
    """
    Describe chosen pairs.

    Returns:
        `dict[str, float]`: `gap`, the mean difference of the gold rewards; `equal`, the share without one; `noise`,
        the mean probability of a wrong label (0.5 of equal ones); and of the unequal ones `wrong`, the share that the
        ensemble that chose them has in the wrong order.
    """
    gaps = np.array([one.gold - other.gold for one, other in pairs])
    scores = reward([each for pair in pairs for each in pair]).reshape(-1, 2)
    found = {
        "gap": np.abs(gaps).mean(),
        "equal": (gaps == 0).mean(),
        "noise": chance_of_error(gaps, noise).mean(),
        "wrong": (np.diff(scores)[:, 0] * gaps >= 0)[gaps != 0].mean(),
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def report(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> str:
    """Return the tables, from the results of each seed."""
    seeds, labels = list(found.values()), np.cumsum(setting.rounds).tolist()
    others = [name for name in setting.arms if name not in (RANDOM, EXACT)]

    def of(name: str, key: str) -> np.ndarray:
        """Return a value after each round in each seed, shape (seeds, rounds)."""
        return np.array([[each[key] for each in seed[name]["rounds"]] for seed in seeds], dtype=float)

    def gaps(name: str, key: str, digits: int) -> list[str]:
        differences = of(name, key) - of(control(name), key)
        return [interval(column.tolist(), digits, sign=True) for column in differences.T[1:]]

    measures = {f"best of {n}": 2 for n in setting.best_of} | {"accuracy": 3}
    parts = []
    for key, digits in measures.items():
        rows = [[name, *(interval(column.tolist(), digits) for column in of(name, key).T)] for name in setting.arms]
        rows += [[f"{name} - {control(name)}", "", *gaps(name, key, digits)] for name in others]
        parts.append(markdown([f"{key}, labels", *map(str, labels)], rows))
    rows = []
    for name in others:
        shares = [share_of_labels(labels, of(name, key), of(control(name), key)) for key in measures]
        rows.append([name, *map(written, shares), "met" if shares[0].mean <= AIM else "missed"])
    titles = [f"labels for random's final {key}" for key in measures]
    parts.append(markdown(["selection", *titles, f"aim: {AIM:.0%} by the first"], rows))

    def mean(name: str, key: str) -> str:
        """Return a value of the chosen pairs, its mean over the rounds."""
        return interval([float(np.mean([each[key] for each in seed[name]["asked"]])) for seed in seeds])

    keys = {
        "gap": "difference of gold rewards",
        "equal": "equal ones",
        "noise": "probability of a wrong label",
        "wrong": "wrong order by the ensemble",
    }
    rows = [[name, *(mean(name, key) for key in keys)] for name in setting.arms]
    parts.append(markdown(["chosen pairs", *keys.values()], rows))
    rows = []
    for number, count in enumerate(labels):
        values = [seed[setting.arms[0]]["rounds"][number] for seed in seeds]
        cells = [[each[key][name] for each in values] for key in ("wrong", "noise") for name in MEASURES]
        rows.append([str(count), *(interval(each) for each in (*cells, [each["agreed"] for each in values]))])
    titles = [f"{name} and {what}" for what in ("wrong order", "noise") for name in MEASURES]
    parts.append(markdown(["labels", *titles, "wrong pairs on which all members agree"], rows))
    return "\n\n".join(parts)


def control(name: str) -> str:
    """Return the arm of random pairs that an arm is compared with."""
    return RANDOM if ARMS[name].is_noisy else EXACT


def written(share: Estimate) -> str:
    """Return a share of the labels and its interval, as text."""
    mean, low, high = (f"{each:.0%}" if each <= 1 else "more than all" for each in share[:3])
    return mean if math.isnan(share.low) else f"{mean} [{low}, {high}]"


def settings_of(quick: bool) -> tuple[Setting, dict[str, Any]]:
    """Return the setting, and what stands of it in the file of results."""
    return identified(QUICK if quick else FULL)


def identified(setting: Setting) -> tuple[Setting, dict[str, Any]]:
    """Return a setting, and what stands of it in the file of results."""
    return setting, json.loads(json.dumps(asdict(setting)))
