"""Normalizer moments, KL coefficients and multipliers on two CPU ranks: those of one, given the same completions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny import save_model

SCRIPT = """
import json
import pathlib
import sys
import torch
from rlhf_trl.callbacks.kl import AdaptiveKL
from rlhf_trl.callbacks.reward_norm import ReferenceNorm, RunningNorm
from rlhf_trl.rewards.lagrange import Lagrange
from tests.helpers.rl import TRAINERS, count_of_a, logged, rl_trainer
from tests.helpers.ppo import prompts

path, out, ranks = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])


def completions(prompt_ids, *args):
    # By the prompt and the place in its group alone, whichever rank asks
    made = []
    for i, ids in enumerate(prompt_ids):
        generator = torch.Generator().manual_seed(2 * sum(ids) + i % 2)
        length = int(torch.randint(1, 6, (1,), generator=generator))
        made.append(torch.randint(5, 9, (length,), generator=generator).tolist() + [1])
    return made


def sometimes(completions, **kwargs):
    return [None if "b" in text else float(len(text)) for text in completions]


found = {}
for kind in TRAINERS:
    for make in (RunningNorm, ReferenceNorm):
        data = prompts(16).add_column("reference", ["a b", "a a a", "c", "a"] * 4)
        trainer = rl_trainer(
            kind, path, out / kind, data=data, reward_funcs=[count_of_a, sometimes], optim="sgd", learning_rate=0.05,
            per_device_train_batch_size=8 // ranks, num_iterations=2,
        )
        assert trainer.accelerator.num_processes == ranks
        trainer._generate_single_turn = completions if kind == "rloo" else lambda *args: (completions(*args), None)
        extra = {"column": "reference"} if make is ReferenceNorm else {}
        norm, controller = make(trainer=trainer, **extra), AdaptiveKL(0.1, 0.01, horizon=100, trainer=trainer)
        trainer.add_callback(norm)
        trainer.add_callback(controller)
        trainer.train()
        keys = ("objective/kl", "objective/kl_coef", "objective/scores", "objective/scores_normalized")
        rollout = trainer.last_rollout
        found[f"{kind} {make.__name__}"] = {
            **norm.state()["attributes"], "coef": controller.coef,
            "rollout": [rollout.kl, rollout.kl_std, rollout.num_sequences],
            **{key: logged(trainer, key) for key in keys},
        }
for kind in TRAINERS:
    lagrange = Lagrange({"sometimes": "<= 5"}, lambda_lr=0.3, window=12)
    trainer = rl_trainer(
        kind, path, out / kind, data=prompts(16), reward_funcs=[count_of_a, sometimes], optim="sgd",
        learning_rate=0.05, per_device_train_batch_size=8 // ranks, num_iterations=2, combine=lagrange,
    )
    trainer._generate_single_turn = completions if kind == "rloo" else lambda *args: (completions(*args), None)
    trainer.train()
    keys = ("objective/scores", "constraints/sometimes/lambda", "constraints/sometimes/violation_rate", "grad_norm")
    found[f"{kind} Lagrange"] = {
        **lagrange.multipliers, "mean cost": lagrange.mean_cost("sometimes"),
        "objective": {key: logged(trainer, key) for key in keys},
    }
pathlib.Path(out, f"found_{trainer.accelerator.process_index}.json").write_text(json.dumps(found))
trainer.accelerator.end_training()
"""


def flat(value, name="") -> dict[str, float]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flat(item, f"{name}/{key}").items()}
    return {name: value}


@pytest.mark.slow
def test_moments_coefficients_and_multipliers_do_not_depend_on_the_number_of_ranks(tmp_path):
    path = save_model(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    found = {}
    for ranks in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        out = tmp_path / str(ranks)
        arguments = [str(tmp_path / "script.py"), path, str(out), str(ranks)]
        command = [*(launch if ranks == 2 else [sys.executable]), *arguments]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found[ranks] = [flat(json.loads((out / f"found_{rank}.json").read_text())) for rank in range(ranks)]
    (one,), two = found[1], found[2]
    assert len(one) > 100 and abs(one["/grpo RunningNorm/objective/kl/3"]) > 1e-3
    shared = {key for key in one if "/objective/" not in key}  # TRL's logs are of rank 0
    assert {key: two[0][key] for key in shared} == {key: two[1][key] for key in shared}
    for key, value in one.items():
        assert two[0][key] == pytest.approx(value, abs=1e-5, rel=1e-5), key
