"""Figures of an evaluation of rewards in words."""

import pytest

from rlhf_trl.report.page import to_markdown
from rlhf_trl.report.reward_reading import reading
from rlhf_trl.report.rewards import reward_page, reward_text
from rlhf_trl.runs.reward_results import RewardQuality


def estimate(mean: float, half: float = 0.05) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def part(name: str, n: int, mean: float, half: float = 0.05) -> dict:
    return {"slice": name, "n": n, "accuracy": estimate(mean, half)}


def points(*gains: float) -> list[dict]:
    return [
        {"n": 2**i, "prompts": 50, "kl": 0.7 * i, "gain": estimate(gain, 0.1), "best_gain": estimate(2.0)}
        for i, gain in enumerate(gains)
    ]


def quality(raters: float | None = None, longer: float = 0.5, **changes) -> RewardQuality:
    reward = {
        "accuracy": estimate(0.7),
        "slices": [part("like length", 200, 0.7)],
        "top_one": estimate(0.5),
        "calibration": {"ece": 0.01, "bins": [{"low": 0.6, "high": 0.8, "n": 900, "predicted": 0.7, "observed": 0.7}]},
        "length": {"pearson": 0.0, "spearman": 0.0, "longer_preferred": longer, "curve": []},
        "ratings": None,
        "mistakes": [],
        "completions_without_score": 0,
        "comparisons_left_out": 0,
        **changes,
    }
    one = {"pearson": 0.5, "spearman": 0.5, "accuracy": raters}
    ceiling = {"completions": 9, "comparisons": 9, "raters": 3.0, "one_rater": one}
    ceiling["half"] = {**one, "spearman_brown": 0.6}
    counts = dict.fromkeys(("rows", "prompts", "completions", "comparisons"), 900)
    return RewardQuality.from_json(
        {
            **counts,
            "longer_preferred": 0.5,
            "gold": "people's mean ratings",
            "rewards": {"model": reward},
            "raters": None if raters is None else ceiling,
        }
    )


def bins(predicted: float, observed: float, n: int = 900) -> dict:
    each = {"low": 0.5, "high": 1.0, "n": n, "predicted": predicted, "observed": observed}
    return {"calibration": {"ece": abs(predicted - observed), "bins": [each]}}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (quality(accuracy=estimate(0.52)), "can't be told from chance"),
        (quality(raters=0.8), "less with people than one rater does with the others (80.0%)"),
        (quality(raters=0.6), "more with people's mean than a single rater"),
        (quality(raters=0.71), "can't be told from a single rater, who agrees with the others in 71.0%"),
        (
            quality(slices=[part("like length", 200, 0.7), part("kind: joke", 60, 0.4)]),
            "Weakest slice: `kind: joke`, 0.40 [0.35, 0.45] of 60 comparisons, where it prefers what people don't",
        ),
        (quality(slices=[part("kind: joke", 60, 0.5)]), "0.50 [0.45, 0.55] of 60 comparisons, no better than chance"),
        (quality(slices=[part("kind: joke", 60, 0.69)]), "No slice is weaker than the whole beyond chance"),
        (quality(**bins(0.9, 0.7)), "Over-confident: on average its scores predict that 90% of raters agree with it"),
        (quality(**bins(0.6, 0.7)), "Under-confident"),
        (quality(**bins(0.75, 0.7, n=40)), "Its confidence fits"),  # 40 comparisons can't tell
        (quality(best_of_n=points(0.0, 0.5, 0.8)), "still rises at the largest n, 4: +0.80 of the +2.00 there is"),
        (
            quality(best_of_n=points(0.0, 0.5, 0.8, 0.2)),
            "best at n = 4 (+0.80 of the +2.00 there is in people's mean ratings); up to n = 8 it loses 0.60 of that, "
            "so stop training at a KL of about 1.4 nats.",
        ),
        (quality(best_of_n=points(0.0, 0.5, 0.8, 0.75)), "rises up to n = 4"),
        (quality(best_of_n=points(0.0, -0.5)), "gains nothing in people's mean ratings"),
        (quality(longer=0.72), "prefers the longer completion in 72% of the comparisons, people in 50%"),
    ],
)
def test_figures_of_a_reward_are_said_in_words(found, said):
    assert said in " ".join(reading(found, "model"))


def test_small_slices_and_hard_comparisons_are_not_called_weak():
    hard = [
        part("gap up to 0.9", 200, 0.3),
        part("less than 75 % of raters agree", 200, 0.3),
        part("kind: x", 19, 0.1),
    ]
    said = " ".join(reading(quality(slices=[*hard, part("like length", 200, 0.7)]), "model"))
    assert "the lowest is `like length`" in said and "kind: x" not in said


def test_what_the_figures_mean_stands_on_the_page_and_in_the_terminal():
    found = quality(**bins(0.9, 0.7))
    assert "Over-confident" in to_markdown(reward_page(found, "title", "command"))
    assert "Over-confident" in reward_text(found) and "`" not in reward_text(found)
