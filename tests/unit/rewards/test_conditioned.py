"""Rewards that count for some rows of the data: conditions, calls, combinations, what is learned from and logged."""

import math

import pytest
import torch
from datasets import Dataset

from rlhf_trl.callbacks.reward_norm import RunningNorm
from rlhf_trl.checks import find_problems
from rlhf_trl.checks.reward_calls import Sample, trial_call
from rlhf_trl.cli.dry_run import show_plan
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.rewards import combine_scores, score, score_members
from rlhf_trl.rewards.combine import minimum, weighted_sum
from rlhf_trl.rewards.conditioned import ConditionedReward
from rlhf_trl.rewards.conditions import ValueTest, condition_problem, unmet_condition
from rlhf_trl.rewards.finite import FiniteReward
from rlhf_trl.rewards.function import FunctionReward
from rlhf_trl.rewards.model import ModelReward
from tests.helpers.ppo import save_reward_model
from tests.helpers.rl import TRAINERS, count_of_a, logged, rl_trainer
from tests.helpers.tiny import WORDS, save_model

nan = math.nan


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("given", "passes", "fails"),
    [
        ("code", ["code"], ["math", None, ["code"]]),
        (["code", "math"], ["code", "math"], ["chat"]),
        ({"not": ["code", None]}, ["math", 0], ["code", None]),
        (1, [1, 1.0], [True, "1"]),
        (True, [True], [1, "true"]),
        (None, [None], ["", 0]),
    ],
)
def test_a_test_compares_without_coercion(given, passes, fails):
    test = ValueTest.parse(given)
    assert [test(value) for value in [*passes, *fails]] == [True] * len(passes) + [False] * len(fails)


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("task == 'code'", r"`reward.a.when` is \"task == 'code'\" and must be a condition"),
        ({}, r"must be a condition. It names columns .* `'reward.a.when=\{task: code\}'`"),
        ({"task": []}, r"`reward.a.when.task` is \[\]"),
        ({"task": {"is": "code"}}, r"`reward.a.when.task` is \{'is': 'code'\}"),
        ({"task": [["code"]]}, "`reward.a.when.task`"),
    ],
)
def test_malformed_conditions_are_named(when, message):
    assert condition_problem({"task": "code"}, "reward.a.when") is None
    with pytest.raises(ConfigError, match=message):
        ConditionedReward(FunctionReward(count_of_a, name="a"), when)


def test_a_condition_that_no_row_satisfies_shows_the_values_of_the_data():
    rows = [{"task": "code", "level": 1}, {"task": "chat", "level": 2}]
    assert unmet_condition({"task": "chat", "level": 2}, rows, "reward.a.when") is None
    problem = unmet_condition({"task": ["math", "Code"]}, rows, "reward.a.when")
    assert problem is not None and "`task` must be 'math' or 'Code', and the data has 'code', 'chat'" in problem
    problem = unmet_condition({"task": "code", "level": "1"}, rows, "reward.a.when")
    assert problem is not None and "`level` must be '1', and the data has 1, 2" in problem


def test_the_function_sees_the_rows_that_it_counts_for_and_no_others():
    seen, extra = [], {}

    def own(prompts, completions, completion_ids, answer, log_extra):
        seen.append((prompts, completions, completion_ids, answer))
        log_extra("answer", answer)
        return [float(len(text)) for text in completions]

    reward = ConditionedReward(FunctionReward(own), {"task": "code"})
    columns = {"task": ["chat", "code", "code"], "answer": ["x", "y", "z"], "log_extra": extra.__setitem__}
    ids = [[1], [2], [3]]
    assert reward(["p", "q", "r"], ["a", "bb", "ccc"], completion_ids=ids, **columns) == [None, 2.0, 3.0]
    assert seen == [(["q", "r"], ["bb", "ccc"], [[2], [3]], ["y", "z"])]
    assert extra == {"answer": [None, "y", "z"]}
    assert reward(["p"], ["a"], completion_ids=[[1]], task=["chat"]) == [None] and len(seen) == 1
    assert "`reward.own.when` is about the column `task`, and the data has no such column (it has `answer`)" in str(
        reward.column_problem(["prompt", "answer"])
    )
    assert "needs an argument `answer`" in str(reward.column_problem(["task"]))
    assert "pairs keep no columns but their own: `chosen`, `prompt`, `rejected`. Set `reward.own.when=null`." in str(
        reward.column_problem(["prompt", "chosen", "rejected"])
    )
    with pytest.raises(ConfigError, match="`reward.own.when` is about the column `task`"):
        reward(["p"], ["a"], completion_ids=[[1]], answer=["x"])


def test_an_invalid_reward_is_named_by_its_row_in_the_batch():
    reward = FiniteReward(
        ConditionedReward(FunctionReward(lambda completions: [nan] * len(completions)), {"task": "code"})
    )
    with pytest.raises(ConfigError, match="is nan for completion 2: 'c'"):
        reward(["p"] * 3, ["a", "b", "c"], completion_ids=[[]] * 3, task=["chat", "chat", "code"])


def test_a_trial_call_is_of_rows_that_count():
    reward = FiniteReward(ConditionedReward(FunctionReward(lambda answer: [float(x) for x in answer]), {"task": "m"}))
    sample = Sample(["p", "q"], ["a", "b"], [[], []], {"task": ["m", "c"], "answer": ["3", "no number"]}, True)
    assert trial_call(reward, sample) == [3.0]
    assert trial_call(reward, sample.of([1])) is None


def test_evaluation_and_best_of_n_skip_what_does_not_count(tmp_path):
    base = save_model(tmp_path / "base")
    model = ModelReward(save_reward_model(base, tmp_path / "reward"))
    model.__name__ = "model"
    rewards = [FunctionReward(count_of_a, name="a"), ConditionedReward(model, {"task": "code"})]
    prompts, completions, ids = ["b", "b", "b"], ["a", "a a", "b a"], [[3], [3, 3], [4, 3]]
    columns = {"task": ["chat", "code", "chat"]}
    scores = score(rewards, prompts, completions, ids, columns, model.tokenizer)
    (alone,) = model(prompts[1:2], completions[1:2], completion_ids=ids[1:2])
    assert scores == {"a": [1.0, 2.0, 1.0], "model": [None, pytest.approx(alone), None]}
    members = score_members(rewards, prompts, completions, ids, columns, model.tokenizer)
    assert [row["model"] for row in members] == [[None], [pytest.approx(alone)], [None]]
    assert combine_scores(scores, rewards, weighted_sum) == pytest.approx([1.0, 2.0 + alone, 1.0])
    assert combine_scores(scores, rewards, minimum) == pytest.approx([1.0, min(2.0, alone), 1.0])


def constant(completions, **kwargs):
    return [100.0 + i for i in range(len(completions))]


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_counts_a_reward_where_its_condition_holds(path, tmp_path, kind):
    data = Dataset.from_dict({"prompt": [f"{word} b" for word in WORDS[:8]], "task": ["code", "chat"] * 4})
    rewards = [FunctionReward(count_of_a, name="a"), FunctionReward(constant, name="b")]
    rewards[1] = ConditionedReward(rewards[1], {"task": "code"})
    trainer = rl_trainer(
        kind, path, tmp_path, data=data, reward_funcs=rewards, eval_dataset=data, eval_strategy="steps", eval_steps=2
    )
    norm = RunningNorm(trainer=trainer)
    records = []
    trainer.on_rollout(records.append)
    trainer.add_callback(norm)
    trainer.train()
    trained = [record for record in records if record.training]
    for record in records:
        there = ~record.rewards.values.isnan()
        assert there[:, 0].all() and 0 < there[:, 1].sum() < len(there)
        assert torch.isnan(record.rewards.scores()).sum() == 0
    counts = sum((~record.rewards.values.isnan()).sum(dim=0) for record in trained)
    assert norm.moments.count.tolist() == counts.tolist() and norm.moments.mean[1] > 90
    shares = [(~record.rewards.values[:, 1].isnan()).double().mean().item() for record in trained]
    assert logged(trainer, "rewards/b/frac_applied") == pytest.approx(shares)
    assert logged(trainer, "rewards/a/frac_applied") == [1.0] * len(trained)
    assert min(logged(trainer, "rewards/b/mean")) >= 100
    assert set(logged(trainer, "eval_rewards/b/frac_applied")) == {0.5}


def test_a_completion_with_a_watched_reward_alone_has_no_score(path, tmp_path):
    """TRL would learn from a 0 there, and log it."""
    data = Dataset.from_dict({"prompt": [f"{word} b" for word in WORDS[:8]], "task": ["code", "chat"] * 4})
    rewards = [FunctionReward(count_of_a, name="a"), FunctionReward(constant, name="b")]
    rewards[1] = ConditionedReward(rewards[1], {"task": "code"})
    trainer = rl_trainer("grpo", path, tmp_path, data=data, reward_funcs=rewards, reward_weights=[0.0, 1.0])
    records = []
    trainer.on_rollout(records.append)
    trainer.train()
    scored = [value for value in logged(trainer, "reward") if not math.isnan(value)]  # of a rollout of other rows
    assert scored and min(scored) >= 100
    watched = [record.rewards.values[:, 0].mean().item() for record in records]
    assert logged(trainer, "rewards/a/mean") == pytest.approx(watched)


@pytest.mark.parametrize(
    ("kind", "options", "normalizes"),
    [
        ("grpo", {}, False),
        ("grpo", {}, True),
        ("grpo", {"multi_objective_aggregation": "normalize_then_sum"}, False),
        ("rloo", {}, True),
    ],
)
def test_a_completion_without_a_score_is_not_learned_from(path, tmp_path, kind, options, normalizes):
    """A reward of weight 0 applies to every completion, and the one that counts to every second one."""

    def every_second(completions, **kwargs):
        return [None if i % 2 else 100.0 + i for i in range(len(completions))]

    rewards = [FunctionReward(count_of_a, name="a"), FunctionReward(every_second, name="b")]
    options = options | {"reward_weights": [0.0, 1.0], "num_generations": 4}
    trainer = rl_trainer(kind, path, tmp_path, reward_funcs=rewards, **options)
    if normalizes:
        RunningNorm(trainer=trainer)
    advantages, generate = [], trainer._generate_and_score_completions

    def recorded(inputs):
        output = generate(inputs)
        advantages.append(output["advantages"])
        return output

    trainer._generate_and_score_completions = recorded
    trainer.train()
    assert advantages and all(each[::2].any() and not each[1::2].any() for each in advantages)
    assert min(logged(trainer, "reward")) >= 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=ppo", "reward.gold.when={task: [[code]]}"], "`reward.gold.when.task`"),
        (["stage=serve_reward", "reward=demo", "reward.gold.when={task: code}"], "Set `reward.http.when` where"),
    ],
)
def test_checks_name_conditions_that_cannot_be(compose, words, message):
    assert any(message in problem for problem in find_problems(compose(*words)))


def test_a_dry_run_names_a_value_that_never_occurs(compose, tmp_path):
    words = ("stage=ppo", f"runs_dir={tmp_path}", "debug=dry_run")
    with pytest.raises(ConfigError, match="No row of the data satisfies `reward.gold.when`.* the data has 'harm'"):
        show_plan(compose(*words, "reward.gold.when={kind: sonnet}"))
    with pytest.raises(ConfigError, match="`reward.gold.when` is about the column `task`, and the data has no such"):
        show_plan(compose(*words, "reward.gold.when={task: code}"))
