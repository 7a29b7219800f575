"""
A constraint on the mean of a reward beside fixed weightings of the same two rewards, by PPO on the embedded world.

    python -m bench.constraints [--seeds 1 2 3] [--weights 0 1 2 4] [--episodes 3072] [--threads 1]

The gold reward pays for whole answers, and `brief` is 1 for an answer of at most `WORDS` words, else 0: the constraint
asks for a mean of `BOUND`. A fixed weighting adds `weight` times `brief` to the gold reward. Rewards are those of the
held-out prompts after training. Finished runs are skipped, so the same command resumes a stopped benchmark.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from bench.reward import do_all
from rlhf_trl.cli.launcher import launch_command
from rlhf_trl.report.text import table

WORDS, BOUND, TOLERANCE = 8, 0.8, 0.05
BRIEF = [
    "reward=[demo,format]",
    # A nested repetition would backtrack: each step here is a word and the blanks before it
    f"reward.format.kwargs.pattern='\\S+(?:\\s+\\S+){{0,{WORDS - 1}}}\\s*'",
]
LAGRANGE = "lagrange"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.constraints")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--weights", nargs="+", type=float, default=[0.0, 1.0, 2.0, 4.0])
    parser.add_argument("--episodes", type=int, default=3072, help="completions of a run")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of a training")
    parser.add_argument("--project", default="bench_constraints", help="folder of the runs under runs/")
    options = parser.parse_args(arguments)
    program = launch_command("cpu", ["--num_cpu_threads_per_process", str(options.threads)])
    made = steps(options.weights, options.seeds, options.episodes)
    folder = do_all(made, options.project, program)
    text = report(folder, options.weights, options.seeds)
    Path(folder, "constraints.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{folder / 'constraints.md'}")


def steps(weights: Sequence[float], seeds: Sequence[int], episodes: int) -> dict[str, list[str]]:
    """Return name and overrides of every run, in order."""
    made = {}
    for seed in seeds:
        common = ["stage=ppo", *BRIEF, f"seed={seed}", f"stage.args.total_episodes={episodes}"]
        made[f"{LAGRANGE}_{seed}"] = [
            *common,
            "combine=lagrange",
            f"combine.constraints={{format: '>= {BOUND}'}}",
            # A cost of 2 per answer that is too long, and a run of a few dozen rollouts
            "reward.format.weight=2",
            "combine.lambda_lr=0.3",
        ]
        for weight in weights:
            made[f"weight_{weight:g}_{seed}"] = [*common, f"reward.format.weight={weight:g}"]
    return made


def report(folder: Path, weights: Sequence[float], seeds: Sequence[int]) -> str:
    """Return the table: held-out rewards of each weighting, means over the seeds."""
    rows = []
    for name in [LAGRANGE, *(f"weight_{weight:g}" for weight in weights)]:
        runs = [json.loads(Path(folder, f"{name}_{seed}", "metrics.json").read_text("utf-8")) for seed in seeds]
        gold, brief, kl = (
            [run["eval"][key] for run in runs]
            for key in ("eval_rewards/gold/mean", "eval_rewards/format/mean", "eval_objective/kl")
        )
        multipliers = [
            [entry["constraints/format/lambda"] for entry in run["history"] if "constraints/format/lambda" in entry]
            for run in runs
        ]
        shown = ", ".join(f"{values[-1]:.2f}" for values in multipliers if values)
        off = max(BOUND - value for value in brief)
        rows.append(
            [
                f"constraint, mean of brief >= {BOUND}" if name == LAGRANGE else f"gold + {name[7:]} x brief",
                f"{fmean(gold):.2f} ({', '.join(f'{value:.2f}' for value in gold)})",
                f"{fmean(brief):.2f} ({', '.join(f'{value:.2f}' for value in brief)})",
                f"{fmean(kl):.2f}",
                "yes" if off <= TOLERANCE + 1e-9 else "no",
                shown,
            ]
        )
    headers = ["policy", "gold (by seed)", "brief (by seed)", "KL", f"met within {TOLERANCE} by every seed", "lambda"]
    return table(headers, rows)


if __name__ == "__main__":
    main()
