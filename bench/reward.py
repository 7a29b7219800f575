"""
Benchmark of reward models from rankings of four against the same comparisons as pairs: accuracy and training time.

    python -m bench.reward [--model smollm2] [--seeds 1 2 3] [--threads 2] [--project NAME] [--output FILE]

A seed draws the rows and the score head. Both trainings of a seed see the same comparisons, one row per ranking or one
row per pair, and take turns in going first; then both models are evaluated in one run on the same held-out
comparisons. Finished runs are skipped, so the same command resumes a stopped benchmark.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from rlhf_trl.cli.launcher import START_OVERRIDES, launch_command, run, shell_line, state_of
from rlhf_trl.errors import ConfigError
from rlhf_trl.report.text import duration, table

ACCURACY, DIFFERENCE, RATIO = 0.88, 0.01, 0.6  # targets
KINDS = ("rankings", "pairs")
# So that the compared time is that of training alone
TRAINING_ALONE = ["stage.args.eval_on_start=false", 'stage.args.eval_strategy="no"']


@dataclass(frozen=True)
class Recipe:
    """
    A model to compare on.

    Args:
        starts (`dict[str, list[str]]`): runs that training starts from, in order: name and overrides.
        train (`list[str]`): overrides of training on rankings.
        pairs (`int`): pairs per step, as many as a step of rankings has on average.
        evaluate (`list[str]`): overrides of the evaluation.
        metric (`str`): metric of `metrics.json`, without the reward's name.
        dtype (`str`): type of the evaluated reward models.
    """

    starts: dict[str, list[str]]
    train: list[str]
    pairs: int
    evaluate: list[str]
    metric: str
    dtype: str = "float32"


RECIPES = {
    "smollm2": Recipe(
        {"sft": ["experiment=reviews/smollm2/sft"]},
        ["experiment=reviews/smollm2/ratings"],
        16,
        ["experiment=reviews/smollm2/quality"],
        "accuracy_gap_above_1",
        "bfloat16",
    ),
    "tiny": Recipe(
        {"init": ["experiment=reviews/tiny/init"], "sft": ["experiment=reviews/tiny/sft"]},
        ["experiment=reviews/tiny/ratings"],
        64,
        ["experiment=reviews/tiny/quality"],
        "accuracy_gap_above_1",
    ),
    "demo": Recipe(
        {},
        ["stage=reward", "data/feedback=rankings", "data.max_samples=2000"],
        180,
        ["stage=evaluate_reward"],
        "accuracy",
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.reward")
    parser.add_argument("--model", default="smollm2", choices=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of a training")
    parser.add_argument("--project", help="folder of the runs under runs/; default bench_reward_<model>")
    parser.add_argument("--output", type=Path, help="default: reward_bench.md in the project's folder")
    options = parser.parse_args(arguments)
    recipe, project = RECIPES[options.model], options.project or f"bench_reward_{options.model}"
    program = launch_command("cpu", ["--num_cpu_threads_per_process", str(options.threads)])
    folder = do_all(steps(recipe, options.seeds), project, program)
    text = report(recipe, [result(recipe, folder, seed) for seed in options.seeds], options)
    output = options.output or folder / "reward_bench.md"
    output.write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{output}")


def steps(recipe: Recipe, seeds: Sequence[int]) -> dict[str, list[str]]:
    """Return name and overrides of every run, in order."""
    made = dict(recipe.starts)
    for turn, seed in enumerate(seeds):
        for kind in KINDS if turn % 2 == 0 else KINDS[::-1]:
            as_pairs = [
                "data.feedback.pairwise_rows=true",
                f"stage.args.per_device_train_batch_size={recipe.pairs}",
            ]
            own = as_pairs if kind == "pairs" else []
            made[f"{kind}_{seed}"] = [*recipe.train, *own, f"seed={seed}", *TRAINING_ALONE]
        other = f"{{_target_:rlhf_trl.rewards.ModelReward,run:pairs_{seed},path:null,dtype:{recipe.dtype}}}"
        rewards = [f"reward.model.run=rankings_{seed}", f"reward.model.dtype={recipe.dtype}", f"+reward.pairs={other}"]
        made[f"quality_{seed}"] = [*recipe.evaluate, *rewards]
    return made


def do_all(steps: Mapping[str, list[str]], project: str, program: Sequence[str]) -> Path:
    """
    Run the steps of a benchmark, and end the process with a message where one fails or is interrupted.

    Args:
        steps (`Mapping[str, list[str]]`): name of each run, with its overrides.
        project (`str`): project of the runs.
        program (`Sequence[str]`): the program, before its overrides.

    Returns:
        `Path`: the folder of the project.
    """
    folder = Path("runs", project)
    try:
        for name, overrides in steps.items():
            do([*overrides, f"project={project}", f"run_name={name}"], folder / name, program)
    except ConfigError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        print("Stopped. Run the same command to resume.", file=sys.stderr)
        sys.exit(130)
    return folder


def do(overrides: list[str], folder: Path, program: Sequence[str]) -> None:
    """
    Run a step unless it is done.

    Args:
        overrides (`list[str]`): overrides of the step.
        folder (`Path`): folder of its run.
        program (`Sequence[str]`): command to append the overrides to.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if it was done with other overrides.
        SystemExit: if it fails.
    """
    state = state_of(folder, overrides)
    if state == "done":
        print(f"{folder.name}: done, skipped", flush=True)
        return
    if state == "changed":
        raise ConfigError(f"`{folder}` was made by another command. Pass another `--project`, or remove it.")
    command = [*program, *overrides, *START_OVERRIDES[state]]
    print(f"{folder.name}: {shell_line(command)}", flush=True)
    if code := run(command):
        sys.exit(code)


def result(recipe: Recipe, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Return `accuracy`, `seconds` of training and `steps` of each kind for one seed."""
    quality = json.loads((folder / f"quality_{seed}" / "metrics.json").read_text(encoding="utf-8"))["eval"]
    found = {}
    for kind, reward in zip(KINDS, ("model", "pairs"), strict=True):
        measured = json.loads((folder / f"{kind}_{seed}" / "metrics.json").read_text(encoding="utf-8"))
        trained = next(entry for entry in reversed(measured["history"]) if "train_runtime" in entry)
        found[kind] = {
            "accuracy": quality[f"eval_{reward}/{recipe.metric}"],
            "seconds": trained["train_runtime"],
            "steps": trained["step"],
        }
    return found


def report(recipe: Recipe, results: list[dict[str, dict[str, float]]], options: argparse.Namespace) -> str:
    """Return the tables: one row per seed, the means, and the targets."""
    headers = (
        ["seed"] + [f"{kind}: {what}" for kind in KINDS for what in ("accuracy", "steps", "time")] + ["time ratio"]
    )
    ratios = [found["rankings"]["seconds"] / found["pairs"]["seconds"] for found in results]
    rows = [
        [str(seed)]
        + [
            cell
            for kind in KINDS
            for one in [found[kind]]
            for cell in (f"{one['accuracy']:.4f}", str(one["steps"]), duration(one["seconds"]))
        ]
        + [f"{ratio:.2f}"]
        for seed, found, ratio in zip(options.seeds, results, ratios, strict=True)
    ]
    means = {kind: mean(found[kind]["accuracy"] for found in results) for kind in KINDS}
    rows.append(
        ["mean"] + [cell for kind in KINDS for cell in (f"{means[kind]:.4f}", "", "")] + [f"{mean(ratios):.2f}"]
    )
    difference = means["rankings"] - means["pairs"]
    aims = [
        [f"accuracy of {kind}, mean", f"{value:.4f}", f"at least {ACCURACY}", _met(value >= ACCURACY)]
        for kind, value in means.items()
        if options.model == "smollm2"
    ]
    aims += [
        ["rankings - pairs", f"{difference:+.4f}", f"within {DIFFERENCE}", _met(difference >= -DIFFERENCE)],
        ["time ratio, median", f"{median(ratios):.2f}", f"at most {RATIO}", _met(median(ratios) <= RATIO)],
    ]
    return (
        f"{options.model}, {options.threads} threads; accuracy is `{recipe.metric}` on held-out comparisons\n\n"
        f"{table(headers, rows)}\n\n{table(['target', 'found', 'limit', ''], aims)}"
    )


def _met(met: bool) -> str:
    return "met" if met else "missed"


if __name__ == "__main__":
    main()
