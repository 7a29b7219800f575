"""
Benchmarks of the loop on a CPU, as tables for the documentation.

    python -m bench.loop refresh|active|judge|smollm2 [--seeds 1 2 ...] [--quick] [--folder FOLDER] [--table]

`refresh`: a refreshed against a static reward model, on the embedded world. `active`: labels that the selections of
`stage=collect` need. `judge`: SmolLM2-135M as a labeler of review sentences beside people. `smollm2`: two rounds of
`pipeline=reviews/rounds`. The last two need the folders RLHF_TRL_REVIEWS and RLHF_TRL_SMOLLM2. What was measured is
written at once, a line of JSON each, and a second call runs what is missing.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

# Read when the libraries are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from bench.loop.results import Results
from bench.loop.steps import Steps
from rlhf_trl.errors import ConfigError

ROOT = Path(__file__).parents[2]
SEEDS = {"refresh": [1, 2, 3, 4, 5], "active": [1, 2, 3], "judge": [1], "smollm2": [1]}


def main(arguments: list[str] | None = None) -> None:
    """Run a benchmark, and print its table."""
    parser = argparse.ArgumentParser(prog="python -m bench.loop")
    parser.add_argument("bench", choices=list(SEEDS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: " + str(SEEDS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which show that it runs and nothing else")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / "loop", help="for runs and results")
    parser.add_argument("--table", action="store_true", help="print what was measured, and run nothing")
    options = parser.parse_args(arguments)
    bench = importlib.import_module(f"bench.loop.{options.bench}")
    setting, identity = bench.settings_of(options.quick)
    results = Results(options.folder / "results.jsonl")
    found = results.read(options.bench, identity)
    wanted = options.seeds or SEEDS[options.bench]
    try:
        for seed in [] if options.table else wanted:
            if str(seed) not in found:
                project = f"{options.bench}_{seed}{'_quick' * options.quick}"
                steps = Steps(options.folder, project, [f"seed={seed}"])
                results.add(options.bench, identity, str(seed), **bench.measure(steps, setting))
    except ConfigError as error:
        sys.exit(f"Error: {error}")
    found = results.read(options.bench, identity)
    chosen = {seed: found[seed] for seed in map(str, wanted) if seed in found}
    print(f"\n{bench.report(chosen, setting)}" if chosen else "Nothing was measured.")


if __name__ == "__main__":
    main()
