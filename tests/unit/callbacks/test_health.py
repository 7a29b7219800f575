"""The health monitor: each sign by a stream of metrics and by a training that provokes it; quiet where all is well."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import TrainerCallback

from rlhf_trl.callbacks.health import HealthMonitor
from rlhf_trl.callbacks.kl import FixedKL
from rlhf_trl.callbacks.progress import ProgressLine
from rlhf_trl.checks import find_problems
from rlhf_trl.errors import ConfigError
from rlhf_trl.health.series import Series
from rlhf_trl.health.signs import (
    LEVELS,
    SIGNS,
    all_limits,
    evaluate_signs,
    limit_problems,
    signs_seen,
    verdict,
)
from rlhf_trl.health.text_statistics import rollout_measures
from rlhf_trl.runs.paths import conf_dir
from tests.helpers.hackable import PHRASE
from tests.helpers.ppo import prompts
from tests.helpers.rl import TRAINERS, count_of_a, logged, rl_trainer
from tests.helpers.tiny import save_model

STEPS = 12  # of the streams


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


# ---- Signs, by streams of metrics ----


def healthy(kind: str) -> list[dict]:
    """Return the log of a healthy run, with noise."""
    noise = random.Random(0)
    common = {
        "loss": lambda t: 0.1,
        "grad_norm": lambda t: 0.5,
        "objective/kl": lambda t: 1.5 * t / (t + 3),
        "objective/kl_standard_error": lambda t: 0.1,
        "objective/length_correlation": lambda t: 0.3,
        "objective/most_common_score": lambda t: 0.3,
        "completions/mean_length": lambda t: 14.0,
        "completions/repetition": lambda t: 0.02,
        "completions/similarity": lambda t: 0.05,
        "rewards/gold/mean": lambda t: 1 + 0.1 * t,
        "rewards/gold/std": lambda t: 2.0,
        "sampling/prob_error": lambda t: 0.005,
        "sampling/clipfrac_long": lambda t: 0.01,
    }
    own = {
        "ppo": {
            "objective/scores": lambda t: 1 + 0.1 * t,
            "objective/scores_std": lambda t: 2.0,
            "policy/entropy": lambda t: 0.4 - 0.01 * t,
            "policy/clipfrac": lambda t: 0.1,
            "value/explained_variance": lambda t: 0.1 * t / (1 + 0.1 * t),
            "completions/eos_rate": lambda t: 0.97,
        },
        "grpo": {
            "reward": lambda t: 1 + 0.1 * t,
            "reward_std": lambda t: 2.0,
            "entropy": lambda t: 0.4 - 0.01 * t,
            "clip_ratio/region_mean": lambda t: 0.02,
            "completions/clipped_ratio": lambda t: 0.03,
        },
    }[kind]
    return [
        {name: value(t) * noise.uniform(0.95, 1.05) for name, value in (common | own).items()} for t in range(STEPS)
    ]


# What a sign's metrics are from the sixth log step on: (trainer, {metric: value at t})
PROVOKED = {
    "nan": ("ppo", {"health/nonfinite_updates": lambda t: 1}),
    "kl_high": ("ppo", {"objective/kl": lambda t: 40.0}),
    "kl_growing": ("grpo", {"objective/kl": lambda t: 0.2 * 1.6**t}),
    "kl_negative": ("ppo", {"objective/kl": lambda t: -0.5}),
    "entropy_collapse": ("grpo", {"entropy": lambda t: 0.01}),
    "clip_fraction": ("ppo", {"policy/clipfrac": lambda t: 0.7}),
    "low_explained_variance": ("ppo", {"value/explained_variance": lambda t: -0.5}),
    "over_optimization": ("ppo", {"rewards/gold/mean": lambda t: 1 - 0.3 * t}),
    "reward_falling": ("grpo", {"reward": lambda t: -1.0, "rewards/gold/mean": lambda t: -1.0}),
    "constant_reward": ("ppo", {"objective/most_common_score": lambda t: 1.0}),
    "length_drift": ("grpo", {"completions/mean_length": lambda t: 5.0}),
    "length_bias": ("ppo", {"objective/length_correlation": lambda t: -0.95, "completions/mean_length": lambda t: 11}),
    "repetition": ("ppo", {"completions/repetition": lambda t: 0.6}),
    "mode_collapse": ("grpo", {"completions/similarity": lambda t: 0.7}),
    "missing_eos": ("grpo", {"completions/clipped_ratio": lambda t: 0.9}),
    "multiplier_ceiling": (
        "grpo",
        {"constraints/safe/lambda_share": lambda t: 1.0, "constraints/safe/cost": lambda t: -1},
    ),
    "constraint_unmet": (
        "ppo",
        {"constraints/safe/lambda_share": lambda t: 1.0, "constraints/safe/cost": lambda t: 1},
    ),
    "gradient_spike": ("ppo", {"grad_norm": lambda t: 100.0 if t == STEPS - 1 else 0.5}),
    "sampler_mismatch": ("ppo", {"sampling/prob_error": lambda t: 0.07}),
    "clipped_completions": ("grpo", {"sampling/clipfrac_long": lambda t: 0.6}),
}


def judged(stream: list[dict], limits=None, **options) -> list[dict]:
    series, found = Series(watched=["gold"], **options), []
    for entry in stream:
        series.add(entry)
        found.append(evaluate_signs(series, all_limits(limits)))
    return found


def test_there_is_a_stream_for_every_sign():
    assert PROVOKED.keys() == SIGNS.keys()


@pytest.mark.parametrize("sign", PROVOKED)
def test_a_stream_with_one_trouble_gets_this_sign_and_no_other(sign):
    kind, change = PROVOKED[sign]
    stream = [
        entry | ({name: value(t) for name, value in change.items()} if t >= 5 else {})
        for t, entry in enumerate(healthy(kind))
    ]
    found = judged(stream)
    levels = {name: finding.level for name, finding in found[-1].items() if finding.level}
    # It grew to somewhere; no multiplier below its maximum leaves a constraint unmet
    expected = {sign, *{"kl_growing": ["kl_high"], "constraint_unmet": ["multiplier_ceiling"]}.get(sign, [])}
    assert levels.keys() == expected and levels[sign] >= LEVELS.index("warn"), found[-1]
    assert " from " in found[-1][sign].text and found[-1][sign].text.endswith(f"{SIGNS[sign].remedy}.")
    # Before, it was as quiet as a healthy one
    assert not any(finding.level for step in found[:5] for finding in step.values())


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_healthy_stream_is_quiet_from_the_seventh_log_step_on(kind):
    found = judged(healthy(kind))
    assert found[:6] == [{}] * 6
    assert len(found[6]) >= 11 and not any(finding.level for step in found for finding in step.values())


def test_baseline_and_window_say_when_it_begins():
    found = judged(healthy("ppo"), baseline=1, window=2)
    assert found[1] == {} and len(found[2]) > 10


def test_a_critic_of_a_constant_reward_is_not_blamed():
    stream = [entry | {"objective/scores_std": 0.0, "value/explained_variance": -5.0} for entry in healthy("ppo")]
    assert "low_explained_variance" not in judged(stream)[-1]


def test_a_score_that_falls_while_multipliers_rise_is_no_falling_reward():
    """A reward of 3 and a cost of 1, neither of which moves, while combine=lagrange raises the price of the cost."""
    prices = [min(1.2**t, 5.0) for t in range(STEPS)]
    constrained = {f"constraints/safe/{key}": 0.0 for key in ("lambda_share", "cost")}
    for extra, level in (({}, 2), (constrained, None)):
        stream = [
            entry | extra | {"objective/scores": (3 - price) / (1 + price), "objective/scores_std": 0.5}
            for price, entry in zip(prices, healthy("ppo"), strict=True)
        ]
        found = judged(stream)[-1].get("reward_falling")
        assert (found and found.level) == level


def test_over_optimization_is_seen_whatever_multipliers_do():
    """The maximized reward rises and a watched one falls, while the score falls as the price of a cost rises."""
    stream = [
        entry
        | {"objective/scores": -t, "objective/maximized": 1 + 0.1 * t, "rewards/gold/mean": min(1, 2.2 - 0.3 * t)}
        for t, entry in enumerate(healthy("ppo"))
    ]
    assert judged(stream)[-1]["over_optimization"].level == 2
    for entry in stream:
        del entry["objective/maximized"]
    assert judged(stream)[-1]["over_optimization"].level == 0


def test_a_correlation_with_length_is_no_bias_while_lengths_do_not_follow_it():
    for change, level in ((0.0, 0), (-0.3, 0), (0.3, 2)):
        stream = [
            entry | {"objective/length_correlation": 0.9, "completions/mean_length": 14 * (1 + change * (t > 4))}
            for t, entry in enumerate(healthy("ppo"))
        ]
        assert judged(stream)[-1]["length_bias"].level == level


def test_over_optimization_needs_a_reward_that_rises():
    falling = [entry | {"rewards/gold/mean": -0.5 * t} for t, entry in enumerate(healthy("ppo"))]
    assert judged(falling)[-1]["over_optimization"].level == 2
    both = [entry | {"objective/scores": -0.5 * t} for t, entry in enumerate(falling)]
    assert judged(both)[-1]["over_optimization"].level == 0
    # An ensemble whose members part as its mean rises: their mean less their disagreement goes down
    parting = [
        entry | {"rewards/model/mean": 1 + 0.1 * t, "rewards/model/std": 2.0, "rewards/model/disagreement": 0.4 * t}
        for t, entry in enumerate(healthy("ppo"))
    ]
    assert judged(parting)[-1]["over_optimization"].level == 2
    agreeing = [entry | {"rewards/model/disagreement": 0.2} for entry in parting]
    assert judged(agreeing)[-1]["over_optimization"].level == 0
    # Of held-out prompts alike
    held_out = [{f"eval_{name}": value for name, value in entry.items()} for entry in falling]
    assert judged(held_out)[-1]["over_optimization"].level == 2


def test_a_critic_that_explains_nothing_has_time_and_one_that_adds_noise_has_none():
    for explained, quiet in ((0.0, 29), (-0.5, 6)):
        stream = [entry | {"value/explained_variance": explained} for entry in (healthy("ppo") * 3)[:30]]
        levels = [found["low_explained_variance"].level for found in judged(stream)[6:]]
        assert [level > 0 for level in levels] == [False] * (quiet - 6) + [True] * (30 - quiet)


def test_the_sampling_error_of_small_rollouts_is_no_sign():
    """Means of 16 rewards in 50 runs of each kind: (score, watched reward) by log step, of 60."""
    kinds = {
        "flat": lambda t: (0.0, 0.0),
        "rising": lambda t: (t / 60, 0.0),
        "over-optimized": lambda t: (t / 20, min(t, 20) / 40 - max(0, t - 20) / 20),
        "falling": lambda t: (-t / 30, -t / 30),
    }
    shown: dict[str, list[str]] = {kind: [] for kind in kinds}
    for run in range(50):
        noise = random.Random(run)
        for kind, means in kinds.items():
            series, signs = Series(watched=["gold"]), set()
            for t in range(60):
                score, gold = (mean + noise.gauss(0, 1) / math.sqrt(16) for mean in means(t))
                series.add({"objective/scores": score, "objective/scores_std": 1.0})
                series.add({"rewards/gold/mean": gold, "rewards/gold/std": 1.0})
                signs |= {name for name, found in evaluate_signs(series, all_limits()).items() if found.level}
            shown[kind] += signs
    assert len(shown["flat"]) <= 3 and len(shown["rising"]) <= 3
    assert shown["over-optimized"].count("over_optimization") == 50
    assert shown["falling"].count("reward_falling") == 50


def test_limits_can_be_changed_and_switched_off():
    high = [entry | {"objective/kl": 12.0} for entry in healthy("ppo")]
    assert judged(high)[-1]["kl_high"].level == 0
    finding = judged(high, {"kl_high": {"note": 1, "warn": 5, "stop": 10}})[-1]["kl_high"]
    assert finding.level == 3 and "12 nats per sequence (stop from 10)" in finding.text
    assert judged(high, {"kl_high": {"note": None, "warn": None}})[-1]["kl_high"].level == 0


@pytest.mark.parametrize(
    ("signs", "message"),
    [
        ({"kl_hihg": {"warn": 1}}, r"`health.signs.kl_hihg` is no sign. Did you mean `kl_high`"),
        ({"kl_high": {"warm": 1}}, r"`health.signs.kl_high.warm` is no level. Use note, warn and stop."),
        ({"kl_high": {"warn": "much"}}, r"has the limit 'much'. Use a number"),
        ({"kl_high": {"warn": 5}}, r"limits note 15, warn 5, and this sign is worse the higher"),
        ({"low_explained_variance": {"stop": 0.5}}, r"worse the lower it is"),
        ({"kl_high": 3}, r"Set `health.signs.kl_high.warn=...`"),
    ],
)
def test_bad_limits_are_told_before_a_model_loads(compose, signs, message):
    assert len(limit_problems(signs)) == 1
    with pytest.raises(ConfigError, match=message):
        all_limits(signs)
    cfg = compose("stage=ppo")
    OmegaConf.set_struct(cfg, False)
    cfg.health.signs = OmegaConf.merge(cfg.health.signs, signs) if not isinstance(signs.get("kl_high"), int) else signs
    assert any("health.signs" in problem for problem in find_problems(cfg))


def test_a_former_sign_names_the_new_one_and_is_no_second_problem(compose):
    cfg = compose("stage=ppo")
    OmegaConf.set_struct(cfg, False)
    cfg.health.signs = OmegaConf.merge(cfg.health.signs, {"critic_blind": {"warn": 0.1}})
    (problem,) = [text for text in find_problems(cfg) if "critic_blind" in text]
    assert "renamed to `health.signs.low_explained_variance`" in problem


@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo"])
def test_the_config_has_the_defaults_and_can_switch_it_off(compose, stage):
    cfg = compose(f"stage={stage}")
    made = instantiate(cfg.health)
    assert made.func is HealthMonitor and made.keywords["signs"] == all_limits()
    assert find_problems(compose(f"stage={stage}", "health=none")) == []
    assert any(
        "`health.window` is 0" in problem for problem in find_problems(compose(f"stage={stage}", "health.window=0"))
    )
    assert "health" not in compose("stage=sft")


def test_the_cell_of_a_line_names_the_worst():
    assert verdict({"reward": 1.0}) == ""
    assert verdict({"health/level": 0, "health/kl_high": 0}) == "health ok"
    logs = {"health/level": 2, "health/kl_high": 2, "health/mode_collapse": 2, "health/repetition": 1}
    assert verdict(logs) == "health warn kl_high mode_collapse +1"


# ---- What a rollout's texts tell ----


def test_measures_of_texts():
    apart = ["a b c d", "e f g h", "i j k l"]
    found = rollout_measures(["x", "y", "z"], apart, [1.0, 2.0, 3.0])
    assert (found["completions/repetition"], found["completions/similarity"]) == (0.0, 0.0)
    assert found["objective/most_common_score"] == pytest.approx(1 / 3)
    assert math.isnan(found["objective/length_correlation"])  # all are as long
    # a b c a b c a b c: seven trigrams, of which four are again those of before
    assert rollout_measures(["x"], ["a b c " * 3], [1.0])["completions/repetition"] == pytest.approx(4 / 7)
    # Of two trigrams an answer shares one with one of two others
    shared = rollout_measures(["x", "y", "z"], ["a b c d", "a b c e", "i j k l"], [1.0, 1.0, 3.0])
    assert shared["completions/similarity"] == pytest.approx((0.25 + 0.25 + 0) / 3)
    assert shared["objective/most_common_score"] == pytest.approx(2 / 3)
    same = rollout_measures(["x", "y"], [PHRASE, PHRASE], [1.0, math.nan])
    assert same["completions/similarity"] == 1.0 and same["objective/most_common_score"] == 1.0
    # Completions of one prompt may be alike; and scripts without spaces have words too
    assert math.isnan(rollout_measures(["x", "x"], [PHRASE, PHRASE], [1.0, 2.0])["completions/similarity"])
    assert rollout_measures(["x"], ["你好吗你好吗你好吗"], [1.0])["completions/repetition"] == pytest.approx(4 / 7)
    long = rollout_measures(["x"] * 4, ["a", "a b", "a b c", "a b c d"], [1.0, 2.0, 3.0, 4.0])
    assert long["objective/length_correlation"] == pytest.approx(1.0)


# ---- In a training ----


def monitored(kind, path, out, monitor=None, rollouts=8, **kwargs):
    trainer = rl_trainer(kind, path, out, data=prompts(4 * rollouts), **kwargs)
    trainer.add_callback(FixedKL(trainer.beta, trainer=trainer))
    trainer.add_callback(HealthMonitor(trainer, **(monitor or {})))
    trainer.add_callback(ProgressLine())
    return trainer


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_log_step_has_a_verdict_and_the_measures(path, tmp_path, kind, capsys):
    trainer = monitored(kind, path, tmp_path, num_iterations=2, learning_rate=1e-4, logging_steps=2)
    if kind == "ppo":
        trainer.args.logging_steps = 1  # it counts rollouts
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 8
    for entry in entries:
        assert 0 <= entry["completions/repetition"] <= 1 and 0 <= entry["completions/similarity"] <= 1
        assert 0 < entry["objective/most_common_score"] <= 1
    assert len(logged(trainer, "objective/kl_standard_error")) >= 7
    assert [entry.get("health/level") is None for entry in entries] == [True] * 6 + [False] * 2
    # Of what there is nothing to say: a KL that began at 0 or below has no growth, and nothing is sampled by vLLM
    expected = (
        SIGNS.keys()
        - {"nan", "over_optimization", "kl_growing", "sampler_mismatch", "clipped_completions"}
        - {"multiplier_ceiling", "constraint_unmet"}
        - (set() if kind == "ppo" else {"low_explained_variance"})
    )
    assert {f"health/{name}" for name in expected} <= entries[-1].keys()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train ")]
    assert len(lines) == 8 and ["health" in line for line in lines] == [False] * 6 + [True] * 2


def test_a_measure_is_that_of_the_rollouts_own_rows(path, tmp_path):
    """Also after an evaluation, whose rows stand in the same place."""
    expected = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            logs = trainer._logs
            scores = [a + 2 * b for a, b in zip(*logs["rewards"].values(), strict=True)]
            expected.append(rollout_measures(list(logs["prompt"]), list(logs["completion"]), scores))

    def shortness(completions, **kwargs):
        return [-float(len(text)) for text in completions]

    trainer = monitored(
        "grpo", path, tmp_path, reward_funcs=[count_of_a, shortness], reward_weights=[1.0, 2.0],
        eval_dataset=prompts(4), eval_strategy="steps", eval_steps=1, rollouts=3,
    )  # fmt: skip
    trainer.add_callback(Look())
    trainer.train()
    assert len(expected) == 3
    for name in expected[0]:
        there = [found[name] for found in expected if math.isfinite(found[name])]
        assert logged(trainer, name) == pytest.approx(there), name


def test_a_stop_saves_and_says_why(path, tmp_path, capsys):
    limits = {"kl_high": {"note": None, "warn": None, "stop": 1e-6}}
    trainer = monitored("ppo", path, tmp_path, {"signs": limits, "baseline": 1, "window": 2}, learning_rate=1e-2)
    trainer.train()
    assert trainer.state.global_step == 3 and (tmp_path / "checkpoint-3").is_dir()
    monitor = trainer.callback_handler.callbacks[0]
    assert isinstance(monitor, HealthMonitor) and "kl_high: the KL to the reference is" in monitor.reason
    output = capsys.readouterr().out
    assert "health stop (kl_high)" in output and "training stops here, with a checkpoint of step 3" in output
    assert "of 20 signs in 1 log steps.\n  stop kl_high (steps 3 to 3" in output  # the summary, the worst first


def test_the_record_says_why_a_run_was_stopped(train, tmp_path):
    words = ["stage=grpo", "stage.args.max_steps=6", "health.baseline=1", "health.window=2", "data.max_eval_samples=4"]
    run_dir = train(tmp_path, *words, "health.signs.missing_eos.note=1", "health.signs.missing_eos.warn=null",
                    "health.signs.missing_eos.stop=1")  # fmt: skip
    record = json.loads(Path(run_dir, "run.json").read_text())
    assert record["status"] == "done" and record["reason"].startswith("Health monitor: missing_eos")
    history = json.loads(Path(run_dir, "metrics.json").read_text())["history"]
    assert signs_seen(history)[0]._asdict() == {"sign": "missing_eos", "level": 3, "first": 3, "last": 3, "count": 1}


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_an_update_with_nan_gradients_is_left_out_and_ends_the_run(path, tmp_path, kind, capsys):
    trainer = monitored(kind, path, tmp_path)
    weights = []

    class Weights(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

    trainer.add_callback(Weights())
    monitor = next(c for c in trainer.callback_handler.callbacks if isinstance(c, HealthMonitor))
    look = monitor.on_pre_optimizer_step

    def spoil_and_look(args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            next(model.parameters()).grad.fill_(math.nan)
        look(args, state, control, model=model, **kwargs)

    monitor.on_pre_optimizer_step = spoil_and_look
    trainer.train()
    assert trainer.state.global_step == 3 and (tmp_path / "checkpoint-3").is_dir()
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1])
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert monitor.reason.startswith("Health monitor: nan: 1 updates had NaN")
    assert logged(trainer, "health/nonfinite_updates") == [1] and "health stop (nan)" in capsys.readouterr().out


def test_a_resumed_run_knows_what_was_before(path, tmp_path, capsys):
    limits = {"length_bias": {"note": 0.0, "warn": None}, "constant_reward": {"note": 0.0, "warn": None}}
    options = {"rollouts": 10, "save_strategy": "steps", "save_steps": 8, "learning_rate": 1e-4}
    whole = monitored("grpo", path, tmp_path / "whole", {"signs": limits}, **options)
    whole.train()
    assert "health note (constant_reward)" in capsys.readouterr().out
    resumed = monitored("grpo", path, tmp_path / "whole", {"signs": limits}, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    # The same verdicts from the ninth on, and what was explained isn't explained again
    assert logged(resumed, "health/constant_reward") == logged(whole, "health/constant_reward")
    assert len(logged(resumed, "health/level")) == 4
    assert "health note (constant_reward)" not in capsys.readouterr().out


def test_a_reward_of_weight_0_is_watched(path, tmp_path):
    def gold(completions, **kwargs):
        return [-value for value in count_of_a(completions)]

    trainer = monitored(
        "grpo", path, tmp_path, {"baseline": 2, "window": 2}, rollouts=12, reward_funcs=[count_of_a, gold],
        reward_weights=[1.0, 0.0], learning_rate=3e-2, beta=1e-4,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "reward")[-1] > logged(trainer, "reward")[0]
    assert max(logged(trainer, "health/over_optimization")) == 2


# ---- On the embedded world: provoked on purpose ----

HACK = "tests.helpers.hackable"
FUNCTION = "reward.function.function"
# What is done to a run: what the monitor has to name, and the overrides
DONE = {
    "hacked": (
        {"over_optimization", "kl_high"},
        ["reward=[function,demo]", f"{FUNCTION}={HACK}.sorry", "reward.gold.weight=0", "stage.args.beta=0",
         "stage.args.learning_rate=1e-3"],
    ),
    "beta 0": ({"kl_growing"}, ["stage.args.beta=0", "stage.args.learning_rate=1e-3"]),
    # whether it ends in one answer or in noise is left to rounding
    "learning rate": ({"reward_falling"}, ["stage.args.learning_rate=1e-2"]),
    # 32 rollouts of 32: it is noted from the 30th on
    "critic": (
        {"low_explained_variance"},
        ["stage.args.critic_learning_rate=0", "stage.args.critic_detach=true", "stage.args.steps_per_generation=1",
         "stage.args.total_episodes=1024"],
    ),
    "constant": ({"constant_reward"}, ["reward=function", f"{FUNCTION}={HACK}.constant"]),
    "length": (
        {"length_bias", "length_drift"},
        ["reward=function", f"{FUNCTION}={HACK}.length", "stage.args.learning_rate=5e-4"],
    ),
    "one answer": (
        {"mode_collapse"}, ["reward=function", f"{FUNCTION}={HACK}.one_answer", "stage.args.learning_rate=5e-4"],
    ),
    "again and again": (
        {"repetition"},
        ["reward=function", f"{FUNCTION}={HACK}.again", "stage.args.learning_rate=1e-3", "stage.args.beta=0.01"],
    ),
    "cut off": (
        {"missing_eos"},
        ["reward=function", f"{FUNCTION}={HACK}.length", "stage.args.learning_rate=5e-4",
         "stage.args.max_completion_length=12"],
    ),
    "narrow clip": (
        {"clip_fraction"},
        ["stage.args.epsilon=0.001", "stage.args.learning_rate=5e-4",
         "health.signs.clip_fraction={note: 0.1, warn: 0.2}"],
    ),
    # sampled greedily, while an entropy bonus takes probability from what was likely
    "greedy": (
        {"kl_negative"},
        ["reward=function", f"{FUNCTION}={HACK}.constant", "+stage.args.top_k=1", "+stage.args.entropy_coef=1.0",
         "stage.args.beta=0", "stage.args.vf_coef=0", "stage.args.learning_rate=4e-5",
         "health.baseline=1", "health.window=2"],
    ),
    "burst": ({"gradient_spike"}, ["reward=function", f"{FUNCTION}={HACK}.burst", "stage.args.cliprange_value=1e9"]),
}  # fmt: skip
FAST = ("critic", "learning rate")
SHORT = [
    "stage.args.total_episodes=768", "stage.args.steps_per_generation=2", "stage.args.lr_scheduler_type=constant",
    "stage.args.max_steps=-1", "stage.args.eval_on_start=false", "data.max_samples=512", "data.max_eval_samples=8",
]  # fmt: skip


@pytest.mark.parametrize("what", [pytest.param(w, marks=[] if w in FAST else pytest.mark.slow) for w in DONE])
def test_a_run_that_is_spoilt_on_purpose_is_named(train, tmp_path, what):
    named, words = DONE[what]
    given = ["stage.args.learning_rate=1e-4"] if not any("s.learning_rate" in word for word in words) else []
    run_dir = train(tmp_path, "stage=ppo", *SHORT, *given, *words)
    history = json.loads(Path(run_dir, "metrics.json").read_text())["history"]
    seen = {found.sign: LEVELS[found.level] for found in signs_seen(history)}
    if what == "critic":  # it explains nothing, which is a note; and nothing else is wrong
        assert seen == {"low_explained_variance": "note"}
    else:
        warned = {name for name, level in seen.items() if level == "warn"}
        assert named <= warned
    if what == "learning rate":
        assert warned & {"entropy_collapse", "mode_collapse", "missing_eos"}
    if what == "constant":
        assert named == {name for name, level in seen.items() if level == "warn"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo"])
def test_a_healthy_run_is_quiet(train, tmp_path, stage, capsys):
    """PPO as in conf/pipeline/demo.yaml, from a reward model; the others as they are."""
    common = ["data.max_samples=null", "data.max_eval_samples=8", "stage.args.eval_on_start=false"]
    if stage == "ppo":
        runs = ["stage=reward", "data.max_samples=3000", "stage.args.max_steps=94", "stage.args.learning_rate=5e-4"]
        train(tmp_path, *runs, "data.max_eval_samples=64")
        own = OmegaConf.load(conf_dir() / "pipeline/demo.yaml").steps.ppo
        words = [word for word in own if word not in ("stage=ppo", "model.run=sft")]
        words += ["stage.args.total_episodes=1536", "stage.args.max_steps=-1"]
    else:
        words = ["stage.args.max_steps=20", "stage.args.learning_rate=5e-4"]
    run_dir = train(tmp_path, f"stage={stage}", *common, *words)
    history = json.loads(Path(run_dir, "metrics.json").read_text())["history"]
    assert signs_seen(history) == []
    assert "health: ok, none of" in capsys.readouterr().out


def test_a_short_run_says_that_it_is_short(path, tmp_path, capsys):
    monitored("rloo", path, tmp_path, rollouts=3).train()
    output = capsys.readouterr().out
    assert "too short to judge, which begins at log step 7" in output and "health ok" not in output


def test_the_yaml_lists_every_sign():
    assert OmegaConf.load(conf_dir() / "health/monitor.yaml").signs.keys() == SIGNS.keys()


RANKS = """
import json
import pathlib
import sys
from rlhf_trl.callbacks.health import HealthMonitor
from tests.helpers.rl import rl_trainer
from tests.helpers.ppo import prompts

path, out = sys.argv[1], pathlib.Path(sys.argv[2])
found = {}
for kind in ("ppo", "grpo"):
    trainer = rl_trainer(kind, path, out / kind, data=prompts(32), per_device_train_batch_size=4, learning_rate=1e-2)
    limits = {"constant_reward": {"note": 0.0, "warn": None, "stop": None}}
    monitor = HealthMonitor(trainer, signs=limits, baseline=1, window=1)
    trainer.add_callback(monitor)
    rank, measured, look = trainer.accelerator.process_index, [], monitor.on_pre_optimizer_step
    measure = monitor._measure

    def both(rows):
        measured.append(rows)
        measure(rows)

    def spoil(args, state, control, model=None, **kwargs):
        # The third step's gradients are NaN, and one rank alone sees it
        if state.global_step == 2 and rank == 1:
            next(model.parameters()).grad.fill_(float("nan"))
        look(args, state, control, model=model, **kwargs)

    monitor._measure, monitor.on_pre_optimizer_step = both, spoil
    trainer.train()
    key = "completions/similarity"
    found[kind] = {
        "step": trainer.state.global_step, "reason": monitor.reason,
        "rows": [len(rollout.completions) for rollout in measured],
        "values": [entry[key] for entry in trainer.state.log_history if key in entry],
        "weights": [parameter.sum().item() for parameter in trainer.model.parameters()],
    }
pathlib.Path(out, f"found_{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_ranks_see_the_same_and_stop_together(path, tmp_path):
    (tmp_path / "script.py").write_text(RANKS)
    root = Path(__file__).parents[3]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(tmp_path / "script.py"), path, str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"found_{rank}.json").read_text()) for rank in (0, 1))
    for kind in ("ppo", "grpo"):
        assert one[kind] == two[kind] and one[kind]["step"] == 3
        assert one[kind]["rows"] == [8] * 3 and len(one[kind]["values"]) == 3  # those of both ranks
        assert one[kind]["reason"].startswith("Health monitor: nan")
        assert all(math.isfinite(value) for value in one[kind]["weights"])
    assert done.stdout.count("training stops here") == 2  # a line of each trainer, by one rank
