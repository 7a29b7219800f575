"""The matrix of stages and engines: its table, and a part of it, run."""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.engines.__main__ import failed, read, table
from bench.engines.architectures import MODELS, make_models
from bench.engines.cells import ENGINES, cells
from bench.engines.compare import break_off, difference, load
from rlhf_trl.checks import find_problems

ROOT = Path(__file__).parents[2]
NO_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed isn't installed: pip install 'rlhf-trl[deepspeed]'",
)
GOOD = {"difference": 2e-7, "resumed": 0.0, "twice_tied": False, "seconds": 9.0}


def test_each_row_of_the_matrix_has_a_name_and_folder_of_its_own():
    rows = cells()
    names, folders = {cell.name for cell in rows}, {cell.folder for cell in rows}
    assert len(names) == len(folders) == len(rows)
    assert {name for cell in rows for name in cell.needs} <= names
    stages = {name.split("/")[0].split()[0] for name in names}
    assert stages == {"sft", "reward", "dpo", "modpo", "orpo", "kto", "rloo", "grpo", "online_dpo", "ppo"}


@pytest.mark.parametrize(
    "name",
    [
        "grpo lora",
        "online_dpo full",
        "ppo/adapter lora, combine=lagrange",
        "ppo/head full, bf16",
        "ppo/head full, OPT",
    ],
)
def test_a_row_of_the_matrix_has_no_problem(compose, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    make_models(tmp_path / MODELS)
    cell = next(cell for cell in cells() if cell.name == name)
    cfg = compose(*cell.command(2, "ddp"))
    assert find_problems(cfg) == []
    assert cfg.run_dir == f"runs/ddp/{cell.folder}"
    assert cfg.stage.args.per_device_train_batch_size * 2 == cell.rows


def test_the_table_shows_what_differs_and_what_failed(tmp_path):
    results = [
        {"row": "sft full", "engine": "ddp", **GOOD},
        {"row": "sft full", "engine": "fsdp2", "error": "exit status 1: no"},
        {"row": "sft full", "engine": "fsdp2", **GOOD, "difference": 3e-4},  # measured again
        {"row": "sft full", "engine": "zero2", "skipped": "DeepSpeed is not installed"},
        {"row": "orpo full", "engine": "ddp", **GOOD, "difference": 5e-4},
        {"row": "ppo/head full", "engine": "ddp", "resumed": 0.5, "twice_tied": False},
        {"row": "ppo/head full", "engine": "zero3", "error": "exit status 1: no"},
        {"row": "kto full", "engine": "ddp", **GOOD, "difference": math.nan},
        {"row": "kto full", "engine": "fsdp2", **GOOD, "resumed": math.nan},
        {"row": "kto full", "engine": "zero2", **GOOD, "files": ["pad.bin"], "logged": ["loss", "lr"]},
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(result) + "\n" for result in results))
    found = read(file)
    assert table(found).splitlines() == [
        "| | DDP | FSDP2 | ZeRO-2 | ZeRO-3 |",
        "|---|---|---|---|---|",
        "| sft full | 2e-07 | 3e-04 | skipped: DeepSpeed is not installed |  |",
        "| orpo full | 5e-04 |  |  |  |",
        "| kto full | nan | 2e-07, **resumed nan** | 2e-07, **files: pad.bin**, **logged: loss, lr** |  |",
        "| ppo/head full | runs, **resumed 5e-01** |  |  | **exit status 1: no** |",
    ]
    assert [key for key, result in found.items() if failed(result)] == [
        ("sft full", "fsdp2"),
        ("ppo/head full", "ddp"),
        ("ppo/head full", "zero3"),
        ("kto full", "ddp"),
        ("kto full", "fsdp2"),
        ("kto full", "zero2"),
    ]


@pytest.mark.parametrize(
    ("last", "expected"), [(1.0, 0.5), (math.nan, math.nan)], ids=["the largest", "NaN, behind a larger number"]
)
def test_the_difference_of_two_runs_is_that_of_all_weights(tmp_path, last, expected):
    for name, values in (("one", [1.0, 1.0, 1.0]), ("other", [1.0, 0.5, last])):
        (tmp_path / name).mkdir()
        tensors = {f"layer_{i}": torch.tensor([0.0, value]) for i, value in enumerate(values)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert difference(tmp_path / "one", tmp_path / "other") == pytest.approx(expected, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", ["fsdp2", pytest.param("zero2", marks=NO_DEEPSPEED), pytest.param("zero3", marks=NO_DEEPSPEED)]
)
def test_a_part_of_the_matrix(tmp_path, engine):
    """
    Each run agrees with two ranks of DDP, and those with one, resumes exactly, and its model loads with plain
    transformers or PEFT: with one model, with a reference, with a critic that is a copy of the policy, and with a
    second model that is loaded beside it.
    """
    rows = "^(sft full|online_dpo full|ppo/model lora|reward full|ppo/model full, critic.run, reward=model)$"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.engines", "--only", rows, "--engines", engine, "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    found = read(tmp_path / "results.jsonl")
    assert done.returncode == 0, [result for result in found.values() if failed(result)]
    assert {name for _, name in found} == {"ddp", engine} <= set(ENGINES) and len(found) == 10


def rehearsals() -> list[str]:
    """Return the commands of the documentation that rehearse an engine on CPU ranks."""
    _, section = (ROOT / "docs" / "launching.md").read_text().split("## Rehearsal on a CPU\n")
    return [line for line in section.split("\n## ")[0].splitlines() if "accelerate launch --config_file" in line]


def test_each_engine_has_its_rehearsal():
    assert [re.search(r"accelerate/(\w+)\.yaml", line).group(1) for line in rehearsals()] == ["ddp", "fsdp2", "zero3"]


def launch(command: str, *overrides: str) -> str:
    """Run a command line of the documentation with overrides that make it short, and return what it says."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        f"{command} {shlex.join(overrides)}",
        shell=True,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=NO_DEEPSPEED)])
def test_an_engine_is_rehearsed_by_the_documented_command(tmp_path, engine):
    command = next(line for line in rehearsals() if f"/{engine}.yaml" in line)
    sizes = ["stage.args.total_episodes=128", "stage.args.max_completion_length=12", "data.max_eval_samples=16"]
    said = launch(command, *sizes, f"runs_dir={tmp_path}")
    run_dir = tmp_path / "default" / "ppo"
    run = json.loads((run_dir / "run.json").read_text())
    assert run["status"] == "done" and run["inputs"]["ranks"] == 2, said[-2000:]
    assert run["inputs"]["engine"] == {"ddp": "DDP", "fsdp2": "FSDP2", "zero3": "DeepSpeed ZeRO-3"}[engine]
    assert "leaves out" not in said
    load(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 1])
def test_fsdp2_resumes_on_another_number_of_ranks(tmp_path, ranks):
    """Each step keeps its rows, and the weights are those of a run that nothing stopped; one process has no FSDP."""
    words = "stage=sft data.max_samples=96 data.max_eval_samples=8 stage.args.max_steps=4 stage.args.save_steps=2"

    def command(count: int) -> str:
        file = "--config_file launch/accelerate/fsdp2.yaml"
        rows = f"stage.args.per_device_train_batch_size={8 // count} runs_dir={tmp_path}"
        return f"ACCELERATE_USE_CPU=true accelerate launch {file} --num_processes {count} train.py {words} {rows}"

    launch(command(2))
    run_dir, whole = tmp_path / "default" / "sft", tmp_path / "whole"
    shutil.copytree(run_dir, whole)
    break_off(run_dir)
    if ranks == 1:
        with pytest.raises(AssertionError, match="`engine` was FSDP2 and is none"):
            launch(command(ranks), "resume=true")
    else:
        assert "It began on 2 ranks." in launch(command(ranks), "resume=true")
        assert difference(run_dir, whole) < 1e-5
