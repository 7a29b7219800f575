"""The benchmark's contenders train on the same numbers: our PPO against the bare loop, and the meter's arithmetic."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import bare, fronts, ours, reward, sparse
from bench.__main__ import BARE_HEAD, OURS_HEAD, Target, ratios, table
from bench.gpu import machine
from bench.gpu.__main__ import main as benchmark_gpu
from bench.gpu.configurations import CONFIGURATIONS
from bench.gpu.cost import update_flops
from bench.gpu.models import SIZES
from bench.gpu.table import tables
from bench.memory import configurations as memory_configurations
from bench.memory import h200
from bench.memory.__main__ import summary as memory_summary
from bench.memory.__main__ import table as memory_table
from bench.setting import PHASES, Meter, Setting, make_prompts, make_small_llama
from rlhf_trl.checks import find_problems
from rlhf_trl.cli import overrides
from rlhf_trl.models.options import soup_points
from rlhf_trl.rewards.shaping import pattern as brevity


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    folder = tmp_path_factory.mktemp("bench")
    make_small_llama(folder)
    make_prompts(folder, 8, 6)
    return Setting(
        str(folder),
        batch=8,
        prompt_tokens=6,
        new_tokens=5,
        epochs=1,
        mini_batches=2,
        lora=False,
        dtype="float32",
        rollouts=1,
    )


def test_ours_and_the_bare_loop_compute_the_same_rollout(setting):
    """Given our completions, the bare loop finds our log-probabilities, values, advantages and returns."""
    meter = Meter()
    trainer = ours.train(setting, {"critic": "head"}, meter)
    meter.end()
    rollout = trainer._rollout
    assert rollout.prompt_mask.all() and rollout.mask.all()
    assert rollout.completion_ids.shape == (8, 5)

    loop = bare.Loop(setting)
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)
    logp, ref, values = loop.old(ids, None, None)
    advantages, returns = loop.advantages(logp, ref, values, loop.score(ids))
    expected = {
        "old_logps": logp,
        "ref_logps": ref,
        "old_values": values,
        "advantages": advantages,
        "returns": returns,
    }
    for key, value in expected.items():
        torch.testing.assert_close(
            getattr(rollout, key), value, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )

    report = meter.report(setting)
    assert all(report["phases"][phase] > 0 for phase in ("generate", "score", "log-probabilities", "update"))
    assert report["seconds"] == pytest.approx(sum(report["phases"].values()))


def test_the_bare_loop_samples_with_the_numbers_of_a_pass(setting):
    loop = bare.Loop(setting)
    torch.nn.init.normal_(loop.head.weight)
    ids, logp, values = loop.generate(torch.tensor([prompt["ids"] for prompt in setting.prompts()]))
    expected, _, expected_values = loop.old(ids, None, None)
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values, expected_values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("critic", ["head", "model"])
def test_the_bare_loop_moves_policy_and_critic(setting, critic):
    before = {k: v.clone() for k, v in bare.Loop(setting, critic).policy.state_dict().items()}
    loop = bare.train(setting, {"critic": critic}, Meter())
    assert any(not torch.equal(v, before[k]) for k, v in loop.policy.state_dict().items())
    trained = loop.head if critic == "head" else loop.critic.score
    start = torch.zeros(1, 256) if critic == "head" else bare.Loop(setting, critic).critic.score.weight
    assert not torch.equal(trained.weight, start)


def test_ratios_are_medians_over_rounds_and_say_if_they_met_their_aim():
    def report(speed):
        return {
            "samples_per_second": speed,
            "seconds": 1 / speed,
            "phases": dict.fromkeys(PHASES, 0.1),
            "peak_memory": 100.0,
        }

    rounds = [{OURS_HEAD.name: report(ours), BARE_HEAD.name: report(4.0)} for ours in (2.0, 8.0, 6.0)]
    fast = Target(OURS_HEAD, BARE_HEAD, "samples_per_second", True, 1.4)
    slow = Target(OURS_HEAD, BARE_HEAD, "samples_per_second", True, 1.6)
    lines = ratios((fast, slow), rounds)
    assert "| 1.50 | 0.50 to 2.00 | at least 1.4 | met |" in lines[2]
    assert "missed" in lines[3]
    assert "| 6.00 | 0.17 |" in table((OURS_HEAD,), rounds)


@pytest.mark.parametrize("model", list(reward.RECIPES))
def test_every_step_of_the_reward_benchmark_passes_the_checks(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RLHF_TRL_REVIEWS", "RLHF_TRL_SMOLLM2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        monkeypatch.setenv(name, str(tmp_path / name))
    made = reward.steps(reward.RECIPES[model], [1, 2])
    assert list(made)[-6:] == ["rankings_1", "pairs_1", "quality_1", "pairs_2", "rankings_2", "quality_2"]
    for name, words in made.items():
        cfg, problems = overrides.compose([*words, "project=bench", f"run_name={name}"])
        assert problems + find_problems(cfg) == [], name
        Path(cfg.run_dir).mkdir(parents=True)
        Path(cfg.run_dir, "run.json").write_text('{"status": "done"}')


def test_the_report_of_the_reward_benchmark():
    results = [
        {
            "rankings": {"accuracy": 0.88, "seconds": s, "steps": 58},
            "pairs": {"accuracy": 0.886, "seconds": 100, "steps": 59},
        }
        for s in (40.0, 50.0, 90.0)
    ]
    options = Namespace(model="smollm2", seeds=[1, 2, 3], threads=2)
    text = reward.report(reward.RECIPES["smollm2"], results, options)
    assert "time ratio, median" in text and text.count(" met") == 4 and "-0.0060" in text and "0.50" in text
    results[0]["rankings"]["accuracy"] = 0.8
    assert reward.report(reward.RECIPES["smollm2"], results, options).count("missed") == 2


def test_every_training_of_the_benchmark_of_fronts_passes_the_checks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setting = fronts.Setting()
    trainings = [fronts.weighting(0.375, setting), fronts.bounded(0.8, setting)]
    for words in trainings:
        cfg, problems = overrides.compose(words)
        assert problems + find_problems(cfg) == []
        (pattern,) = [node.kwargs.pattern for key, node in cfg.reward.items() if key == "format"]
        assert pattern == fronts.PATTERN
        texts = ["one two three four five six seven eight", "one two three four five six seven eight nine", "", "a. b"]
        assert brevity(texts, pattern) == [1.0, 0.0, 0.0, 1.0]
    cfg, problems = overrides.compose(fronts.soups(setting))
    assert problems == [] and len(cfg.stage.grid) == 9
    places = fronts.places(setting)
    weights = soup_points(["gold", "brief"], None, list(cfg.stage.grid))
    assert weights[int(places["soup_0.125"].removeprefix("soup/"))]["gold"] == 0.125 and len(places) == 9 + 4 + 7
    assert set(setting.few) <= set(setting.shares)


def test_the_tables_of_the_benchmark_of_fronts():
    setting = fronts.Setting(shares=(0.0, 0.5, 1.0), few=(0.0, 1.0), bounds=(0.5, 0.9))
    front = {"weight_0": (1.0, 1.0), "weight_0.5": (2.0, 0.7), "weight_1": (3.0, 0.2), "soup_0.5": (2.0, 0.5)}
    front |= {"bound_0.5": (2.5, 0.5), "bound_0.9": (1.5, 0.8)}
    seeds = {
        str(seed): {
            "policies": {
                name: {"gold": gold + 0.1 * seed, "brief": brief, "kl": 1.0} for name, (gold, brief) in front.items()
            },
            "lambdas": {"0.5": 1.0, "0.9": 2.5},
        }
        for seed in (0, 1)
    }
    first, second, volumes = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in fronts.Fronts().report(seeds, setting).splitlines()
        if line.startswith(("| >= ", "| fixed weights"))
    ]
    assert first[2] == "yes (2 of 2)" and first[4] == "1.00, 1.00" and first[5] == "0.5"
    assert first[8] == first[9] == "+0.50 [+0.50, +0.50]"
    # It misses its bound, and what is compared with it doesn't
    assert second[2] == "no (0 of 2)" and second[5] == "0" and second[8] == "+0.50 [+0.50, +0.50]"
    # Over (1, 0.2), without and with 0.1 more gold reward: 1 x 0.5 and 1.1 x 0.5 + 0.1 x 0.3
    assert volumes[1] == "3" and volumes[2].startswith("0.54 [")


def test_the_benchmark_of_a_gpu_rehearsed(tmp_path, capsys):
    """With tiny models: each kind of contender is measured, and what can't be is named."""
    only = "0.5B (PPO, critic=head|GRPO of TRL|RLOO of TRL)$|NF4|PPO of TRL 1.12|FlashAttention"
    output = tmp_path / "gpu.jsonl"
    benchmark_gpu(["--rehearse", "--in-process", "--no-tests", "--only", only, "--output", str(output)])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    rows = {row["name"]: row for row in lines if "name" in row}
    measured = {name: row for name, row in rows.items() if "samples_per_second" in row}
    names = ["PPO, critic=head", "GRPO of TRL", "RLOO of TRL", "PPO, four roles on one base, NF4"]
    assert sorted(measured) == sorted(names)
    for name, row in measured.items():
        assert all(row["phases"][phase] > 0 for phase in PHASES if phase != "rest"), name
        assert row["warm"] and row["tokens_per_second"] == pytest.approx(8 * row["samples_per_second"]), name
        assert row["mfu"] > 0 and row["planned_gib"]["peak"] > row["planned_gib"]["update"] > 0, name
    assert "flash_attn" in rows["PPO, FlashAttention 2"]["skipped"]
    printed = tables(lines)
    assert printed in capsys.readouterr().out and "| GRPO of TRL |" in printed
    # a critic of its own is a second forward and backward, LoRA spares the gradients of the weights
    size, setting = SIZES["0.5B"], CONFIGURATIONS[0].setting("", tiny=False)
    flops = {critic: update_flops(size, setting, critic) for critic in (None, "head", "model")}
    assert flops["head"] == flops[None] < flops["model"] < 2 * flops["head"]
    assert update_flops(size, replace(setting, lora=True), "head") < flops["head"]
    tokens = setting.batch * setting.epochs * (setting.prompt_tokens + setting.new_tokens)
    assert flops["head"] == pytest.approx(6 * size.trunk * tokens + 3 * size.embedding * tokens, rel=0.1)


def test_versions_outside_of_the_range_are_named_before_a_measurement(monkeypatch):
    assert machine.outside_of_range() == []
    installed = machine.version
    older = {"torch": "2.8.0+cu128", "transformers": "5.17.0"}
    monkeypatch.setattr(machine, "version", lambda name: older.get(name) or installed(name))
    found = machine.outside_of_range()
    assert len(found) == 2 and any(sentence.startswith("transformers 5.17.0 is outside of ") for sentence in found)
    assert "torch 2.8.0+cu128 is outside of torch>=2.9: what follows may fail by it." in found


@pytest.mark.parametrize("name", ["kto, full, checkpointing", "grpo, full", "ppo, four roles on one base"])
def test_the_trainings_of_the_memory_benchmark_can_be_composed(name, tmp_path):
    configuration = next(each for each in memory_configurations.CONFIGURATIONS if each.name == name)
    cfg, problems = overrides.compose(memory_configurations.words(configuration, tmp_path / "llama", tmp_path))
    assert problems == [] and cfg is not None and cfg.model.path == f"{tmp_path}/llama/policy"


def test_the_summary_of_the_memory_benchmark():
    rows = [
        {
            "name": "a",
            "model": "m",
            "planned": 2**20 * planned,
            "measured": 2**20 * 100,
            "process": 2**28,
            "seconds": 1.0,
        }
        for planned in (110, 100, 85)
    ]
    text = memory_table(rows) + memory_summary(rows)
    assert "| a | m | 110 | 100 | +10.0% | 256 |" in text
    assert "off by 8.3% on average and 15.0% at most (within 10% and 20%)" in text
    rows[0]["planned"] *= 2
    assert "NOT within" in memory_summary(rows)


@pytest.mark.slow
def test_the_plans_of_the_documentation_are_those_of_today():
    """Off by at most 3 % from what was measured on a GPU."""
    text = Path(__file__).parents[2].joinpath("docs", "benchmarks.md").read_text()
    found = h200.table().splitlines()
    assert len(found) == 15 and all(line in text for line in found[:-1])
    assert all(abs(planned / measured - 1) < 0.03 for *_, planned, measured in h200.rows())


def test_the_ablation_of_sparse_feedback_is_fair_and_passes_the_checks(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = sparse.steps(250, 25, [1], Path("runs/x"))
    rewards = {name: words for name, words in made.items() if words[0] == "stage=reward"}
    assert {name.removesuffix("_1") for name in rewards} == set(sparse.ARMS)
    plain = [word for word in rewards["none_1"] if not word.startswith("data.feedback.")]
    for name, words in rewards.items():
        assert [word for word in words if not word.startswith("data.feedback.")] == plain, name
    for words in (rewards["all_1"], made["weaker_answers_1"]):
        assert find_problems(compose(*words)) == []
    found = {arm: [0.7, 0.8] for arm in sparse.ARMS} | {"weaker": [0.75, 0.83]}
    text = sparse.report(found, 250, 25, [1, 2])
    (line,) = [line for line in text.splitlines() if line.startswith("weaker policy's answers as rejected")]
    assert line.split()[5:7] == ["0.790", "+0.040"] and line.endswith("2 of 2")
