"""PPO on two CPU ranks: the same numbers as on one, given the same completions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import save_model

SCRIPT = """
import json
import pathlib
import sys
from tests.test_ppo_update import make_trainer, prompts
path, out, ranks = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
trainer, _ = make_trainer(
    path, out, data=prompts(32), per_device_train_batch_size=4 // ranks, steps_per_generation=4,
    gradient_accumulation_steps=2, num_iterations=2, missing_eos_penalty=0.5,
)
assert trainer.accelerator.num_processes == ranks
trainer.train()
trainer.save_model()
if trainer.accelerator.is_main_process:
    pathlib.Path(trainer.args.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))
"""


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(tmp_path):
    path = save_model(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    logs, weights = {}, {}
    for ranks in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launch = launch if ranks == 2 else [sys.executable]
        out = tmp_path / str(ranks)
        arguments = [str(tmp_path / "script.py"), path, str(out), str(ranks)]
        done = subprocess.run([*launch, *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        logs[ranks] = json.loads((out / "run" / "log.json").read_text())
        weights[ranks] = {
            **load_file(out / "run" / "model.safetensors"),
            **load_file(out / "run" / "critic.safetensors"),
        }
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[2][name], value, atol=1e-5, rtol=1e-5)
    keys = ("objective/scores", "objective/kl", "value/loss", "policy/loss", "policy/entropy")
    for key in (*keys, "value/explained_variance"):
        one, two = ([entry[key] for entry in logs[ranks] if key in entry] for ranks in (1, 2))
        assert len(one) == 2 and two == pytest.approx(one, abs=1e-4), key
