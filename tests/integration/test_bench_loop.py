"""The benchmarks of the loop: the measures of their tables, and each of them run at tiny sizes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.loop import active, active_exact, active_scores, best_of, best_of_n, judge, refresh, smollm2
from bench.loop.results import (
    Results,
    at_kl,
    compare_paths,
    interval,
    labels_to_reach,
    markdown,
    pair_accuracy,
    share_of_labels,
)
from bench.overoptimization.samples import Sample
from rlhf_trl.cli.overrides import compose
from rlhf_trl.cli.rounds import all_steps, register_rounds

ROOT = Path(__file__).parents[2]


def test_the_gold_reward_at_a_kl_is_between_those_of_the_measured_points():
    path = [(0.0, 1.0), (4.0, 3.0), (1.0, 2.0), (1.0, 4.0)]
    assert at_kl(path, 0.0) == 1.0
    assert at_kl(path, 0.25) == pytest.approx(2.0)  # half of the way to the mean of both points at 1, by the root
    assert at_kl(path, 4.0) == at_kl(path, 9.0) == 3.0
    assert at_kl([(-0.01, 1.0), (1.0, 2.0)], 0.0) == 1.0  # an estimate may be below 0


def test_two_runs_are_compared_where_both_have_been():
    further = [(0.0, 1.0), (4.0, 3.0), (16.0, 0.0)]
    nearer = [(0.0, 1.0), (4.0, 4.0)]
    found = compare_paths(nearer, further)
    assert found["kl"] == 4.0 and found["end"] == pytest.approx(1.0) and found["last"] == pytest.approx(4.0)
    assert found["mean"] == pytest.approx(0.525)  # a straight line in the root of the KL, over 20 points of it
    assert compare_paths(further, nearer)["end"] == pytest.approx(-1.0)


def test_accuracy_counts_pairs_that_differ_in_the_gold_reward():
    assert pair_accuracy([([1.0, 2.0, 2.0], [0.0, 1.0, -1.0])]) == 0.5
    assert pair_accuracy([([1.0, 2.0], [0.5, 0.5]), ([3.0, 1.0], [1.0, 0.0])]) == 0.75
    assert pair_accuracy([([1.0, 1.0], [0.0, 1.0])]) is None


def test_the_labels_that_a_curve_needs():
    curve = [(64, 1.0), (128, 2.0), (192, 1.5)]
    assert labels_to_reach(curve, 0.5) == 64
    assert labels_to_reach(curve, 1.5) == pytest.approx(64 * 2**0.5)
    assert labels_to_reach(curve, 2.5) is None


def test_the_share_of_the_labels_is_that_of_the_mean_curves_with_an_interval_over_seeds():
    labels, control = [64, 128, 256], np.array([[1.0, 1.5, 2.0]] * 2)
    better = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 2.5]])
    assert share_of_labels(labels, better, control) == pytest.approx((0.5, 0.5, 0.5))
    assert share_of_labels(labels, better[:1], control[:1])[0] == 0.5
    assert share_of_labels(labels, control - 0.1, control) == (math.inf,) * 3
    # One of two seeds gets there with a quarter of the labels, the other one never, and their mean with all
    mixed = share_of_labels(labels, np.array([[2.5, 2.5, 2.5], [1.0, 1.0, 1.5]]), control)
    assert mixed == (pytest.approx(1.0), 0.25, math.inf)


def test_intervals_are_students_over_seeds():
    assert interval([1.0, 1.2, 0.8, 1.1, 0.9]) == "1.00 [0.80, 1.20]"  # 2.776 * .158 / sqrt(5)
    assert interval([0.5], sign=True) == "+0.50" and interval([]) == "-"
    assert markdown(["a", "b"], [["1", "2"]]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


def test_results_are_those_of_the_same_setting(tmp_path, capsys):
    results = Results(tmp_path / "results.jsonl")
    assert results.read("refresh", {"rounds": 3}) == {}
    results.add("refresh", {"rounds": 3}, "1", value=1.0)
    results.add("refresh", {"rounds": 2}, "1", value=2.0)
    results.add("refresh", {"rounds": 3}, "1", value=3.0)
    results.add("active", {"rounds": 3}, "2", value=4.0)
    assert {of: row["value"] for of, row in results.read("refresh", {"rounds": 3}).items()} == {"1": 3.0}


def test_the_table_of_refreshed_and_static_reward_models():
    setting = refresh.Setting(rounds=2)
    found = {
        str(seed): {
            "static": {"path": [[0.0, 1.5], [4.0, 1.0 + seed / 10]], "accuracy": [0.7, 0.5]},
            "refreshed": {"path": [[0.0, 1.5], [4.0, 2.0]], "accuracy": [0.68, 0.7], "before": [None, 0.6]},
        }
        for seed in (0, 1)
    }
    text = refresh.report(found, setting)
    assert "| seed 1 | 1.50 | 1.10 at 4.00 | 2.00 at 4.00 | 4.00 | +0.90 |" in text
    assert "| mean [95 %] |  |  |  | 4.00 [4.00, 4.00] | +0.95 [+0.31, +1.59] | +0.50" in text
    assert "| 1 | 0.500 [0.500, 0.500] | 0.600 [0.600, 0.600] | 0.700 [0.700, 0.700] |" in text
    assert "| last - first | -0.200 [-0.200, -0.200] |  | +0.020" in text


class FirstId:
    """A reward that is the first token of a row, and reads no row twice."""

    def __init__(self):
        self.rows: set[tuple[int, ...]] = set()

    def score_ids(self, rows: list[list[int]]) -> list[float]:
        new = set(map(tuple, rows))
        assert not new & self.rows
        self.rows |= new
        return [float(row[0]) for row in rows]


def by_first_id() -> best_of.Scorer:
    return best_of.Scorer(FirstId())


def completions(*golds: float) -> list[Sample]:
    """Return completions of a prompt with rising scores."""
    return [Sample("p", (i,), 1, gold) for i, gold in enumerate(golds)]


def test_the_best_of_n_of_a_sample_has_its_kl_gold_and_accuracy():
    many = completions(*range(4096))
    path = best_of.gold_path([many], by_first_id(), [1, 4])
    assert path[0] == (0.0, 2047.5)
    assert path[1][0] == pytest.approx(math.log(4) - 3 / 4, abs=1e-3)  # without repeated completions
    assert path[1][1] == pytest.approx(4096 * 4 / 5, rel=1e-3)
    # One that is written three times is chosen as often as its share says, and its KL is smaller
    twice = completions(1.0, 0.0)
    assert best_of.gold_path([[twice[0], *[twice[1]] * 3]], by_first_id(), [2])[0] == (
        pytest.approx(1 / 16 * math.log(1 / 4) + 15 / 16 * math.log(5 / 4), abs=1e-4),
        pytest.approx(1 / 16, abs=1e-4),
    )
    group = completions(0.0, 2.0, 1.0)
    assert best_of.accuracy([group], by_first_id(), 1, by_first_id()) == pytest.approx(2 / 3, abs=1e-4)
    # Of two that are drawn, the best is one of the last two more often, which are in the wrong order
    assert best_of.accuracy([group], by_first_id(), 2, by_first_id()) == pytest.approx(8 / 23, abs=1e-4)
    assert best_of.accuracy([completions(1.0, 1.0)], by_first_id(), 1, by_first_id()) is None


def test_accuracy_at_the_differences_of_other_pairs_and_that_of_the_labeler():
    # Of the differences 1, 2 and 3, each between two bounds of the bins, the scores have that of 1 wrong
    group, first = completions(0.0, 3.0, 2.0), completions(0.0, 1.0, 1.0)
    assert best_of.differences([group], None, 1) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert best_of.differences([first], None, 1) == pytest.approx([1, 0, 0, 0])
    assert best_of.accuracy([group], by_first_id(), 1, by_first_id()) == pytest.approx(2 / 3, abs=1e-4)
    for like, right in (([0.6, 0.2, 0.2, 0], 0.4), ([1, 0, 0, 0], 0.0), ([0.5, 0.25, 0, 0.25], 1 / 3)):
        found = best_of.accuracy([group], by_first_id(), 1, by_first_id(), np.array(like))
        assert found == pytest.approx(right, abs=1e-4)  # of the last, no pair of the group differs so much
    right = [1 / (1 + math.exp(-gap / 0.5)) for gap in (1, 2, 3)]
    assert best_of.labeler_accuracy([group], None, 1, 0.5) == pytest.approx(sum(right) / 3, abs=1e-4)
    # The best of two are seldom the first and the second; the others are those with differences of 1 and 2
    shares = [1 / 9, 3 / 9, 5 / 9]
    pairs = [shares[1] * shares[2], shares[0] * shares[2], shares[0] * shares[1]]
    found = best_of.labeler_accuracy([group], by_first_id(), 2, 0.5)
    assert found == pytest.approx(sum(map(math.prod, zip(pairs, right, strict=True))) / sum(pairs), abs=1e-4)


def test_the_steps_of_a_reward_model_are_passes_over_its_pairs_in_batches_of_like_lengths():
    pairs = [(Sample("p", (0,) * size, 1, 1.0), Sample("p", (1,) * size, 1, 0.0)) for size in range(1, 13)]
    rows = best_of_n.ordered(pairs, 7, 4, 1)
    assert len(rows) == 28 and {rows.count(pair) for pair in pairs} == {2, 3}
    batches = [[len(better.ids) for better, _ in rows[i : i + 4]] for i in range(0, 28, 4)]
    assert max(max(each) - min(each) for each in batches) <= 3 and batches != sorted(batches)
    assert rows == best_of_n.ordered(pairs, 7, 4, 1) != best_of_n.ordered(pairs, 7, 4, 2)


def test_labels_are_of_the_policy_and_the_first_one_and_ties_are_none():
    groups = [completions(3.0, 0.0, 1.0), completions(1.0, 1.0), completions(0.0, 3.0, 2.0)]
    made = best_of_n.labels(groups, None, 1, 15, 0.01, "1")
    assert all(better.gold > worse.gold for better, worse in made)
    assert {each.gold for pair in made for each in pair} == {0.0, 1.0, 2.0, 3.0}
    # One is the best of 3, seldom the first one of rising scores; the other too, or a random one
    made = [best_of_n.labels(groups, by_first_id(), 3, 15, 0.01, "1", own) for own in (1.0, 0.0)]
    few, more = (sum(0 in each.ids for pair in each_own for each in pair) for each_own in made)
    assert few < 4 <= more < 12
    assert made[0] == best_of_n.labels(groups, by_first_id(), 3, 15, 0.01, "1")
    with pytest.raises(ValueError, match="The completions of 1 prompts gave 0 labels, and 2 are asked for"):
        best_of_n.labels(groups[1:2], None, 1, 2, 0.01, "1")


def test_the_table_of_the_best_of_n():
    static = {"accuracy": [0.7, 0.5, 0.4], "equal": [0.7, 0.6, 0.4], "labeler": [0.9, 0.8, 0.8]}
    refreshed = {"accuracy": [0.6, 0.65], "equal": [0.6, 0.7], "labeler": [0.9, 0.85, 0.8], "before": [None, 0.6, 0.5]}
    refreshed |= {"ceiling": [0.7, 0.74], "another": [0.6, 0.55, 0.45]}
    found = {
        str(seed): {
            "static": {"path": [[0.0, 1.5], [0.6, 2.0], [4.0, 1.0 + seed / 10]], **static},
            "refreshed": {"path": [[0.0, 1.5], [4.0, 2.0]], **refreshed},
        }
        for seed in (0, 1)
    }
    text = best_of_n.report(found, best_of_n.Setting(best_of_n.QUICK.sizes, counts=(2, 4)))
    assert "| seed 1 | 1.50 | 2.00 | 2.00 | 1.10 at 4.00 | 2.00 at 4.00 | +0.90 |" in text
    assert "| mean [95 %] |  |  |  |  |  | +0.95 [+0.31, +1.59] |" in text
    cells = [f"{x:.3f} [{x:.3f}, {x:.3f}]" for x in (0.8, 0.4, 0.4)]
    assert f"| 2: best of 4 | {' | '.join(cells)} |" in text
    cells = [f"{x:.3f} [{x:.3f}, {x:.3f}]" for x in (0.8, 0.5, 0.45)]
    assert f"| 2: best of 4 | {cells[0]} | {cells[1]} | - | - | {cells[2]} | - |" in text
    # Accuracies, at equal differences, and less what the labeler's and the ceiling change
    cells = [f"{x:+.3f} [{x:+.3f}, {x:+.3f}]" for x in (-0.2, -0.1, -0.1, 0.05, 0.1, 0.1, 0.01)]
    assert f"| static, after round 1 - after 0 | {' | '.join(cells[:3])} |  |" in text
    assert f"| refreshed, after round 1 - after 0 | {' | '.join(cells[3:])} |" in text


class Scores:
    """Scores of two members by the tokens of a completion, each row read once."""

    def __init__(self, *members: list[float]):
        self.reward = FirstId()
        self.table = np.array(members)

    def member_scores(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(self.table[:, [int(score) for score in self.reward.score_ids(rows)]])


def ensemble(*members: list[float]) -> active.Ensemble:
    return active.Ensemble(Scores(*members))


def test_an_ensemble_is_measured_by_its_mean_and_by_what_its_members_disagree_about():
    group = completions(0.0, 1.0, 3.0)
    setting = active.Setting(active.QUICK.sizes, best_of=(1, 4096))
    # Both members have the last two in the wrong order, and they disagree most about the first against the last
    found = active.quality([group], ensemble([0.0, 3.0, 1.0], [0.0, 3.5, 2.5]), setting)
    assert (found["best of 4096"], found["accuracy"], found["agreed"]) == (1.0, pytest.approx(2 / 3, abs=1e-4), 1.0)
    # Variances .0625 (0, 1), .5625 (0, 2) and .25 (1, 2); wrong 0, 0, 1; gaps of the gold reward 1, 3, 2
    assert found["wrong"]["scores"] == 0.0 and found["noise"]["scores"] == -1.0
    found = active.quality([group], ensemble([0.0, 3.0, 1.0], [0.0, 0.5, 1.0]), setting)
    assert found["agreed"] == 0.0  # only one member has them in the wrong order


def test_equal_values_have_the_mean_of_their_ranks():
    assert active.rank_correlation(np.array([1.0, 2.0, 9.0]), np.array([0.0, 5.0, 6.0])) == pytest.approx(1.0)
    ranks = np.corrcoef([1, 2, 3, 4], [1.5, 1.5, 3.5, 3.5])[0, 1]
    assert active.rank_correlation(np.array([1, 2, 3, 4]), np.array([0, 0, 1, 1])) == pytest.approx(ranks)


def test_labels_have_noise_or_none_and_are_the_same_for_every_selection():
    low, high, same = completions(0.0, 1.0, 1.0)
    assert active.answer((0, low, high), 0.0, 1) == active.answer((0, high, low), 0.0, 1) == (high, low)
    assert active.answer((0, high, same), 0.0, 1) is None
    drawn = [active.answer((prompt, low, high), 0.5, 1) for prompt in range(400)]
    assert drawn == [active.answer((prompt, high, low), 0.5, 1) for prompt in range(400)]
    assert drawn.count((high, low)) / 400 == pytest.approx(1 / (1 + math.exp(-2)), abs=0.05)
    chance = [active.answer((prompt, high, same), 0.5, 1) for prompt in range(400)]
    assert chance.count((high, same)) / 400 == pytest.approx(0.5, abs=0.08)


def test_chosen_pairs_are_described():
    low, high, same = completions(0.0, 1.0, 1.0)
    found = active.describe([(low, high), (high, same), (high, low)], ensemble([1.0, 0.0, 2.0], [1.0, 1.0, 0.0]), 0.5)
    wrong = round((0.5 + 2 / (1 + math.exp(2))) / 3, 4)
    assert found == {"gap": 0.6667, "equal": 0.3333, "noise": wrong, "wrong": 1.0}


def test_the_table_of_selections():
    golds = {"random": [1.0, 2.0], "uncertainty": [1.0, 3.0], "thompson": [1.0, 1.5]}
    ranks = dict.fromkeys(active.MEASURES, 0.25)

    def result(shift: float):
        return {
            name: {
                "rounds": [
                    {
                        "best of 2": gold + shift,
                        "best of 4": 1.0,
                        "accuracy": 0.6,
                        "agreed": 0.5,
                        "wrong": ranks,
                        "noise": ranks,
                    }
                    for gold in each
                ],
                "asked": [{"gap": 2.0, "equal": 0.1, "noise": 0.2, "wrong": 0.3}],
            }
            for name, each in golds.items()
        }

    setting = active.Setting(active.QUICK.sizes, rounds=(64, 64), best_of=(2, 4))
    text = active.report({"1": result(0.0), "2": result(0.1)}, setting)
    assert "| uncertainty - random |  | +1.00 [+1.00, +1.00] |" in text
    assert "| uncertainty | 71% [71%, 71%] | 50% [50%, 50%] | 50% [50%, 50%] | missed |" in text
    assert "| thompson | more than all [more than all, more than all] |" in text
    assert "| thompson | 2.00 [2.00, 2.00] | 0.10 [0.10, 0.10] | 0.20 [0.20, 0.20] | 0.30 [0.30, 0.30] |" in text


def test_selections_are_compared_with_random_pairs_of_the_same_noise():
    for module, noise in ((active, 0.5), (active_exact, 0.0), (active_scores, 0.5)):
        setting, identity = module.settings_of(quick=False)
        assert {active.control(name) for name in setting.arms} == {setting.arms[0]}
        assert {active.ARMS[name].is_noisy for name in setting.arms} == {noise > 0} and len(setting.arms) == 3
        assert identity["arms"] == list(setting.arms)


def test_answers_of_a_judge_are_held_against_the_decided_ones_of_people():
    people = {(0, 1): 0, (2, 3): 2, (4, 5): 5, (6, 7): 6, (8, 9): "tie"}
    said = {(0, 1): 0, (2, 3): 3, (4, 5): "tie", (8, 9): 8}
    assert judge.agreement(said, people) == {"same": 1, "other": 1, "tie": 1, "none": 1}
    assert judge.chosen({"question": [4, 2], "answer": 1}) == 2
    assert judge.chosen({"question": [4, 2], "answer": "tie"}) == "tie"
    row = judge.questions([("good", "bad"), ("good", "so so")], seed=1)
    assert [each.completion for each in row.candidates] == [" good", " bad", " so so"]
    assert sorted(map(sorted, row.questions)) == [[0, 1], [0, 2]]


def test_the_sizes_of_the_rounds_on_smollm2_are_keys_of_the_pipeline():
    register_rounds()
    words = [f"pipeline={smollm2.PIPELINE}", *(f"{name}={size}" for name, size in smollm2.QUICK.items())]
    cfg, problems = compose(words, [], "pipeline")
    assert cfg is not None and problems == []
    steps = all_steps(cfg)
    assert list(steps)[-6:] == [f"{name}_2" for name in ("collect", "label", "reward", "quality", "policy", "compare")]
    assert "stage.budget=8" in steps["collect_2"] and "stage.labels=[label_1]" in steps["collect_2"]


def run(tmp_path: Path, *words: str) -> str:
    """Return what a benchmark prints at tiny sizes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.loop", *words, "--quick", "--seeds", "1", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["refresh", "best_of_n", "active", "active_exact"])
def test_a_benchmark_of_the_loop_runs_and_is_resumed(tmp_path, name):
    text = run(tmp_path, name)
    (row,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["bench"] == name and row["of"] == "1"
    table = text[text.index("\n|") :]
    assert run(tmp_path, name).endswith(table) and run(tmp_path, name, "--table").endswith(table)
    (tmp_path / "results.jsonl").unlink()
    assert run(tmp_path, name).endswith(table)  # from the runs, which are done
