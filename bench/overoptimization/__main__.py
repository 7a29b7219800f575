"""
Over-optimization of reward models on the embedded world, whose gold reward is known (Gao et al., arXiv 2210.10760).

    python -m bench.overoptimization [--seeds 1 2 3 4 5] [--processes 2] [--quick] [--folder FOLDER] [--table]

Reward models learn from comparisons of the first policy's completions by the gold reward, a part of them the wrong way
round. Best-of-n, PPO and DPO maximize them, and proxy and gold reward are measured against sqrt(KL). Results are lines
of JSON in the folder, written at once; a second call runs what is missing. The table and the figure are made of them.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

# Read when the libraries are imported, in each process
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from bench.loop.driver import ROOT
from bench.loop.results import Results
from bench.overoptimization.figure import draw
from bench.overoptimization.forecast import tables
from bench.overoptimization.jobs import BENCH, FULL, QUICK, Job, identity, jobs, run
from bench.overoptimization.report import report
from bench.overoptimization.samples import make, samples_file


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.overoptimization")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 1 to 5, with --quick 1 and 2")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="each with one thread")
    parser.add_argument("--quick", action="store_true", help="few seeds and conditions, and short runs")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / "overoptimization")
    parser.add_argument("--table", action="store_true", help="only table and figure of what was measured")
    options = parser.parse_args(arguments)
    setting = QUICK if options.quick else FULL
    results = Results(options.folder / "results.jsonl")
    seeds = options.seeds or ([1, 2] if options.quick else [1, 2, 3, 4, 5])
    if not options.table:
        make(samples_file(options.folder, setting.sizes), setting.sizes)
        done = set(results.read(BENCH, identity(setting)))
        missing = [job for job in jobs(setting, seeds) if job.missing(setting, done)]
        run_all(missing, options.folder, options.quick, max(1, options.processes))
    found = results.read(BENCH, identity(setting))
    if not found:
        print("Nothing was measured.")
        return
    text = "\n\n".join([report(found, setting, seeds), tables(found, setting, seeds)])
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "overoptimization.md").write_text(text + "\n", encoding="utf-8")
    draw(found, setting, seeds, options.folder / "overoptimization.png")
    print(f"\n{text}\n\n{options.folder / 'overoptimization.md'}\n{options.folder / 'overoptimization.png'}")


def run_all(missing: list[Job], folder: Path, quick: bool, processes: int) -> None:
    """Run jobs in some processes, in their order."""
    if processes == 1:
        for job in missing:
            run(job, folder, quick)
        return
    # A fork would have this process's threads and locks
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for made in [pool.submit(run, job, folder, quick) for job in missing]:
            made.result()


if __name__ == "__main__":
    main()
