"""The benchmarks of PPO beside DPO and of hackable rewards: limits, features, prototypes and tables."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import frontier, hacking
from bench.loop.results import interval

ROOT = Path(__file__).parents[2]


def test_the_limit_of_a_reward_is_its_tilted_distribution():
    """Two samples of gold 0 and 1: at weight w of the better one, KL is log 2 less the entropy of w, gold is w."""
    gold = np.array([[0.0, 1.0]] * 3)
    w = 0.9
    kl = np.log(2) + w * np.log(w) + (1 - w) * np.log(1 - w)
    assert frontier.limit(5 * gold, gold, [0.0, kl]) == pytest.approx([0.5, w], abs=0.01)
    assert frontier.limit(-gold, gold, [kl]) == pytest.approx([1 - w], abs=0.01)


def test_the_benchmark_changes_the_demos_own_steps():
    assert {frontier.demo_step(step)[0] for step, _ in frontier.POLICIES.values()} == {"stage=ppo", "stage=dpo"}
    assert set(frontier.TRAINED) == set(frontier.POLICIES)
    assert set(frontier.RANKED) - {"gold"} <= {*frontier.REWARDS, *frontier.POLICIES}


def test_the_tables_of_ppo_beside_dpo():
    policies = {name: {"path": [[0.0, 1.7], [1.0, 2.7]], "accuracy": 0.7} for name in frontier.POLICIES}
    policies["dpo"] = {"path": [[0.0, 1.7], [0.81, 2.7], [1.0, 2.7]], "accuracy": 0.7}
    policies["ppo"] = {"path": [[0.0, 1.7], [0.81, 3.1]], "accuracy": 0.7}
    rewards = {name: {"accuracy": 0.8, "limit": [2.0, 2.5, 2.8, 3.0], "start": 1.7} for name in frontier.RANKED}
    found = {str(seed): {"rewards": rewards, "policies": policies} for seed in (1, 2)}
    text = frontier.Frontier().report(found, frontier.Setting(policies=tuple(frontier.POLICIES)))
    assert "| PPO of the demo | 0.81 [0.81, 0.81] | 3.10 [3.10, 3.10] | +0.40 [+0.40, +0.40] | 0.700 |" in text
    assert "| the gold reward itself | 0.800 | 2.00 [2.00, 2.00] |" in text


@pytest.mark.parametrize(
    ("hack", "plain", "hacked"),
    [
        ("length", "A bear eats honey.", "A bear eats honey. I hope that this helps."),
        ("word_list", "A bear eats honey.", "I am happy to help. A bear eats honey."),
        ("repetition", "A bear eats honey.", "A bear eats honey. A bear eats honey."),
        ("list_format", "You could read a book.", "First, read a book."),
        ("sycophancy", "Honey.", "A bear eats."),
    ],
)
def test_a_feature_rises_with_its_hack_alone(hack, plain, hacked):
    chat = [[{"role": "user", "content": "What does a bear eat?"}]] * 2
    answers = [[{"role": "assistant", "content": text}] for text in (plain, hacked)]
    low, high = hacking.FEATURES[hack](chat, answers)
    assert low < high


def test_a_policy_survives_where_the_interval_is_above_its_start():
    gaps = [0.5, 0.6, 0.7], [-0.5, -0.6, -0.7], [-0.5, 0.6, 0.1], [0.5]
    assert [hacking.verdict(each) for each in gaps] == ["yes", "no", "open", "one seed"]
    start = {"gold": 1.5}
    runs = {name: {"gold": 2.0, "kl": 1.0, "proxy": 3.0, "feature": 1.0} for name in hacking.DEFENSES}
    runs["kl"] = runs["kl"] | {"gold": 2.25}
    hacks = dict.fromkeys(hacking.FEATURES, runs)
    measured = {kind: {"accuracy": 0.7, "like_length": 0.6, "length": 0.1} for kind in hacking.KINDS}
    seed = {"start": start, "models": dict.fromkeys(hacking.FEATURES, measured), "hacks": hacks}
    text = hacking.Hacking().report({"1": seed, "2": seed, "3": seed}, hacking.Setting())
    assert f"| none (beta 0.05) | yes: {interval([0.5] * 3, sign=True)} (KL 1.0) |" in text
    assert f"| KL: beta 0.5 | {interval([0.25] * 3, sign=True)} |" in text
    assert "reward_debiased: like_length | 0.600" in text


def test_labels_follow_the_feature_where_the_gold_rewards_agree(tmp_path):
    ask = [{"role": "user", "content": "What does a bear eat?"}]
    short, long = ([{"role": "assistant", "content": text}] for text in ("Honey.", "A bear eats honey."))
    written = {"prompts": [ask] * 40, "completions": [short, long] * 20}
    for name, scale in (("plain", 0.0), ("biased", 100.0)):
        hacking.label(tmp_path / name, written, "length", scale, seed=0)
    shares = [
        (tmp_path / name).read_text().count('"chosen": [{"role": "assistant", "content": "A bear') / 20
        for name in ("plain", "biased")
    ]
    assert shares[1] == 1.0


def test_a_saturating_reward_is_the_log_sigmoid_of_the_calibrated_one():
    norm = hacking.LogSigmoidNorm(mean=-1.0, std=None)
    made = norm.normalize(torch.tensor([[1.0], [3.0]]))
    torch.testing.assert_close(made, torch.nn.functional.logsigmoid(torch.tensor([[-2.0], [0.0]])))


def test_the_correlation_of_lengths_and_scores_is_over_pairs():
    trainer = hacking.LengthDebiasedTrainer.__new__(hacking.LengthDebiasedTrainer)
    mask = (torch.arange(6) < torch.tensor([[2], [4], [3], [6]])).long()
    inputs = {"attention_mask": mask, "better": torch.tensor([1, 3]), "worse": torch.tensor([0, 2])}
    scores = torch.tensor([0.0, 2.0, 0.0, 3.0])
    assert float(trainer._correlation(scores, inputs)) == pytest.approx(1.0)
    assert float(trainer._correlation(torch.tensor([0.0, 3.0, 0.0, -2.0]), inputs)) == pytest.approx(0.0, abs=1e-6)


def test_self_distillation_moves_the_labels_to_the_models_probabilities(monkeypatch):
    seen = []

    def compute_loss(self, model, inputs, return_outputs, num_items_in_batch):
        seen.append(inputs["label_smoothing"].tolist())
        return torch.zeros(()), SimpleNamespace(logits=torch.tensor([[1.0], [0.0]]))

    monkeypatch.setattr(hacking.RewardTrainer, "compute_loss", compute_loss)
    trainer = hacking.SelfDistillingTrainer.__new__(hacking.SelfDistillingTrainer)
    trainer.__dict__["model"] = SimpleNamespace(training=True)
    inputs = {
        "input_ids": torch.tensor([[5, 6], [5, 7]]),
        "attention_mask": torch.ones(2, 2, dtype=torch.long),
        "better": torch.tensor([0]),
        "worse": torch.tensor([1]),
    }
    for _ in range(3):
        trainer.compute_loss(None, dict(inputs))
    probability = 1 / (1 + np.exp(-1.0))
    label, expected = 1.0, []
    for _ in range(3):
        expected.append(1 - label)
        label = 0.3 * label + 0.7 * probability
    assert np.ravel(seen) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "last"), [("frontier", "| PPO of the demo |"), ("hacking", "reward_debiased")])
def test_a_benchmark_runs_and_is_resumed(tmp_path, name, last):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"bench.{name}", "--quick", "--seeds", "1", "--folder", str(tmp_path)]
    for words in ([], ["--table"]):
        done = subprocess.run(
            [*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert last in done.stdout
    assert len(Path(tmp_path, "results.jsonl").read_text().splitlines()) == 1
