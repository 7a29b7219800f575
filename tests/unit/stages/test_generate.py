"""Completions that `stage=generate` keeps for rejection sampling, and their control."""

import json
from collections import Counter

import pytest

from rlhf_trl.checks import find_problems
from rlhf_trl.errors import ConfigError
from rlhf_trl.stages.generate import chosen, keep

ROWS = [
    {"prompt": prompt, "completion": f"{prompt}{reward}", "reward": reward, "ended": True}
    for prompt, rewards in (("a", [1.0, 5.0, 4.0]), ("b", [3.0, -1.0, 0.0]))
    for reward in rewards
]
CUT = [
    {"prompt": "a", "completion": "cut", "reward": 9.0, "ended": False},
    {"prompt": "c", "completion": "none", "reward": None, "ended": True},
    {"prompt": "c", "completion": "nan", "reward": "NaN", "ended": True},
]


@pytest.mark.parametrize(("rule", "best"), [("best_per_prompt", ["a5.0", "b3.0"]), ("best_overall", ["a5.0", "a4.0"])])
def test_the_best_are_kept_beside_as_many_random_ones(rule, best):
    notes, means = Counter(), []
    for seed in range(40):
        found, control = chosen([*ROWS, *CUT], rule, seed, notes)
        assert [row["completion"] for row in found] == best and len(control) == len(best)
        assert rule != "best_per_prompt" or [row["prompt"] for row in control] == ["a", "b"]
        means.append(sum(row["reward"] for row in control) / 2)
    assert min(means) < 2 < max(means) and abs(sum(means) / 40 - 2.0) < 0.5  # the mean of all is 2
    assert notes == {
        "not chosen: without a finite reward": 80,
        "not chosen: cut at `stage.max_completion_length`": 40,
    }


def test_what_is_kept_is_data_for_fine_tuning(tmp_path, capsys):
    output = tmp_path / "completions.jsonl"
    chat = [{"role": "user", "content": "Hi"}]
    output.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {**ROWS[0], "prompt": chat}, *CUT]))
    keep(output, "best_per_prompt", 0)
    kept = [json.loads(line) for line in (tmp_path / "completions.best.jsonl").read_text().splitlines()]
    assert kept[0] == {"prompt": "a", "completion": "a5.0", "reward": 5.0}
    assert kept[2]["completion"] == [{"role": "assistant", "content": "a1.0"}]
    assert len((tmp_path / "completions.random.jsonl").read_text().splitlines()) == 3
    assert "3 best ones, mean reward 3.000" in capsys.readouterr().out
    output.write_text("".join(json.dumps(row) + "\n" for row in CUT))
    with pytest.raises(ConfigError, match="finds no completion to keep.*cut at"):
        keep(output, "best_per_prompt", 0)


def test_choosing_needs_a_reward(compose):
    (problem,) = find_problems(compose("stage=generate", "stage.keep=best_overall", "reward=none", "run_name=new"))
    assert "chooses by a reward" in problem
