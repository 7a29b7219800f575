"""Results as dataclasses and as JSON."""

import json
import math

import pytest

from rlhf_trl.runs.results import Comparison, Estimate, PolicyResult, PromptSample, RunRecord, SweepJob
from rlhf_trl.runs.reward_results import HalfPrediction, Mistake, Reliability

ESTIMATE = {"mean": 1.0, "low": 0.5, "high": None}
BASELINE = {
    "path": "demo:sft",
    "family": "sft",
    "completion_length": 10.5,
    "eos_rate": 1.0,
    "entropy": None,
    "distinct_1": 0.5,
    "distinct_2": 0.6,
    "repetition": 0.0,
    "kl": None,
    "gaps": {},
    "reward": ESTIMATE,
    "rewards": {"gold": None},
    "reward_intervals": {"gold": None},
    "reward_std": {"gold": 1.0},
    "difference": None,
    "win_rate": None,
}
OTHER = BASELINE | {
    "gaps": {"kl": "another vocabulary"},
    "judgements": 4,
    "unclear": 0,
    "position_bias": None,
    "order_agreement": None,
}
COMPARISON = {
    "baseline": "sft",
    "prompts": 4,
    "left_out": 1,
    "seed": 42,
    "temperature": 1.0,
    "max_completion_length": 64,
    "judge": "the reward",
    "combine": "minimum",
    "weights": {"gold": 1.0},
    "policies": {"sft": BASELINE, "ppo": OTHER},
    "bradley_terry": {"sft": ESTIMATE, "ppo": None},
    "best_of_n": {
        "samples": 2,
        "curves": [{"by": "", "points": [{"n": 1, "kl": 0.0, "reward": ESTIMATE, "chosen_by": 1.0}]}],
    },
    "differences": [],
    "slices": [],
    "samples": [{"prompt": "p", "completions": {"sft": "a", "ppo": "b"}, "rewards": {"sft": None, "ppo": 1.0}}],
}
RUN = {
    "stage": "sft",
    "command": "accelerate launch train.py stage=sft",
    "status": "running",
    "model": "demo:base",
    "pid": 1,
    "started": "2026-01-01T10:00:00+00:00",
    "ended": None,
    "versions": {"python": "3.11"},
    "inputs": {"ranks": 1},
    "quantization": None,
    "published": {},
}
JOB = {
    "number": 0,
    "overrides": {"stage.args.beta": "0.1"},
    "status": "failed",
    "seconds": 1.5,
    "objective": None,
    "value": None,
    "direction": None,
    "health": "",
    "eval": {},
    "message": "out of memory",
    "log": "0.log",
}


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (Comparison, COMPARISON),
        (RunRecord, RUN),
        (RunRecord, RUN | {"status": "done", "reason": "stopped early"}),
        (RunRecord, RUN | {"status": "done", "base": "hub/id", "base_fingerprint": None}),
        (SweepJob, JOB),
    ],
)
def test_reading_and_writing_keeps_a_file_byte_for_byte(kind, content):
    assert json.dumps(kind.from_json(content).to_json()) == json.dumps(content)


def test_keys_of_the_files_and_names_of_the_fields():
    comparison = Comparison.from_json(COMPARISON)
    assert comparison.dropped == 1 and comparison.policies["ppo"].missing == {"kl": "another vocabulary"}
    assert list(comparison.others) == ["ppo"] and comparison.base.path == "demo:sft"
    mistake = Mistake(prompt="p", preferred="a", other="b", scores=[0.0, 1.0], rating_gap=math.nan)
    assert mistake.to_json()["gap"] is None
    half = HalfPrediction.from_json({"pearson": 1, "spearman": 1.0, "accuracy": None, "spearman_brown": 0.5})
    assert half.pearson == 1 and math.isnan(half.accuracy)


def test_a_number_that_is_null_is_nan():
    assert math.isnan(Estimate.from_json(ESTIMATE).high)
    assert Reliability.from_json({"ece": None, "bins": []}).to_json() == {"ece": None, "bins": []}
    assert PromptSample.from_json(COMPARISON["samples"][0]).rewards["sft"] is None


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (PolicyResult, {"path": "p"}, "holds no `completion_length`"),
        (Comparison, COMPARISON | {"samples": {}}, "holds no `samples`"),
        (Comparison, COMPARISON | {"weights": {"gold": "one"}}, "holds no `weights.gold`"),
        (Comparison, COMPARISON | {"bradley_terry": {"sft": {"mean": 1}}}, "an estimate lacks one of `mean`"),
        (RunRecord, [], "holds no object"),
    ],
)
def test_a_missing_key_or_another_type_is_named(kind, content, message):
    with pytest.raises(ValueError, match=message):
        kind.from_json(content)


def test_duration_of_a_run():
    assert RunRecord.from_json(RUN).seconds is None
    assert RunRecord.from_json(RUN | {"ended": "2026-01-01T10:01:05+00:00"}).seconds == 65
