"""
Benchmark of the memory plan.

    python -m bench.memory [--only PATTERN] [--output memory.jsonl] [--table cpu|h200|scaling]

`cpu` (the default) trains small models, each configuration in a process of its own (or one per rank), and holds the
peak of their tensors against what the plan says before they start. `h200` holds the plan against the peaks that
`python -m bench.gpu` measured on a GPU. `scaling` plans policies of 1, 8 and 70 billion parameters, and runs nothing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from bench.memory.configurations import CONFIGURATIONS, Configuration, make_data, make_models, words
from rlhf_trl.cli.launcher import launch_command

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "PYTHONWARNINGS": "ignore",
}
MIB = 2**20
# What the plan is to hold: on average, and in each row
MEAN, WORST = 0.10, 0.20


def main(arguments: list[str] | None = None) -> None:
    """Print the table of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory")
    parser.add_argument("--table", choices=("cpu", "h200", "scaling"), default="cpu")
    parser.add_argument("--only", default="", help="regular expression of the configurations to run")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "bench" / "memory.jsonl", help="results")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a configuration")
    options = parser.parse_args(arguments)
    if options.table == "cpu":
        rows = [row for row in run(options) if "measured" in row]
        print(f"\n{table(rows)}\n\n{summary(rows)}")
        return
    # The tables that run nothing
    from bench.memory import h200, scaling

    print((h200 if options.table == "h200" else scaling).table())


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the configurations, and return a row for each; they are also written, a line of JSON each."""
    chosen = [each for each in CONFIGURATIONS if re.search(options.only, each.name)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as name, options.output.open("w") as output:
        folder = Path(name)
        make_data(folder)
        for model in dict.fromkeys(each.model for each in chosen):
            make_models(model, folder / model)
        for number, configuration in enumerate(chosen):
            row = measure(configuration, folder, number, options.timeout)
            rows.append(row)
            output.write(json.dumps(row) + "\n")
            output.flush()
            print(line(row) if "measured" in row else f"{row['name']}: {row['problem']}", flush=True)
    return rows


def measure(configuration: Configuration, folder: Path, number: int, timeout: float) -> dict[str, Any]:
    """Return the plan and the measured peak of a configuration, or what went wrong."""
    report = folder / f"{number}.json"
    command = [sys.executable]
    if configuration.ranks > 1:
        flags = ["--num_processes", str(configuration.ranks), "--mixed_precision", "no"]
        command = launch_command(configuration.engine.lower(), flags)
        command = command[: command.index("no") + 1]
    command += ["-m", "bench.memory.worker", str(report), configuration.engine]
    command += words(configuration, folder / configuration.model, folder / "runs" / str(number))
    environment = os.environ | ENVIRONMENT | ({"ACCELERATE_USE_CPU": "true"} if configuration.ranks > 1 else {})
    row: dict[str, Any] = {"name": configuration.name, "model": configuration.model}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return row | {"problem": f"stopped after {timeout:.0f} s"}
    if not report.is_file():
        return row | {"problem": (done.stdout + done.stderr).strip()[-1500:]}
    return row | json.loads(report.read_text())


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, in MiB."""
    columns = ["", "model", "planned", "measured", "difference", "process"]
    head = [f"| {' | '.join(columns)} |", "|---|---|---:|---:|---:|---:|"]
    return "\n".join([*head, *map(line, rows)])


def line(row: dict[str, Any]) -> str:
    """Return a row as Markdown."""
    sizes = [f"{row[key] / MIB:,.0f}" for key in ("planned", "measured")]
    cells = [row["name"], row["model"], *sizes, f"{difference(row):+.1%}", f"{row['process'] / MIB:,.0f}"]
    return f"| {' | '.join(cells)} |"


def difference(row: dict[str, Any]) -> float:
    """Return by which share of the measured peak the plan is off."""
    return row["planned"] / row["measured"] - 1


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the mean and the worst difference beside what they are to be, and how long a plan took."""
    if not rows:
        return "nothing was measured"
    off = [abs(difference(row)) for row in rows]
    met = mean(off) <= MEAN and max(off) <= WORST
    return (
        f"{len(rows)} configurations: off by {mean(off):.1%} on average and {max(off):.1%} at most "
        f"({'within' if met else 'NOT within'} {MEAN:.0%} and {WORST:.0%}); a plan took "
        f"{max(row['seconds'] for row in rows):.1f} s at most."
    )


if __name__ == "__main__":
    main()
