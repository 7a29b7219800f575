"""The comparison of policies: statistics on known numbers, sampling, tables."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM

from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.compare import compare_policies, find_policy, held_out, score, weighted_sum
from rlhf_trl.evaluation.sampling import sample, sequence_logps
from rlhf_trl.evaluation.statistics import bootstrap_mean, paired_difference, win_rate
from rlhf_trl.evaluation.tables import WIDTH, comparison_text, duration, side_by_side, table
from rlhf_trl.rewards import FunctionReward

from .tiny import save_model


def test_bootstrap_of_two_values_is_the_binomial():
    """Means of two draws from {0, 1} are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    assert bootstrap_mean([0, 1]) == (0.5, 0.0, 1.0)
    assert bootstrap_mean([0, 1], level=0.4) == (0.5, 0.5, 0.5)


def test_bootstrap_of_many_values_is_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    mean, low, high = bootstrap_mean(values)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert mean == pytest.approx(values.mean())
    assert (low, high) == (pytest.approx(mean - half, abs=0.1 * half), pytest.approx(mean + half, abs=0.1 * half))


def test_bootstrap_is_the_same_every_time_and_holds_what_is_constant():
    assert bootstrap_mean([1.0, 5.0, 2.0]) == bootstrap_mean([1.0, 5.0, 2.0])
    assert bootstrap_mean([2.5] * 7) == (2.5, 2.5, 2.5)


def test_paired_difference_is_of_the_prompts_not_of_the_means():
    """The prompts differ by 100, the policies by exactly 1: only the paired interval sees it."""
    baseline = np.array([0.0, 100.0, 200.0, 300.0])
    assert paired_difference(baseline + 1, baseline) == (1.0, 1.0, 1.0)


def test_win_rate_counts_a_tie_half():
    assert win_rate([1, 2, 3, 4], [0, 2, 4, 3]).mean == 0.625
    assert win_rate([1, 1], [1, 1]) == (0.5, 0.5, 0.5)


def test_rewards_that_do_not_apply_are_left_out_and_broken_ones_are_not_hidden():
    scores = {"a": np.array([1.0, np.nan, np.nan, np.inf]), "b": np.array([10.0, 20.0, np.nan, 0.0])}
    np.testing.assert_array_equal(weighted_sum(scores, [2.0, 0.5]), [7.0, 10.0, np.nan, np.inf])


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


def settings(**changes):
    return {
        "dataset": Dataset.from_dict({"prompt": ["a b", "c", "d e f"] * 8, "bonus": [0.0, 1.0, 2.0] * 8}),
        "rewards": [FunctionReward(likes_a, weight=2.0)],
        "temperature": 1.0,
        "max_completion_length": 8,
        "batch_size": 8,
        "dtype": "float32",
        "seed": 3,
    } | changes


def test_comparison_of_a_policy_with_itself_finds_nothing(policies):
    """Same prompts and same seed: the same completions."""
    comparison = compare_policies({"sft": policies["sft"], "twin": policies["sft"]}, "sft", **settings())
    twin = comparison["policies"]["twin"]
    assert twin["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert twin["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert twin["kl"]["mean"] == pytest.approx(0.0, abs=1e-4)
    assert comparison["policies"]["sft"]["kl"] is None


def test_comparison_of_two_policies(policies):
    comparison = compare_policies(policies, "sft", **settings())
    entry = comparison["policies"]["ppo"]
    samples = comparison["samples"]
    assert comparison["prompts"] == len(samples) == 24
    rewards = [row["rewards"]["ppo"] for row in samples]
    words = [2 * (row["completions"]["ppo"].split().count("a") + i % 3) for i, row in enumerate(samples)]
    assert rewards == words
    assert entry["reward"]["mean"] == pytest.approx(np.mean(rewards))
    assert entry["difference"]["mean"] == pytest.approx(
        np.mean([r["rewards"]["ppo"] - r["rewards"]["sft"] for r in samples])
    )
    assert entry["kl"]["low"] > 0
    assert 1 <= entry["completion_length"] <= 8
    assert 0 <= entry["eos_rate"] <= 1
    text = comparison_text(comparison)
    assert max(map(len, text.split("\n"))) <= WIDTH
    assert "24 held-out prompts" in text and "KL to sft" in text


def test_prompts_without_a_reward_are_left_out_for_all_and_counted(policies):
    def broken(completions, **columns):
        return [math.nan if i == 0 else None if i == 1 else 1.0 for i in range(len(completions))]

    comparison = compare_policies(policies, "sft", **settings(rewards=[FunctionReward(broken)]))
    assert (comparison["prompts"], comparison["left_out"]) == (22, 2)
    assert "2 left out" in comparison_text(comparison)


def test_chat_prompts_reach_rewards_as_messages(policies):
    seen = []

    def look(prompts, completions, **columns):
        seen.extend(completions)
        return [0.0] * len(completions)

    prompts = [[{"role": "user", "content": "a b"}]] * 4
    compare_policies(
        {"sft": policies["sft"]},
        "sft",
        **settings(dataset=Dataset.from_dict({"prompt": prompts}), rewards=[FunctionReward(look)]),
    )
    assert [message["role"] for (message,) in seen] == ["assistant"] * 4


def test_a_policy_with_another_vocabulary_is_refused(policies, tmp_path):
    other = save_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigError, match="another vocabulary"):
        compare_policies({"sft": policies["sft"], "other": other}, "sft", **settings())


def test_data_without_held_out_prompts_is_refused():
    with pytest.raises(ConfigError, match="held-out"):
        held_out({"train": Dataset.from_dict({"prompt": ["a"]})})


def test_a_policy_is_a_run_or_a_path(policies, tmp_path):
    assert find_policy(policies["sft"], str(tmp_path)) == policies["sft"]
    with pytest.raises(ConfigError, match="stage=ppo"):
        find_policy("ppo", str(tmp_path))


def test_scores_are_called_by_the_rewards_names():
    dataset = Dataset.from_dict({"prompt": ["p", "q"], "bonus": [1.0, 2.0]})
    scores = score([FunctionReward(likes_a, name="mine")], dataset, ["a a", "b"], [[5, 5], [6]])
    np.testing.assert_array_equal(scores["mine"], [3.0, 2.0])


def test_tables():
    text = table(["step", "time"], [["sft", "8 s"], ["compare", "12 s"]])
    assert text == "step     time\n-------  ----\nsft       8 s\ncompare  12 s"
    columns = side_by_side({"sft": "one two", "ppo": ""}, width=60).split("\n")
    assert columns == ["sft" + " " * 28 + "ppo", "---" + " " * 28 + "---", "one two" + " " * 24 + "(empty)"]
    assert side_by_side(dict.fromkeys("abcdef", "text"), width=60).startswith("[a]\ntext\n[b]")
    assert [duration(seconds) for seconds in (48, 185, 7620)] == ["48 s", "3 min 05 s", "2 h 07 min"]
