"""Figures of an evaluation during training: of each held-out row once, on any number of ranks and any batch size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from transformers import AutoTokenizer

from rlhf_trl.trainers.held_out import BatchMetric, pool_metrics, split_batches
from tests.helpers.held_out import STAGES, deterministic, figures, score
from tests.helpers.tiny import save_model

RL = ("ppo", "grpo", "rloo")
OF_PADDING = ("eval_logits/chosen", "eval_logits/rejected")  # ORPO's are means over padding as well


def same_figures(found: dict, whole: dict, stage: str):
    assert found.keys() == whole.keys() and len(whole) > 3
    kept = {key: value for key, value in whole.items() if stage != "orpo" or key not in OF_PADDING}
    assert {key: found[key] for key in kept} == pytest.approx(kept, rel=1e-5, abs=1e-6)


SIZES = [(11, 4, 1, 1), (11, 4, 2, 1), (3, 4, 4, 1), (8, 4, 2, 1), (22, 4, 2, 2), (33, 3, 4, 3), (18, 4, 6, 6)]


@pytest.mark.parametrize(("rows", "batch_size", "ranks", "group"), SIZES)
def test_every_row_of_a_batch_stands_in_it_equally_often(rows, batch_size, ranks, group):
    batches = split_batches(range(rows), batch_size, ranks, group)
    dealt = []
    for batch in batches:
        given = [row for indices in batch.indices for row in indices]
        assert len({len(indices) for indices in batch.indices}) == 1
        distinct = list(dict.fromkeys(given))
        assert given == distinct * (ranks if batch.copied else 1) and len(distinct) == batch.rows
        assert batch.rows % group == 0 and all(len(each) <= max(batch_size, group) for each in batch.indices)
        dealt += distinct
    assert dealt == list(range(rows))


def test_batches_are_weighted_by_what_they_are_means_of():
    figures = {
        "reward": [BatchMetric(10.0, 4, 4), BatchMetric(40.0, 1, 2)],
        "reward_std": [BatchMetric(2.0, 4, 4), BatchMetric(0.0, 1, 2)],
        "completions/min_length": [BatchMetric(3, 4, 4), BatchMetric(2, 1, 2)],
        "rewards/f/mean": [BatchMetric(float("nan"), 0, 0), BatchMetric(40.0, 1, 2)],
        "rewards/g/mean": [BatchMetric(float("nan"), 0, 0), BatchMetric(0.0, 0, 0)],  # of no row: left out
    }
    # 4 rows with variance 4 around 10 (squares: 12), and one of 40: mean 16
    assert pool_metrics(figures) == pytest.approx(
        {
            "reward": 16.0,
            "reward_std": ((12 + 4 * 6**2 + 24**2) / 4) ** 0.5,
            "completions/min_length": 2,
            "rewards/f/mean": 40.0,
        }
    )


@pytest.mark.parametrize("stage", STAGES)
def test_uneven_batches_give_the_figures_of_one(tmp_path, stage):
    model = save_model(tmp_path / "model")
    whole, uneven = (figures(stage, model, tmp_path / str(size), size) for size in (64, 4))
    same_figures(uneven, whole, stage)
    if stage in RL:
        tokenizer = AutoTokenizer.from_pretrained(model)
        rows = load_dataset("json", data_files=str(tmp_path / f"4/{stage}-eval.jsonl"), split="train")
        written = deterministic(tokenizer(rows["prompt"][:])["input_ids"])
        rewards = [value for value in score(tokenizer.batch_decode(written, skip_special_tokens=True)) if value]
        assert 2 < len(rewards) < 11
        assert uneven["eval_reward"] == pytest.approx(sum(rewards) / len(rewards))


@pytest.mark.slow
def test_two_ranks_give_the_figures_of_one(tmp_path):
    model, root = save_model(tmp_path / "model"), Path(__file__).parents[3]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["tests/helpers/held_out.py", model, str(tmp_path), "4"]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "figures_0.json").read_text())
    for stage in STAGES:
        same_figures(two[stage], figures(stage, model, tmp_path / "one", 64), stage)
