"""PPO under FSDP2 on two CPU ranks, by the file that is shipped: the numbers of one process, and an exact resume."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from rlhf_trl.cli.launcher import launch_command
from tests.helpers.ppo import LORA, make_trainer, prompts, save_reward_model
from tests.helpers.tiny import save_model

ROOT = Path(__file__).parents[2]
SCRIPT = """
import shutil
import sys
from pathlib import Path
from accelerate.utils import DistributedType
from torch import float32
from torch.distributed.tensor import DTensor
from tests.helpers.ppo import sampled
from tests.integration.test_fsdp import CHECKPOINTED, roles, trained

path, reward, out, critic = sys.argv[1:]
out = Path(out)
trainer = trained(path, reward, out / "whole", critic, ranks=2, **CHECKPOINTED)
accelerator, run_dir = trainer.accelerator, out / "whole" / "run"
assert accelerator.distributed_type == DistributedType.FSDP and accelerator.num_processes == 2
weights = dict(trainer.model.named_parameters())
assert all(isinstance(weight, DTensor) for weight in weights.values())
assert {weight.placements[0].dim for weight in weights.values()} == {0}
if accelerator.is_main_process:
    (out / "again").mkdir()
    shutil.copytree(run_dir / "checkpoint-2", out / "again" / "checkpoint-2")
accelerator.wait_for_everyone()
checkpoint = str(out / "again" / "checkpoint-2")
trained(path, reward, out / "again", critic, ranks=2, resume=checkpoint, **CHECKPOINTED)

half = sampled(path, out / "half", bf16=True, per_device_train_batch_size=2, max_steps=1, **roles(critic, reward))
scores, score_tokens = [], half._score_tokens
half._score_tokens = lambda *args, **kwargs: scores.append(score_tokens(*args, **kwargs)) or scores[-1]
half.train()
for kind in ("logps", "values"):
    found = [getattr(each, kind) for each in scores]
    assert found and all(each.dtype == float32 for each in found), kind
    assert any((each.bfloat16().float() != each).any() for each in found), kind  # not rounded on their way
losses = [entry["value/loss"] for entry in half.state.log_history if "value/loss" in entry]
assert half.state.global_step == 1 and len(losses) == 1 and 0 < losses[0] < float("inf")
accelerator.end_training()
"""
CHECKPOINTED = {"save_strategy": "steps", "save_steps": 1}


def roles(critic, reward) -> dict:
    """Return the arguments of a critic, and of the policy's adapter where it needs one."""
    lora = {"peft_config": LoraConfig(**LORA, task_type="CAUSAL_LM")} if critic == "adapter" else {}
    return {"critic": critic, "critic_path": None if critic == "head" else reward} | lora


def trained(path, reward, out, critic, ranks, resume=None, **options):
    """Train three rollouts with completions that depend on the prompt alone, save the model, return the trainer."""
    torch.manual_seed(0)  # of the adapter
    trainer, _ = make_trainer(
        path,
        out,
        data=prompts(24),
        per_device_train_batch_size=4 // ranks,
        gradient_accumulation_steps=2,
        **(roles(critic, reward) | options),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that a run has saved, policy's and critic's."""
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2
    return load_file(files[0]) | load_file(files[1])


@pytest.mark.parametrize(
    "critic",
    ["head", pytest.param("adapter", marks=pytest.mark.slow), pytest.param("model", marks=pytest.mark.slow)],
)
def test_ppo_on_two_sharded_ranks_is_that_of_one_process_and_resumes_exactly(tmp_path, critic):
    """In float32; and a step in bfloat16, in which FSDP casts all weights, the critic's included."""
    path = save_model(tmp_path / "model")
    reward = save_reward_model(path, tmp_path / "reward")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = launch_command("fsdp2", ["--num_processes", "2", "--mixed_precision", "no"])[:-1]
    command += [str(tmp_path / "script.py"), path, reward, str(tmp_path / "fsdp"), critic]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    trained(path, reward, tmp_path / "one", critic, ranks=1)
    whole, again, one = (weights_in(tmp_path / name) for name in ("fsdp/whole/run", "fsdp/again/run", "one/run"))
    assert whole.keys() == again.keys() >= one.keys()
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
    for name, weight in one.items():
        torch.testing.assert_close(whole[name], weight, atol=1e-5, rtol=1e-5)
