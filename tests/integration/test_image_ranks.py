"""PPO with images in two processes gives the numbers of one, given the same completions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.vision import save_vlm

SCRIPT = """
import json
import pathlib
import sys
from transformers import set_seed
from rlhf_trl.callbacks.samples import SampleLog
from rlhf_trl.models.tokenizers import load_tokenizer
from tests.helpers.ppo_images import Rollouts, make_trainer, questions
path, out, ranks, critic = sys.argv[1:]
out, ranks = pathlib.Path(out), int(ranks)
set_seed(0)
tokenizer = load_tokenizer(path)
trainer = make_trainer(
    path, out, tokenizer, questions(24), Rollouts(tokenizer), critic=critic, per_device_train_batch_size=4 // ranks
)
assert trainer.accelerator.num_processes == ranks
trainer.add_callback(SampleLog(trainer, str(out)))
trainer.train()
trainer.save_model()
if trainer.accelerator.is_main_process:
    pathlib.Path(trainer.args.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))
trainer.accelerator.end_training()
"""


def run(tmp_path, path, ranks, critic):
    """Return the log of a run, its samples, and the final weights, policy's and critic's."""
    (tmp_path / "script.py").write_text(SCRIPT)
    root, out = Path(__file__).parents[2], tmp_path / str(ranks)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch = launch if ranks == 2 else [sys.executable]
    words = [*launch, tmp_path / "script.py", path, out, ranks, critic]
    done = subprocess.run([*map(str, words)], cwd=root, env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = [load_file(file) for file in sorted((out / "run").glob("*.safetensors"))]
    assert len(weights) == 2
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return json.loads((out / "run" / "log.json").read_text()), samples, weights[0] | weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["head", "model"])
def test_two_ranks_with_images_give_the_numbers_of_one(tmp_path, critic):
    path = save_vlm(tmp_path / "model")
    one, two = (run(tmp_path, path, ranks, critic) for ranks in (1, 2))
    (log, samples, weights), (log_of_two, samples_of_two, weights_of_two) = one, two
    assert weights.keys() == weights_of_two.keys()
    for name, value in weights.items():
        torch.testing.assert_close(weights_of_two[name], value, atol=1e-5, rtol=1e-5)
    for key in ("objective/scores", "objective/kl", "value/loss", "policy/loss", "policy/entropy"):
        one, two = ([entry[key] for entry in entries if key in entry] for entries in (log, log_of_two))
        assert len(one) == 3 and two == pytest.approx(one, abs=1e-4), key
    shown, shown_of_two = (
        sorted((row["step"], row["prompt"], row["completion"], row["images"]) for row in rows)
        for rows in (samples, samples_of_two)
    )
    assert len(shown) == 24 and shown == shown_of_two
