"""
Ablation of synthetic feedback on the embedded world: reward models of few labels, with each option.

    python -m bench.sparse [--labels 250] [--seeds 1 2 3 4 5] [--steps 25] [--threads 1] [--project NAME]

A seed draws the labels, the held-out pairs and the score head. All reward models of a seed start from the same policy,
take the same number of optimizer steps on rows of the same labels, and are evaluated on the same held-out pairs of
people, which get no synthetic ones. The weaker policy is the embedded base checkpoint, and the paraphrases come from
it after SFT on other phrasings of training prompts. Finished runs are skipped, so the same command resumes a stopped
benchmark.
"""

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from bench.reward import do_all
from rlhf_trl.evaluation.statistics import paired_difference
from rlhf_trl.report.text import table
from rlhf_trl.runs.paths import conf_dir
from rlhf_trl.runs.record import is_done
from rlhf_trl.tasks.demo.world import is_held_out, prompts

# Option, and what it is in the table; paths are filled in by `arms`
ARMS = {
    "none": "labels alone",
    "negatives": "negatives of other prompts",
    "matched": "negatives of like length and style",
    "truncated": "truncated copies of the chosen answer",
    "perturbed": "chosen answer with changed words",
    "weaker": "weaker policy's answers as rejected",
    "paraphrased": "paraphrased prompts",
    "length_ratio": "only pairs of like length (at most twice)",
    "all": "all that add pairs",
}
METRIC = "eval_accuracy"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.sparse")
    parser.add_argument("--labels", type=int, default=250, help="pairs that people compared")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps of each reward model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--project", default="bench_sparse", help="folder of the runs under runs/")
    parser.add_argument("--output", type=Path, help="default: sparse_bench.md in the project's folder")
    options = parser.parse_args(arguments)
    folder = Path("runs", options.project)
    torch.set_num_threads(options.threads)
    folder.mkdir(parents=True, exist_ok=True)
    phrasings = write_phrasings(folder / "phrasings.jsonl")
    do_all(steps(options.labels, options.steps, options.seeds, folder, phrasings), options.project, do)
    found = {arm: [accuracy(folder / f"{arm}_{seed}") for seed in options.seeds] for arm in ARMS}
    text = report(found, options.labels, options.steps, options.seeds)
    output = options.output or folder / "sparse_bench.md"
    output.write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{output}")


def do(overrides: list[str], folder: Path) -> None:
    """Run a step in this process, which has imported the libraries, unless it is done."""
    if is_done(folder):
        print(f"{folder.name}: done, skipped", flush=True)
        return
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", [*overrides, "overwrite=true"])
    print(f"{folder.name}: {' '.join(overrides)}", flush=True)
    instantiate(cfg.stage.run)(cfg)


def write_phrasings(path: Path) -> Path:
    """Write pairs of a training prompt and another phrasing of it, which a paraphraser learns from."""
    by_topic: dict[object, list[str]] = {}
    for prompt, topic in prompts().items():
        if not is_held_out(prompt):
            by_topic.setdefault(topic, []).append(prompt)
    rng, rows = random.Random(0), []
    for each in by_topic.values():
        shuffled = rng.sample(each, len(each))
        rows += [{"prompt": a, "completion": b} for a, b in itertools.pairwise(shuffled)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rng.sample(rows, len(rows))), encoding="utf-8")
    return path


def steps(labels: int, count: int, seeds: Sequence[int], folder: Path, phrasings: Path) -> dict[str, list[str]]:
    """Return name and overrides of every run, in order."""
    made = {
        "paraphraser": [
            *("stage=sft", "data=files", f"data.paths={phrasings}", "data.eval_size=0.05"),
            *("data.split_by=row", "stage.args.num_train_epochs=2"),
        ]
    }
    for seed in seeds:
        labeled = [f"seed={seed}", "data/feedback=pairs", f"data.max_samples={labels}"]
        made[f"weaker_answers_{seed}"] = [
            *("stage=generate", "stage.starts_from=base", "reward=none", "stage.split=train", *labeled),
            "stage.max_completion_length=64",
        ]
        made[f"paraphrases_{seed}"] = [
            *("stage=paraphrase", "model.run=paraphraser", "stage.n=2", "stage.template='{prompt}'", *labeled),
            "stage.max_completion_length=64",
        ]
        for arm in ARMS:
            made[f"{arm}_{seed}"] = [
                *("stage=reward", *labeled, f"stage.args.max_steps={count}", *options_of(arm, folder, seed)),
                *("stage.args.eval_on_start=false", 'stage.args.eval_strategy="no"'),
            ]
    return made


def options_of(arm: str, folder: Path, seed: int) -> list[str]:
    """Return the overrides of one row of the table."""
    added = {
        "negatives": "1",
        "matched": "1",
        "truncated": "1",
        "perturbed": "1",
        "weaker": str(folder / f"weaker_answers_{seed}" / "completions.jsonl"),
        "paraphrased": str(folder / f"paraphrases_{seed}" / "paraphrases.jsonl"),
    }
    given = added if arm == "all" else {"length_ratio": "2"} if arm == "length_ratio" else {}
    given = {arm: added[arm]} if arm in added else given
    return [f"data.feedback.{name}={value}" for name, value in given.items()]


def accuracy(run: Path) -> float:
    """Return the accuracy of a reward model on the held-out pairs of its seed."""
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))["eval"][METRIC]


def report(found: dict[str, list[float]], labels: int, count: int, seeds: Sequence[int]) -> str:
    """Return the table: accuracy of each option, and its difference from the labels alone with a 95 % interval."""
    rows = []
    for arm, values in found.items():
        cells = ["", ""]
        if arm != "none":
            change = paired_difference(np.array(values), np.array(found["none"]))
            wins = sum(value > base for value, base in zip(values, found["none"], strict=True))
            cells = [f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]", f"{wins} of {len(seeds)}"]
        rows.append([ARMS[arm], f"{mean(values):.3f}", *cells])
    headers = ["", "accuracy", "difference [95 %]", "better in"]
    return (
        f"{labels} labels, {count} optimizer steps, {len(seeds)} seeds; accuracy on held-out pairs of people\n\n"
        f"{table(headers, rows)}"
    )


if __name__ == "__main__":
    main()
