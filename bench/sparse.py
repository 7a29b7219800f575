"""
Ablation of synthetic feedback on the embedded world: reward models of few labels, with each option.

    python -m bench.sparse [--labels 250] [--seeds 1 2 3 4 5] [--steps 25] [--folder FOLDER]

A seed draws the labels, the held-out pairs and the score head. All reward models of a seed start from the same policy,
take the same number of optimizer steps on rows of the same labels, and are evaluated on the same held-out pairs of
people, which get no synthetic ones. The weaker policy is the embedded base checkpoint, and the paraphrases come from
it after SFT on other phrasings of training prompts. Finished runs are skipped, so the same command resumes a stopped
benchmark; other `--labels` and `--steps` are other runs.
"""

import argparse
import itertools
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

# Read when the libraries are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from bench.loop.driver import ROOT
from bench.loop.results import interval
from bench.loop.steps import Steps
from rlhf_trl.errors import ConfigError
from rlhf_trl.report.text import table
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
PHRASINGS = "phrasings.jsonl"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.sparse")
    parser.add_argument("--labels", type=int, default=250, help="pairs that people compared")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps of each reward model")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / "sparse", help="for the runs")
    options = parser.parse_args(arguments)
    project = f"labels_{options.labels}_steps_{options.steps}"
    options.folder.mkdir(parents=True, exist_ok=True)
    write_phrasings(options.folder / PHRASINGS)
    runs = Steps(options.folder, project, [])
    try:
        for name, words in steps(options.labels, options.steps, options.seeds, Path("runs", project)).items():
            runs.run(name, *words)
    except ConfigError as error:
        sys.exit(f"Error: {error}")
    found = {arm: [runs.metrics(f"{arm}_{seed}")[METRIC] for seed in options.seeds] for arm in ARMS}
    text = report(found, options.labels, options.steps, options.seeds)
    output = options.folder / f"{project}.md"
    output.write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{output}")


def write_phrasings(path: Path) -> None:
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


def steps(labels: int, count: int, seeds: Sequence[int], folder: Path) -> dict[str, list[str]]:
    """Return name and overrides of every run, in order; `folder` is that of the runs."""
    made = {
        "paraphraser": [
            *("stage=sft", "data=files", f"data.paths={PHRASINGS}", "data.eval_size=0.05"),
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


def report(found: dict[str, list[float]], labels: int, count: int, seeds: Sequence[int]) -> str:
    """Return the table: accuracy of each option, and its difference from the labels alone with a 95 % interval."""
    rows = []
    for arm, values in found.items():
        cells = ["", ""]
        if arm != "none":
            gaps = [value - base for value, base in zip(values, found["none"], strict=True)]
            cells = [interval(gaps, 3, sign=True), f"{sum(gap > 0 for gap in gaps)} of {len(seeds)}"]
        rows.append([ARMS[arm], f"{mean(values):.3f}", *cells])
    headers = ["", "accuracy", "difference [95 %]", "better in"]
    return (
        f"{labels} labels, {count} optimizer steps, {len(seeds)} seeds; accuracy on held-out pairs of people\n\n"
        f"{table(headers, rows)}"
    )


if __name__ == "__main__":
    main()
