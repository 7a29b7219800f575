"""The hook on rollouts: what listeners are given, and that their order doesn't matter."""

import functools
import json
import math

import pytest
import torch
import trl

from rlhf_trl.callbacks.health import HealthMonitor
from rlhf_trl.callbacks.kl import AdaptiveKL
from rlhf_trl.callbacks.reward_norm import RewardNorm, RunningNorm
from rlhf_trl.callbacks.samples import SAMPLES_FILE, SampleLog
from rlhf_trl.callbacks.unrewarded import UnrewardedGuard
from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.combine import minimum, threshold
from rlhf_trl.trainers.base import TrainerMixin
from rlhf_trl.trainers.rollout_hook import Rewards, RolloutHookWithKL
from rlhf_trl.trainers.rollouts import Rollouts, extended
from tests.helpers.ppo import prompts
from tests.helpers.rl import TRAINERS, count_of_a, logged, rl_trainer
from tests.helpers.tiny import save_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def has_b(completions, **kwargs):
    return [float("b" in text.split()) if i % 4 else None for i, text in enumerate(completions)]


CALLBACKS = {
    "kl": functools.partial(AdaptiveKL, 0.1, 1e-3, horizon=100),
    "norm": functools.partial(RunningNorm, combine=functools.partial(threshold, constraints={"has_b": 1.0})),
    "samples": None,
    "health": functools.partial(HealthMonitor, baseline=1, window=1),
    "unrewarded": UnrewardedGuard,
}


def run_with_callbacks(kind, path, out, order):
    trainer = rl_trainer(
        kind,
        path,
        out,
        data=prompts(16),
        num_iterations=2,
        reward_funcs=[count_of_a, has_b],
        eval_dataset=prompts(4),
        eval_strategy="steps",
        eval_steps=1,
    )
    for name in order:
        made = SampleLog(trainer, str(out)) if name == "samples" else CALLBACKS[name](trainer=trainer)
        trainer.add_callback(made)
    trainer.train()
    times = ("time", "per_second")
    history = [{k: v for k, v in e.items() if not any(t in k for t in times)} for e in trainer.state.log_history]
    return trainer, history, [json.loads(line) for line in (out / SAMPLES_FILE).read_text().splitlines()]


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_order_of_registration_does_not_matter(path, tmp_path, kind):
    names = list(CALLBACKS)
    orders = [names, names[::-1], [*names[2:], *names[:2]]]
    runs = []
    for i, order in enumerate(orders):
        (tmp_path / str(i)).mkdir()
        runs.append(run_with_callbacks(kind, path, tmp_path / str(i), order))
    trainer, history, samples = runs[0]
    assert {row["split"] for row in samples} == {"train", "eval"} and len(logged(trainer, "objective/kl")) == 4
    assert logged(trainer, "objective/scores") != logged(trainer, "objective/scores_normalized")
    for other, again, rows in runs[1:]:
        assert again == history and rows == samples
        for (name, a), (_, b) in zip(
            trainer.model.state_dict().items(), other.model.state_dict().items(), strict=True
        ):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", TRAINERS)
def test_listeners_are_given_each_rollout_with_raw_rewards(path, tmp_path, kind):
    trainer = rl_trainer(
        kind, path, tmp_path, reward_funcs=[count_of_a, has_b], reward_weights=[1.0, 0.5], num_iterations=2,
        eval_dataset=prompts(4), eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    records = []
    RunningNorm(trainer=trainer, combine=minimum)
    trainer.on_rollout(records.append)
    trainer.train()
    trained = [record for record in records if record.training]
    assert len(trained) == 2 and len(records) > 2 and trainer.last_rollout is trained[-1]
    for record in records:
        rewards = record.rewards
        assert len(record.prompts) == len(record.completions) == len(rewards.values)
        assert rewards.names == ["count_of_a", "has_b"] and rewards.weights.tolist() == [1.0, 0.5]
        assert rewards.values[:, 0].tolist() == count_of_a(record.completions)
        assert rewards.values[:, 1].isnan().tolist() == [i % 4 == 0 for i in range(len(record.completions))]
        expected = minimum(rewards.values, rewards.values, torch.tensor([1.0, 0.5]), rewards.names)
        torch.testing.assert_close(rewards.scores(), expected)
        assert (rewards.normalized is not None) == record.training
        assert (record.kl is not None) == record.training
    assert [record.kl for record in trained] == pytest.approx(logged(trainer, "objective/kl"))
    assert trainer.reward_weights.tolist() == [1.0, 0.5]


def test_two_normalizers_are_refused(path, tmp_path):
    trainer = rl_trainer("grpo", path, tmp_path)
    for norm in (RunningNorm(trainer=trainer), RewardNorm(clip=1.0, trainer=trainer)):
        trainer.add_callback(norm)
    with pytest.raises(ConfigError, match="Use one reward normalizer"):
        trainer.train()


def test_completions_with_an_invalid_reward_have_no_score():
    values = torch.tensor([[1.0, 2.0], [3.0, math.nan], [math.nan, math.nan], [5.0, math.nan]])
    invalid = torch.tensor([[False, False], [False, True], [False, False], [False, False]])
    rewards = Rewards(values, invalid, torch.tensor([1.0, 10.0]), ["a", "b"], normalized=values / 2)
    nan = math.nan
    assert rewards.scores().tolist() == pytest.approx([21.0, nan, nan, 5.0], nan_ok=True)
    assert rewards.counted[1].isnan().all() and rewards.counted[3].tolist() == pytest.approx([5.0, nan], nan_ok=True)
    scores = rewards.normalized_scores().tolist()
    assert scores[0] == 10.5 and scores[3] == 2.5 and math.isnan(scores[2])


def test_trainers_of_trl_get_the_hook():
    class Own(trl.RLOOTrainer):
        pass

    for trainer_class in (trl.GRPOTrainer, Own):
        assert {RolloutHookWithKL, Rollouts, TrainerMixin} < set(extended(trainer_class).__mro__)
    assert not issubclass(extended(trl.SFTTrainer), RolloutHookWithKL)
