"""Settings of the benchmark, and its jobs, each of which shares its reward models."""

import functools
import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.loop.results import Results
from bench.overoptimization.curves import best_of_n_curves
from bench.overoptimization.samples import Sizes, comparisons, gold_array, parts, read, samples_file
from bench.overoptimization.training import Members, average, dpo, ppo, reward_model, scores, start
from rlhf_trl.rewards import ModelReward

BENCH = "overoptimization"
SINGLE, WARM = "single", "WARM"
# Aggregations of an ensemble, each with its coefficient
ENSEMBLES = {"mean": 0.0, "min": 0.0, "mean_minus_std": 1.0, "mean_minus_var": 2.0}


@dataclass(frozen=True)
class Setting:
    """
    Sizes of the benchmark.

    Attributes:
        sizes: numbers of prompts and samples.
        comparisons: numbers of comparisons of the reward models.
        noises: shares of them that are the wrong way round.
        batch, least_steps: comparisons of an optimizer step of a reward model, and the least number of steps: fewer
            comparisons are seen several times.
        reward_rate: its learning rate.
        members: of an ensemble.
        ensemble_of: comparisons that ensembles and several `betas` are compared at.
        counts: the n of best-of-n.
        rollouts, epochs, rate: of PPO: rollouts of 128 completions, epochs over each, and learning rate.
        betas: KL coefficients of PPO at `ensemble_of` comparisons; otherwise the first one.
        dpo_sizes, dpo_steps, dpo_beta, dpo_rate: of DPO; it is measured after each of the steps, on `dpo_prompts`.
    """

    sizes: Sizes
    comparisons: tuple[int, ...] = (250, 1000, 4000, 16000)
    noises: tuple[float, ...] = (0.0, 0.25)
    batch: int = 32
    least_steps: int = 80
    reward_rate: float = 5e-4
    members: int = 4
    ensemble_of: int = 1000
    counts: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    rollouts: int = 26
    epochs: int = 3
    rate: float = 4e-4
    betas: tuple[float, ...] = (0.0, 0.02, 0.1)
    dpo_sizes: tuple[int, ...] = (250, 1000, 4000)
    dpo_steps: tuple[int, ...] = (2, 4, 7, 10, 15, 20, 30, 40, 60, 80)
    dpo_beta: float = 0.02
    dpo_rate: float = 3e-4
    dpo_prompts: int = 256


FULL = Setting(Sizes(compared=1500, drawn=12, prompts=16, samples=2048))
QUICK = Setting(
    sizes=Sizes(compared=400, drawn=12, prompts=8, samples=512),
    comparisons=(250, 1000),
    noises=(0.25,),
    least_steps=32,
    members=2,
    counts=tuple(2**i for i in range(9)),
    rollouts=12,
    betas=(0.0, 0.1),
    dpo_sizes=(1000,),
    dpo_steps=(10, 20, 40),
    dpo_prompts=64,
)


@dataclass(frozen=True)
class Job:
    """All that is measured with the reward models of a seed, of some comparisons with some noise."""

    seed: int
    noise: float
    size: int

    def name(self, kind: str, aggregation: str = SINGLE, beta: float = 0.0) -> str:
        """Return the name of a result; `kind` is `best_of_n`, `ppo` or `dpo`."""
        return name_of(self.seed, self.noise, self.size, kind, aggregation, beta)

    def names(self, setting: Setting) -> Iterator[tuple[str, str, float]]:
        """Yield kind, aggregation and beta of all that it measures."""
        ensembles = self.size == setting.ensemble_of
        noisy = self.noise == max(setting.noises)
        yield "best_of_n", SINGLE, 0.0
        yield "ppo", SINGLE, setting.betas[0]
        if ensembles:
            for each in (*ENSEMBLES, WARM):
                yield "best_of_n", each, 0.0
                # The labels without noise have one ensemble, for the forecast
                if noisy or each == "mean":
                    yield "ppo", each, setting.betas[0]
            if noisy:
                for beta in setting.betas[1:]:
                    yield "ppo", SINGLE, beta
        if noisy and self.size in setting.dpo_sizes:
            yield "dpo", SINGLE, setting.dpo_beta

    def missing(self, setting: Setting, done: Set[str]) -> list[tuple[str, str, float]]:
        """Return what was not measured yet."""
        return [each for each in self.names(setting) if self.name(*each) not in done]


def identity(setting: Setting) -> dict[str, Any]:
    """Return the setting as it stands in the file of results."""
    return json.loads(json.dumps(asdict(setting)))


def name_of(seed: int, noise: float, size: int, kind: str, aggregation: str = SINGLE, beta: float = 0.0) -> str:
    """Return the name of a result in the file."""
    return f"{kind} {aggregation} beta={beta:g} comparisons={size} noise={noise:g} seed={seed}"


def jobs(setting: Setting, seeds: Sequence[int]) -> list[Job]:
    """Return the jobs, a seed after the other."""
    return [Job(seed, noise, size) for seed in seeds for noise in setting.noises for size in setting.comparisons]


@functools.cache
def _samples(path: Path):
    return read(path)


def run(job: Job, folder: Path, quick: bool) -> None:
    """Train the reward models of a job, and measure what is missing."""
    torch.set_num_threads(1)
    setting = QUICK if quick else FULL
    results, own = Results(folder / "results.jsonl"), identity(setting)
    missing = job.missing(setting, set(results.read(BENCH, own)))
    samples = _samples(samples_file(folder, setting.sizes))
    pairs = comparisons(samples["compared"], job.size, job.noise, job.seed)
    first = start(job.seed)
    steps = max(setting.least_steps, job.size // setting.batch)
    count = setting.members if job.size == setting.ensemble_of else 1
    # From one start, so that their mean is a model as well; in an order of their own
    seeds = [100 * job.seed + i for i in range(count)]
    models = [reward_model(pairs, first, steps, setting.batch, setting.reward_rate, seed) for seed in seeds]
    rewards = {SINGLE: Members(models[:1])}
    if count > 1:
        rewards |= {each: Members(models, each, coef) for each, coef in ENSEMBLES.items()}
        rewards[WARM] = Members([average(models)])
    _, training, held_out = parts()
    gold = gold_array(samples["best_of_n"])
    sampled = [each for group in samples["compared"] for each in group[:2]]
    before = {
        name: moments(scores(reward, sampled), np.array([each.gold for each in sampled]))
        for name, reward in rewards.items()
    }
    for kind, aggregation, beta in missing:
        reward = rewards[aggregation]
        if kind == "best_of_n":
            found = best_of_n_result(reward, samples["best_of_n"], gold, setting)
        elif kind == "ppo":
            points = ppo(reward, training, setting.rollouts, setting.epochs, beta, setting.rate, job.seed)
            found = {"points": points, "start": before[aggregation]}
        else:
            questions = held_out[setting.sizes.prompts :][: setting.dpo_prompts]
            points = dpo(reward, pairs, questions, setting.dpo_steps, beta, setting.dpo_rate, job.seed)
            found = {
                "points": points,
                "start": before[aggregation] | {key: points[0][key] for key in ("proxy", "gold")},
            }
        results.add(BENCH, own, job.name(kind, aggregation, beta), **found)


def best_of_n_result(reward: ModelReward, groups, gold, setting: Setting) -> dict:
    """Return the curves of best-of-n, and the share of pairs of a prompt that the reward orders as the gold reward."""
    chosen_by = scores(reward, [each for group in groups for each in group]).reshape(gold.shape)
    curves = best_of_n_curves(chosen_by, {"proxy": chosen_by, "gold": gold}, setting.counts)
    gaps, gold_gaps = (
        values[:, : gold.shape[1] // 2] - values[:, gold.shape[1] // 2 :] for values in (chosen_by, gold)
    )
    differ = gold_gaps != 0
    accuracy = ((gaps * gold_gaps > 0)[differ].mean() + 0.5 * (gaps == 0)[differ].mean()).item()
    values = {name: [round(float(gain), 4) for gain in gains] for name, (_, gains) in curves.items()}
    start = moments(chosen_by, gold)
    return {"accuracy": round(accuracy, 4), "n": list(setting.counts), "start": start} | values


def moments(proxy: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Return means and standard deviations of both rewards over completions of the first policy."""
    values = {"proxy": proxy.mean(), "proxy_std": proxy.std(), "gold": gold.mean(), "gold_std": gold.std()}
    return {name: round(float(value), 4) for name, value in values.items()}
