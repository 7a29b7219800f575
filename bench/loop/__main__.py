"""
Benchmarks of the loop on a CPU, as tables for the documentation.

    python -m bench.loop BENCH [--seeds 1 2 ...] [--quick] [--folder FOLDER] [--table]

`refresh`: a refreshed against a static reward model on the embedded world, by PPO, and `best_of_n`: by the best of n
completions. `active`: labels that the selections of `stage=collect` need, by ensembles; `active_exact`: the same
without noise; `active_scores`: by what a single reward model knows too. `judge`: SmolLM2-135M as a labeler of review
sentences beside people. `smollm2`: two rounds of `pipeline=reviews/rounds`. The last two need the folders
RLHF_TRL_REVIEWS and RLHF_TRL_SMOLLM2. What was measured is written at once, a line of JSON each, and a second call
runs what is missing.
"""

import importlib
import os
from typing import Any

# Read when the libraries are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from bench.loop.driver import drive, parser

SEEDS = {
    "refresh": [1, 2, 3, 4, 5],
    "best_of_n": [1, 2, 3, 4, 5],
    "active": list(range(1, 11)),
    "active_exact": list(range(1, 7)),
    "active_scores": list(range(1, 11)),
    "judge": [1],
    "smollm2": [1],
}


def main(arguments: list[str] | None = None) -> None:
    """Run a benchmark, and print its table."""
    reader = parser("bench.loop", SEEDS, "loop")
    reader.add_argument("bench", choices=list(SEEDS))
    options = reader.parse_args(arguments)
    benchmark: Any = importlib.import_module(f"bench.loop.{options.bench}")
    drive(options.bench, benchmark, options, SEEDS[options.bench])


if __name__ == "__main__":
    main()
