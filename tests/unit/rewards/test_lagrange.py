"""Constraints on the means of rewards (`combine=lagrange`): numbers, and what PPO, RLOO and GRPO learn and keep."""

import math

import pytest
import torch
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate

from rlhf_trl.callbacks.reward_norm import ReferenceNorm, RewardNorm
from rlhf_trl.checks import find_problems
from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.constraints import Bound
from rlhf_trl.rewards.lagrange import Lagrange
from tests.helpers.ppo import prompts
from tests.helpers.rl import TRAINERS, count_of_a, logged, rl_trainer
from tests.helpers.tiny import save_model

nan = math.nan
NAMES = ["good", "safe", "length"]
WEIGHTS = torch.tensor([2.0, -1.0, 0.5])
BOUNDS = {"safe": ">= 0.5", "length": "<= 60"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


# ---- Numbers ----


def test_multiplier_after_one_rollout():
    """The worked number of Safe RLHF's update: lambda 1, learning rate .1, mean cost .5."""
    lagrange = Lagrange({"safe": "<= 0"}, lambda_lr=0.1)
    lagrange.update(torch.tensor([[0.0], [1.0], [nan], [math.inf]]), torch.ones(1), ["safe"])
    assert lagrange.multipliers["safe"] == pytest.approx(1.0512710963760241, rel=1e-15)
    # What plain SGD makes of the loss -(mean cost) * exp(log lambda)
    log_lambda = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([log_lambda], lr=0.1)
    (-0.5 * log_lambda.exp()).backward()
    optimizer.step()
    assert lagrange.log_lambda["safe"] == log_lambda.item()


@pytest.mark.parametrize(
    ("text", "bound", "value", "excess"),
    [(">= 0.5", (-1, 0.5), 0.2, 0.3), ("<=60", (1, 60), 58, -2), (" <= -1e-1 ", (1, -0.1), 0, 0.1)],
)
def test_bounds_are_read(text, bound, value, excess):
    assert Bound.parse(text) == bound and Bound.parse(text).excess(value) == pytest.approx(excess)
    assert Bound.parse(str(Bound.parse(text))) == bound


@pytest.mark.parametrize("text", ["0.5", "> 1", ">= ", ">= 1e999", ">= nan", "== 1", "0 <= 1"])
def test_malformed_bounds_are_refused(text):
    with pytest.raises(ConfigError, match=r'`combine.constraints.safe` is .* and must be a bound: ">= '):
        Lagrange({"safe": text})


def test_score_is_the_lagrangian_and_costs_are_raw():
    lagrange = Lagrange(BOUNDS, lambda_init=3.0)
    values = torch.tensor([[1.0, 9.0, 9.0], [1.0, 9.0, 9.0], [nan, nan, 9.0], [nan, nan, nan]])
    raw = torch.tensor([[7.0, 0.2, 70.0], [7.0, 0.9, 50.0], [nan, nan, 62.0], [nan, nan, nan]])
    signals = lagrange.signals(values, raw, WEIGHTS, NAMES)
    # R is normalized and weighted; a cost has the size of its weight, and what doesn't apply is at its bound
    expected = [[2, 0.3, 5], [2, -0.4, -5], [0, 0, 1], [0, 0, 0]]
    torch.testing.assert_close(signals, torch.tensor(expected))
    found = lagrange(values, raw, WEIGHTS, NAMES)
    assert found.tolist() == pytest.approx([(2 - 3 * 5.3) / 7, (2 + 3 * 5.4) / 7, -3 / 7, nan], nan_ok=True, rel=1e-6)
    # An infinite reward is no price: it ends in a NaN, as without constraints
    assert lagrange(values[:1], torch.tensor([[7.0, -math.inf, 70.0]]), WEIGHTS, NAMES).tolist() == [-math.inf]
    assert lagrange.measures(raw, NAMES) == {
        "safe": {"mean": pytest.approx(0.55), "violation_rate": 0.5},
        "length": {"mean": pytest.approx(182 / 3), "violation_rate": pytest.approx(2 / 3)},
    }


def test_window_delay_and_ceiling():
    lagrange = Lagrange({"safe": "<= 0"}, lambda_lr=1.0, lambda_max=4.0, delay=1, window=3)

    def update(*costs):
        lagrange.update(torch.tensor(costs).unsqueeze(1), torch.ones(1), ["safe"])
        return lagrange.multipliers["safe"]

    assert update(5.0) == 1.0  # delayed, but in the window
    assert lagrange.costs["safe"] == [5.0]
    assert update(-2.0, -2.0) == pytest.approx(math.exp(1 / 3))
    assert update(-9.0) == pytest.approx(math.exp(1 / 3 - 13 / 3 * math.exp(1 / 3)))
    assert lagrange.costs["safe"] == [-2.0, -2.0, -9.0]
    assert update(1e4, 2e4, 3e4, 4e4) == pytest.approx(4.0)  # of the whole rollout, and no further
    assert lagrange.mean_cost("safe") == 25000.0
    before = lagrange.multipliers["safe"]
    assert update(nan) == pytest.approx(before)  # no new cost
    with pytest.raises(ConfigError, match="`combine.lambda_init=9` is above `combine.lambda_max=4`"):
        Lagrange({"safe": "<= 0"}, lambda_init=9.0, lambda_max=4.0)


@pytest.mark.parametrize(
    ("constraints", "weights", "message"),
    [
        ({"saef": ">= 1"}, WEIGHTS, "names `saef`, and there is no such reward. Did you mean `safe`"),
        ({"safe": ">= 1"}, torch.tensor([1.0, 0.0, 1.0]), "names `safe`, whose weight is 0"),
        ({"safe": ">= 1", "length": "<= 1"}, torch.tensor([0.0, 1.0, 1.0]), "leaves no reward to maximize"),
    ],
)
def test_constraints_that_do_not_fit_the_rewards(constraints, weights, message):
    with pytest.raises(ConfigError, match=message):
        Lagrange(constraints)(torch.ones(1, 3), torch.ones(1, 3), weights, NAMES)


# ---- In training ----


def num_words(completions, **kwargs):
    return [float(len(text.split())) if i % 4 else None for i, text in enumerate(completions)]


def run(kind, path, out, resume=None, normalizer=RewardNorm, **options):
    """Return a trainer with a constraint after four rollouts of 8, its rewards of each rollout, and of evaluations."""
    lagrange = Lagrange({"num_words": "<= 2.5"}, lambda_lr=0.2, window=12)
    trainer = rl_trainer(
        kind,
        path,
        out,
        data=prompts(16),
        combine=lagrange,
        save_strategy="steps",
        **{
            "reward_funcs": [count_of_a, num_words],
            "reward_weights": [1.0, 0.5],
            "save_steps": 2,
            "beta": 0.0 if kind == "rloo" else 0.1,
            **options,
        },
    )
    seen = []
    trainer.on_rollout(lambda rollout: seen.append((rollout.training, rollout.rewards.values)))
    trainer.add_callback(normalizer(trainer=trainer, combine=lagrange))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, lagrange, seen


@pytest.mark.parametrize("kind", TRAINERS)
def test_multipliers_move_and_the_score_follows(path, tmp_path, kind):
    options = {"eval_dataset": prompts(6), "eval_strategy": "steps", "eval_steps": 4}
    trainer, lagrange, seen = run(kind, path, tmp_path, **options)
    trained = [rewards for training, rewards in seen if training]
    again, scores, multipliers = Lagrange({"num_words": "<= 2.5"}, lambda_lr=0.2, window=12), [], []
    weights, names = torch.tensor([1.0, 0.5]), ["count_of_a", "num_words"]
    for rewards in trained:
        again.update(rewards, weights, names)
        multipliers.append(again.multipliers["num_words"])
        r, c, m = rewards[:, 0], (0.5 * (rewards[:, 1] - 2.5)).nan_to_num(), multipliers[-1]
        scores.append(((r - m * c) / (1 + m)).mean().item())
    assert len(trained) == 4 and len({round(m, 3) for m in multipliers}) == 4
    assert logged(trainer, "constraints/num_words/lambda") == pytest.approx(multipliers)
    assert logged(trainer, "constraints/num_words/lambda_share") == pytest.approx([m / 5 for m in multipliers])
    assert logged(trainer, "constraints/num_words/cost")[-1] == lagrange.mean_cost("num_words")
    assert logged(trainer, "objective/scores") == pytest.approx(scores, abs=1e-5)
    assert logged(trainer, "reward") == pytest.approx(scores, abs=1e-5)
    means = [rewards[:, 1].nanmean().item() for rewards in trained]
    assert logged(trainer, "constraints/num_words/mean") == pytest.approx(means)
    assert logged(trainer, "rewards/num_words/mean") == pytest.approx(means)
    rates = [(r[~r.isnan()] > 2.5).float().mean().item() for r in (rewards[:, 1] for rewards in trained)]
    assert logged(trainer, "constraints/num_words/violation_rate") == pytest.approx(rates)
    maximized = [rewards[:, 0].mean().item() for rewards in trained]
    assert logged(trainer, "objective/maximized") == pytest.approx(maximized)
    # Evaluation moves nothing, and counts each row once
    maximized = torch.cat([rewards[:, 0] for training, rewards in seen if not training]).mean().item()
    assert logged(trainer, "eval_objective/maximized") == pytest.approx([maximized])
    held_out = torch.cat([rewards[:, 1] for training, rewards in seen if not training])
    held_out = held_out[~held_out.isnan()]
    assert logged(trainer, "eval_constraints/num_words/mean") == pytest.approx([held_out.mean().item()])
    rate = (held_out > 2.5).float().mean().item()
    assert logged(trainer, "eval_constraints/num_words/violation_rate") == pytest.approx([rate])
    assert not logged(trainer, "eval_constraints/num_words/lambda")


def test_what_is_maximized_leaves_out_completions_that_only_a_reward_of_weight_0_applies_to(path, tmp_path):
    def some_of_a(completions, **kwargs):
        return [each if i % 4 else None for i, each in enumerate(count_of_a(completions, **kwargs))]

    def watched(completions, **kwargs):
        return [1.0] * len(completions)

    rewards, weights = [some_of_a, num_words, watched], [1.0, 0.5, 0.0]
    trainer, _, seen = run("ppo", path, tmp_path, reward_funcs=rewards, reward_weights=weights)
    means = [values[:, 0].nanmean().item() for _, values in seen]
    assert all(values[:, 0].isnan().any() for _, values in seen)
    assert logged(trainer, "objective/maximized") == pytest.approx(means)


def test_multipliers_rest_while_the_critic_warms_up(path, tmp_path):
    trainer, lagrange, _ = run("ppo", path, tmp_path, critic_warmup_steps=2)
    first, second, *moved = logged(trainer, "constraints/num_words/lambda")
    assert first == second == 1.0 and len({1.0, *moved}) == 3 and lagrange.rollouts == 4
    assert all(logged(trainer, "constraints/num_words/cost"))  # measured all the same


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_resumed_run_is_the_uninterrupted_one(path, tmp_path, kind):
    whole, lagrange, _ = run(kind, path, tmp_path)
    resumed, again, _ = run(kind, path, tmp_path / "again", resume=f"{tmp_path}/checkpoint-2")
    assert lagrange.state() == again.state() and lagrange.rollouts == 4
    for key in ("constraints/num_words/lambda", "objective/scores", "loss"):
        assert logged(whole, key) == logged(resumed, key) and len(logged(whole, key)) == 4, key
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    if kind == "ppo":  # and of other signals there is nothing to resume
        fewer = rl_trainer(kind, path, tmp_path / "fewer", data=prompts(16), reward_funcs=[count_of_a, num_words])
        with pytest.raises(ConfigError, match="critic of another shape: its number of constraints"):
            fewer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
        lagrange = Lagrange({"count_of_a": "<= 1"})
        with pytest.raises(ConfigError, match=r"The checkpoint has the constraints \['num_words'\]"):
            lagrange.load_state(again.state())


def test_ppo_samples_two_values_per_token_and_learns_normalized_rewards(path, tmp_path):
    trainer, *_ = run("ppo", path, tmp_path, normalizer=ReferenceNorm, vf_coef=1.0)
    assert trainer._sampled is not None and trainer._sampled.usable
    rollout = trainer._rollout
    assert rollout.old_values.shape == (*rollout.mask.shape, 2) == rollout.returns.shape
    trainer.model.train()
    output = trainer._generate_and_score_completions([{"prompt": p} for p in ["a", "b c"] * 4])
    ids, mask = (torch.cat([output[f"prompt_{x}"], output[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
    with torch.no_grad():
        scores = trainer._score_tokens(trainer.model, ids, mask, output["completion_ids"].size(1), 8)
    valid = output["completion_mask"].bool().unsqueeze(-1)
    difference = torch.where(valid, scores.values - output["old_values"], 0.0).abs().max()
    assert difference < 1e-5 < scores.values.abs().min()
    for key in ("value/num_words/explained_variance", "value/num_words/mean", "returns/num_words/mean"):
        assert len(logged(trainer, key)) == 4
    assert logged(trainer, "objective/scores_normalized") != logged(trainer, "objective/scores")


def test_a_lagrange_that_the_trainer_does_not_know_is_refused(path, tmp_path):
    trainer = rl_trainer("ppo", path, tmp_path, reward_funcs=[count_of_a, num_words])
    with pytest.raises(ConfigError, match="Pass it to the trainer as well"):
        RewardNorm(trainer=trainer, combine=Lagrange({"num_words": "<= 1"}))
    with pytest.raises(ConfigError, match="multi_objective_aggregation=normalize_then_sum"):
        rl_trainer(
            "grpo",
            path,
            tmp_path,
            combine=Lagrange({"count_of_a": "<= 1"}),
            multi_objective_aggregation="normalize_then_sum",
        )


# ---- The group ----

TWO = ["reward=[demo,tokens]", "combine=lagrange"]


@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo"])
def test_stages_with_rollouts_have_the_option(compose, stage):
    cfg = compose(f"stage={stage}", *TWO, "combine.constraints={tokens: '<= 20'}", "combine.window=64")
    assert find_problems(cfg) == []
    lagrange = instantiate(cfg.combine)
    assert lagrange.bounds == {"tokens": (1.0, 20.0)} and lagrange.window == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "`combine.constraints` is not set and must name rewards"),
        (["combine.constraints=tokens"], "`combine.constraints` is 'tokens' and must name rewards"),
        (["combine.constraints={tokesn: '<= 20'}"], "Did you mean `tokens`"),
        (["combine.constraints={tokens: 20}"], "`combine.constraints.tokens` is 20 and must be a bound"),
        (["combine.constraints={tokens: '< 20'}"], "`combine.constraints.tokens` is '< 20' and must be a bound"),
        (["combine.constraints={tokens: '<= 20'}", "reward.tokens.weight=0"], "whose weight is 0"),
        (["combine.constraints={tokens: '<= 20', gold: '>= 1'}"], "leaves no reward to maximize"),
        (["combine.constraints={tokens: '<= 20'}", "combine.lambda_lr=-1"], "`combine.lambda_lr` is -1"),
        (["combine.constraints={tokens: '<= 20'}", "combine.window=0"], "`combine.window` is 0"),
        (["combine.constraints={tokens: '<= 20'}", "combine.lambda_init=10"], "Set `combine.lambda_max=20`"),
        (
            [
                "stage=grpo",
                "combine.constraints={tokens: '<= 20'}",
                "stage.args.multi_objective_aggregation=normalize_then_sum",
            ],
            "set `combine=sum`",
        ),
        (["stage=evaluate", "combine.constraints={tokens: '<= 20'}"], "`stage=evaluate` trains nothing. Set"),
        (["stage=chat", "combine.constraints={tokens: '<= 20'}"], "`stage=chat` trains nothing. Set `combine=sum`."),
    ],
)
def test_bad_constraints_are_one_error_before_anything_loads(compose, tmp_path, words, message):
    problems = [p for p in find_problems(compose(f"runs_dir={tmp_path}", *TWO, *words)) if "combine" in p]
    assert len(problems) == 1 and message in problems[0], problems


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ("{glod: '>= 1'}", "`stage.constraints` names `glod`, and there is no such reward. Did you mean `gold`"),
        ("{gold: 1}", "`stage.constraints.gold` is 1 and must be a bound"),
    ],
)
def test_bad_constraints_of_an_evaluation(compose, tmp_path, constraints, message):
    words = [f"runs_dir={tmp_path}", "stage=evaluate", f"stage.constraints={constraints}"]
    problems = [p for p in find_problems(compose(*words)) if "`stage.constraints" in p]
    assert len(problems) == 1 and message in problems[0], problems


def test_stage_reward_has_no_rewards_to_combine(compose):
    with pytest.raises(ConfigCompositionException):
        compose("stage=reward", "combine=lagrange")
