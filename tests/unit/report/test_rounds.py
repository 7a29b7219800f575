"""Rounds of a loop in the report of a project."""

import json

import pytest

from rlhf_trl.report.page import Figure, Table
from rlhf_trl.report.records import load_runs
from rlhf_trl.report.rounds import number_of, round_blocks, rounds_of
from rlhf_trl.runs.record import write_json
from rlhf_trl.runs.results import Comparison, Estimate, PolicyResult, Promotion, Promotions, Rounds
from rlhf_trl.runs.reward_results import LengthBias, Reliability, RewardQuality, RewardResult, SliceAccuracy


def estimate(mean: float) -> Estimate:
    return Estimate(mean, mean - 0.1, mean + 0.1)


def policy(reward: float, kl: float | None) -> PolicyResult:
    return PolicyResult(
        path="p",
        completion_length=9,
        eos_rate=1,
        reward=estimate(reward),
        rewards={"gold": reward, "model": 2 * reward},
        kl=None if kl is None else estimate(kl),
    )


def quality(**accuracies: dict[str, float]) -> RewardQuality:
    rewards = {
        name: RewardResult(
            accuracy=estimate(0.5),
            completions_without_score=0,
            comparisons_dropped=0,
            slices=[
                SliceAccuracy(name=f"run: {run}", n=9, accuracy=estimate(value), ece=1 - value)
                for run, value in parts.items()
            ],
            top_one=estimate(0.5),
            reliability=Reliability(ece=0.1, bins=[]),
            length=LengthBias(pearson=0, spearman=0, longer_preferred=0.5, curve=[]),
            ratings=None,
            mistakes=[],
        )
        for name, parts in accuracies.items()
    }
    return RewardQuality(
        rows=9, prompts=9, completions=18, comparisons=9, gold=None, raters=None, longer_preferred=0.5, rewards=rewards
    )


def add_run(project, name: str, stage: str, file: str, content) -> None:
    (project / name).mkdir(parents=True)
    (project / name / "run.json").write_text(json.dumps({"status": "done", "stage": stage, "started": name[-1]}))
    write_json(project / name / file, content)


def labels(count: int) -> dict:
    return {"train": {}, "eval": {"eval_labels": count, "eval_alpha": None}, "history": []}


@pytest.fixture
def project(tmp_path):
    policies = {"policy_0": policy(1.0, None), "policy_1": policy(2.0, 0.5), "policy_2": policy(3.0, 0.75)}
    for number in (1, 2):
        comparison = Comparison(
            baseline="policy_0",
            prompts=9,
            dropped=0,
            seed=0,
            temperature=1.0,
            max_completion_length=9,
            judge="",
            weights={"gold": 1.0, "model": 0.0},
            policies=dict(list(policies.items())[: number + 1]),
            samples=[],
        )
        add_run(tmp_path, f"compare_{number}", "evaluate", "comparison.json", comparison)
        add_run(tmp_path, f"label_{number}", "label", "metrics.json", labels(8 * number))
    add_run(tmp_path, "quality_1", "evaluate_reward", "reward_quality.json", quality(before={}, model={}))
    both = quality(before={"label_1": 0.75, "label_2": 0.55}, model={"label_1": 0.8, "label_2": 0.7})
    add_run(tmp_path, "quality_2", "evaluate_reward", "reward_quality.json", both)
    return tmp_path


def test_each_round_has_a_row_and_there_is_one_figure(project):
    table, figure = round_blocks(load_runs(project))
    assert isinstance(table, Table) and isinstance(figure, Figure)
    for part in ("Reward of the policy of each round.", "before and after its refresh.", "the gap to", "KL of the"):
        assert part in figure.caption
    assert table.cells == [
        ["1", "2.000 [1.900, 2.100]", "4.000", "0.500", "0.500", "0.500", "0.500", "0.500", "0.100", "0.100", "8", ""],
        [
            "2",
            "3.000 [2.900, 3.100]",
            "6.000",
            "0.750",
            "0.550",
            "0.700",
            "0.750",
            "0.800",
            "0.450",
            "0.300",
            "16",
            "",
        ],
    ]


def test_a_round_that_is_not_complete_has_empty_cells(project):
    (project / "compare_2" / "comparison.json").unlink()
    (project / "quality_2" / "reward_quality.json").unlink()
    table, _ = round_blocks(load_runs(project))
    assert table.cells[1] == ["2", *[""] * 9, "16", ""]


def test_early_stopping_names_the_best_round(project):
    found = Rounds(metric="policy_2/reward", values={"0": 1.0, "1": 2.0, "2": 1.5}, best=1, stopped=2, total=5)
    write_json(project / "rounds.json", found)
    table, _ = round_blocks(load_runs(project))
    assert [row[0] for row in table.cells] == ["1 (best)", "2"]
    assert "Early stopping after round 2 of 5: `policy_2/reward` improves no more" in table.note
    for name in ("label_1", "label_2"):  # without labelings the values are all there is
        (project / name / "run.json").unlink()
    (table,) = round_blocks(load_runs(project))
    assert table.cells == [["0", "1.000"], ["1", "2.000"], ["2", "1.500"]] and "round 1." in table.note


def test_nights_have_rounds_of_thumbs_and_say_which_policy_is_the_current_one(project):
    for number in (1, 2):
        (project / f"label_{number}" / "run.json").unlink()
        (project / f"quality_{number}" / "run.json").unlink()
        thumbs = {"train": {}, "eval": {"eval_thumbs_of_users": 20 * number}, "history": []}
        add_run(project, f"collect_{number}", "collect", "metrics.json", thumbs)
    decisions = [
        Promotion(1, "policy_1", "first", True, "reward", 2.0, 1.0),
        Promotion(2, "policy_2", "policy_1", False, "reward", 1.5, 2.0),
    ]
    write_json(project / "promotions.json", Promotions(current="policy_1", rounds=decisions))
    table, figure = round_blocks(load_runs(project))
    assert (
        figure.caption == "Reward of the policy of each round. KL of the policy to the baseline, nats per completion."
    )
    assert table.headers == ["round", "reward [95 %]", "proxy", "KL", "thumbs"]
    assert [[row[0], row[-1]] for row in table.cells] == [["1 (current)", "20"], ["2", "40"]]
    assert "so `policy_1` stays the current policy" in table.note and "Before" not in table.note


def test_rounds_that_a_judge_compares_have_win_rates(project):
    for number in (1, 2):
        path = project / f"compare_{number}" / "comparison.json"
        content = json.loads(path.read_text()) | {"weights": {}}
        for result in content["policies"].values():
            result |= {"reward": None, "rewards": {}, "win_rate": {"mean": 0.6, "low": 0.5, "high": 0.7}}
        path.write_text(json.dumps(content))
    table, figure = round_blocks(load_runs(project))
    assert table.headers[1] == "win rate [95 %]" and table.cells[0][1] == "0.600 [0.500, 0.700]"
    assert figure.caption.startswith("Win rate of the policy of each round.") and ">win rate<" in figure.svg


def test_the_control_of_a_round_is_not_its_policy(project):
    path = project / "compare_2" / "comparison.json"
    content = json.loads(path.read_text())
    content["policies"] = {"control_2": content["policies"]["policy_1"], **content["policies"]}
    path.write_text(json.dumps(content))
    table, _ = round_blocks(load_runs(project))
    assert [row[1:3] for row in table.cells] == [
        ["2.000 [1.900, 2.100]", ""],
        ["3.000 [2.900, 3.100]", "2.000 [1.900, 2.100]"],
    ]


def test_a_project_without_labelings_has_no_rounds(tmp_path):
    add_run(tmp_path, "compare_1", "evaluate", "metrics.json", labels(1))
    assert rounds_of(load_runs(tmp_path)) == [] and round_blocks(load_runs(tmp_path)) == []
    assert (number_of("label_12"), number_of("label"), number_of("label_a")) == (12, None, None)
