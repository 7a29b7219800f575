"""Rewards that are None for everything: said, and no run is done that learned nothing."""

import pytest

from rlhf_trl.callbacks.unrewarded import UnrewardedGuard
from rlhf_trl.errors import ConfigError
from tests.helpers.rl import TRAINERS, count_of_a, rl_trainer
from tests.helpers.tiny import save_model


def never(completions, **kwargs):
    return [None] * len(completions)


@pytest.fixture
def guarded(tmp_path):
    """`guarded(kind, *rewards, **options)`: a trainer with the guard, whose rollouts are 8 completions."""
    path = save_model(tmp_path / "model")

    def made(kind, *rewards, **options):
        trainer = rl_trainer(kind, path, tmp_path / kind, reward_funcs=list(rewards), **options)
        trainer.add_callback(UnrewardedGuard(trainer))
        return trainer

    return made


@pytest.mark.parametrize("kind", TRAINERS)
def test_none_for_all_ends_the_run(guarded, kind, capsys):
    with pytest.raises(ConfigError, match="`never` gave None for every completion in 3 rollouts in a row, .* step 3"):
        guarded(kind, never, max_steps=5).train()
    assert capsys.readouterr().out.count("every reward is None for all 8 completions") == 2


def test_a_short_run_ends_so_too(guarded):
    with pytest.raises(ConfigError, match="in all 2 rollouts, so nothing was learned"):
        guarded("ppo", never, max_steps=2).train()


def test_one_rollout_without_a_reward_is_only_said(guarded, capsys):
    def seldom(completions, **kwargs):
        seldom.calls += 1
        return [None if seldom.calls == 2 else 1.0 for _ in completions]

    seldom.calls = 0
    guarded("grpo", seldom, max_steps=3).train()
    assert capsys.readouterr().out.count("nothing to learn from") == 1


def test_one_reward_of_several_that_never_applies_is_said_once(guarded, capsys):
    guarded("rloo", never, count_of_a, max_steps=4).train()
    assert capsys.readouterr().out.count("the reward `never` was None for every completion of 3 rollouts") == 1


def test_completions_without_a_reward_are_said_once(guarded, capsys):
    def sometimes(completions, **kwargs):
        return [None, *(1.0 for _ in completions[1:])]

    guarded("ppo", sometimes, max_steps=3).train()
    assert capsys.readouterr().out.count("every reward is None for 1 of 8 completions") == 1
