"""Two nodes, as two launchers on the loopback device: one run, or one message on both."""

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_trl.cli.launcher import launch_command, launch_dir

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
WORDS = {
    "sft": ["stage=sft", "stage.args.max_steps=4", "stage.args.save_steps=2"],
    "ppo": [
        *("stage=ppo", "stage.args.max_steps=8", "stage.args.save_steps=1", "stage.args.num_iterations=2"),
        *("stage.args.steps_per_generation=2", "stage.args.max_completion_length=12"),
    ],
}
SMALL = ["data.max_samples=96", "data.max_eval_samples=16", "stage.args.per_device_train_batch_size=4"]


def start(folder: Path, options: list[str], *words: str) -> subprocess.Popen:
    """Start a launcher in a folder."""
    folder.mkdir(exist_ok=True)
    command = [
        *launch_command(str(launch_dir() / "accelerate" / "ddp.yaml"), options)[:-1],
        str(ROOT / "train.py"),
        *SMALL,
        *words,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **pipes)


def two_nodes(folders: list[Path], *words: str, timeout: float = 300) -> list[tuple[int, str]]:
    """Return exit status and output of the launchers of two nodes, each in its folder."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    shared += ["--main_process_port", str(port)]
    processes = [start(folder, [*shared, "--machine_rank", str(rank)], *words) for rank, folder in enumerate(folders)]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, said) for process, said in zip(processes, outputs, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", WORDS)
def test_two_nodes_are_two_ranks_of_one(tmp_path, stage):
    one = start(tmp_path / "one", ["--num_processes", "2"], *WORDS[stage])
    said = one.communicate(timeout=300)[0]
    assert one.returncode == 0, said[-3000:]
    for code, said in two_nodes([tmp_path / "two"] * 2, *WORDS[stage]):
        assert code == 0, said[-3000:]
    dirs = [tmp_path / name / "runs" / "default" / stage for name in ("one", "two")]
    files = [{path.name for path in run_dir.glob("*.safetensors")} for run_dir in dirs]
    assert files[0] == files[1] != set()
    for file in files[0]:
        weights, of_two = (load_file(run_dir / file) for run_dir in dirs)
        assert all(torch.equal(of_two[name], weight) for name, weight in weights.items())
    assert json.loads((dirs[1] / "run.json").read_text())["inputs"]["ranks"] == 2
    assert [path.name for path in dirs[1].parent.iterdir()] == [stage]


@pytest.mark.slow
def test_nodes_without_a_shared_folder_end_with_one_message(tmp_path):
    """At the start by the lock that one of them doesn't see; at a resume before anything is loaded."""
    started = time.monotonic()
    for code, said in two_nodes([tmp_path / "a", tmp_path / "b"], *WORDS["sft"]):
        assert code != 0 and "The nodes don't share the run directory" in said, said[-3000:]
        assert "machine_rank 0" in said and "machine_rank 1" in said and str(tmp_path / "a") in said
    assert time.monotonic() - started < 240

    for code, said in two_nodes([tmp_path / "a"] * 2, *WORDS["sft"], "stage.args.max_steps=2"):
        assert code == 0, said[-3000:]
    shutil.rmtree(tmp_path / "b")
    words = [*WORDS["sft"], "resume=true"]
    started = time.monotonic()
    for code, said in two_nodes([tmp_path / "a", tmp_path / "b"], *words):
        assert code != 0 and "The nodes don't share the run directory" in said, said[-3000:]
    assert time.monotonic() - started < 120


@pytest.mark.slow
def test_what_one_node_lacks_ends_both(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 200)
    words = [
        *WORDS["sft"],
        "data=files",
        "data.paths=rows.jsonl",
        "data.max_samples=null",
        "data.max_eval_samples=null",
    ]
    for code, said in two_nodes([tmp_path / "a", tmp_path / "b"], *words):
        assert code != 0 and "(machine_rank 1): " in said and "rows.jsonl" in said, said[-3000:]
