"""PPO in processes: two CPU ranks give the numbers of one, given the same completions; runs that are killed."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rlhf_trl.runs.checkpoints import last_checkpoint
from tests.helpers.ppo import save_reward_model
from tests.helpers.tiny import save_model

SCRIPT = """
import json
import pathlib
import sys
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from rlhf_trl.runs.checkpoints import last_checkpoint
from rlhf_trl.rewards import AdapterReward
from tests.helpers.ppo import LORA
from tests.helpers.ppo import make_trainer, prompts
path, reward, out, ranks, critic, epochs, resume = sys.argv[1:]
out, ranks = pathlib.Path(out), int(ranks)
set_seed(0)
lora = {"peft_config": LoraConfig(**LORA, task_type="CAUSAL_LM"), "reward_funcs": AdapterReward(reward)}
completions = ["a b c d e"[: 1 + 2 * i] for i in range(8)]
demonstrations = Dataset.from_dict({"prompt": list("abcdefgh"), "completion": completions})
trainer, _ = make_trainer(
    path, out, data=prompts(48), per_device_train_batch_size=4 // ranks, steps_per_generation=4,
    gradient_accumulation_steps=2, num_iterations=2, missing_eos_penalty=0.5, critic=critic,
    critic_path=None if critic == "head" else reward, critic_warmup_steps=1, ratio_threshold=5.0,
    ptx_coef=0.5, ptx_dataset=demonstrations, save_strategy="steps", save_steps=1, save_total_limit=3,
    num_train_epochs=int(epochs),
    **(lora if critic == "adapter" else {}),
)
assert trainer.accelerator.num_processes == ranks
trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir) if resume == "resume" else None)
trainer.save_model()
if trainer.accelerator.is_main_process:
    pathlib.Path(trainer.args.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))
trainer.accelerator.end_training()
"""


def start(tmp_path, ranks, critic, resume="", epochs=1, out=None):
    """Start a process of a run, with a process group of its own."""
    path, reward = tmp_path / "model", tmp_path / "reward"
    if not reward.exists():
        save_model(path)
        save_reward_model(str(path), reward)
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch = launch if ranks == 2 else [sys.executable]
    arguments = [tmp_path / "script.py", path, reward, out or tmp_path / str(ranks), ranks, critic, epochs, resume]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launch, *map(str, arguments)], cwd=root, env=env, start_new_session=True, **pipes)


def run(tmp_path, ranks, critic, *options, **named):
    """Return the log and the final weights of a run, policy's and critic's."""
    process = start(tmp_path, ranks, critic, *options, **named)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error[-3000:]
    out = named.get("out") or tmp_path / str(ranks)
    weights = [load_file(file) for file in sorted((out / "run").glob("*.safetensors"))]
    assert len(weights) == 2
    return json.loads((out / "run" / "log.json").read_text()), weights[0] | weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["head", "adapter", "model"])
def test_two_ranks_give_the_numbers_of_one(tmp_path, critic):
    """Every role: with `adapter`, policy, reference, critic and reward are adapters on one base."""
    (log, weights), (log_of_two, weights_of_two) = (run(tmp_path, ranks, critic) for ranks in (1, 2))
    assert weights.keys() == weights_of_two.keys()
    for name, value in weights.items():
        torch.testing.assert_close(weights_of_two[name], value, atol=1e-5, rtol=1e-5)
    keys = ("objective/scores", "objective/kl", "value/loss", "policy/loss", "policy/entropy", "policy/ptx_loss")
    for key in (*keys, "value/explained_variance", "policy/skipped"):
        one, two = ([entry[key] for entry in entries if key in entry] for entries in (log, log_of_two))
        assert len(one) == 3 and two == pytest.approx(one, abs=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["head", "adapter", "model"])
def test_two_ranks_resume_exactly(tmp_path, critic):
    log, weights = run(tmp_path, 2, critic)
    checkpoints = sorted((tmp_path / "2/run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(checkpoints[-1])
    again, resumed = run(tmp_path, 2, critic, "resume")
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    for key in ("objective/scores", "value/loss", "policy/loss", "policy/ptx_loss"):
        assert [e[key] for e in again if key in e] == [e[key] for e in log if key in e]


@pytest.mark.slow
@pytest.mark.parametrize("critic, ranks", [("head", 1), ("adapter", 1), ("model", 1), ("model", 2)])
def test_a_killed_run_resumes_from_a_whole_checkpoint(tmp_path, critic, ranks):
    """SIGKILL at a random moment of a run that saves at every rollout; resumed, it ends as one that was let run."""
    log, weights = run(tmp_path, ranks, critic, epochs=6, out=tmp_path / "whole")
    process = start(tmp_path, ranks, critic, epochs=6)
    folder = tmp_path / str(ranks) / "run"
    while len(list(folder.glob("checkpoint-*"))) < 2:
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    ranks_of_it = psutil.Process(process.pid).children(recursive=True)  # torchrun gives each a session of its own
    for victim in (process, *ranks_of_it):
        victim.kill()
    process.communicate()
    assert last_checkpoint(folder) is not None and not (folder / "log.json").exists()
    again, resumed = run(tmp_path, ranks, critic, "resume", epochs=6)
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    for key in ("objective/scores", "value/loss", "policy/loss", "policy/ptx_loss"):
        assert [e[key] for e in again if key in e] == [e[key] for e in log if key in e]
