"""The evaluation of policies: statistics on known numbers, judges, sampling, tables."""

import functools
import itertools
import json
import math
import re
import threading
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from hydra.utils import instantiate
from transformers import AutoTokenizer, LlamaForCausalLM

from rlhf_trl.data.splits import eval_split
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.evaluation.columns import slice_columns
from rlhf_trl.evaluation.differences import policy_differences, prompt_slices
from rlhf_trl.evaluation.generation import sample, sample_in_turns, token_statistics
from rlhf_trl.evaluation.judges import Answers, HTTPJudge, ModelJudge, RewardJudge, outcomes_of, verdict
from rlhf_trl.evaluation.policies import Benchmark, Candidate, evaluate_policies
from rlhf_trl.evaluation.rewards import as_arrays, score
from rlhf_trl.evaluation.statistics import (
    best_of_n,
    best_of_n_kl,
    bootstrap_mean,
    bootstrap_share,
    bradley_terry,
    distinct_n,
    length_controlled_win_rate,
    paired_difference,
    repetition,
    win_rate,
)
from rlhf_trl.report.page import to_markdown
from rlhf_trl.report.pareto import pareto
from rlhf_trl.report.policies import frontier_blocks
from rlhf_trl.report.project import project_page
from rlhf_trl.report.tables import comparison_tables
from rlhf_trl.report.text import WIDTH, comparison_text, duration, side_by_side, table
from rlhf_trl.report.verdicts import DONT, policy_verdicts
from rlhf_trl.rewards.combine import combined, minimum, product, threshold, weighted_sum
from rlhf_trl.rewards.function import FunctionReward
from rlhf_trl.runs.paths import find_policy
from rlhf_trl.runs.record import write_json
from rlhf_trl.runs.results import Comparison
from rlhf_trl.stages.evaluate import policies_of, reference_answers
from tests.helpers.tiny import save_model


def sequence_logps(*args, **options) -> torch.Tensor:
    """Return the log-probability of each completion given its prompt, in nats, shape (P,)."""
    return torch.stack([row.logps.sum() for row in token_statistics(*args, **options)])


def test_bootstrap_is_the_binomial():
    """Means of 20 draws from as many 0 as 1 are k/20 with the probabilities of 20 coins: 6 to 14 heads in 95.9 %."""
    assert bootstrap_mean([0, 1] * 10) == (0.5, 0.3, 0.7)
    assert bootstrap_mean([0, 1] * 10, level=0.1) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("count", [2, 5, 19])
def test_the_interval_of_few_prompts_holds_the_mean_as_often_as_it_says(count):
    """Percentiles of the bootstrap hold it in 83 % of the cases for 5 prompts, and in at most half of them for 2."""
    samples = np.random.default_rng(0).normal(3.0, 2.0, size=(1500, count))
    means = [bootstrap_mean(values) for values in samples]
    shares = [bootstrap_share(2 * values, np.full(count, 2)) for values in samples]
    for found in (means, shares):
        assert np.mean([each.low < 3 < each.high for each in found]) == pytest.approx(0.95, abs=0.017)


def test_a_win_rate_of_few_prompts_has_wilsons_interval():
    """Wilson (1927); of 8 of 10 as in Brown, Cai and DasGupta (2001)."""
    assert win_rate(np.array([1.0] * 8 + [0.0] * 2)) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    mean, low, high = win_rate(np.ones(3))
    assert (mean, high) == (1.0, 1.0) and low == pytest.approx(0.4385, abs=1e-4)
    assert win_rate(np.zeros(128)) == pytest.approx((0.0, 0.0, 0.0291), abs=1e-4)  # of many the bootstrap has none


def test_percentiles_of_few_prompts_are_expanded():
    outcomes = np.array([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    few, many = (length_controlled_win_rate(np.tile(outcomes, k), np.zeros(8 * k)) for k in (1, 9))
    assert many.high - many.low < (few.high - few.low) / 3  # a third of it for nine times as many, and what is added
    few, many = (bradley_terry({("b", "a"): np.tile(outcomes, k)}, ["a", "b"], "a")["b"] for k in (1, 9))
    assert many.high - many.low < (few.high - few.low) / 3


def test_bootstrap_of_many_values_is_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    mean, low, high = bootstrap_mean(values)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert mean == pytest.approx(values.mean())
    assert (low, high) == (pytest.approx(mean - half, abs=0.1 * half), pytest.approx(mean + half, abs=0.1 * half))


def test_bootstrap_of_one_value_has_no_interval():
    mean, low, high = bootstrap_mean([2.0])
    assert mean == 2.0 and math.isnan(low) and math.isnan(high)


def test_bootstrap_is_the_same_every_time_and_holds_what_is_constant():
    assert bootstrap_mean([1.0, 5.0, 2.0]) == bootstrap_mean([1.0, 5.0, 2.0])
    assert bootstrap_mean([2.5] * 7) == (2.5, 2.5, 2.5)


def test_paired_difference_is_of_the_prompts_not_of_the_means():
    """The prompts differ by 100, the policies by exactly 1: only the paired interval sees it."""
    baseline = np.array([0.0, 100.0, 200.0, 300.0])
    assert paired_difference(baseline + 1, baseline) == (1.0, 1.0, 1.0)


def test_win_rate_counts_a_tie_half():
    assert win_rate(np.array([1, 0.5, 0, 1])).mean == 0.625
    assert win_rate(np.full(20, 0.5)) == (0.5, 0.5, 0.5)


def test_best_of_n_is_the_mean_over_all_draws():
    random = np.random.default_rng(0)
    select, measure = random.integers(0, 4, size=(5, 6)).astype(float), random.normal(size=(5, 6))  # with ties
    for n in (1, 2, 3, 6):
        exact = []
        for by, worth in zip(select, measure, strict=True):
            draws = [list(draw) for draw in itertools.combinations(range(6), n)]
            exact.append(np.mean([worth[draw][by[draw] == by[draw].max()].mean() for draw in draws]))
        np.testing.assert_allclose(best_of_n(select, measure, n), exact)
    # The example of arXiv 2310.02743's estimator: all six pairs of four samples, the gold reward in the scores' order
    assert best_of_n(np.arange(4)[None], np.array([[1.0, 0, 3, 2]]), 2) == pytest.approx([2.0])


def test_the_best_of_many_samples_has_no_number_too_large_for_a_float():
    samples = np.arange(4096.0)[None]
    for n in (1, 64, 1024, 4096):  # the largest of n of m numbers without replacement: n (m + 1) / (n + 1), from 1
        assert best_of_n(samples, samples + 1, n) == pytest.approx([n * 4097 / (n + 1)])


def test_best_of_n_kl_is_the_published_one():
    found = {n: best_of_n_kl(n) for n in (1, 2, 4, 16, 64)}
    assert found == pytest.approx({1: 0, 2: 0.193147, 4: 0.636294, 16: 1.835089, 64: 3.174508}, abs=1e-6)


def test_equal_length_takes_out_what_length_explains():
    """A judge that goes by length alone, of a policy that writes longer: all its wins are its length."""
    random = np.random.default_rng(0)
    longer = random.normal(3.0, 2.0, size=4000)
    by_length = (random.random(4000) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))).astype(float)
    assert by_length.mean() > 0.75
    mean, low, high = length_controlled_win_rate(by_length, longer)
    assert low < 0.5 < high and high - low < 0.12 and mean == pytest.approx(0.5, abs=0.06)


def test_equal_length_is_the_win_rate_where_lengths_say_nothing():
    outcomes = np.array([1.0, 1.0, 0.5, 0.0] * 50)
    assert length_controlled_win_rate(outcomes, np.zeros(200)).mean == pytest.approx(0.625, abs=1e-3)
    always = length_controlled_win_rate(np.ones(50), np.arange(50.0))
    assert 0.9 < always.low <= always.mean < 1  # finite, though wins and losses are apart


def test_bradley_terry_finds_the_strengths_that_made_the_wins():
    strengths, random = {"sft": 0.0, "ppo": 0.8, "dpo": -0.5}, np.random.default_rng(0)
    outcomes = {
        (a, b): (random.random(5000) < 1 / (1 + math.exp(strengths[b] - strengths[a]))).astype(float)
        for a, b in itertools.combinations(strengths, 2)
    }
    outcomes["ppo", "dpo"][:100] = np.nan  # not judged
    found = bradley_terry(outcomes, list(strengths), "sft")
    assert found["sft"] == (0.0, 0.0, 0.0)
    for name in ("ppo", "dpo"):
        assert found[name].low < strengths[name] < found[name].high
        assert found[name].mean == pytest.approx(strengths[name], abs=0.08)


def test_bradley_terry_of_one_that_always_wins_is_finite():
    found = bradley_terry(
        {("ppo", "sft"): np.ones(20), ("dpo", "sft"): np.full(20, 0.5)}, ["sft", "ppo", "dpo"], "sft"
    )
    assert found["ppo"].mean == pytest.approx(math.log(20.5 / 0.5), abs=1e-4)
    assert found["dpo"].mean == pytest.approx(0.0, abs=1e-6)


def test_bradley_terry_knows_nothing_of_what_was_not_judged():
    wins, nothing = np.ones(20), np.full(20, np.nan)
    outcomes = {("ppo", "sft"): wins, ("dpo", "sft"): nothing, ("dpo", "kto"): wins, ("orpo", "ppo"): wins}
    found = bradley_terry(outcomes, ["sft", "ppo", "dpo", "kto", "orpo"], "sft")
    assert found["dpo"] is None and found["kto"] is None  # against each other only
    assert found["orpo"].mean == pytest.approx(2 * found["ppo"].mean, abs=1e-4) and found["sft"].mean == 0.0
    assert found["ppo"].mean == pytest.approx(math.log(20.5 / 0.5), abs=1e-4)
    assert bradley_terry({("ppo", "sft"): nothing}, ["sft", "ppo"], "sft") == {"sft": None, "ppo": None}


def test_the_pareto_set():
    assert pareto([1, 2, 2, 0, None], [1, 2, 3, 1, 0]) == [True, True, False, False, False]


def test_variety_of_texts():
    assert distinct_n(["a b a", "A b"], 1) == 2 / 5
    assert distinct_n(["a b a", "A b"], 2) == 2 / 3
    assert math.isnan(distinct_n(["a"], 2))
    assert repetition(["x y x y x y", "a b c d e", "short"], n=2) == pytest.approx((1 - 2 / 5) / 3)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        *[
            ("A", "A"),
            (" b.", "B"),
            ("**A**", "A"),
            ("tie", "tie"),
            ("C", "tie"),
            ("Answer: B", "B"),
            ("A is better", "A"),
        ],
        *[("[[B]] because A is rude", "B"), ("Both are fine.\nVerdict: A", "A"), ("B\nIt is kinder.", "B")],
        *[
            ("A good answer would ask first.", None),
            ("", None),
            ("Neither", None),
            ("A or B", None),
            ("[[A]] [[B]]", None),
        ],
        *[("I can't say", None), ("AB", None), ("A\nVerdict: B", None)],
    ],
)
def test_a_verdict_is_read_and_not_guessed(reply, says):
    assert verdict(reply) == says


def test_both_orders_together_show_the_position_bias():
    # Prompt 1: the policy wins in both orders; 2: whoever is first; 3: a tie in one; 4: one order is unclear
    found = outcomes_of(["A", "B", "A", "A", "tie", "B", "A", None])
    np.testing.assert_array_equal(found.outcomes, [1.0, 0.5, 0.75, np.nan])
    assert (found.unclear, found.judgements) == (1, 8)
    assert found.first == 4 / 6 and found.agreement == pytest.approx(1 / 3)


def test_rewards_that_do_not_apply_are_left_out_and_broken_ones_are_not_hidden():
    scores = {"a": np.array([1.0, np.nan, np.nan, np.inf]), "b": np.array([10.0, 20.0, np.nan, 0.0])}
    rewards = [FunctionReward(likes_a, name="a", weight=2.0), FunctionReward(likes_a, name="b", weight=0.5)]
    for combine, expected in (
        (weighted_sum, [7.0, 10.0, np.nan, np.inf]),
        (minimum, [2.0, 10.0, np.nan, np.inf]),
        (product, [10**0.5, 20**0.5, np.nan, np.inf]),
        (functools.partial(threshold, constraints={"b": 15.0}, floor=-1.0), [-3.5, np.nan, np.nan, np.inf]),
    ):
        np.testing.assert_allclose(combined(scores, rewards, combine), expected)


@pytest.mark.parametrize(
    ("combine", "kind", "expected"),
    [
        (minimum, "minimum", lambda gold, words: min(gold, 0.5 * words)),
        (product, "product", lambda gold, words: gold * words**0.5),
        (
            functools.partial(threshold, constraints={"words": 4.0}),
            "threshold",
            lambda gold, words: gold if words >= 4 else 0.5 * (words - 4),
        ),
    ],
)
def test_evaluation_combines_as_training_does(policies, combine, kind, expected):
    rewards = [FunctionReward(likes_a, name="gold"), FunctionReward(length_of, name="words", weight=0.5)]
    found = evaluate(named(policies), rewards=rewards, samples=4, combine=combine)
    for i, row in enumerate(found.samples):
        for name, text in row.completions.items():
            words = text.split()
            assert row.rewards[name] == pytest.approx(expected(words.count("a") + i % 3, len(words)))
    assert found.combine == kind and found.curves
    mean = np.mean([row.rewards["ppo"] for row in found.samples])
    assert found.policies["ppo"].reward.mean == pytest.approx(mean)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    return {name: save_model(folder / name, pad_is_eos=True, seed=seed) for seed, name in enumerate(("sft", "ppo"))}


def load(path: str):
    return LlamaForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def test_sampling_ends_at_eos_and_repeats_with_the_seed(policies):
    model, tokenizer = load(policies["sft"])
    prompts = [tokenizer(text)["input_ids"] for text in ("a b c", "d", "e f") * 20]
    options = {"max_completion_length": 12, "temperature": 1.0, "batch_size": 16}
    completions = sample(model, tokenizer, prompts, seed=1, **options)
    assert completions == sample(model, tokenizer, prompts, seed=1, **options)
    assert completions != sample(model, tokenizer, prompts, seed=2, **options)
    eos = tokenizer.eos_token_id
    ended = [ids for ids in completions if eos in ids]
    assert ended and all(ids.index(eos) == len(ids) - 1 for ids in ended)
    assert all(len(ids) == 12 for ids in completions if eos not in ids)


def test_sampling_in_turns_draws_from_the_same_distribution(policies):
    """Share of those that end within each quarter, and of a token at a place beyond the first turn."""
    model, tokenizer = load(policies["sft"])
    prompts = [[5, 6, 7], [8]] * 1500
    options = {"max_completion_length": 24, "temperature": 1.0, "batch_size": 500}
    whole = sample(model, tokenizer, prompts, seed=1, **options)
    turns = sample_in_turns(model, tokenizer, prompts, seed=2, **options)
    eos = tokenizer.eos_token_id
    assert all(eos not in ids[:-1] and (len(ids) == 24 or ids[-1] == eos) for ids in turns)
    for limit in (4, 16, 20, 23):
        shares = [np.mean([len(ids) <= limit for ids in found]) for found in (whole, turns)]
        assert shares[0] == pytest.approx(shares[1], abs=4 * math.sqrt(0.5 / 3000))
    late = [[ids[18] for ids in found if len(ids) > 18] for found in (whole, turns)]
    assert min(map(len, late)) > 300
    common = max(set(late[0]), key=late[0].count)
    shares = [np.mean([token == common for token in tokens]) for tokens in late]
    assert shares[0] == pytest.approx(shares[1], abs=4 * math.sqrt(0.5 / min(map(len, late))))


def test_sequence_log_probabilities_do_not_depend_on_the_batch(policies):
    """Each row by itself, without padding, is what a batch of unequal rows must give."""
    model, tokenizer = load(policies["sft"])
    eos = tokenizer.eos_token_id
    prompts, completions = [[5, 6, 7], [8], [9, eos]], [[10, eos], [11, 12, 13, 14], [eos]]
    alone = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0].float() / 0.7
        logps = logits.log_softmax(-1)
        alone.append(sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)))
    for batch_size in (1, 2, 3):
        logps = sequence_logps(model, prompts, completions, temperature=0.7, batch_size=batch_size)
        torch.testing.assert_close(logps, torch.tensor(alone), atol=1e-5, rtol=0)


def test_kl_estimate_is_the_kl_of_the_distributions(policies):
    """Completions of one token: the mean log-ratio of samples against the sum over the vocabulary."""
    (policy, tokenizer), (baseline, _) = load(policies["ppo"]), load(policies["sft"])
    prompts = [[5, 6]] * 4000
    written = sample(policy, tokenizer, prompts, 1, temperature=1.0, batch_size=1000, seed=0)
    options = {"temperature": 1.0, "batch_size": 1000}
    ratio = sequence_logps(policy, prompts, written, **options) - sequence_logps(baseline, prompts, written, **options)
    p, q = (model(torch.tensor([[5, 6]])).logits[0, -1].log_softmax(-1) for model in (policy, baseline))
    exact = (p.exp() * (p - q)).sum().item()
    assert ratio.mean().item() == pytest.approx(exact, abs=4 * ratio.std().item() / math.sqrt(4000))


def likes_a(completions, bonus, **columns):
    """Words `a`, and the row's bonus."""
    return [text.split().count("a") + extra for text, extra in zip(completions, bonus, strict=True)]


def evaluate(candidates: dict[str, Candidate], **changes) -> Comparison:
    """Return the comparison with `sft`, by the options of a benchmark and of `evaluate_policies`."""
    benchmark = {
        "dataset": Dataset.from_dict({"prompt": ["a b", "c", "d e f"] * 8, "bonus": [0.0, 1.0, 2.0] * 8}),
        "rewards": [FunctionReward(likes_a, weight=2.0)],
        "temperature": 1.0,
        "max_completion_length": 8,
        "batch_size": 8,
        "seed": 3,
    }
    names = {field.name for field in fields(Benchmark)}
    benchmark |= {name: value for name, value in changes.items() if name in names}
    options = {"judge": RewardJudge(), "dtype": "float32"}
    options |= {name: value for name, value in changes.items() if name not in names}
    return evaluate_policies(candidates, "sft", Benchmark(**benchmark), **options)


def named(policies) -> dict[str, Candidate]:
    return {name: Candidate(path, name) for name, path in policies.items()}


def test_evaluation_of_a_policy_with_itself_finds_nothing(policies):
    """Same prompts and same seed: the same completions."""
    found = evaluate(named({"sft": policies["sft"], "twin": policies["sft"]}))
    twin = found.policies["twin"]
    assert twin.difference == (0.0, 0.0, 0.0)
    assert twin.win_rate == (0.5, 0.5, 0.5)
    assert twin.length_controlled_win_rate == pytest.approx((0.5, 0.5, 0.5))
    assert twin.tie_rate == 1.0
    assert twin.kl.mean == twin.kl_k3.mean == pytest.approx(0.0, abs=1e-4)
    assert found.policies["sft"].kl is None and found.bradley_terry == {}


def test_evaluation_of_two_policies(policies):
    found = evaluate(named(policies))
    entry = found.policies["ppo"]
    samples = found.samples
    assert found.prompts == len(samples) == 24
    rewards = [row.rewards["ppo"] for row in samples]
    words = [2 * (row.completions["ppo"].split().count("a") + i % 3) for i, row in enumerate(samples)]
    assert rewards == words
    assert entry.reward.mean == pytest.approx(np.mean(rewards))
    assert entry.difference.mean == pytest.approx(np.mean([r.rewards["ppo"] - r.rewards["sft"] for r in samples]))
    assert entry.kl.low > 0 and entry.kl_k3.low > 0
    assert entry.kl_per_token == pytest.approx(entry.kl.mean / entry.completion_length)
    assert 0 < entry.entropy < math.log(len(AutoTokenizer.from_pretrained(policies["ppo"])))
    assert 1 <= entry.completion_length <= 8
    assert 0 <= entry.eos_rate <= 1
    text = comparison_text(found)
    assert max(map(len, text.split("\n"))) <= WIDTH
    assert "24 held-out prompts" in text and "KL to sft" in text


def test_constraints_on_the_means_of_rewards_are_reported(policies):
    """The mean against its bound, the share of single answers beyond it, and the verdict."""
    rewards = [FunctionReward(likes_a, name="likes"), FunctionReward(length_of, name="length", weight=0.0)]
    constraints = {"likes": ">= 0", "length": "<= 2"}
    found = evaluate(named(policies), rewards=rewards, constraints=constraints)
    for name, result in found.policies.items():
        assert result.constraints["likes"].reading == "satisfied"
        assert result.constraints["likes"].violation_rate == 0.0
        lengths = length_of([row.completions[name] for row in found.samples])
        each = result.constraints["length"]
        assert each.value.mean == pytest.approx(np.mean(lengths)) and each.bound == "<= 2"
        assert each.violation_rate == pytest.approx(np.mean([length > 2 for length in lengths]))
        assert each.excess == pytest.approx(each.value.mean - 2)
        assert each.excess_low == pytest.approx(each.value.low - 2)
        assert each.is_violated and each.reading == "violated"
    assert policy_verdicts(found)["ppo"].call == DONT
    assert "length <= 2 beyond chance" in policy_verdicts(found)["ppo"].reasons[0]
    again = Comparison.from_json(json.loads(json.dumps(found.to_json())))
    assert again.policies["ppo"].constraints == found.policies["ppo"].constraints
    (shown,) = [block for block in frontier_blocks(again) if getattr(block, "caption", "").startswith("Constraints")]
    assert [row[1] for row in shown.rows] == ["likes >= 0", "length <= 2"] * 2
    assert "length <= 2: sft violated" in comparison_text(found).replace("\n", " ")
    columns, rows = comparison_tables(again)["report/comparison"]
    assert (
        rows[0][columns.index("length_violation_rate")] == found.policies["sft"].constraints["length"].violation_rate
    )
    assert found.measures["ppo/violation_rate/likes"] == 0.0


def test_entropy_of_each_token_is_that_of_its_distribution(policies):
    model, _ = load(policies["sft"])
    (row,) = token_statistics(model, [[5, 6]], [[7, 8]], temperature=0.5, batch_size=1)
    logps = (model(torch.tensor([[5, 6, 7]])).logits[0, 1:].float() / 0.5).log_softmax(-1)
    torch.testing.assert_close(row.entropy, -(logps.exp() * logps).sum(-1))
    torch.testing.assert_close(row.logps, logps[[0, 1], [7, 8]])


def test_best_of_n_and_reference_answers_are_the_baselines(policies):
    """A reward of weight 0 also chooses; what it chooses is measured by the one that counts."""
    rewards = [FunctionReward(likes_a, name="gold"), FunctionReward(length_of, name="proxy", weight=0.0)]
    dataset = Dataset.from_dict({"prompt": ["a b", "c", "d e f"] * 8, "bonus": [0.0] * 24})
    references = Dataset.from_dict({"prompt": ["a b", "c"], "completion": [" d e", " f"]})
    found = evaluate(named(policies), dataset=dataset, rewards=rewards, samples=8, references=references)
    own, chosen = found.curves
    assert [point.n for point in own.points] == [1, 2, 4, 8]
    means = [point.reward.mean for point in own.points]
    assert means == sorted(means) and means[-1] > means[0]
    assert own.points[0].reward.mean == pytest.approx(chosen.points[0].reward.mean)
    assert chosen.by == "proxy" and chosen.points[-1].reward.mean < means[-1]
    lengths = [point.chosen_by for point in chosen.points]
    assert lengths == sorted(lengths) and lengths[0] > 1
    model, tokenizer = load(policies["ppo"])
    prompts = [tokenizer(text)["input_ids"] for text in references["prompt"]]
    ends = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in references["completion"]]
    logps = sequence_logps(model, prompts, ends, temperature=1.0, batch_size=2)
    expected = math.exp(-logps.sum().item() / sum(map(len, ends)))
    assert found.policies["ppo"].reference_perplexity == pytest.approx(expected, rel=1e-4)


def test_completions_have_a_perplexity_under_the_baseline(policies):
    found = evaluate(named(policies))
    base, tokenizer = load(policies["sft"])
    for name, result in found.policies.items():
        model, _ = load(policies[name])
        prompts = [tokenizer(row.prompt)["input_ids"] for row in found.samples]
        ids = sample(model, tokenizer, prompts, 8, 1.0, 8, seed=3)  # as `evaluate` does
        assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids] == [
            row.completions[name] for row in found.samples
        ]
        logps = torch.cat([row.logps for row in token_statistics(base, prompts, ids, 1.0, 4)])
        assert result.baseline_perplexity == pytest.approx(math.exp(-logps.mean().item()), rel=1e-4), name


def test_greedy_answers_have_rewards_and_wins_but_no_kl(policies):
    found = evaluate(named(policies), temperature=0.0, samples=4)
    again = evaluate(named(policies), temperature=0.0, seed=9)
    assert [row.completions for row in found.samples] == [row.completions for row in again.samples]
    entry = found.policies["ppo"]
    assert math.isfinite(entry.difference.mean) and math.isfinite(entry.win_rate.mean)
    assert entry.kl is None and entry.entropy is None and found.best_of_n is None
    # Under the baseline's own distribution; its likeliest answers are more likely than those of another policy
    assert 1 < found.policies["sft"].baseline_perplexity < entry.baseline_perplexity
    assert "no draws from a policy" in entry.missing["kl"]
    assert "no draws from a policy" in " ".join(comparison_text(found).split())


STAGE = ["stage=evaluate", "~stage.policies.ppo", "~stage.policies.dpo", "stage.policies.sft=demo:sft", "project=test"]
STAGE += ["+stage.policies.base=demo:base"]
STAGE += ["data.max_eval_samples=4", "stage.max_completion_length=8", "stage.best_of_n=4"]


def test_the_stage_evaluates_greedy_answers(compose, tmp_path):
    cfg = compose(*STAGE, f"runs_dir={tmp_path}", "stage.temperature=0")
    instantiate(cfg.stage.run)(cfg)
    assert json.loads(Path(cfg.run_dir, "run.json").read_text())["status"] == "done"
    text = (tmp_path / "test" / "report" / "report.md").read_text()
    assert text.count("no draws from a policy") == 1 and "needs samples that differ" in text
    assert re.search(r"\| evaluate +\| evaluate +\| done ", text)


@pytest.mark.parametrize("error", [RuntimeError, ConfigError])  # such as a damaged file of another run
def test_a_page_that_fails_leaves_the_scores_and_says_failed(compose, tmp_path, monkeypatch, error):
    def broken(*args, **kwargs):
        assert json.loads(Path(cfg.run_dir, "run.json").read_text())["status"] == "running"
        raise error("no page")

    monkeypatch.setattr("rlhf_trl.stages.evaluate.write_page", broken)
    cfg = compose(*STAGE, f"runs_dir={tmp_path}")
    with pytest.raises(error, match="no page"):
        instantiate(cfg.stage.run)(cfg)
    record = json.loads(Path(cfg.run_dir, "run.json").read_text())
    assert record["status"] == "failed" and "no page" in record["error"]
    assert len(json.loads(Path(cfg.run_dir, "comparison.json").read_text())["samples"]) == 4


def length_of(completions, **columns):
    return [float(len(text.split())) for text in completions]


def test_policies_are_held_beside_each_other_and_by_the_columns_of_the_data():
    rewards = {"sft": np.arange(6.0), "a": np.arange(6.0) + 1, "b": np.array([0.0, 1, 2, 9, 9, 9])}
    outcomes = {
        ("a", "sft"): np.array([1.0, 1, 0.5, 0, np.nan, 1]),
        ("b", "sft"): np.array([0.0, 1, 1.0, 1, 1, np.nan]),
    }
    (pair,) = policy_differences(list(rewards), "sft", rewards, outcomes)
    assert (pair.one, pair.other) == ("a", "b") and pair.difference.mean == pytest.approx(-1.5)
    assert pair.wins.mean == pytest.approx((1 + 0 - 0.5 - 1) / 4)  # of the prompts that are judged of both
    unclear = outcomes | {("b", "sft"): np.full(6, np.nan)}
    assert policy_differences(list(rewards), "sft", rewards, unclear)[0].wins is None
    kinds = np.array(["x", "x", "x", "y", "y", "y"], dtype=object)
    x, y = prompt_slices(rewards, {"kind": kinds}, "sft")
    assert (x.column, x.value, x.prompts, y.value) == ("kind", "x", 3, "y")
    assert [x.rewards[name].mean for name in rewards] == [1.0, 2.0, 1.0]
    assert (x.differences["b"].mean, y.differences["b"].mean) == (0.0, 5.0) and "sft" not in x.differences


def test_columns_to_slice_by():
    columns = {"kind": ["a", "b", "a"], "id": [str(i) for i in range(3)], "same": [1, 1, 1]}
    assert slice_columns({**columns, "many": list(range(21))}, None).keys() == {"kind", "id"}
    assert slice_columns(columns, ["same"]) == {"same": ["1", "1", "1"]}
    with pytest.raises(ConfigError, match="`stage.slices` names the column `kin`.*`kind`"):
        slice_columns(columns, ["kin"])
    with pytest.raises(ConfigError, match="21 different values"):
        slice_columns({"many": list(range(21))}, ["many"])


def test_a_comparison_holds_kinds_and_differences(policies):
    dataset = Dataset.from_dict({"prompt": ["a b"] * 4, "kind": ["x", "y", "x", "x"]})
    found = evaluate(
        named({**policies, "twin": policies["sft"]}), dataset=dataset, rewards=[FunctionReward(length_of)]
    )
    assert [(part.value, part.prompts) for part in found.slices] == [("x", 3), ("y", 1)]
    assert math.isnan(found.slices[1].differences["ppo"].high)  # of one prompt
    assert [(pair.one, pair.other) for pair in found.differences] == [("ppo", "twin")]
    assert found.policies["ppo"].parameters > 1000
    written = found.to_json()
    assert Comparison.from_json(json.loads(json.dumps(written))).to_json() == written


def test_three_policies_are_ranked(policies):
    three = named({**policies, "twin": policies["sft"]})
    ranking = evaluate(three).bradley_terry
    assert list(ranking) == ["sft", "ppo", "twin"] and ranking["sft"].mean == 0.0
    assert ranking["twin"].mean == pytest.approx(0.0, abs=0.05)


def test_prompts_without_a_reward_are_left_out_for_all_and_counted(policies):
    def broken(completions, **columns):
        return [math.nan if i == 0 else None if i == 1 else 1.0 for i in range(len(completions))]

    found = evaluate(named(policies), rewards=[FunctionReward(broken)])
    assert (found.prompts, found.dropped) == (22, 2)
    assert "2 dropped" in comparison_text(found)


def test_chat_prompts_reach_rewards_as_messages(policies):
    seen = []

    def look(prompts, completions, **columns):
        seen.extend(completions)
        return [0.0] * len(completions)

    prompts = [[{"role": "user", "content": "a b"}]] * 4
    dataset = Dataset.from_dict({"prompt": prompts})
    evaluate(named({"sft": policies["sft"]}), dataset=dataset, rewards=[FunctionReward(look)])
    assert [message["role"] for (message,) in seen] == ["assistant"] * 4


def test_a_policy_with_another_vocabulary_has_no_kl_and_says_so(policies, tmp_path):
    other = save_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other)
    bound = []

    class Bound(FunctionReward):
        def bind(self, tokenizer):
            bound.append(len(tokenizer))

    found = evaluate(named({"sft": policies["sft"], "other": other}), rewards=[Bound(likes_a)])
    entry = found.policies["other"]
    assert entry.kl is None and "another vocabulary" in entry.missing["kl"] and entry.win_rate
    assert "another vocabulary" in comparison_text(found).replace("\n", " ")
    assert bound == [len(tokenizer) - 1, len(tokenizer)]  # each policy's ids are read with its own tokenizer


# ---- Judges ----

TEMPLATE = "{prompt} | {a} | {b}"


def answers(*texts) -> Answers:
    return Answers(list(texts), {"": np.zeros(len(texts))})


def test_a_reward_judge_knows_ties_and_its_rewards():
    one = Answers(["a", "b", "c"], {"": np.array([1.0, 2.0, 3.0]), "gold": np.array([0.0, 1.0, np.nan])})
    other = Answers(["d", "e", "f"], {"": np.array([1.2, 1.0, 3.0]), "gold": np.array([1.0, 0.0, 1.0])})
    np.testing.assert_array_equal(RewardJudge(tie_margin=0.5).compare(["p"] * 3, one, other).outcomes, [0.5, 1, 0.5])
    found = RewardJudge("gold").compare(["p"] * 3, one, other)
    np.testing.assert_array_equal(found.outcomes, [0.0, 1.0, np.nan])
    assert found.unclear == 1
    with pytest.raises(ConfigError, match="`judge.reward` is `golf`.*`gold`"):
        RewardJudge("golf").compare(["p"] * 3, one, other)


def test_a_template_shows_all_three_and_leaves_braces_alone():
    judge = ModelJudge("demo:sft", TEMPLATE)
    assert judge.question("{a} {x}", "{b}", "B") == "{a} {x} | {b} | B"
    with pytest.raises(ConfigError, match=r"`judge.template` has no `\{b\}`"):
        ModelJudge("demo:sft", "{prompt} {a}")


def test_a_language_model_that_says_neither_is_counted(policies):
    """A random model writes words of its own."""
    judge = ModelJudge(policies["sft"], TEMPLATE, dtype="float32")
    found = evaluate(named(policies), judge=judge)
    entry = found.policies["ppo"]
    assert entry.unclear == entry.judgements == 48 and entry.win_rate is None
    assert "both orders" in found.judge
    assert "48 of 48 judgements of ppo named neither" in comparison_text(found)


class Endpoint(BaseHTTPRequestHandler):
    """Prefers the longer answer, and the first of equals; its first `failures` answers are 503."""

    failures = 0
    asked: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.asked.append((self.path, body, self.headers.get("Authorization")))
        if Endpoint.failures > 0:
            Endpoint.failures -= 1
            self.send_response(503)
            self.end_headers()
            return
        if body["model"] != "judge":
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b"no such model")
            return
        _, a, b = body["messages"][0]["content"].split(" | ")
        content = "hard to say" if "?" in a + b else "A" if len(a) >= len(b) else "B"
        reply = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    Endpoint.failures, Endpoint.asked = 0, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_an_endpoint_judges_in_both_orders(endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = HTTPJudge(endpoint, "judge", TEMPLATE, api_key_env="JUDGE_KEY")
    judge.check()
    found = judge.compare(
        ["p", "q", "r", "s"], answers("longer", "x", "same", "?"), answers("x", "longer", "same", "x")
    )
    np.testing.assert_array_equal(found.outcomes, [1.0, 0.0, 0.5, np.nan])
    assert found.unclear == 2 and found.first == pytest.approx(4 / 6) and found.agreement == pytest.approx(2 / 3)
    path, body, key = Endpoint.asked[1]
    assert path == "/v1/chat/completions" and body["temperature"] == 0 and key == "Bearer secret"


def test_without_rewards_a_judge_alone_compares(endpoint, policies, tmp_path):
    judge = HTTPJudge(endpoint, "judge", TEMPLATE)
    found = evaluate(named({**policies, "twin": policies["ppo"]}), rewards=[], judge=judge, samples=0)
    ppo = found.policies["ppo"]
    assert ppo.win_rate and ppo.kl and ppo.reward is ppo.difference is None and not ppo.rewards
    (pair,) = found.differences
    assert pair.difference is None and pair.wins.mean == 0
    assert found.prompts == 24 and found.samples[0].rewards == {"sft": None, "ppo": None, "twin": None}
    assert found.slices == [] and "win_rate" in " ".join(found.measures)
    assert "ppo" in comparison_text(found)
    written = json.loads(json.dumps(found.to_json()))
    assert Comparison.from_json(written).to_json() == written
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "run.json").write_text('{"status": "done", "stage": "evaluate"}')
    write_json(tmp_path / "evaluate" / "comparison.json", found)
    page = to_markdown(project_page(tmp_path))
    assert "wins vs sft" in page and "nan" not in page.split() and "no reward" not in page and "differ by" not in page


def test_an_endpoint_that_stumbles_is_asked_again(endpoint, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    Endpoint.failures = 2
    assert HTTPJudge(endpoint, "judge", TEMPLATE, retries=2).ask(["p | a | b"]) == ["A"]
    assert waits == [1, 2]
    Endpoint.failures = 9
    with pytest.raises(ConfigError, match="can't be asked, after 3 tries.*503"):
        HTTPJudge(endpoint, "judge", TEMPLATE, retries=2).ask(["p | a | b"])


def test_an_endpoint_that_is_down_or_refuses_is_one_clear_error(endpoint, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ConfigError, match="can't be asked, after 2 tries.*`judge.url`"):
        HTTPJudge("http://127.0.0.1:9/v1", "judge", TEMPLATE, retries=1).check()
    with pytest.raises(ConfigError, match="refused with status 404: .no such model"):
        HTTPJudge(endpoint, "other", TEMPLATE).check()
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ConfigError, match="`NO_KEY`, which is not set"):
        HTTPJudge(endpoint, "judge", TEMPLATE, api_key_env="NO_KEY")


# ---- Which policies ----


def test_checkpoints_and_sweeps_are_policies_too(tmp_path):
    for name, steps in (("ppo", (4, 8)), ("sft", ())):
        for folder in [tmp_path / name, *(tmp_path / name / f"checkpoint-{step}" for step in steps)]:
            folder.mkdir()
        (tmp_path / name / "run.json").write_text('{"status": "done"}')
        (tmp_path / name / "metrics.json").write_text('{"eval": {}, "history": [{"step": 8}]}')
    sweep = tmp_path / "dpo_sweep"
    sweep.mkdir()
    jobs = [
        {"number": i, "status": status, "overrides": {"stage": "dpo", "stage.args.beta": str(beta)}}
        for i, (status, beta) in enumerate([("done", 0.1), ("failed", 0.2), ("done", 0.3)])
    ]
    (sweep / "sweep.json").write_text(json.dumps(jobs))
    found = policies_of({"sft": "sft", "ppo": "ppo"}, True, ["dpo_sweep"], str(tmp_path))
    assert list(found) == ["sft", "ppo", "ppo@4", "dpo beta=0.1", "dpo beta=0.3"]  # step 8 is the result
    assert found["ppo@4"] == Candidate(str(tmp_path / "ppo" / "checkpoint-4"), "ppo")
    assert found["dpo beta=0.3"] == Candidate(str(sweep / "2"), "dpo_sweep")
    with pytest.raises(ConfigError, match="no sweep with finished runs.*launch/sweep.py"):
        policies_of({}, False, ["rloo_sweep"], str(tmp_path))


def test_data_without_held_out_prompts_is_refused():
    with pytest.raises(ConfigError, match="held-out"):
        eval_split({"train": Dataset.from_dict({"prompt": ["a"]})})


def test_data_without_answers_says_how_to_go_on_without_them(monkeypatch):
    def none(cfg, dataset_type):
        raise DataError("no column has answers.")

    monkeypatch.setattr("rlhf_trl.stages.evaluate.instantiate_data", none)
    with pytest.raises(ConfigError, match="no column has answers. Set `stage.references=false`"):
        reference_answers(None)


def test_a_policy_is_a_run_or_a_path(policies, tmp_path):
    assert find_policy(policies["sft"], str(tmp_path)) == policies["sft"]
    with pytest.raises(ConfigError, match="stage=ppo"):
        find_policy("ppo", str(tmp_path))


def test_a_run_wins_over_a_folder_of_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/p/sft", "runs/p/sweep/0", "runs/p/v1.5", "sft", "sweep/0", "v1.5", "other"):
        Path(folder).mkdir(parents=True)
        if folder.startswith("runs"):
            Path(folder, "run.json").write_text('{"status": "done"}')
    for place in ("sft", "sweep/0", "v1.5"):
        assert find_policy(place, "runs/p") == str(tmp_path / "runs/p" / place)
        said = capsys.readouterr().out
        assert said == f"`{place}` is the run `runs/p/{place}`; the folder of that name here is `./{place}`.\n"
        assert find_policy(place, "runs/p") and capsys.readouterr().out == ""  # said once
        assert find_policy(f"./{place}", "runs/p") == str(tmp_path / place)
    assert find_policy("other", "runs/p") == str(tmp_path / "other")
    monkeypatch.chdir("runs/p")  # the same folder
    assert find_policy("sft", ".") == str(tmp_path / "runs/p/sft") and capsys.readouterr().out == ""


def test_scores_are_called_by_the_rewards_names():
    rewards = [FunctionReward(likes_a, name="mine")]
    scores = score(rewards, ["p", "q"], ["a a", "b"], [[5, 5], [6]], {"bonus": [1.0, 2.0]})
    np.testing.assert_array_equal(as_arrays(scores)["mine"], [3.0, 2.0])


def test_tables():
    text = table(["step", "time"], [["sft", "8 s"], ["compare", "12 s"]])
    assert text == "step     time\n-------  ----\nsft       8 s\ncompare  12 s"
    columns = side_by_side({"sft": "one two", "ppo": ""}, width=60).split("\n")
    assert columns == ["sft" + " " * 28 + "ppo", "---" + " " * 28 + "---", "one two" + " " * 24 + "(empty)"]
    assert side_by_side(dict.fromkeys("abcdef", "text"), width=60).startswith("[a]\ntext\n[b]")
    assert [duration(seconds) for seconds in (48, 185, 7620)] == ["48 s", "3 min 05 s", "2 h 07 min"]
