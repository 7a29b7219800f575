"""
The matrix of stages and engines on two CPU ranks, as a table for the documentation.

    python -m bench.engines [--only PATTERN] [--engines ddp fsdp2 zero2 zero3] [--also OVERRIDE ...] [--table]

Each run has four steps of the embedded model (PPO two rollouts), by the files of launch/accelerate. What was measured
is written at once, a line of JSON each; a second call runs what is missing. DeepSpeed's columns need the package.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

# Read when the libraries are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from bench.engines import compare, ranks
from bench.engines.architectures import MODELS, make_models
from bench.engines.cells import ENGINES, RANKS, Cell, cells

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
DRAWN = "_drawn"  # runs with the same completions on one rank and several
# The likelihood of ORPO is a mean per token of a rank's own rows (`trl.experimental.orpo`), so it has its own gradient
OTHER_MATH = {("orpo full", "ddp"), ("orpo lora", "ddp")}


def main(arguments: list[str] | None = None) -> int:
    """Run the cells of the command line, and print the table; the exit status is 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines")
    parser.add_argument("--only", default="", help="regular expression of the rows to run")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="columns to run")
    parser.add_argument("--also", nargs="+", default=[], metavar="OVERRIDE", help="further overrides of every run")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "bench" / "engines", help="for runs and results"
    )
    parser.add_argument("--table", action="store_true", help="print what was measured, and run nothing")
    options = parser.parse_args(arguments)
    results = options.folder / "results.jsonl"
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        measure(options, results)
    found = read(results)
    print(table(found))
    return int(any(failed(result) for result in found.values()))


def measure(options: argparse.Namespace, results: Path) -> None:
    """Run what the options name and the file of results doesn't hold."""
    ranks.import_modules()
    models = options.folder / MODELS
    if code := ranks.run(functools.partial(make_models, models), [{}], options.folder / "models.log"):
        raise SystemExit(code)
    every = {cell.name: cell for cell in cells()}
    chosen = [cell for cell in every.values() if re.search(options.only, cell.name)]
    done = read(results)
    for cell in chosen:
        for engine in dict.fromkeys(["ddp", *options.engines]):  # what the others are compared with
            if (cell.name, engine) in done:
                continue
            for name in cell.needs:
                if not run_dir(options.folder, every[name], "ddp").is_dir():
                    train(every[name], "ddp", options)
            result = {"row": cell.name, "engine": engine, "also": options.also}
            if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
                result |= {"skipped": "DeepSpeed is not installed"}
            else:
                start = time.monotonic()
                result |= run_cell(cell, engine, options)
                result["seconds"] = round(time.monotonic() - start, 1)
            print(json.dumps(result), flush=True)
            done[cell.name, engine] = result
            with results.open("a") as file:
                file.write(json.dumps(result) + "\n")


def run_dir(folder: Path, cell: Cell, engine: str) -> Path:
    """Return the run directory of a cell."""
    return folder / "runs" / engine / cell.folder


def train(cell: Cell, engine: str, options: argparse.Namespace, resume: bool = False) -> str | None:
    """
    Run a cell, on one rank for `one`; return the end of its log if it failed. `one_drawn` and `ddp_drawn` have the
    same completions.
    """
    log = options.folder / f"{engine}_{cell.folder}{'_resumed' * resume}.log"
    log.unlink(missing_ok=True)
    if not resume:
        shutil.rmtree(run_dir(options.folder, cell, engine), ignore_errors=True)
        for name in cell.needs:  # runs of one project find each other
            target = run_dir(options.folder, next(each for each in cells() if each.name == name), engine)
            source = options.folder / "runs" / "ddp" / target.name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(source, target)
    launch, drawn = engine.removesuffix(DRAWN), engine.endswith(DRAWN)
    count = 1 if launch == "one" else RANKS
    command = cell.command(count, engine, *options.also, *(["resume=true"] if resume else []))
    environments = ranks.rank_environments(None if launch == "one" else launch, count)
    code = ranks.run(functools.partial(ranks.train, command, options.folder, drawn), environments, log)
    return None if code == 0 else f"exit status {code}: {last_words(log)}"


def last_words(log: Path) -> str:
    """Return the last line of each rank's log."""
    found = [path.read_text(errors="replace").split("\n") for path in sorted(log.parent.glob(f"{log.stem}*.log"))]
    return " | ".join(next((line.strip() for line in reversed(lines) if line.strip()), "") for lines in found)[:400]


def run_cell(cell: Cell, engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a cell, hold it against its reference, load what it saved, and resume it."""
    here = run_dir(options.folder, cell, engine)
    if error := train(cell, engine, options):
        return {"error": error}
    found: dict[str, Any] = {}
    compared, reference = here, run_dir(options.folder, cell, "ddp")
    if engine == "ddp" and not cell.half:
        end = DRAWN * cell.samples  # by its own numbers a rank samples other completions than one rank alone
        compared, reference = (run_dir(options.folder, cell, f"{launch}{end}") for launch in ("ddp", "one"))
        for launch in ("one", *(["ddp"] if cell.samples else [])):
            if error := train(cell, f"{launch}{end}", options):
                return {"error": f"{launch}{end}: {error}"}
    try:
        if not cell.half:
            if not reference.is_dir():
                return {"error": f"{reference} is not there to compare with"}
            found["difference"] = compare.difference(compared, reference)
            for what in (compare.files, compare.logged):
                ours, theirs = what(compared), what(reference)
                if ours != theirs:
                    found[what.__name__] = sorted(ours ^ theirs)
        found["twice_tied"] = compare.twice_tied(here)
    except (AssertionError, OSError) as error:
        return found | {"error": str(error)}
    log = options.folder / f"{engine}_{cell.folder}_loaded.log"
    log.unlink(missing_ok=True)
    if ranks.run(functools.partial(compare.load, here), [{}], log):
        return found | {"error": f"doesn't load: {last_words(log)}"}
    whole = here.with_name(f"{here.name}_whole")
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(here, whole)
    compare.break_off(here)
    if error := train(cell, engine, options, resume=True):
        return found | {"error": f"resumed: {error}"}
    try:
        found["resumed"] = compare.difference(here, whole)
    except AssertionError as error:
        return found | {"error": f"resumed: {error}"}
    return found


def failed(result: dict[str, Any]) -> bool:
    """Return whether a cell isn't as it should be."""
    if "skipped" in result:
        return False
    if "error" in result:
        return True
    tolerance = math.inf if (result["row"], result["engine"]) in OTHER_MATH else TOLERANCE
    near = 0 <= result.get("difference", 0.0) <= tolerance  # which NaN isn't
    return not near or result["resumed"] != 0 or any(name in result for name in ("files", "logged"))


def read(results: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what was measured, the last of each cell."""
    lines = results.read_text().splitlines() if results.is_file() else []
    return {(each["row"], each["engine"]): each for each in map(json.loads, lines)}


def text_of(result: dict[str, Any] | None) -> str:
    """Return the text of a cell."""
    if result is None:
        return ""
    if "skipped" in result or "error" in result:
        return f"**{result['error']}**" if "error" in result else f"skipped: {result['skipped']}"
    parts = [f"{result['difference']:.0e}"] if "difference" in result else ["runs"]
    parts += [f"**resumed {result['resumed']:.0e}**"] if result["resumed"] else []
    parts += [f"**{name}: {', '.join(result[name])}**" for name in ("files", "logged") if name in result]
    return ", ".join(parts)


def table(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Return the results as a Markdown table: rows are stages, columns engines."""
    lines = [f"| | {' | '.join(ENGINES.values())} |", "|---" * (len(ENGINES) + 1) + "|"]
    order = [cell.name for cell in cells()]
    for row in sorted({row for row, _ in found}, key=order.index):
        texts = [text_of(found.get((row, engine))) for engine in ENGINES]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
