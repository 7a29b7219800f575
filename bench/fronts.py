"""
Fronts of two rewards by fixed weights, by soups of two policies, and by bounds, by PPO on the embedded world.

    python -m bench.fronts [--seeds 1 2] [--episodes 3072] [--threads 1]

The rewards are those of `bench.constraints`: the gold reward, and `brief`, 1 for an answer of at most eight words,
else 0. A seed trains a run for each of `WEIGHTS` (`sweep=pareto`) and for each of `BOUNDS` (`combine=lagrange`). The
soups are averages of the two runs that had one reward each, and train nothing. All are measured on the same held-out
prompts, and the hypervolume is the area over the worst means, so those of one seed can be compared. Finished runs are
skipped, so the same command resumes a stopped benchmark.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from bench.constraints import BRIEF
from bench.reward import do_all
from rlhf_trl.cli.launcher import launch_command, run
from rlhf_trl.report.text import table
from rlhf_trl.runs.record import SWEEP_FILE, read_comparison, read_jobs

WEIGHTS = (0.0, 0.3333333, 0.6666667, 1.0)
BOUNDS = (">= 0.5", ">= 0.65", ">= 0.8", ">= 0.95")
SOUPS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
WAYS = {"weights": "fixed weights", "soup": "soups of the two ends", "bounds": "bounds (Lagrangian)"}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.fronts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--episodes", type=int, default=3072, help="completions of a run")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of a training")
    parser.add_argument("--project", default="bench_fronts", help="folder of the runs under runs/")
    options = parser.parse_args(arguments)
    threads = f"--num_cpu_threads_per_process,'{options.threads}'"
    folder = Path("runs", options.project)
    for seed in options.seeds:
        for name, words in sweeps(seed, options.episodes).items():
            jobs = read_jobs(folder / name / SWEEP_FILE)
            if jobs and all(job.done for job in jobs):
                print(f"{name}: done, skipped", flush=True)
                continue
            command = [sys.executable, "launch/sweep.py", "-m", *words, f"project={options.project}"]
            if code := run([*command, f"run_name={name}", "accelerate=cpu", f"launch=[{threads}]"]):
                sys.exit(code)
        program = launch_command("cpu", ["--num_cpu_threads_per_process", str(options.threads)])
        do_all(steps(seed), options.project, program)
    text = report(folder, options.seeds)
    Path(folder, "fronts.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{folder / 'fronts.md'}")


def sweeps(seed: int, episodes: int) -> dict[str, list[str]]:
    """Return name and overrides of the sweeps of a seed."""
    # In the middle of the simplex one gold reward weighs as much as two of `brief`
    common = ["sweep=pareto", "stage=ppo", *BRIEF, "reward.format.weight=2", f"seed={seed}"]
    common.append(f"stage.args.total_episodes={episodes}")
    bounds = ", ".join(f'"{bound}"' for bound in BOUNDS)
    lagrange = ["combine=lagrange", "combine.lambda_lr=0.3", f"pareto.thresholds={{format: [{bounds}]}}"]
    return {
        f"weights_{seed}": [*common, f"pareto.grid=[{','.join(map(str, WEIGHTS))}]"],
        f"bounds_{seed}": [*common, *lagrange],
    }


def steps(seed: int) -> dict[str, list[str]]:
    """Return name and overrides of the soups of a seed, and of the evaluation of all."""
    ends = f"{{gold: weights_{seed}/0, brief: weights_{seed}/{len(WEIGHTS) - 1}}}"
    evaluation = [
        "stage=evaluate",
        *BRIEF,
        "~stage.policies.ppo",
        "~stage.policies.dpo",
        "stage.policies.sft=demo:sft",
    ]
    names = ",".join(f"{way}_{seed}" for way in WAYS)
    evaluation += [f"stage.sweeps=[{names}]", "stage.best_of_n=0", "stage.references=false", "stage.show=false"]
    return {
        f"soup_{seed}": ["stage=soup", f"stage.models={ends}", f"stage.grid=[{','.join(map(str, SOUPS))}]"],
        f"compare_{seed}": evaluation,
    }


def report(folder: Path, seeds: Sequence[int]) -> str:
    """Return the table: hypervolume of each way by seed, with the rewards of its non-dominated policies."""
    found = {seed: read_comparison(folder / f"compare_{seed}") for seed in seeds}
    rows = []
    for way, title in WAYS.items():
        volumes, fronts, trained = [], [], 0
        for seed, comparison in found.items():
            assert comparison is not None and comparison.front is not None
            family = f"{way}_{seed}"
            each = comparison.front.hypervolumes[family]
            volumes.append(f"{each.mean:.3f} [{each.low:.3f}, {each.high:.3f}]")
            means = {
                name: tuple(result.rewards[reward] or 0.0 for reward in comparison.front.rewards)
                for name, result in comparison.policies.items()
                if result.family == family
            }
            best = sorted(means[name] for name in comparison.front.policies if name in means)
            fronts.append(", ".join(f"({gold:.2f}, {brief:.2f})" for gold, brief in best) or "none")
            trained = 2 if way == "soup" else len(means)
        mean = fmean(float(volume.split()[0]) for volume in volumes)
        rows.append([title, str(trained), f"{mean:.3f}", "; ".join(volumes), "; ".join(fronts)])
    headers = [
        "front by",
        "trained runs",
        "hypervolume",
        "by seed [95 %]",
        "(gold, brief) of those on the common front",
    ]
    points = {
        seed: json.dumps({name: round(value, 3) for name, value in comparison.front.reference_point.items()})
        for seed, comparison in found.items()
        if comparison is not None and comparison.front is not None
    }
    origin = "; ".join(f"seed {seed}: {point}" for seed, point in points.items())
    return f"{table(headers, rows)}\n\nReference points: {origin}"


if __name__ == "__main__":
    main()
