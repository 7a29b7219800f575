"""The matrix of stages and engines: its table, and a part of it, run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.engines.__main__ import failed, read, table
from bench.engines.cells import ENGINES, cells
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
    assert stages == {"sft", "reward", "dpo", "orpo", "kto", "rloo", "grpo", "ppo"}


@pytest.mark.parametrize("name", ["grpo lora", "ppo/model full"])
def test_a_row_of_the_matrix_has_no_problem(compose, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
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
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(result) + "\n" for result in results))
    found = read(file)
    assert table(found).splitlines() == [
        "| | DDP | FSDP2 | ZeRO-2 | ZeRO-3 |",
        "|---|---|---|---|---|",
        "| sft full | 2e-07 | 3e-04 | skipped: DeepSpeed is not installed |  |",
        "| orpo full | 5e-04 |  |  |  |",
        "| ppo/head full | runs, **resumed 5e-01** |  |  | **exit status 1: no** |",
    ]
    assert [key for key, result in found.items() if failed(result)] == [
        ("sft full", "fsdp2"),
        ("ppo/head full", "ddp"),
        ("ppo/head full", "zero3"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", ["fsdp2", pytest.param("zero2", marks=NO_DEEPSPEED), pytest.param("zero3", marks=NO_DEEPSPEED)]
)
def test_a_part_of_the_matrix(tmp_path, engine):
    """
    Each run agrees with two ranks of DDP, resumes exactly, and its model loads with plain transformers or PEFT: with
    one model, with a critic that is a copy of the policy, and with a second model that is loaded beside it.
    """
    rows = "^(sft full|ppo/model lora|reward full|ppo/model full, critic.run, reward=model)$"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.engines", "--only", rows, "--engines", engine, "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    found = read(tmp_path / "results.jsonl")
    assert done.returncode == 0, [result for result in found.values() if failed(result)]
    assert {name for _, name in found} == {"ddp", engine} <= set(ENGINES) and len(found) == 8
