"""
Benchmark of PPO on one GPU, beside TRL's GRPO and RLOO and the last PPO of TRL.

    python -m bench.gpu [--output gpu.jsonl] [--budget 470] [--only PATTERN] [--trl112 FOLDER]

Needs no network: models are randomly initialized in the sizes of Qwen2.5-0.5B and Qwen2.5-1.5B. Each configuration has
a process of its own with a time limit, and what was measured is written at once, a line of JSON each; what the budget
doesn't suffice for is named. The tests marked `gpu` run at the end. `--rehearse` does the same with tiny models on any
device.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

# Read when CUDA starts: tests and measurements share the card
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from bench.gpu import machine, worker
from bench.gpu.configurations import CONFIGURATIONS, Configuration, missing
from bench.gpu.cost import peak_rate, planned_memory, update_flops
from bench.gpu.models import SIZES, make_models, make_prompts
from bench.gpu.table import tables
from bench.setting import Setting

ROOT = Path(__file__).parents[2]
TESTS_SECONDS = 100  # kept for the tests


def main(arguments: list[str] | None = None):
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "bench" / "gpu.jsonl", help="results")
    parser.add_argument("--folder", type=Path, help="for the models; a temporary one by default")
    parser.add_argument("--budget", type=float, default=470, help="seconds for everything")
    parser.add_argument("--only", default="", help="regular expression of the names to run, with the size before it")
    parser.add_argument(
        "--trl112", type=Path, default=trl112(), help="folder with TRL 1.12, put first on the path (.venv-trl112's)"
    )
    parser.add_argument("--no-tests", action="store_true", help="without the tests marked `gpu`")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on any device")
    parser.add_argument("--in-process", action="store_true", help="without a process per configuration")
    options = parser.parse_args(arguments)
    options.command = " ".join(["python -m bench.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("There is no GPU here. `--rehearse` runs everything with tiny models on a CPU.")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, options.output.open("w") as output:
        Benchmark(options, Path(folder), output).run()


def trl112() -> Path | None:
    """Return the packages of the environment that `python -m bench` makes, if it is there."""
    return next(iter(sorted((ROOT / ".venv-trl112" / "lib").glob("python*/site-packages"))), None)


class Benchmark:
    """
    A run of the benchmark.

    Args:
        options (`argparse.Namespace`): the command line.
        folder (`Path`): for models and logs.
        output (`TextIO`): file for the results.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, output: TextIO):
        self.options, self.folder, self.output = options, folder, output
        self.ends = time.monotonic() + options.budget
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.rows: list[dict[str, Any]] = []
        self.waiting: list[Configuration] = []
        self.workers: dict[Configuration, Worker] = {}  # of those to come

    def run(self):
        options = self.options
        chosen = [c for c in CONFIGURATIONS if re.search(options.only, f"{c.size} {c.name}")]
        self.write({"command": options.command, **machine.describe()})
        for sentence in machine.outside_of_range():
            print(sentence, flush=True)
        rate = machine.matrix_rate(self.device, 256 if options.rehearse else 8192)
        self.write({"matrix_rate": rate})
        self.peak = peak_rate(machine.describe()["card"]) or rate
        for size in dict.fromkeys(self.size_of(c) for c in chosen):
            start = time.monotonic()
            (self.folder / size).mkdir()
            make_models(SIZES[size], self.folder / size, self.device)
            setting = chosen[0].setting("", options.rehearse)
            make_prompts(SIZES[size], self.folder / size, 256, setting.prompt_tokens)
            self.write({"models": size, "seconds": time.monotonic() - start})
        if self.device == "cuda":
            torch.cuda.empty_cache()
        self.waiting = [c for c in chosen if not self.write_skipped(c)]
        try:
            while self.waiting:
                self.measure(self.waiting.pop(0))
        finally:
            for spare in self.workers.values():
                spare.kill()
        if not options.no_tests:
            self.test()
        print(tables(self.rows))

    def size_of(self, configuration: Configuration) -> str:
        return "tiny" if self.options.rehearse else configuration.size

    def write(self, row: dict[str, Any]):
        """Write a line of the results."""
        self.rows.append(row)
        self.output.write(json.dumps(row) + "\n")
        self.output.flush()
        print(json.dumps(row), flush=True)

    # ---- Measurements ----

    def write_skipped(self, configuration: Configuration) -> bool:
        """Write and return whether a configuration needs something that isn't there."""
        lacking = missing(configuration)
        if configuration.contender == "trl112" and self.options.trl112 is None:
            lacking = ["TRL 1.12 (--trl112)"]
        if lacking:
            self.write(self.named(configuration) | {"skipped": f"needs {', '.join(lacking)}"})
        return bool(lacking)

    def measure(self, configuration: Configuration):
        """Run a configuration, and write what was measured, or why nothing was."""
        row = self.named(configuration)
        left = self.ends - time.monotonic() - (0 if self.options.no_tests else TESTS_SECONDS)
        if left < 15:
            self.write(row | {"skipped": "no time left"})
            return
        setting, report, start = self.setting(configuration), self.report(configuration), time.monotonic()
        problem = None
        if self.options.in_process:
            worker.train(configuration.contender, configuration.options, worker.Reporter(setting, report))
        else:
            limit = min(configuration.seconds * (10 if self.options.rehearse else 1), left)
            problem = self.run_worker(configuration, limit)
        row["wall"] = round(time.monotonic() - start, 1)
        if report.is_file():
            row |= self.with_costs(json.loads(report.read_text()), configuration, setting)
        self.write(row | ({"problem": problem} if problem else {}))

    def named(self, configuration: Configuration) -> dict[str, Any]:
        return {"name": configuration.name, "size": self.size_of(configuration)}

    def setting(self, configuration: Configuration) -> Setting:
        return configuration.setting(str(self.folder / self.size_of(configuration)), self.options.rehearse)

    def report(self, configuration: Configuration) -> Path:
        return self.folder / f"{CONFIGURATIONS.index(configuration)}.json"

    def with_costs(self, report: dict[str, Any], configuration: Configuration, setting: Setting) -> dict[str, Any]:
        """Return a report with tokens per second, the MFU of the update and the planned memory."""
        size = SIZES[self.size_of(configuration)]
        flops = update_flops(size, setting, configuration.critic)
        if configuration.contender != "trl112":  # whose output layer keeps all logits
            plan = planned_memory(size, setting, configuration.critic, configuration.options)
            report |= {"planned_gib": plan}
        update = report["phases"]["update"]
        return report | {
            "tokens_per_second": report["samples_per_second"] * setting.new_tokens,
            "generated_per_second": setting.batch * setting.new_tokens / max(report["phases"]["generate"], 1e-9),
            "update_flops": flops,
            "mfu": flops / max(update, 1e-9) / self.peak,
            "peak_gib": report.get("peak_gpu_memory", report["peak_memory"]) / 1024,
        }

    def run_worker(self, configuration: Configuration, limit: float) -> str | None:
        """
        Run a configuration in a process of its own; return the problem if it failed or took too long.

        While it warms up the next one loads its models, and the one after that imports.
        """
        process = self.worker(configuration)
        process.tell(b"go\n")
        for following in self.waiting[:2]:
            self.worker(following, loads=following is self.waiting[0])
        del self.workers[configuration]
        return process.wait(limit)

    def worker(self, configuration: Configuration, loads: bool = True) -> "Worker":
        """Return the worker of a configuration, started if it is new, and told its job if it shall load its models."""
        if configuration not in self.workers:
            log = self.folder / f"{CONFIGURATIONS.index(configuration)}.log"
            path = self.options.trl112 if configuration.contender == "trl112" else None
            self.workers[configuration] = Worker(configuration.contender, log, path)
        process = self.workers[configuration]
        if loads and not process.has_job:
            job = worker.job(self.setting(configuration), configuration.options, self.report(configuration))
            process.tell(job)
            process.has_job = True
        return process

    # ---- Tests ----

    def test(self):
        """Run the tests marked `gpu`, or collect them where there is no GPU."""
        files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *map(str, files)]
        if self.device == "cpu":
            command.append("--collect-only")
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
        limit = max(self.ends - time.monotonic(), 20)
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
            printed = done.stdout
        except subprocess.TimeoutExpired as stopped:
            printed = f"{(stopped.stdout or b'').decode()}\nstopped after {limit:.0f} s"
        lines = printed.strip().splitlines()
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
        self.write({"tests": lines[-1] if lines else "nothing was printed", "failures": failures[:40]})


class Worker:
    """
    A process of `bench.gpu.worker`.

    Args:
        contender (`str`): what it imports.
        log (`Path`): file for what it prints.
        path (`Path`, *optional*): folder to import from first.
    """

    def __init__(self, contender: str, log: Path, path: Path | None):
        self.log, self.has_job = log, False
        paths = [str(path)] if path else []
        inherited = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths + inherited), "TRL_EXPERIMENTAL_SILENCE": "1"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.gpu.worker", contender],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def tell(self, line: bytes):
        """Write a line to the process; one that has died says so in `wait`."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def wait(self, seconds: float) -> str | None:
        """Return what went wrong, the end of the log or that it took more than `seconds`; `None` if nothing did."""
        try:
            status = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return f"stopped after {seconds:.0f} s"
        lines = [line for line in self.log.read_text().splitlines() if line.strip()]
        return None if status == 0 else "\n".join(lines[-12:])[-2000:]

    def kill(self):
        """End the process."""
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    main()
