"""The first and the last lines of a run."""

import json
import shlex
from pathlib import Path

import pytest

from rlhf_trl.cli.outcome import STEP, first_line, last_lines
from rlhf_trl.cli.overrides import compose
from rlhf_trl.runs.record import finish_run, start_run, write_metrics

POLICY = {"config.json": {"architectures": ["LlamaForCausalLM"]}}
REWARD_MODEL = {"config.json": {"architectures": ["Qwen2ForSequenceClassification"]}}
ADAPTER = {"adapter_config.json": {"task_type": "CAUSAL_LM"}}
REWARD_ADAPTER = {"adapter_config.json": {"task_type": "SEQ_CLS"}}
PPO = [
    {"step": 0, "eval_objective/scores": 1.5, "eval_objective/kl": 0.0},
    {"step": 8, "objective/kl": 2.0},
    {"step": 8, "eval_objective/scores": 3.1, "eval_objective/kl": 1.234},
]
DPO = [{"step": 0, "eval_loss": 0.693}, {"step": 9, "eval_loss": 0.51, "eval_rewards/accuracies": 0.71}]
REWARD = [{"step": 0, "eval_accuracy": 0.5}, {"step": 9, "eval_accuracy": 0.75}]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """`finished(words, files, history)` gives the last lines of a run, without the program in its commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(STEP, raising=False)
    monkeypatch.setattr("rlhf_trl.config.program.program", lambda app, launched: ["train"])

    def lines(words: str, files: dict, history: list | None) -> list[str]:
        typed = shlex.split(words)
        cfg, problems = compose(typed)
        assert problems == []
        start_run(cfg.run_dir, cfg.stage.name, "", "demo:sft")
        for name, content in files.items():
            Path(cfg.run_dir, name).write_text(json.dumps(content))
        if history is not None:
            write_metrics(cfg.run_dir, history)
        finish_run(cfg.run_dir, "done")
        return last_lines(cfg, typed, 35.2).splitlines()

    return lines


def test_the_last_line_has_the_means_that_are_constrained(finished):
    history = [*PPO[:2], PPO[2] | {"eval_constraints/tokens/mean": 9.25}]
    words = "stage=ppo reward=[demo,tokens] combine=lagrange 'combine.constraints={tokens: \"<= 9\"}'"
    first, *_ = finished(words, POLICY, history)
    assert first == "ppo: score 1.5 -> 3.1, KL 1.23, tokens 9.25 (<= 9), 35 s, runs/default/ppo"


@pytest.mark.parametrize(
    ("words", "files", "history", "expected"),
    [
        (
            "stage=ppo",
            POLICY,
            PPO,
            [
                "ppo: score 1.5 -> 3.1, KL 1.23, 35 s, runs/default/ppo",
                "next: chat      train stage=chat model.run=ppo",
                "      evaluate  train stage=evaluate stage.policies.sft=demo:sft stage.policies.dpo=null",
            ],
        ),
        (
            "stage=dpo model=hf model.path=organization/name data=hub data.path=pairs adapter=lora project=mine",
            ADAPTER,
            DPO,
            [
                "dpo: loss 0.693 -> 0.51, accuracy 0.71, 35 s, runs/mine/dpo",
                "next: chat   train stage=chat model=hf model.run=dpo project=mine",
                "      merge  train stage=merge model.run=dpo project=mine",
            ],
        ),
        (
            "stage=ppo model.run=sft run_name=second reward=length reward.length.kwargs.max_length=9",
            POLICY,
            PPO,
            [
                "ppo: score 1.5 -> 3.1, KL 1.23, 35 s, runs/default/second",
                "next: chat      train stage=chat model.run=second",
                "      evaluate  train stage=evaluate +stage.policies.second=second stage.policies.ppo=null "
                "stage.policies.dpo=null reward=length reward.length.kwargs.max_length=9",
            ],
        ),
        (
            "stage=reward adapter=lora",
            REWARD_ADAPTER,
            REWARD,
            [
                "reward: accuracy 0.5 -> 0.75, 35 s, runs/default/reward",
                "next: evaluate_reward  train stage=evaluate_reward reward=model reward.model.run=reward",
                "      ppo              train stage=ppo reward=model reward.model.run=reward adapter=lora",
            ],
        ),
        (
            "stage=init",
            POLICY,
            None,
            ["init: 35 s, runs/default/init", "next: sft  train stage=sft model.run=init data.conversational=false"],
        ),
        (
            "stage=reward data=files data.paths=rows.jsonl data/feedback=attributes",
            REWARD_MODEL,
            REWARD,
            ["reward: accuracy 0.5 -> 0.75, 35 s, runs/default/reward"],
        ),
        ("stage=evaluate", {}, None, ["evaluate: 35 s, runs/default/evaluate"]),
        (
            "experiment=reviews/tiny/dpo",
            POLICY,
            DPO,
            [
                "dpo: loss 0.693 -> 0.51, accuracy 0.71, 35 s, runs/reviews_tiny/dpo",
                "next: chat  train stage=chat model.run=dpo project=reviews_tiny",
            ],
        ),
    ],
)
def test_the_last_lines_say_what_came_out_and_what_is_next(finished, words, files, history, expected):
    assert finished(words, files, history) == expected


@pytest.mark.parametrize(
    ("words", "files", "history", "compared"),
    [
        ("stage=ppo", POLICY, PPO, {"sft": "demo:sft", "ppo": "ppo"}),
        ("stage=dpo model.run=sft", POLICY, DPO, {"sft": "sft", "dpo": "dpo"}),
        ("stage=ppo model=hf model.path=./my-model.1", POLICY, PPO, {"start": "./my-model.1", "ppo": "ppo"}),
        ("stage=ppo model=hf model.path=other/ppo", POLICY, PPO, {"start": "other/ppo", "run": "ppo"}),
        ("stage=ppo +data@ptx_data=demo stage.args.ptx_coef=0.1", POLICY, PPO, {"sft": "demo:sft", "ppo": "ppo"}),
        (
            "stage=ppo reward=[demo,tokens] combine=lagrange 'combine.constraints={tokens:\"<=9\"}' combine.window=64",
            POLICY,
            PPO,
            {"sft": "demo:sft", "ppo": "ppo"},
        ),
        ("stage=reward adapter=lora", REWARD_ADAPTER, REWARD, None),
        ("stage=init", POLICY, None, None),
    ],
)
def test_the_commands_for_what_is_next_compose(finished, words, files, history, compared):
    commands = [line.split(" train ")[1] for line in finished(words, files, history)[1:]]
    assert commands
    for command in commands:
        cfg, problems = compose(shlex.split(command))
        assert problems == []
        if cfg.stage.name == "evaluate":
            assert "ptx_data" not in cfg
            assert cfg.combine._target_.endswith("weighted_sum")  # of training alone are multipliers
            assert cfg.stage.constraints == ({"tokens": "<=9"} if "tokens" in cfg.reward else None)
            policies = {name: place for name, place in cfg.stage.policies.items() if place}
            assert policies == compared and cfg.stage.baseline == next(iter(compared))


def test_a_step_of_a_pipeline_says_nothing_of_what_is_next(finished, monkeypatch):
    monkeypatch.setenv(STEP, "1")
    assert finished("stage=ppo", POLICY, PPO) == ["ppo: score 1.5 -> 3.1, KL 1.23, 35 s, runs/default/ppo"]


def test_the_first_line_says_where_the_run_goes():
    cfg, _ = compose(["stage=ppo", "project=mine"])
    assert first_line(cfg, writes=True) == "rlhf_trl ppo -> runs/mine/ppo"
    assert first_line(cfg, writes=False) == "rlhf_trl ppo"
    cfg, _ = compose(["stage=dpo", "debug=dry_run"])
    assert first_line(cfg, writes=True) == "rlhf_trl dpo (dry run)"
