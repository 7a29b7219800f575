"""Combination of several rewards: the formulas, and what PPO, RLOO and GRPO learn from and log."""

import functools
import math

import pytest
import torch
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate

from rlhf_trl.callbacks.reward_norm import ReferenceNorm, RewardNorm
from rlhf_trl.checks import find_problems
from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.combine import minimum, product, threshold, weighted_sum
from rlhf_trl.trainers.rollout_hook import Rewards
from tests.helpers.ppo import prompts
from tests.helpers.rl import TRAINERS, count_of_a, logged, rl_trainer
from tests.helpers.tiny import save_model

nan = math.nan
NAMES = ["safe", "kind", "good"]
WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def combined(combine, rows, raw=None, weights=WEIGHTS, **options):
    rows = torch.tensor(rows)
    return combine(rows, rows if raw is None else torch.tensor(raw), weights, NAMES, **options).tolist()


@pytest.mark.parametrize(
    ("combine", "expected"),
    [(weighted_sum, [1 + 2 + 2.0, 4.0, 3.0]), (minimum, [1.0, 4.0, 1.0]), (product, [1.0 * 1 * 2, 4.0, 1.0])],
)
def test_none_is_ignored_in_a_combination(combine, expected):
    rows = [[1.0, 1.0, 4.0], [nan, 2.0, nan], [1.0, 1.0, nan], [nan, nan, nan]]
    *values, empty = combined(combine, rows)
    assert values == pytest.approx(expected) and math.isnan(empty)


@pytest.mark.parametrize(
    "combine, expected", [(weighted_sum, [10.0, nan]), (minimum, [1.0, nan]), (product, [9.0, nan])]
)
def test_reward_of_weight_0_is_not_counted(combine, expected):
    rows = [[-5.0, 1.0, 9.0], [-5.0, nan, nan]]
    found = combined(combine, rows, weights=torch.tensor([0.0, 1.0, 1.0]))
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("combine, expected", [(weighted_sum, 0.0), (minimum, 0.0), (product, 1.0)])
def test_where_no_reward_has_a_weight_a_completion_with_one_has_a_score(combine, expected):
    *scores, empty = combined(combine, [[0.5, 1.0, 9.0], [0.5, nan, nan], [nan, nan, nan]], weights=torch.zeros(3))
    assert scores == [expected, expected] and math.isnan(empty)


def test_product_of_negative_rewards_is_an_error():
    with pytest.raises(ConfigError, match=r"`kind` is -0.5 for completion 1, and `combine=product` takes"):
        combined(product, [[1.0, 0.0, 1.0], [1.0, -0.5, -1.0]])


def test_threshold_counts_rewards_once_the_constraints_are_satisfied():
    rows = [[0.2, 0.1, 9.0], [0.5, 0.1, 9.0], [0.5, 1.0, 9.0], [nan, 1.0, 9.0], [0.9, nan, nan], [0.0, nan, nan]]
    found = combined(threshold, rows, constraints={"safe": 0.5, "kind": 1.0}, floor=-3)
    assert found[:4] == pytest.approx([-3 - 0.3, -3 - 2 * 0.9, 4.5, 4.5])
    assert math.isnan(found[4]) and found[5] == pytest.approx(-3.5)
    # The other order of the same constraints
    first, *_ = combined(threshold, rows, constraints={"kind": 1.0, "safe": 0.5}, floor=-3)
    assert first == pytest.approx(-3 - 2 * 0.9)
    # Thresholds are on the raw scale, what is learned from is not
    (one,) = combined(threshold, [[-1.0, 0.0, 4.0]], raw=[[0.6, 1.0, 100.0]], constraints={"safe": 0.5})
    assert one == pytest.approx(2.0)
    # "At most", by a negative weight; and the rule of Llama 2
    weights = torch.tensor([-1.0, 1.0, 1.0])
    rows = [[0.2, 1.0, 1.0], [0.8, 1.0, 1.0]]
    assert combined(threshold, rows, weights=weights, constraints={"safe": 0.5}) == pytest.approx([2.0, -0.3])
    rows, llama = [[0.1, nan, 0.7], [0.2, nan, 0.7]], {"constraints": {"safe": 0.15}, "floor": 0.15}
    assert combined(threshold, rows, weights=torch.ones(3), **llama) == pytest.approx([0.1, 0.7])


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"saef": 1}, "names `saef`, and there is no such reward. Did you mean `safe`"),
        ({"safe": "high"}, "`combine.constraints.safe` is 'high' and must be a number"),
        (dict.fromkeys(NAMES, 1), "names all rewards"),
        (None, "needs to know which rewards are constraints"),
    ],
)
def test_wrong_constraints_are_named(constraints, message):
    with pytest.raises(ConfigError, match=message):
        combined(threshold, [[1.0, 1.0, 1.0]], constraints=constraints)


# ---- In training ----


def has_b(completions, **kwargs):
    return [float("b" in text.split()) if i % 4 else None for i, text in enumerate(completions)]


COMBINATIONS = {
    "min": minimum,
    "product": product,
    "threshold": functools.partial(threshold, constraints={"has_b": 1.0}, floor=-1.0),
}


class Seen(list):
    """Keeps the rewards that functions gave, in training and in evaluation; one tensor (rows, functions) each time."""

    def watch(self, trainer):
        trainer.on_rollout(lambda rollout: self.append((rollout.training, rollout.rewards.values)))


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_combined_score_is_learned_from_and_logged(path, tmp_path, kind, name):
    weights, functions = [1.0, 2.0], [count_of_a, has_b]
    trainer = rl_trainer(
        kind,
        path,
        tmp_path,
        data=prompts(16),
        reward_funcs=functions,
        reward_weights=weights,
        eval_dataset=prompts(4),
        eval_strategy="steps",
        eval_steps=4,
        beta=0.0 if kind != "ppo" else 0.1,
    )
    seen, rollouts = Seen(), []
    seen.watch(trainer)
    trainer.add_callback(RewardNorm(combine=COMBINATIONS[name], trainer=trainer))
    generate = trainer._generate_and_score_completions

    def watched(inputs):
        rollouts.append((trainer.model.training, generate(inputs)))
        return rollouts[-1][1]

    trainer._generate_and_score_completions = watched
    trainer.train()

    def scores(rewards):
        names = ["count_of_a", "has_b"]
        return COMBINATIONS[name](rewards, rewards, torch.tensor(weights), names)

    trained = [rewards for training, rewards in seen if training]
    assert len(trained) == 4 and len({round(scores(r).nanmean().item(), 4) for r in trained}) > 1
    expected = [scores(rewards).nanmean().item() for rewards in trained]
    assert any(
        abs((r * torch.tensor(weights)).nansum(1).mean() - e) > 1e-3 for r, e in zip(trained, expected, strict=True)
    )
    assert logged(trainer, "reward") == pytest.approx(expected, abs=1e-5)
    assert logged(trainer, "objective/scores") == pytest.approx(expected, abs=1e-5)
    assert logged(trainer, "rewards/has_b/mean") == pytest.approx([r[:, 1].nanmean().item() for r in trained])
    assert logged(trainer, "rewards/count_of_a/mean") == pytest.approx([r[:, 0].mean().item() for r in trained])
    held_out = torch.cat([scores(rewards) for training, rewards in seen if not training])
    metric = "eval_objective/scores" if kind == "ppo" else "eval_reward"
    assert logged(trainer, metric) == pytest.approx([held_out.nanmean().item()], abs=1e-5)
    if kind != "ppo":  # the baseline of two completions of one prompt; the learned advantage follows the score
        pairs = scores(trained[0]).view(-1, 2)
        centre = pairs.mean(1, keepdim=True) if kind == "grpo" else pairs.flip(1)
        advantages = next(rollout["advantages"] for training, rollout in rollouts if training)
        torch.testing.assert_close(advantages.flatten(), (pairs - centre).flatten(), atol=1e-5, rtol=0)


def test_constraints_are_on_the_raw_scale_beside_a_normalizer(path, tmp_path):
    trainer = rl_trainer("ppo", path, tmp_path, data=prompts(16), reward_funcs=[count_of_a, has_b])
    seen = Seen()
    seen.watch(trainer)
    combine = functools.partial(threshold, constraints={"has_b": 1.0}, floor=-1.0)
    trainer.add_callback(ReferenceNorm(trainer=trainer, combine=combine))
    trainer.train()
    norm, weights, names = ReferenceNorm(), torch.ones(2), ["count_of_a", "has_b"]
    for (_, raw), found in zip(seen, logged(trainer, "objective/scores_normalized"), strict=True):
        assert found == pytest.approx(combine(norm.normalize(raw), raw, weights, names).mean().item(), abs=1e-5)


def test_combination_is_refused_where_grpo_normalizes_every_function(path, tmp_path):
    trainer = rl_trainer("grpo", path, tmp_path, multi_objective_aggregation="normalize_then_sum")
    with pytest.raises(ConfigError, match="multi_objective_aggregation=normalize_then_sum"):
        RewardNorm(combine=minimum, trainer=trainer)


def test_gdpo_normalizes_each_reward_by_prompt_and_their_sum_over_the_rollout(path, tmp_path):
    """Against the formula of arXiv 2601.05242, with TRL's unbiased deviations and 1e-4 beside them."""
    rewards = torch.tensor(
        [[1.0, 0.2], [3.0, 0.1], [2.0, nan], [2.0, 0.4], [5.0, 7.0], [5.0, 9.0], [nan, 1.0], [0.0, 1.0]]
    )
    weights = torch.tensor([0.5, 2.0])
    trainer = rl_trainer(
        "grpo", path, tmp_path, reward_funcs=[count_of_a, has_b], reward_weights=weights.tolist(), num_generations=4,
        scale_rewards="group", multi_objective_aggregation="normalize_then_sum",
    )  # fmt: skip
    found = []
    trainer.score_completions = lambda *args: Rewards(
        rewards, torch.zeros_like(rewards, dtype=torch.bool), trainer.reward_weights, trainer.reward_func_names
    )
    original = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: found.append(original(inputs)) or found[-1]
    trainer.train()
    sums = []
    for group in rewards.split(4):
        total = torch.zeros(4)
        for column, weight in zip(group.T, weights, strict=True):
            known = column[~column.isnan()]
            scaled = (column - known.mean()) / (known.std() + 1e-4)
            total += weight * scaled.nan_to_num(0.0)
        sums.append(total)
    sums = torch.cat(sums)
    expected = (sums - sums.mean()) / (sums.std() + 1e-4)
    torch.testing.assert_close(found[0]["advantages"], expected)
    assert logged(trainer, "reward")[0] == pytest.approx((rewards.nan_to_num(0.0) @ weights).mean().item())


# ---- The group ----


@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo"])
def test_training_stages_use_the_group_combine(compose, stage):
    words = [f"stage={stage}", "reward=[demo,format]", "reward.format.kwargs.pattern=.*", "combine=threshold"]
    cfg = compose(*words, "combine.constraints={format: 1}", "combine.floor=-4")
    assert find_problems(cfg) == []
    score = instantiate(cfg.combine)(
        torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 0.0]]), torch.ones(2), [*cfg.reward]
    )
    assert score.item() == -5
    with pytest.raises(ConfigCompositionException):
        compose("stage=evaluate_reward", "combine=min")


@pytest.mark.parametrize("stage", ["evaluate", "generate", "chat"])
def test_stages_that_score_completions_use_the_group_combine(compose, stage):
    words = [f"stage={stage}", "reward=[demo,eos]", "combine=threshold"]
    assert any("combine.constraints" in problem for problem in find_problems(compose(*words)))
    cfg = compose(*words, "combine.constraints={eos: 1}", "combine.floor=-4")
    assert not any("combine" in problem for problem in find_problems(cfg))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["combine=threshold"], "`'combine.constraints={gold: 0.5}'`"),
        (["combine=threshold", "combine.constraints={gold: 1}"], "names all rewards"),
        (["combine=threshold", "combine.constraints=gold"], "`combine.constraints` is 'gold' and must name rewards"),
        (
            ["combine=threshold", "reward=[demo,eos]", "combine.constraints={eos: 1}", "combine.floor=low"],
            "`combine.floor` is 'low' and must be a number",
        ),
        (["combine=threshold", "combine.constraints={glod: 1}"], "Did you mean `gold`"),
        (["combine=product", "reward_norm=running"], "`RunningNorm` brings about half of them below"),
        (
            ["stage=grpo", "combine=min", "stage.args.multi_objective_aggregation=normalize_then_sum"],
            "set `combine=sum`",
        ),
        (
            [
                "stage=grpo",
                "stage.args.multi_objective_aggregation=normalize_then_sum",
                "stage.args.scale_rewards=none",
            ],
            "`stage.args.scale_rewards=none` has no effect",
        ),
    ],
)
def test_impossible_combinations_are_errors_before_anything_loads(compose, tmp_path, words, message):
    problems = find_problems(compose(f"runs_dir={tmp_path}", *words))
    assert len(problems) == 1 and message in problems[0], problems
