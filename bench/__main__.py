"""
Benchmark of PPO (`make bench`): each contender in its own process, in turn, round after round.

    python -m bench [--runs 11] [--smollm2 FOLDER] [--settings small lora] [--output bench/results.md]

Tables are printed and written to a file. A ratio compares two contenders in the same round; its median over the rounds
counts. There are many rounds because a process on a shared machine can be ten per cent faster or slower than the next.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from bench.setting import PHASES, Setting, as_json, make_from, make_prompts, make_small_llama

ROOT = Path(__file__).parents[1]
TRL112_VENV = ROOT / ".venv-trl112"
SAME_VERSIONS = ("transformers", "peft", "accelerate", "datasets", "psutil")


@dataclass(frozen=True)
class Contender:
    """A module of this package that trains, with its options."""

    name: str
    module: str
    options: dict = field(default_factory=dict)


TRL112 = Contender("TRL 1.12", "bench.trl112")
OURS_HEAD = Contender("ours, critic=head", "bench.ours", {"critic": "head"})
OURS_MODEL = Contender("ours, critic=model", "bench.ours", {"critic": "model"})
OURS_ADAPTER = Contender("ours, critic=adapter", "bench.ours", {"critic": "adapter"})
OURS_ONE_BASE = Contender("ours, four roles on one base", "bench.ours", {"critic": "adapter", "reward": "adapter"})
BARE_HEAD = Contender("bare loop, value head", "bench.bare", {"critic": "head"})
BARE_MODEL = Contender("bare loop, value network", "bench.bare", {"critic": "model"})


@dataclass(frozen=True)
class Target:
    """A ratio to reach: `better` over `worse` in `quantity` of the report, at least or at most `limit`."""

    better: Contender
    worse: Contender
    quantity: str
    at_least: bool
    limit: float


# Contenders of each setting, and the ratios to reach
SMALL_CONTENDERS = (TRL112, OURS_HEAD, OURS_MODEL, BARE_HEAD, BARE_MODEL)
LORA_CONTENDERS = (TRL112, OURS_HEAD, OURS_ADAPTER, OURS_ONE_BASE, BARE_HEAD)
SMALL_TARGETS = (
    Target(OURS_HEAD, TRL112, "samples_per_second", True, 1.4),
    Target(OURS_HEAD, BARE_HEAD, "seconds", False, 1.15),
    Target(OURS_MODEL, TRL112, "samples_per_second", True, 1.05),
)
LORA_TARGETS = (
    Target(OURS_HEAD, TRL112, "samples_per_second", True, 1.4),
    Target(OURS_HEAD, BARE_HEAD, "seconds", False, 1.15),
    Target(OURS_ONE_BASE, TRL112, "peak_memory", False, 0.5),
)


def small(folder: Path) -> Setting:
    """Return the setting of full fine-tuning of a Llama of 3 M parameters in float32."""
    setting = Setting(
        str(folder),
        batch=64,
        prompt_tokens=32,
        new_tokens=48,
        epochs=4,
        mini_batches=4,
        lora=False,
        dtype="float32",
        rollouts=3,
    )
    make_small_llama(folder)
    make_prompts(folder, 2 * setting.batch, setting.prompt_tokens)
    return setting


def lora(folder: Path, smollm2: str) -> Setting:
    """Return the setting of LoRA on SmolLM2-135M, everything else in bfloat16."""
    setting = Setting(
        str(folder),
        batch=8,
        prompt_tokens=32,
        new_tokens=16,
        epochs=2,
        mini_batches=2,
        lora=True,
        dtype="bfloat16",
        rollouts=2,
    )
    make_from(smollm2, folder)
    make_prompts(folder, 2 * setting.batch, setting.prompt_tokens)
    return setting


def main(arguments: list[str] | None = None):
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("--runs", type=int, default=11, help="rounds; the medians are over these")
    parser.add_argument("--settings", nargs="+", default=["small", "lora"], choices=["small", "lora"])
    parser.add_argument("--smollm2", default=os.environ.get("RLHF_TRL_SMOLLM2"), help="folder of SmolLM2-135M")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench", help="for models and reports")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results.md")
    options = parser.parse_args(arguments)
    make_venv()
    parts = [heading(options.runs)]
    if "small" in options.settings:
        setting = small(options.folder / "small")
        parts.append(
            section("Full fine-tuning of a Llama of 3 M parameters", setting, SMALL_CONTENDERS, SMALL_TARGETS, options)
        )
    if "lora" in options.settings and options.smollm2:
        setting = lora(options.folder / "lora", options.smollm2)
        parts.append(section("LoRA on SmolLM2-135M", setting, LORA_CONTENDERS, LORA_TARGETS, options))
    elif "lora" in options.settings:
        print("SmolLM2-135M is skipped: set RLHF_TRL_SMOLLM2 to its folder (docs/recipes.md says how to get it).")
    text = "\n".join(parts)
    options.output.write_text(text)
    print(text)


def make_venv():
    """Make an environment with TRL 1.12 and otherwise the versions of this one, once."""
    ready = TRL112_VENV / ".ready"
    if ready.exists():
        return
    print(f"Making {TRL112_VENV.name} with TRL 1.12.0", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(TRL112_VENV)], check=True)
    pip = [str(TRL112_VENV / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    pip += os.environ.get("PIP_FLAGS", "").split()
    # torch first, in its exact version, as in the Makefile
    subprocess.run([*pip, f"torch=={version('torch').partition('+')[0]}"], check=True)
    same = [f"{package}=={version(package)}" for package in SAME_VERSIONS]
    subprocess.run([*pip, "trl==1.12.0", *same], check=True)
    ready.touch()


def section(title: str, setting: Setting, contenders, targets, options) -> str:
    """Run a setting's contenders in turn, and return the results in Markdown."""
    rounds: list[dict[str, dict]] = []
    for number in range(options.runs):
        shift = number % len(contenders)  # so that none is always first
        rounds.append({})
        for contender in contenders[shift:] + contenders[:shift]:
            report = rounds[-1][contender.name] = run(contender, setting)
            print(
                f"{title}, round {number + 1}, {contender.name}: {report['samples_per_second']:.2f} samples/s, "
                f"{report['peak_memory']:.0f} MiB",
                flush=True,
            )
        Path(setting.folder, "reports.json").write_text(json.dumps(rounds, indent=1))
    return "\n".join(
        [f"## {title}", "", describe(setting), "", table(contenders, rounds), "", *ratios(targets, rounds), ""]
    )


def run(contender: Contender, setting: Setting) -> dict:
    """Run a contender once in its own process, and return its report."""
    python = str(TRL112_VENV / "bin" / "python") if contender is TRL112 else sys.executable
    command = [python, "-m", contender.module, as_json(setting), json.dumps(contender.options)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{contender.name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(contenders, rounds: list[dict[str, dict]]) -> str:
    """Return a table of medians over the rounds, one contender per row."""
    gpu = "peak_gpu_memory" in rounds[0][contenders[0].name]
    columns = ["", "samples/s", "s per rollout", *PHASES, "peak memory (MiB)", *(["GPU memory (MiB)"] if gpu else [])]
    lines = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
    for contender in contenders:
        reports = [reports_of_round[contender.name] for reports_of_round in rounds]
        cells = [
            contender.name,
            f"{median(r['samples_per_second'] for r in reports):.2f}",
            f"{median(r['seconds'] for r in reports):.2f}",
            *(f"{median(r['phases'][phase] for r in reports):.2f}" for phase in PHASES),
            f"{median(r['peak_memory'] for r in reports):.0f}",
        ]
        if gpu:
            cells.append(f"{median(r['peak_gpu_memory'] for r in reports):.0f}")
        lines.append(_row(cells))
    return "\n".join(lines)


def ratios(targets, rounds: list[dict[str, dict]]) -> list[str]:
    """Return a table of the ratios: median and range over the rounds, and the target."""
    names = {"samples_per_second": "samples/s", "seconds": "time", "peak_memory": "peak memory"}
    lines = [_row(["ratio", "median", "range", "target", ""]), _row(["---", "---:", "---:", "---:", "---"])]
    for target in targets:
        found = [r[target.better.name][target.quantity] / r[target.worse.name][target.quantity] for r in rounds]
        middle = median(found)
        met = middle >= target.limit if target.at_least else middle <= target.limit
        lines.append(
            _row(
                [
                    f"{names[target.quantity]}, {target.better.name} / {target.worse.name}",
                    f"{middle:.2f}",
                    f"{min(found):.2f} to {max(found):.2f}",
                    f"{'at least' if target.at_least else 'at most'} {target.limit}",
                    "met" if met else "missed",
                ]
            )
        )
    return lines


def heading(runs: int) -> str:
    """Return the head of the page: machine, versions, and how it was measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = ", ".join(f"{package} {version(package)}" for package in ("trl", "torch", *SAME_VERSIONS[:3]))
    machine = f"{torch.get_num_threads()} threads on {os.cpu_count()} CPU cores ({platform.machine()}), {device}"
    return f"""# Benchmark

`make bench`: {machine}.
Python {platform.python_version()}, {versions}.
TRL 1.12.0 runs with the same torch, transformers, PEFT and accelerate.

Each contender runs in its own process; they take turns, {runs} rounds. Figures are medians over the rounds; the first
rollout of a process doesn't count. Times are seconds per rollout. Peak memory is a process's largest resident size
less that after its imports.

All train on the same prompts with the same starting weights, reward model, batch, epochs, mini-batches and number of
tokens, without gradient checkpointing. None samples EOS or padding (`suppress_tokens` in the model's generation
config), so each completion has full length and nothing is padded. TRL 1.12's critic is always a separate network,
started from the reward model and trained in full as in its example script, under LoRA too; it runs all mini-batches
but takes one optimizer step per epoch, whatever `num_mini_batches` says. Ours has the allocator's thresholds that
train.py sets (`rlhf_trl.patches.malloc`); the others have glibc's own. The bare loop is plain PyTorch
(`bench/bare.py`): the same arithmetic, no metrics, nothing around it. In float32 all three take the policy's old
log-probabilities from the passes that sampled; in bfloat16 ours and the bare loop compute them anew.
"""


def describe(setting: Setting) -> str:
    """Return a setting in one sentence."""
    return (
        f"Rollouts of {setting.batch} prompts of {setting.prompt_tokens} tokens, {setting.new_tokens} new tokens "
        f"each; {setting.epochs} epochs of {setting.mini_batches} mini-batches; {setting.dtype}."
    )


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
