"""Quality of rewards: each measure against numbers by hand or brute force, and the stage from data to page."""

import itertools
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hydra.utils import instantiate

from rlhf_trl.checks import find_problems
from rlhf_trl.data import Attributes, Pairs, Rankings, Ratings
from rlhf_trl.data.sources.files import load_files
from rlhf_trl.data.sources.mixture import mix
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.evaluation import rewardbench
from rlhf_trl.evaluation.annotations import read_annotated, slices_of
from rlhf_trl.evaluation.reward_measures import (
    accuracy,
    best_of_n_gains,
    disagreement,
    length_slices,
    quantile_curve,
    rater_ceiling,
    rating_gap_slices,
    reliability,
    share_slices,
    top_one,
    within,
)
from rlhf_trl.evaluation.reward_quality import evaluate_rewards, metrics_of
from rlhf_trl.evaluation.statistics import bootstrap_share, pearson, ranks, spearman
from rlhf_trl.report.page import to_html
from rlhf_trl.report.rewards import reward_page, reward_text, summary_table
from rlhf_trl.rewards.function import FunctionReward
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.runs.reward_results import RewardQuality
from rlhf_trl.tasks.demo.data import load
from tests.helpers.tiny import make_tokenizer

NAN = np.nan


def test_accuracy_counts_a_tie_half_and_draws_whole_rows():
    lead = np.array([1.0, -1.0, 0.0, 2.0, NAN])
    found = accuracy(lead, np.array([0, 0, 1, 2, 2]))
    assert found.mean == (1 + 0 + 0.5 + 1) / 4
    # Two rows, one all right, one all wrong: drawing rows gives 0, 1/2 and 1, whatever the number of comparisons
    assert accuracy(np.array([1.0] * 9 + [-1.0] * 9), np.repeat([0, 1], 9)) == (0.5, 0.0, 1.0)
    lonely = accuracy(np.array([1.0, 1.0]), np.array([7, 7]))
    assert lonely.mean == 1 and math.isnan(lonely.low)


def test_bootstrap_share_is_that_of_unequal_rows():
    sums, counts = np.array([3.0, 0.0, 1.0]), np.array([4, 0, 1])
    found = bootstrap_share(np.tile(sums, 10), np.tile(counts, 10))
    assert found.mean == 0.8 and 0.75 < found.low < 0.8 < found.high < 0.88
    # Of two rows Student's interval, whose quantile is 12.7: the residuals are -.2 and .2, the error .08
    assert bootstrap_share(sums, counts) == (0.8, 0.0, 1.0)
    assert bootstrap_share(10 * sums, counts) == pytest.approx((8.0, 8 - 12.7062 * 0.8, 8 + 12.7062 * 0.8), abs=1e-3)


def test_correlations():
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 40.0]
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert spearman(x, y) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert ranks([5, 1, 5, 2]).tolist() == [3.5, 1, 3.5, 2]
    assert math.isnan(pearson([1, 1, 1], [1, 2, 3])) and math.isnan(pearson([1, 2], [1, 2]))


def test_calibration_by_hand():
    """sigmoid(ln 3) = .75 and sigmoid(ln 9) = .9; the reward prefers the other side in the third comparison."""
    lead = np.array([math.log(3), math.log(3), -math.log(3), math.log(9), NAN])
    share = np.array([0.8, 0.6, 0.7, NAN, 0.9])
    (found,) = reliability(lead, share, bins=1).bins
    assert found.n == 4 and (found.low, found.high) == (0.5, 1.0)
    at = {round(one.predicted, 3): one for one in reliability(lead, share, bins=10).bins}
    assert at[0.75].observed == pytest.approx((0.8 + 0.6 + 0.3) / 3) and at[0.75].n == 3
    assert at[0.9].observed == 1.0  # one choice without raters
    assert reliability(lead, share, bins=10).ece == pytest.approx((3 * (0.75 - 1.7 / 3) + (1 - 0.9)) / 4)


def test_what_says_the_observed_share_is_calibrated():
    share = np.linspace(0.02, 0.98, 200)
    assert reliability(np.log(share / (1 - share)), share).ece < 1e-12
    assert reliability(3 * np.log(share / (1 - share)), share).ece > 0.1
    assert reliability(np.zeros(5)).ece == 0  # no preference: one half, which is right


def test_slices():
    parts = length_slices(np.array([100, 100, 50, 0]), np.array([91, 50, 100, 0]))
    assert {name: part.tolist() for name, part in parts.items()} == {
        "like length": [True, False, False, True],
        "preferred one longer": [False, True, False, False],
        "preferred one shorter": [False, False, True, False],
    }
    gap = np.array([0.5, 1.5, 2.5, NAN])
    assert {name: part.sum() for name, part in rating_gap_slices(gap, [1, 2]).items()} == {
        "gap above 1": 2,
        "gap above 2": 1,
    }
    thirds = rating_gap_slices(np.arange(1.0, 10.0))
    assert [part.sum() for part in thirds.values()] == [3, 3, 3]
    assert rating_gap_slices(np.array([1.0, 1.0, NAN])) == {} == share_slices(np.array([1.0, NAN]))
    assert [part.sum() for part in share_slices(np.array([0.6, 0.75, 0.95, 1.0, NAN])).values()] == [1, 2, 1]


def test_top_one():
    scores = np.array([3.0, 1.0, 2.0, 5.0, 5.0, 0.0, 1.0, 1.0])
    rows = [[0, 1, 2], [3, 4, 5], [6, 7]]
    # The first row's highest is the best; of the second's two highest one loses; the third has two completions only
    found = top_one(scores, rows, [{0}, {3}, {6}], [{1, 2}, {4, 5}, {7}])
    assert found.mean == (1 + 0.5) / 2
    assert math.isnan(top_one(scores, [[6, 7]], [{6}], [{7}]).mean)


def test_parts_of_like_size():
    found = quantile_curve(np.arange(8.0), np.arange(8.0) ** 2, parts=2)
    assert [(one.x, one.n, one.y) for one in found] == [(1.5, 4, 2.5), (5.5, 4, 30.5)]
    assert [one.n for one in quantile_curve(np.array([1.0, 1.0, 1.0, 2.0]), np.arange(4.0), parts=4)] == [3, 1]
    assert quantile_curve(np.array([]), np.array([])) == []
    assert within(np.array([1.0, 3.0, 10.0]), np.array([4, 4, 9])).tolist() == [-1, 1, 0]


def test_raters_who_always_agree_are_no_ceiling():
    ratings = [[1, 1], [2, 2, 2], [5, 5], [3], []]
    found = rater_ceiling(ratings, np.array([1, 2, 3]), np.array([0, 1, 0]))
    assert found.completions == 3 and found.comparisons == 2 and found.raters == pytest.approx(7 / 3)
    for one in (found.one_rater, found.half):
        assert one.pearson == pytest.approx(1) and one.accuracy == 1
    assert rater_ceiling([[1, 2], [1, 3], [2]], np.array([0]), np.array([1])) is None


def test_ceiling_of_two_raters_by_hand():
    """With two raters a rater and the rest, or two halves, are one number each: only which is which is drawn."""
    ratings = [[1, 2], [2, 1], [4, 3], [3, 4]]
    found = rater_ceiling(ratings, np.array([2, 3]), np.array([0, 1]), draws=400)
    orders = list(itertools.product((0, 1), repeat=4))
    drawn = [
        pearson(
            [r[o] for r, o in zip(ratings, order, strict=True)],
            [r[1 - o] for r, o in zip(ratings, order, strict=True)],
        )
        for order in orders
    ]
    assert found.one_rater.pearson == pytest.approx(np.mean(drawn), abs=0.02)
    assert found.half.spearman_brown == pytest.approx(2 * found.half.pearson / (1 + found.half.pearson))
    assert found.half.accuracy == 1  # the higher two are above the lower two for whoever is drawn


def test_one_noisy_rater_predicts_less_than_half_of_them():
    random = np.random.default_rng(0)
    truth = random.normal(size=400)
    ratings = truth[:, None] + random.normal(scale=1.0, size=(400, 10))
    found = rater_ceiling(ratings.tolist(), np.arange(0, 400, 2), np.arange(1, 400, 2))
    # corr(one, mean of 9) = 1 / sqrt(2 * (1 + 1/9)); corr of halves of 5 = 1 / (1 + 1/5)
    assert found.one_rater.pearson == pytest.approx(1 / math.sqrt(2 * (1 + 1 / 9)), abs=0.05)
    assert found.half.pearson == pytest.approx(1 / 1.2, abs=0.04)
    assert found.one_rater.accuracy < found.half.accuracy


@pytest.mark.parametrize("n", [1, 2, 4])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    random = np.random.default_rng(n)
    scores, gold = random.integers(0, 4, size=5).astype(float), random.normal(size=5)
    expected = []
    for subset in itertools.combinations(range(5), n):
        highest = [i for i in subset if scores[i] == scores[list(subset)].max()]
        expected.append(gold[highest].mean())  # equal scores: any of them
    gains = {point.n: point.gain.mean for point in best_of_n_gains(scores, gold, np.zeros(5))}
    assert list(gains) == [1, 2, 4]
    assert gains[n] == pytest.approx(np.mean(expected) - gold.mean())


def test_best_of_many_does_not_overflow():
    scores = np.arange(1000.0)
    gains = {point.n: point.gain.mean for point in best_of_n_gains(scores, scores, np.zeros(1000))}
    assert gains[1] == 0 and gains[64] == pytest.approx(64 / 65 * 1001 - 1 - 499.5)  # the largest of 64 of 1 to 1,000


def test_best_of_n_is_a_gain_over_each_prompts_own_mean():
    prompts = np.array([0, 0, 1, 1, 2])
    gold = np.array([0.0, 1.0, 100.0, 110.0, 5.0])
    found = best_of_n_gains(np.array([0.0, 1.0, 5.0, 4.0, NAN]), gold, prompts)
    assert [point.n for point in found] == [1, 2]
    assert found[0].gain.mean == 0 and found[0].prompts == 2
    assert found[1].gain.mean == pytest.approx((0.5 - 5.0) / 2)
    assert found[1].best_gain.mean == pytest.approx((0.5 + 5.0) / 2)
    assert found[1].kl == pytest.approx(0.193147, abs=1e-6)


def test_disagreement_is_largest_where_members_part():
    members = np.array([[0.0, 1.0, 0.0, 2.0], [0.0, 1.2, 3.0, 1.0]])
    found = disagreement(members, np.array([1, 3, 1]), np.array([0, 2, 2]), np.array([0, 1, 2]))
    leads = np.array([[1.0, 2.0, 1.0], [1.2, -2.0, -1.8]])
    assert found.margin_std == pytest.approx(leads.std(axis=0, ddof=1).mean())
    assert [part.accuracy.mean for part in found.slices] == [1.0, 0.0, 0.5]
    assert [each.mean for each in found.members] == [1.0, pytest.approx(1 / 3)]


def test_rewardbench_sections_count_prompts_and_math_as_much_as_code():
    subsets, leads = [], []
    for subset, right in {"mt-bench-easy": 1.0, "alpacaeval-easy": 0.5, "math-prm": 0.25, "hep-go": 1.0}.items():
        subsets += [subset] * 4
        leads += [1.0 if i < 4 * right else -1.0 for i in range(4)]
    found = rewardbench.section_scores(subsets, np.array(leads))
    assert found.sections["Chat"] == pytest.approx((28 * 1.0 + 100 * 0.5) / 128)
    assert found.sections["Reasoning"] == pytest.approx((984 * 0.25 + 164 * 1.0) / (984 + 164))
    assert found.sections["Safety"] is None and found.score is None and "donotanswer" in found.missing


def test_rewardbench_score_is_the_mean_of_four_sections():
    subsets = sorted(rewardbench.SUBSETS)
    code = {name for name in subsets if name.startswith("hep-")}
    found = rewardbench.section_scores(subsets, np.array([1.0 if name in code else 0.0 for name in subsets]))
    assert found.missing == [] and found.sections["Reasoning"] == 0.5  # six times 164 of code, 984 of math
    assert found.score == 0.125  # equal scores are no success
    assert sum(rewardbench.SECTIONS["Chat"].values()) == 358 and sum(rewardbench.SECTIONS["Safety"].values()) == 740
    assert rewardbench.section_scores(["hep-go"] * 2, np.array([NAN, 1.0])).subsets["hep-go"].n == 1


def annotated_rows() -> Dataset:
    """Two prompts, three answers each; longer is better for the first prompt's people, shorter for the second's."""
    return Dataset.from_list(
        [
            {
                "prompt": prompt,
                "completions": ["a", "a a a", "a a a a a a"],
                "better": better,
                "worse": worse,
                "gap": [2.0, 1.0, 1.0],
                "share": [1.0, 0.75, None],
                "ratings": [[1.0, 2.0], [2.0, 3.0], [4.0, 4.0]][::step],
                "kind": kind,
            }
            for prompt, better, worse, kind, step in (
                ("p", [2, 1, 2], [0, 0, 1], "long", 1),
                ("q", [0, 0, 1], [2, 1, 2], "short", -1),
            )
        ]
    )


def by_length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def test_a_measured_reward_and_its_page():
    reward = FunctionReward(by_length, name="length")
    quality = evaluate_rewards(read_annotated(annotated_rows()), [reward], gaps_above=[1.5])
    entry = quality.rewards["length"]
    assert quality.completions == 6 and quality.comparisons == 6 and quality.prompts == 2
    slices = {part.name: (part.n, part.accuracy.mean) for part in entry.slices}
    assert entry.accuracy.mean == 0.5 and slices["kind: long"] == (3, 1.0) and slices["kind: short"] == (3, 0.0)
    assert slices["gap above 1.5"] == (2, 0.5) and slices["preferred one longer"] == (3, 1.0)
    assert entry.length.longer_preferred == 1.0 and quality.longer_preferred == 0.5
    assert entry.length.pearson == pytest.approx(1) and entry.top_one.mean == 0.5
    # Gold is the mean rating: of two of three, length gains in one prompt what it loses in the other
    assert [round(point.gain.mean, 9) for point in entry.best_of_n] == [0, 0]
    mean, best = (1.5 + 2.5 + 4) / 3, (4 + 4 + 2.5) / 3
    assert entry.best_of_n[1].best_gain.mean == pytest.approx(best - mean)
    assert len(entry.mistakes) == 3 and entry.mistakes[0].preferred == "a"
    metrics = metrics_of(quality)
    assert metrics["eval_length/accuracy"] == 0.5 and metrics["eval_length/accuracy_kind_long"] == 1.0
    assert metrics["eval_length/accuracy_gap_above_1.5"] == 0.5 and "eval_length/best_of_2_gain" in metrics
    assert "gap above 1.5" in reward_text(quality) and "(one rater)" in reward_text(quality)
    html = to_html(reward_page(quality, "a title", "python train.py"))
    assert html.count("<svg") == 10 and "people&#39;s mean ratings" in html


def test_scores_that_are_none_or_not_finite_are_counted():
    values = iter([1.0, None, float("nan"), 4.0, float("inf"), 6.0])

    def broken(prompts, completions, **columns):
        return [next(values) for _ in completions]

    quality = evaluate_rewards(read_annotated(annotated_rows()), [FunctionReward(broken)])
    entry = quality.rewards["broken"]
    assert entry.completions_without_score == 3 and entry.comparisons_dropped == 5
    assert entry.accuracy.mean == 0.0 and math.isnan(entry.accuracy.low)  # of the one of 4.0 and 6.0
    to_html(reward_page(quality, "a title", ""))

    with pytest.raises(ConfigError, match="`nothing` has no finite score for both"):
        evaluate_rewards(
            read_annotated(annotated_rows()),
            [FunctionReward(lambda completions: [None] * len(completions), name="nothing")],
        )


class TwoMembers(ModelReward):
    """An ensemble of one that likes length and one that doesn't."""

    members = 2

    def __init__(self):
        super(ModelReward, self).__init__("two")
        self.tokenizer = make_tokenizer()

    def __call__(self, prompts, completions, **columns):
        return [0.0] * len(completions)

    def member_scores(self, rows):
        lengths = torch.tensor([float(len(row)) for row in rows])
        return torch.stack([lengths, -lengths])


def test_members_of_an_ensemble_are_held_beside_each_other():
    quality = evaluate_rewards(read_annotated(annotated_rows()), [TwoMembers()])
    found = quality.rewards["two"].disagreement
    assert [each.mean for each in found.members] == [0.5, 0.5]
    # Leads of 5, 2, 3 tokens in each row, and as much below 0: their unbiased std is sqrt(2) times as large
    assert metrics_of(quality)["eval_two/disagreement"] == pytest.approx(math.sqrt(2) * 10 / 3)
    assert "Ensemble" in to_html(reward_page(quality, "a title", ""))


def test_slices_that_are_not_there():
    annotated = read_annotated(annotated_rows())
    with pytest.raises(ConfigError, match="`stage.slices` names the column `source`.*`kind`"):
        slices_of(annotated, None, ["source"], 0.1)
    many = Dataset.from_list([{**row, "id": i} for i, row in enumerate(list(annotated_rows()) * 15)])
    assert not any(name.startswith("id") for name in slices_of(read_annotated(many), None, None, 0.1))
    with pytest.raises(ConfigError, match="`id`, which has 30 different values"):
        slices_of(read_annotated(many), None, ["id"], 0.1)
    with pytest.raises(ConfigError, match="the data doesn't say"):
        slices_of(read_annotated(annotated_rows().remove_columns("gap")), [1], None, 0.1)


def test_rows_that_compare_nothing():
    rows = annotated_rows().map(lambda row: {"better": [], "worse": [], "gap": [], "share": []})
    with pytest.raises(ConfigError, match=r"2 rows for evaluation compare nothing.*data/feedback=\.\.\."):
        read_annotated(rows)


def test_few_raters_are_said():
    lone = annotated_rows().map(lambda row: {"ratings": [[1.0], [2.0], [3.0]]})
    quality = evaluate_rewards(read_annotated(lone), [FunctionReward(by_length)])
    assert quality.raters is None and "6 completions with a single rating" in quality.notes[0]
    assert "fewer than three completions have two raters" in quality.notes[1]


def test_attributes_are_slices_of_their_own_order():
    rows = Dataset.from_list(
        [
            {
                "prompt": "p",
                "completions": ["a", "a a"],
                "better": [0],
                "worse": [1],
                "gap": [1.0],
                "share": [None],
                "attributes": [{"helpful": 1.0, "clear": 0.0}, {"helpful": 0.0, "clear": 1.0}],
            }
        ]
    )
    entry = evaluate_rewards(read_annotated(rows), [FunctionReward(by_length)]).rewards["by_length"]
    slices = {part.name: part.accuracy.mean for part in entry.slices}
    assert slices["more helpful"] == 0.0 and slices["more clear"] == 1.0 and entry.ratings is None


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pairs_keep_the_columns_that_part_them(tmp_path, capsys):
    rows = [
        {"prompt": f"p{i}", "chosen": "good", "rejected": "bad", "subset": "hep-go", "margin": 1.5, "tags": ["x"]}
        for i in range(3)
    ]
    found = load_files("annotated", 0, write(tmp_path / "pairs.jsonl", rows), eval_size=None)["train"]
    assert found[0]["subset"] == "hep-go" and found[0]["gap"] == [1.5] and found[0]["better"] == [0]
    assert "`tags` is neither text nor number and dropped (3 rows)" in capsys.readouterr().out
    rows[1] |= {"share": 1.2}
    with pytest.raises(DataError, match="line 2: `share` is 1.2"):
        load_files("annotated", 0, write(tmp_path / "pairs.jsonl", rows), eval_size=None)


def test_feedback_of_several_raters_becomes_shares(tmp_path):
    base = {"prompt": "p", "completion_a": "x", "completion_b": "y", "source": "web"}
    rows = [{**base, "preferred": choice, "rater": rater} for rater, choice in enumerate("aab")]
    found = load_files("annotated", 0, write(tmp_path / "a.jsonl", rows), feedback=Pairs(shuffle=False))["train"]
    assert found[0]["share"] == [pytest.approx(2 / 3)] and found[0]["source"] == "web" and len(found) == 1

    rows = [
        {"prompt": "p", "completion": text, "ratings": votes, "model": text, "source": "web"}
        for text, votes in (("x", [1, 2]), ("y", [5, 2]), ("z", [2, 1]))
    ]
    ratings = Ratings(shuffle=False, min_gap=1, negatives=2)  # negatives are for training
    found = load_files("annotated", 0, write(tmp_path / "b.jsonl", rows), feedback=ratings)["train"][0]
    assert sorted(map(tuple, found["ratings"])) == [(1, 2), (2, 1), (5, 2)] and len(found["completions"]) == 3
    assert [found["completions"][i] for i in found["better"]] == ["y", "y"] and found["gap"] == [2.0, 2.0]
    assert found["share"] == [0.875, 0.875]  # 5 beats both, 2 beats 1 and ties with 2
    assert found["source"] == "web" and "model" not in found

    rows = [{"prompt": "p", "completions": ["x", "y", "z"], "ranks": [1, 2, 2]}]
    found = load_files("annotated", 0, write(tmp_path / "c.jsonl", rows), feedback=Rankings(shuffle=False))["train"][0]
    assert found["better"] == [0, 0] and found["share"] == [None, None]

    rows = [{"prompt": "p", "completion": text, "helpful": value} for text, value in (("x", 1), ("y", None), ("z", 0))]
    feedback = Attributes(dimensions=["helpful"], shuffle=False)
    found = load_files("annotated", 0, write(tmp_path / "d.jsonl", rows), feedback=feedback)["train"][0]
    assert len(found["better"]) == 1 and {"helpful": 1.0} in found["attributes"]


def test_the_sources_of_a_mixture_are_slices():
    sources = {name: partial(load, max_samples=20, max_eval_samples=8 * i) for i, name in enumerate(("own", "web"), 1)}
    rows = mix("annotated", 0, sources)["eval"]
    found = slices_of(read_annotated(rows), None, ["source"], 0.1)
    assert 0 < found["source: own"].sum() < found["source: web"].sum()


def run(compose, tmp_path, *overrides: str) -> tuple[dict, Path]:
    cfg = compose("stage=evaluate_reward", f"runs_dir={tmp_path}", "project=test", "data.max_samples=40", *overrides)
    instantiate(cfg.stage.run)(cfg)
    return json.loads(Path(cfg.run_dir, "reward_quality.json").read_text()), Path(cfg.run_dir)


def test_the_stage_evaluates_the_embedded_worlds_gold_reward(compose, tmp_path, capsys):
    quality, folder = run(compose, tmp_path, "reward=demo", "data.max_eval_samples=200")
    entry = quality["rewards"]["gold"]
    assert (
        entry["accuracy"]["mean"] > 0.85 and entry["ratings"]["spearman"] > quality["raters"]["one_rater"]["spearman"]
    )
    assert entry["calibration"]["ece"] < 0.1 and entry["best_of_n"][-1]["gain"]["low"] > 0
    assert any(part["slice"] == "kind: fact" for part in entry["slices"])
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    assert (folder / "report" / "index.html").stat().st_size > 20_000
    said = capsys.readouterr().out
    assert "(one rater)" in said and "`eval_model/accuracy` was not measured" in said
    # The tables can be made from the file too, whose NaN are null
    cells = summary_table(RewardQuality.from_json(quality)).cells
    assert cells[0][0] == "gold" and cells[0][1].startswith("0.9") and cells[1][0] == "(one rater)"


def test_values_with_signs_of_formulas_are_shown_and_a_page_that_fails_leaves_the_scores(
    compose, tmp_path, monkeypatch
):
    rows = [
        {"prompt": f"p {i}", "chosen": "a b", "rejected": "a", "price": ["$5", "$\\frac{1}$", "_x & <b>"][i % 3]}
        for i in range(12)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data=files", f"data.paths={file}", "data.eval_size=null", "reward=function"]
    words += ["reward.function.function=tests.unit.evaluation.test_evaluate_reward.by_length"]
    words += ["stage=evaluate_reward", f"runs_dir={tmp_path}", "project=test"]
    cfg = compose(*words)
    instantiate(cfg.stage.run)(cfg)
    html = Path(cfg.run_dir, "report", "index.html").read_text()
    assert "price: $5</text>" in html and "price: $\\frac{1}$</text>" in html and "_x &amp; &lt;b&gt;" in html
    assert json.loads(Path(cfg.run_dir, "run.json").read_text())["status"] == "done"

    def broken(*args):
        raise RuntimeError("no page")

    monkeypatch.setattr("rlhf_trl.stages.evaluate_reward.write_page", broken)
    cfg = compose(*words, "overwrite=true")
    with pytest.raises(RuntimeError, match="no page"):
        instantiate(cfg.stage.run)(cfg)
    assert json.loads(Path(cfg.run_dir, "run.json").read_text())["status"] == "failed"
    quality = json.loads(Path(cfg.run_dir, "reward_quality.json").read_text())
    assert quality["rewards"]["function"]["accuracy"]["mean"] == 1.0


def test_best_of_n_of_what_a_policy_writes(compose, tmp_path):
    quality, _ = run(
        compose,
        tmp_path,
        "reward=[demo,function]",
        "reward.function.function=tests.unit.evaluation.test_evaluate_reward.by_chat_length",
        "stage.gold=gold",
        "stage.policy=demo:sft",
        "stage.prompts=4",
        "stage.completions=8",
        "data.max_eval_samples=40",
        "stage.objective=eval_function/best_of_8_gain",
    )
    curve = quality["rewards"]["function"]["best_of_n"]
    assert [(point["n"], point["prompts"]) for point in curve] == [(1, 4), (2, 4), (4, 4), (8, 4)]
    assert curve[-1]["best_gain"]["mean"] > max(0, curve[-1]["gain"]["mean"])
    assert quality["gold"] == "gold, of a policy's completions" and "best_of_n" not in quality["rewards"]["gold"]


def by_chat_length(completions):
    return [float(len(messages[-1]["content"])) for messages in completions]


def test_a_gold_reward_that_is_not_there(compose, tmp_path):
    with pytest.raises(ConfigError, match="`stage.gold` is `truth`, and the rewards are `gold`"):
        run(compose, tmp_path, "reward=demo", "stage.gold=truth")
    with pytest.raises(ConfigError, match="`stage.policy` writes completions that nobody has rated"):
        run(compose, tmp_path, "reward=demo", "stage.policy=demo:sft", "stage.bins=0")
    drawn = ["reward=[demo,repetition]", "stage.gold=gold", "stage.policy=demo:sft", "stage.temperature=0"]
    with pytest.raises(ConfigError, match="`stage.temperature` is 0"):
        run(compose, tmp_path, *drawn)
    with pytest.raises(ConfigError, match="the only reward"):
        run(compose, tmp_path, "reward=demo", "stage.gold=gold")
    with pytest.raises(ConfigError, match="(?s)2 problems.*`stage.bins` is 0. Set it to 1 or more"):
        run(compose, tmp_path, "reward=demo", "stage.bins=0", "stage.completions=1")


def test_a_reward_model_and_a_policy_that_are_not_there(compose, tmp_path):
    cfg = compose("stage=evaluate_reward", f"runs_dir={tmp_path}", "stage.policy=sft")
    problems = find_problems(cfg)
    assert "`reward.model.run` is `reward`" in problems[0] and "`stage.policy` is `sft`" in problems[1]


def test_a_file_in_the_format_of_rewardbench_gives_its_sections(compose, tmp_path, capsys):
    rows = [
        {"prompt": f"Question {i}", "chosen": "a" * (1 + i % 3), "rejected": "bb", "subset": subset, "id": i}
        for i, subset in enumerate(["alpacaeval-easy", "donotanswer", "hep-go"] * 4)
    ]
    words = ["data=files", f"data.paths={write(tmp_path / 'rewardbench.jsonl', rows)}", "data.eval_size=null"]
    words += ["data.to_chat=true", "reward=function"]
    words += ["reward.function.function=tests.unit.evaluation.test_evaluate_reward.by_chat_length"]
    quality, _ = run(compose, tmp_path, *words)
    found = quality["rewards"]["function"]["rewardbench"]
    # Chosen has one letter in Chat, as many as rejected in Safety, and one more in Reasoning
    assert found["sections"] == {"Chat": 0.0, "Chat Hard": None, "Safety": 0.0, "Reasoning": 1.0}
    assert found["score"] is None and quality["raters"] is None and quality["gold"] is None
    said = capsys.readouterr().out
    assert "no `eval` split, so rewards are evaluated on all of its 12 rows" in said and "Reasoning" in said


def test_a_trained_ensemble(compose, train, tmp_path):
    few = ["stage.args.max_steps=2", "stage.args.eval_strategy='no'", "data.max_samples=64"]
    train(tmp_path, "stage=reward", "adapter=lora", "adapter.peft.r=4", "stage.members=2", *few)
    quality, _ = run(compose, tmp_path, "data.max_eval_samples=100")
    entry = quality["rewards"]["model"]
    found = entry["disagreement"]
    assert len(found["members"]) == 2 and found["lead_std"] > 0
    assert sum(part["n"] for part in found["slices"]) == quality["comparisons"]
    assert entry["completions_without_score"] == 0
