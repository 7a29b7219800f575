"""The benchmark of over-optimization: its curves and fits, its tables, and the whole of it at tiny sizes."""

import numpy as np
import pytest

from bench.overoptimization import __main__ as program
from bench.overoptimization import jobs
from bench.overoptimization.curves import LOG, SQUARE, best_of_n_curves, bootstrap, fit, highest, mean_curve
from bench.overoptimization.forecast import first_above, forecasts, worth
from bench.overoptimization.samples import Sample, Sizes, comparisons, parts, reward_rows


@pytest.mark.parametrize(
    ("form", "curve"), [(SQUARE, lambda d: d * (2 - 0.5 * d)), (LOG, lambda d: d * (2 - 0.5 * np.log(d)))]
)
def test_a_curve_of_a_form_gives_back_its_coefficients(form, curve):
    distances = np.linspace(0.1, 6, 30)
    found = fit(distances, curve(distances), form)
    assert (found.a, found.b, found.r2) == pytest.approx((2, 0.5, 1))
    np.testing.assert_allclose(found(distances), curve(distances))
    # No neighbor of the peak is higher
    assert curve(found.peak) >= max(curve(found.peak * 0.99), curve(found.peak * 1.01))
    assert found(np.zeros(1)) == 0  # also where the logarithm isn't defined


def test_a_form_that_rises_has_no_peak():
    assert fit(np.arange(1.0, 5), np.arange(1.0, 5) ** 2, SQUARE).peak == np.inf
    noise = np.random.default_rng(0).normal(size=50)
    assert fit(np.linspace(0, 1, 50), noise, SQUARE).r2 < 0.3


def test_runs_are_averaged_where_half_of_them_are():
    near, far = (
        (np.array([0.05, 0.15]), np.array([1.0, 2.0])),
        (np.array([0.05, 0.06, 0.25]), np.array([2.0, 4.0, 9.0])),
    )
    distances, gains = mean_curve([near, far, near], 0.1)
    np.testing.assert_allclose(distances, [0.155 / 3, 0.15])
    np.testing.assert_allclose(gains, [5 / 3, (2 + 2 + (3 + 6 * 0.095 / 0.195)) / 3])
    distances, gains = mean_curve([(np.array([0.05, 0.35]), np.array([0.0, 3.0]))], 0.1)
    np.testing.assert_allclose([distances, gains], [[0.05, 0.15, 0.25, 0.35], [0, 1, 2, 3]])  # nothing between
    distances = np.linspace(0, 4, 41)
    noise = 0.1 * np.cos(50 * distances)
    assert highest((distances, distances * (2 - 0.5 * distances) + noise)) == pytest.approx((2, 2), abs=0.1)
    assert highest((np.array([0.0, 9.0]), np.array([0.0, 1.0])))[0] == 9.0
    low, high = bootstrap([near, far], lambda runs: float(np.mean([gains.max() for _, gains in runs])))
    assert (low, high) == (2.0, 9.0)


def test_best_of_n_gains_nothing_with_one_sample_and_most_with_the_gold_reward_itself():
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(3, 64))
    proxy = gold + rng.normal(size=gold.shape)
    counts = (1, 4, 16)
    by_proxy, by_gold = (best_of_n_curves(by, {"gold": gold}, counts)["gold"] for by in (proxy, gold))
    np.testing.assert_allclose(by_proxy[0], np.sqrt([0, np.log(4) - 3 / 4, np.log(16) - 15 / 16]))
    assert by_proxy[1][0] == pytest.approx(0) and (by_gold[1][1:] > by_proxy[1][1:]).all()


def test_comparisons_of_more_labels_begin_with_those_of_fewer_and_noise_reverses_some():
    groups = [[Sample(text, (i, j), 1, float(j)) for j in (0, 1, 1, 2)] for i, text in enumerate("abcdefgh")]
    few, many = (comparisons(groups, count, 0.0, seed=1) for count in (8, 24))
    assert many[:8] == few and all(better.gold > worse.gold for better, worse in many)
    reversed_ = comparisons(groups, 24, 0.5, seed=1)
    assert {frozenset(pair) for pair in reversed_} == {frozenset(pair) for pair in many}
    assert 0 < sum(a != b for a, b in zip(many, reversed_, strict=True)) < 24
    assert comparisons(groups, 24, 0.0, seed=2) != many
    with pytest.raises(ValueError, match="24 comparisons"):
        comparisons(groups, 25, 0.0, seed=1)
    assert reward_rows(few)[0]["better"] == [0] and reward_rows(few)[0]["length"] == 2


def test_prompts_of_comparisons_policies_and_measures_are_disjoint():
    compared, training, held_out = map(set, parts())
    assert not compared & training and not held_out & (compared | training)


def test_a_forecast_is_where_the_fitted_form_of_the_first_rollouts_peaks():
    distances = np.linspace(0, 3, 20)
    gains = distances * (2 - 0.5 * distances)
    points = [
        {"kl": d**2, "proxy": 1 + gain, "gold": 2 + gain, "gold_64": 2 + gain, "disagreement": 0.3 + 0.1 * d}
        for d, gain in zip(distances, gains, strict=True)
    ]
    row = {"points": points, "start": {"proxy": 1.0, "gold": 2.0}}
    found = forecasts(row, 0.5)
    assert found[f"proxy, {SQUARE}"] == pytest.approx(4) and found[
        f"64 gold rewards per rollout, {SQUARE}"
    ] == pytest.approx(4)
    assert found[f"proxy - 2 x disagreement, {SQUARE}"] == pytest.approx(1.8**2)  # a is smaller by twice the slope
    assert first_above(row, 4.0) == 13 and first_above(row, 100.0) == 19 and first_above(row, 0.1, part=0.5) == 10
    points[3]["gold_64"] += 8  # what a rule sees by chance is no part of what it gets
    assert worth(row)[3] < 2 + gains[3]


@pytest.mark.slow
def test_the_benchmark_resumes_and_makes_table_and_figure(tmp_path, monkeypatch, capsys):
    tiny = jobs.Setting(
        Sizes(compared=60, drawn=8, prompts=3, samples=64),
        comparisons=(32, 64),
        noises=(0.0, 0.25),
        least_steps=2,
        members=2,
        ensemble_of=64,
        counts=(1, 2, 4, 16),
        rollouts=2,
        betas=(0.0, 0.1),
        dpo_sizes=(64,),
        dpo_steps=(1, 2),
        dpo_prompts=8,
    )
    monkeypatch.setattr(jobs, "QUICK", tiny)
    monkeypatch.setattr(program, "QUICK", tiny)
    words = ["--quick", "--processes", "1", "--folder", str(tmp_path)]
    program.main([*words, "--seeds", "1"])
    program.main([*words, "--seeds", "1", "2"])
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2 * sum(len(list(job.names(tiny))) for job in jobs.jobs(tiny, [1]))
    said = capsys.readouterr().out
    assert (tmp_path / "overoptimization.png").stat().st_size > 10_000
    for part in (
        "| best of n | 25% | 64 |",
        "| DPO | 25% | 64 |",
        "| PPO | 25% | mean_minus_var |",
        "PPO's beta",
        "below its best",
    ):
        assert part in said
