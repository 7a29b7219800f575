"""
A constraint beside fixed weightings of the same two rewards, and fronts by weights, soups and bounds, by PPO.

    python -m bench.fronts [--seeds 1 2 ...] [--bounds 0.5 0.8 ...] [--quick] [--folder FOLDER] [--table]

On the embedded world the gold reward pays for whole answers, and `brief` is 1 for an answer of at most `WORDS` words,
else 0. A seed trains a policy for each weighting of the two, and one for each bound on the mean of `brief`
(`combine=lagrange`). Soups average the two policies that had one reward each, and train nothing. All answer the same
held-out prompts. With one bound there are no fronts and no soups. A second call runs what is missing.
"""

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

# Read when the libraries are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

from bench.frontier import draw
from bench.loop.driver import drive, parser
from bench.loop.results import interval, markdown
from bench.loop.steps import Steps
from rlhf_trl.report.pareto import hypervolume
from rlhf_trl.runs.paths import resolve_path
from rlhf_trl.runs.record import read_metrics
from rlhf_trl.tasks.demo.gold import completion_text

START = resolve_path("demo:sft", None, "")
WORDS, TOLERANCE = 8, 0.05
# A nested repetition would backtrack: each step here is a word and the blanks before it
PATTERN = f"\\S+(?:\\s+\\S+){{0,{WORDS - 1}}}\\s*"
# What a brief answer is worth in units of the gold reward, where both have the same share
SCALE = 2.0
SEARCHED, FEW, SOUPS, BOUNDED = "weights", "few", "soups", "bounds"
WAYS = {
    SEARCHED: "fixed weights in eighths",
    FEW: "four of them: {few} of the gold reward's",
    SOUPS: "soups of the two ends, in eighths",
    BOUNDED: "bounds of brief: {bounds}",
}


@dataclass(frozen=True)
class Setting:
    """
    Sizes of the benchmark.

    Attributes:
        shares: of the gold reward in the fixed weightings.
        few: those of them whose front is compared with that of as many bounds.
        bounds: of the mean of `brief`.
        episodes: completions of a run of PPO.
        prompts, samples: held-out prompts, and completions of each.
    """

    shares: tuple[float, ...] = tuple(i / 8 for i in range(9))
    few: tuple[float, ...] = (0.0, 0.375, 0.625, 1.0)
    bounds: tuple[float, ...] = (0.5, 0.65, 0.8, 0.95)
    episodes: int = 3072
    prompts: int = 256
    samples: int = 4

    @property
    def has_fronts(self) -> bool:
        """Whether the ways to a front are compared: a single bound is none."""
        return len(self.bounds) > 1


QUICK = Setting(shares=(0.0, 0.5, 1.0), few=(0.0, 1.0), bounds=(0.5, 0.8), episodes=256, prompts=8, samples=2)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark of the command line."""
    seeds = [1, 2, 3, 4, 5]
    reader = parser("bench.fronts", seeds, "fronts")
    reader.add_argument("--bounds", nargs="+", type=float, help="of the mean of brief, in place of the four")
    options = reader.parse_args(arguments)
    drive("fronts", Fronts(options.bounds), options, seeds)


@dataclass(frozen=True)
class Fronts:
    """See [`~bench.loop.driver.Benchmark`]. With other `bounds` than the setting's."""

    bounds: Sequence[float] | None = None

    def settings_of(self, quick: bool) -> tuple[Setting, dict[str, Any]]:
        """Return the setting, and what stands of it in the file of results."""
        setting = QUICK if quick else Setting()
        setting = replace(setting, bounds=tuple(self.bounds)) if self.bounds else setting
        return setting, json.loads(json.dumps(asdict(setting)))

    def measure(self, steps: Steps, setting: Setting) -> dict[str, Any]:
        """
        Train the policies of a seed.

        Returns:
            `dict[str, Any]`: `policies`, of each by name `gold`, `brief` and `kl` on the held-out prompts; `lambdas`,
            the multiplier of each bound at its end.
        """
        lambdas = {}
        for share in setting.shares:
            steps.run(f"weight_{share:g}", *weighting(share, setting))
        for bound in setting.bounds:
            run = steps.run(f"bound_{bound:g}", *bounded(bound, setting))
            history = (read_metrics(run) or {}).get("history", [])
            key = "constraints/format/lambda"
            lambdas[f"{bound:g}"] = [entry[key] for entry in history if key in entry][-1]
        if setting.has_fronts:
            steps.run("soup", *soups(setting))
        found = {}
        for name, place in places(setting).items():
            found[name] = steps.compute(
                f"{name}_values", functools.partial(values_of, steps.path(place), setting.prompts, setting.samples)
            )
        return {"policies": found, "lambdas": lambdas}

    def report(self, found: Mapping[str, Mapping[str, Any]], setting: Setting) -> str:
        """Return the tables, from the results of each seed."""
        seeds = list(found.values())
        fronts = [volumes(seeds, setting)] if setting.has_fronts else []
        return "\n\n".join([constraints(seeds, setting), *fronts, points(seeds, setting)])


def training(setting: Setting) -> list[str]:
    """Return the overrides that all policies share."""
    few = ["data.max_eval_samples=16", "stage.args.eval_on_start=false", "health=none"]
    rewards = ["reward=[demo,format]", f"reward.format.kwargs.pattern='{PATTERN}'"]
    return ["stage=ppo", *rewards, *few, f"stage.args.total_episodes={setting.episodes}"]


def weighting(share: float, setting: Setting) -> list[str]:
    """Return the overrides of PPO with a fixed weighting, by the share of the gold reward."""
    weights = [f"reward.gold.weight={share:g}", f"reward.format.weight={SCALE * (1 - share):g}"]
    return [*training(setting), *weights]


def bounded(bound: float, setting: Setting) -> list[str]:
    """Return the overrides of PPO with a bound on the mean of `brief`."""
    # A run of a few dozen rollouts
    lagrange = ["combine=lagrange", f"combine.constraints={{format: '>= {bound:g}'}}", "combine.lambda_lr=0.3"]
    return [*training(setting), *lagrange, f"reward.format.weight={SCALE:g}"]


def soups(setting: Setting) -> list[str]:
    """Return the overrides of the soups."""
    grid = ",".join(f"{share:g}" for share in setting.shares)
    return ["stage=soup", "stage.models={gold: weight_1, brief: weight_0}", f"stage.grid=[{grid}]"]


def places(setting: Setting) -> dict[str, str]:
    """Return the run of each policy, by its name in the results. The ends of the soups are those of the weights."""
    found = {f"weight_{share:g}": f"weight_{share:g}" for share in setting.shares}
    found |= {f"bound_{bound:g}": f"bound_{bound:g}" for bound in setting.bounds}
    # The first model's weight falls
    inner = list(enumerate(reversed(setting.shares)))[1:-1] if setting.has_fronts else []
    return found | {f"soup_{share:g}": f"soup/{number}" for number, share in inner}


def values_of(run: Path, prompts: int, samples: int) -> dict[str, float]:
    """Return both rewards and the KL of a policy's completions of held-out prompts."""
    drawn = draw(run, START, prompts, samples, seed=1)
    brief = [re.fullmatch(PATTERN, completion_text(text)) is not None for text in drawn.texts]
    return {"gold": float(drawn.gold.mean()), "brief": fmean(brief), "kl": float(drawn.ratios.mean())}


Seeds = Sequence[Mapping[str, Any]]


def values(seeds: Seeds, name: str, key: str) -> list[float]:
    """Return a value of a policy, one of each seed."""
    return [seed["policies"][name][key] for seed in seeds]


def constraints(seeds: Seeds, setting: Setting) -> str:
    """Return the table of the bounds, each beside the best weighting that satisfies it."""
    rows = []
    weightings = [f"weight_{share:g}" for share in setting.shares]
    for bound in setting.bounds:
        name, least = f"bound_{bound:g}", bound - TOLERANCE
        brief, gold = (values(seeds, name, key) for key in ("brief", "gold"))
        met = "yes" if fmean(brief) >= least else "no"
        met += f" ({sum(value >= least for value in brief)} of {len(seeds)})"
        row = [f">= {bound:g}", interval(brief), met, interval(gold)]
        row.append(", ".join(f"{seed['lambdas'][f'{bound:g}']:.2f}" for seed in seeds))
        allowed = [each for each in weightings if fmean(values(seeds, each, "brief")) >= least]
        if allowed:
            best = max(allowed, key=lambda each: fmean(values(seeds, each, "gold")))
            row += [best.removeprefix("weight_"), interval(values(seeds, best, "brief"))]
            others = values(seeds, best, "gold")
            row += [interval(others), interval([a - b for a, b in zip(gold, others, strict=True)], sign=True)]
        else:
            row += ["none meets it", "", "", ""]
        # A search of its own in each seed, by the very completions that the result is read from
        searched = [
            [policy["gold"] for each in weightings if (policy := seed["policies"][each])["brief"] >= least]
            for seed in seeds
        ]
        gaps = [mine - max(there) for mine, there in zip(gold, searched, strict=True) if there]
        rows.append([*row, interval(gaps, sign=True)])
    headers = ["bound", "brief", f"met within {TOLERANCE} on average (in single seeds)", "gold", "lambda at the end"]
    headers += ["best weighting that meets it (gold's share)", "its brief", "its gold", "gold minus its"]
    return markdown([*headers, "gold minus the best weighting's of each seed"], rows)


def families(setting: Setting) -> dict[str, list[str]]:
    """Return the names of the policies of each way to a front."""
    ends = [f"weight_{setting.shares[0]:g}", f"weight_{setting.shares[-1]:g}"]
    return {
        SEARCHED: [f"weight_{share:g}" for share in setting.shares],
        FEW: [f"weight_{share:g}" for share in setting.few],
        SOUPS: ends + [name for name in places(setting) if name.startswith("soup_")],
        BOUNDED: [f"bound_{bound:g}" for bound in setting.bounds],
    }


def volumes(seeds: Seeds, setting: Setting) -> str:
    """Return the table of the hypervolumes, over the worst means of all seeds."""
    every = [policy for seed in seeds for policy in seed["policies"].values()]
    origin = np.array([min(policy[key] for policy in every) for key in ("gold", "brief")])
    found = {
        way: [
            hypervolume(
                np.array([[seed["policies"][name][key] for key in ("gold", "brief")] for name in names]), origin
            )
            for seed in seeds
        ]
        for way, names in families(setting).items()
    }
    words = {name: ", ".join(f"{value:g}" for value in getattr(setting, name)) for name in ("few", "bounds")}
    rows = []
    for way, volumes_ in found.items():
        gaps = [a - b for a, b in zip(volumes_, found[FEW], strict=True)]
        trained = 2 if way == SOUPS else len(families(setting)[way])
        gap = "" if way == FEW else interval(gaps, sign=True)
        rows.append([WAYS[way].format(**words), str(trained), interval(volumes_), gap])
    table = markdown(["front by", "trained runs", "hypervolume", "minus that of the four weights"], rows)
    return f"{table}\n\nHypervolumes begin at a gold reward of {origin[0]:.2f} and a brief of {origin[1]:.2f}."


def points(seeds: Seeds, setting: Setting) -> str:
    """Return the table of all policies."""
    names = dict.fromkeys(name for group in families(setting).values() for name in group)
    rows = [
        [name.replace("_", " "), *(interval(values(seeds, name, key)) for key in ("gold", "brief", "kl"))]
        for name in names
    ]
    return markdown(["policy", "gold", "brief", "KL"], rows)


if __name__ == "__main__":
    main()
