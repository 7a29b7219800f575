"""Command line of the benchmarks that measure one seed after the other and keep what was measured."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bench.loop.results import Results
from bench.loop.steps import Steps
from rlhf_trl.errors import ConfigError

ROOT = Path(__file__).parents[2]


class Benchmark(Protocol):
    """A module that measures one seed, and makes tables of several."""

    def settings_of(self, quick: bool) -> tuple[Any, dict[str, Any]]:
        """Return the setting, and what stands of it in the file of results."""
        ...

    def measure(self, steps: Steps, setting: Any) -> dict[str, Any]:
        """Run one seed, and return what is written of it."""
        ...

    def report(self, found: Mapping[str, Mapping[str, Any]], setting: Any) -> str:
        """Return the tables, from the results of each seed."""
        ...


def parser(prog: str, seeds: Any, folder: str) -> argparse.ArgumentParser:
    """Return the parser of what these benchmarks share. The runs are in `runs/bench/` and `folder` by default."""
    made = argparse.ArgumentParser(prog=f"python -m {prog}")
    made.add_argument("--seeds", nargs="+", type=int, help=f"default: {seeds}")
    made.add_argument("--quick", action="store_true", help="tiny sizes, which show that it runs and nothing else")
    made.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / folder, help="for runs and results")
    made.add_argument("--table", action="store_true", help="print what was measured, and run nothing")
    return made


def drive(name: str, benchmark: Benchmark, options: argparse.Namespace, seeds: Sequence[int]) -> None:
    """
    Run a benchmark's seeds that are missing in its file of results, and print its tables.

    Args:
        name (`str`): of the benchmark, in the file of results and in the projects of its runs.
        benchmark ([`Benchmark`]): the benchmark.
        options (`argparse.Namespace`): of [`parser`].
        seeds (`Sequence[int]`): those to run by default.
    """
    setting, identity = benchmark.settings_of(options.quick)
    results = Results(options.folder / "results.jsonl")
    found = results.read(name, identity)
    wanted = options.seeds or seeds
    try:
        for seed in [] if options.table else wanted:
            if str(seed) not in found:
                project = f"{name}_{seed}{'_quick' * options.quick}"
                steps = Steps(options.folder, project, [f"seed={seed}"])
                results.add(name, identity, str(seed), **benchmark.measure(steps, setting))
    except ConfigError as error:
        sys.exit(f"Error: {error}")
    found = results.read(name, identity)
    chosen = {seed: found[seed] for seed in map(str, wanted) if seed in found}
    print(f"\n{benchmark.report(chosen, setting)}" if chosen else "Nothing was measured.")
