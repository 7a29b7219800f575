"""A rank that dies: the others end with it, the last checkpoint is whole, and the run resumes, also on fewer ranks."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_trl.cli.launcher import launch_command
from rlhf_trl.runs.checkpoints import last_whole_checkpoint

ROOT = Path(__file__).parents[2]
CALLBACK = """
import os
import signal
import time
from transformers import TrainerCallback


class Death(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        kind = os.environ.get("DEATH")
        if kind is None or os.environ.get("RANK") != "1" or state.global_step != 5:
            return
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "raise":
            raise ValueError("the second card fell off the bus")
        time.sleep(10_000)
"""
TIMEOUT = 20  # seconds that the ranks wait for each other
OVERRIDES = [
    *("stage=sft", "data.max_samples=96", "data.max_eval_samples=16", "stage.args.max_steps=8"),
    *("stage.args.save_steps=2", f"+stage.args.ddp_timeout={TIMEOUT}", "+callbacks.death._target_=death.Death"),
]


def launch(folder: Path, *overrides: str, ranks: int = 2, death: str | None = None) -> subprocess.CompletedProcess:
    """Run SFT with eight rows in each step; rank 1 dies in the fifth."""
    (folder / "death.py").write_text(CALLBACK)
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"DEATH": death} if death else {}
    with contextlib.chdir(folder):  # paths of the command are relative to it
        command = [sys.executable] if ranks == 1 else launch_command("ddp", ["--num_processes", str(ranks)])[:-1]
    rows = f"stage.args.per_device_train_batch_size={8 // ranks}"
    command = [*command, str(ROOT / "train.py"), *OVERRIDES, rows, *overrides]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("death", ["kill", "raise", "hang"])
def test_a_dead_rank_ends_the_others_and_leaves_a_whole_checkpoint(tmp_path, death):
    """Resumed on two ranks, the run ends as one that nothing stopped; on one rank, up to the order of sums."""
    start = time.monotonic()
    died = launch(tmp_path, "project=dead", death=death)
    output = died.stdout + died.stderr
    assert died.returncode != 0, output[-3000:]
    assert time.monotonic() - start < 200
    if death == "raise":
        assert "the second card fell off the bus" in output
    run_dir = tmp_path / "runs/dead/sft"
    checkpoint, damaged = last_whole_checkpoint(run_dir)
    assert checkpoint is not None and checkpoint.endswith("checkpoint-4") and damaged == {}
    assert not (run_dir / "model.safetensors").exists()
    if death != "kill":
        return
    shutil.copytree(tmp_path / "runs/dead", tmp_path / "runs/fewer")
    for words, ranks in ((["project=whole"], 2), (["project=dead", "resume=true"], 2)):
        done = launch(tmp_path, *words, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    whole, resumed = (weights(tmp_path / "runs" / project / "sft") for project in ("whole", "dead"))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    # The project is a part of the config, so the copy takes the place of the run
    shutil.rmtree(tmp_path / "runs/dead")
    (tmp_path / "runs/fewer").rename(tmp_path / "runs/dead")
    done = launch(tmp_path, "project=dead", "resume=true", ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "It began on 2 ranks" in done.stdout
    for name, weight in weights(run_dir).items():
        torch.testing.assert_close(weight, whole[name], atol=1e-5, rtol=1e-5)
