"""Reward normalizers: their numbers, what they learn from and log on PPO, RLOO and GRPO, and their state."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from rlhf_trl.callbacks.reward_norm import BatchNorm, ReferenceNorm, RewardNorm, RunningNorm
from rlhf_trl.callbacks.samples import SAMPLES_FILE, SampleLog
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.calibration import Moments, read_calibration
from rlhf_trl.rewards.finite import FiniteReward
from rlhf_trl.rewards.function import FunctionReward
from rlhf_trl.rewards.model import ModelReward
from tests.helpers.ppo import prompts
from tests.helpers.rl import TRAINERS, count_of_a, logged, rl_trainer
from tests.helpers.tiny import save_model

WHITENED = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def column(*values: float) -> torch.Tensor:
    """Rewards of one function."""
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def close(actual: torch.Tensor, *expected: float, atol: float = 1e-6):
    torch.testing.assert_close(actual.flatten(), torch.tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


# ---- Numbers ----


def test_running_moments():
    norm = RunningNorm()
    close(norm.normalize(column(1, 2, 3)), -1, 0, 1)
    close(norm.normalize(column(4, 6)), 0.8 / 1.9235384, 2.8 / 1.9235384)
    assert norm.moments.mean.item() == pytest.approx(3.2) and norm.moments.count.item() == 5
    assert norm.moments.std().item() == pytest.approx(1.9235384, abs=1e-7)
    close(RunningNorm(shift_mean=False).normalize(column(1, 3)), 2 - 1 / math.sqrt(2), 2 + 1 / math.sqrt(2))


def test_a_single_reward_and_one_that_never_varies_are_only_shifted():
    close(RunningNorm().normalize(column(5)), 0)
    for norm in (RunningNorm(), BatchNorm(), ReferenceNorm()):
        for _ in range(3):
            close(norm.normalize(column(1000, 1000.00006, 1000)), 0, 6e-5, 0, atol=1e-4)  # float32's rounding
    close(BatchNorm().normalize(column(0, 0)), 0, 0)
    # Once it varies, it is scaled, and by the whole history
    norm = RunningNorm()
    norm.normalize(column(*[1.0] * 98))
    assert norm.normalize(column(2, 1)).abs().max() < 10


def test_whitening():
    values = [1.2 + 0.1 * i for i in range(9)]
    close(BatchNorm(shift_mean=False).normalize(column(*values)), *itertools.chain(*WHITENED), atol=5e-5)
    close(BatchNorm().normalize(column(*values)), *(x - 1.6 for row in WHITENED for x in row), atol=5e-5)


def test_calibration():
    norm = ReferenceNorm()
    deviation = 4 / math.sqrt(2)
    close(norm.normalize(column(2.5 - deviation, 2.5 + deviation)), -math.sqrt(0.5), math.sqrt(0.5))
    assert norm.gain == [pytest.approx(0.25)] and norm.bias == [pytest.approx(-0.625)]
    close(norm.normalize(column(10, 20)), 1.875, 4.375)  # and then left alone
    norm = ReferenceNorm(mean=1.0, std=2.0)
    norm.normalize(column(2.5 - deviation, 2.5 + deviation))
    assert norm.gain == [pytest.approx(0.5)] and norm.bias == [pytest.approx(-0.25)]
    close(ReferenceNorm(std=None).normalize(column(1, 3)), -1, 1)


@pytest.mark.parametrize("make", [RunningNorm, BatchNorm, ReferenceNorm])
def test_functions_have_moments_of_their_own_without_what_is_not_there(make):
    nan, inf = math.nan, math.inf
    rewards = torch.tensor([[1, 10], [3, nan], [nan, 30], [inf, 20], [5, 50]], dtype=torch.float32)
    without = torch.tensor([[1, 10], [3, nan], [nan, 30], [5, 50]], dtype=torch.float32)
    normalized = make().normalize(rewards)
    assert normalized.dtype == torch.float32
    kept = normalized[[0, 1, 2, 4]]
    torch.testing.assert_close(kept, make().normalize(without), equal_nan=True)
    assert torch.equal(kept.isnan(), without.isnan())
    for i in range(2):
        values = without[:, i][~without[:, i].isnan()]
        std = values.std(unbiased=make is not BatchNorm)
        torch.testing.assert_close(kept[:, i][~without[:, i].isnan()], (values - values.mean()) / std)


def test_a_function_that_never_applied_waits_for_its_rewards():
    nan = math.nan
    running, reference = RunningNorm(), ReferenceNorm()
    for norm in (running, reference):
        assert norm.normalize(torch.tensor([[1.0, nan], [3.0, nan]]))[:, 1].isnan().all()
    torch.testing.assert_close(running.normalize(torch.tensor([[2.0, 4.0], [2.0, 8.0]]))[:, 1].sum().item(), 0.0)
    assert reference.gain[1] is None
    reference.normalize(torch.tensor([[9.0, 4.0], [9.0, 8.0]]))
    assert reference.gain[1] == pytest.approx(1 / math.sqrt(8)) and reference.gain[0] == pytest.approx(
        1 / math.sqrt(2)
    )


def test_clipping_comes_after_normalizing():
    close(RewardNorm(clip=2).normalize(column(-5, 1, 7)), -2, 1, 2)
    close(RunningNorm(clip=0.5).normalize(column(1, 2, 3)), -0.5, 0, 0.5)
    assert RewardNorm(clip=2).normalize(column(math.nan)).isnan().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardNorm(clip=0), "`reward_norm.clip` is 0"),
        (lambda: ReferenceNorm(std=0.0), "`reward_norm.std` is 0.0"),
        (lambda: ReferenceNorm(rows=1), "`reward_norm.rows` is 1"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ---- In training ----


def twice(completions, **kwargs):
    return [None if i % 3 == 2 else 10 * x - 3 for i, x in enumerate(count_of_a(completions))]


class Seen(list):
    """Keeps the rewards that functions gave in training, one tensor (rows, functions) per rollout."""

    def watch(self, trainer):
        def keep(rollout):
            if rollout.training:
                self.append(rollout.rewards.values.double())

        trainer.on_rollout(keep)
        return trainer


def total(rewards, weights):
    return (rewards * torch.tensor(weights, dtype=torch.float64)).nansum(dim=1)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("make", [RunningNorm, BatchNorm, ReferenceNorm, RewardNorm])
def test_raw_and_normalized_scores_are_logged(path, tmp_path, kind, make):
    weights = [2.0, 0.5]
    trainer = rl_trainer(
        kind,
        path,
        tmp_path,
        data=prompts(16),
        reward_funcs=[count_of_a, twice],
        reward_weights=weights,
        eval_dataset=prompts(4),
        eval_strategy="steps",
        eval_steps=2,
    )
    seen = Seen()
    seen.watch(trainer)
    norm = make(clip=0.9, trainer=trainer)
    trainer.add_callback(norm)
    trainer.add_callback(SampleLog(trainer, str(tmp_path), max_rows=8))
    trainer.train()
    assert len(seen) == 4 and any(rewards[:, 0].std() > 0 for rewards in seen)
    again = make(clip=0.9)
    expected = [total(again.normalize(rewards), weights).mean().item() for rewards in seen]
    raw = [total(rewards, weights).mean().item() for rewards in seen]
    assert logged(trainer, "objective/scores") == pytest.approx(raw, abs=1e-5)
    assert logged(trainer, "objective/scores_normalized") == pytest.approx(expected, abs=1e-5)
    # TRL's own metrics and the samples are of the raw rewards
    assert logged(trainer, "reward") == pytest.approx(raw, abs=1e-5)
    std = [total(rewards, weights).std().item() for rewards in seen]
    assert logged(trainer, "reward_std") == pytest.approx(std, abs=1e-5)
    for i, name in enumerate(("count_of_a", "twice")):
        there = [rewards[:, i][~rewards[:, i].isnan()] for rewards in seen]
        assert logged(trainer, f"rewards/{name}/mean") == pytest.approx([x.mean().item() for x in there], abs=1e-5)
        assert logged(trainer, f"rewards/{name}/std") == pytest.approx([x.std().item() for x in there], abs=1e-5)
    rows = [json.loads(line) for line in Path(tmp_path, SAMPLES_FILE).read_text().splitlines()]
    first = [row["rewards"] for row in rows if row["step"] == 1 and row["split"] == "train"]
    assert [row["count_of_a"] for row in first] == pytest.approx(seen[0][:, 0].tolist())
    # Evaluation is of raw scores and moves no moment
    held_out = "eval_objective/scores" if kind == "ppo" else "eval_reward"
    assert len(logged(trainer, held_out)) == 2 and not logged(trainer, "eval_objective/scores_normalized")
    if make is RunningNorm:
        assert norm.moments.count.tolist() == [sum((~r[:, i].isnan()).sum().item() for r in seen) for i in range(2)]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("make", [RunningNorm, BatchNorm, ReferenceNorm])
def test_an_update_does_not_depend_on_the_scale_of_the_rewards(path, tmp_path, kind, make):
    def scaled(completions, **kwargs):
        return [100 * x + 7 for x in count_of_a(completions)]

    states = []
    for reward, normalized in ((count_of_a, True), (scaled, True), (count_of_a, False), (scaled, False)):
        trainer = rl_trainer(kind, path, tmp_path, data=prompts(16), reward_funcs=reward, optim="sgd", beta=0.5)
        if normalized:
            trainer.add_callback(make(trainer=trainer))
        trainer.train()
        states.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=1e-4)
    assert (states[2] - states[3]).abs().max() > 1e-4
    assert (states[0] - states[2]).abs().max() > 1e-5  # and the normalizer does something


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_advantages_are_those_of_the_clipped_rewards(path, tmp_path, kind):
    trainer = rl_trainer(kind, path, tmp_path, beta=0.0, reward_funcs=lambda completions, **_: list(range(8)))
    trainer.add_callback(RewardNorm(clip=2.5, trainer=trainer))
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([{"prompt": p} for p in ["a", "a", "b", "b"] * 2])
    pairs = torch.tensor([0, 1, 2, 2.5, 2.5, 2.5, 2.5, 2.5]).view(4, 2)
    expected = pairs - (pairs.mean(dim=1, keepdim=True) if kind == "grpo" else pairs.flip(1))
    torch.testing.assert_close(rollout["advantages"], expected.flatten())


def test_invalid_rows_of_ppo_enter_no_moment(path, tmp_path):
    def infinite(completions, **kwargs):
        return [math.inf if i == 3 else float(i) for i in range(len(completions))]

    def other(completions, **kwargs):
        return [1000.0 if i == 3 else float(i) for i in range(len(completions))]

    trainer = rl_trainer("ppo", path, tmp_path, reward_funcs=[infinite, other], max_invalid_fraction=0.2)
    norm = RunningNorm(trainer=trainer)
    trainer.add_callback(norm)
    trainer.train()
    assert norm.moments.count.tolist() == [14, 14]  # two rollouts of 8
    assert norm.moments.mean.tolist() == pytest.approx([25 / 7, 25 / 7])


def run(kind, path, out, make, resume=None):
    trainer = rl_trainer(
        kind,
        path,
        out,
        data=prompts(16),
        num_iterations=2,
        reward_funcs=[count_of_a, twice],
        save_strategy="steps",
        save_steps=2 if kind != "ppo" else 1,
    )
    norm = make(trainer=trainer)
    trainer.add_callback(norm)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, norm


@pytest.mark.parametrize("make", [RunningNorm, ReferenceNorm])
def test_a_resumed_run_has_the_moments_of_the_uninterrupted_one(path, tmp_path, make):
    whole, norm = run("ppo", path, tmp_path, make)
    resumed, again = run("ppo", path, tmp_path / "again", make, resume=f"{tmp_path}/checkpoint-4")
    assert norm.state() == again.state()
    for key in ("objective/scores", "objective/scores_normalized", "policy/loss"):
        assert logged(whole, key) == logged(resumed, key) and len(logged(whole, key)) == 4
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_moments_are_read_back_from_a_checkpoint(path, tmp_path, kind):
    _, norm = run(kind, path, tmp_path, RunningNorm)
    assert norm.moments.count.tolist() == [32, 24]
    _, again = run(kind, path, tmp_path / "again", RunningNorm, resume=f"{tmp_path}/checkpoint-4")
    assert again.moments.count.tolist() == [32, 24]
    _, fresh = run(kind, path, tmp_path / "fresh", RunningNorm)
    assert fresh.moments.count.tolist() == [32, 24]  # begins with nothing, whatever lies in a folder


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("grpo", {"scale_rewards": "group"}, "`stage.args.scale_rewards=group` divides.*scale_rewards=none"),
        ("grpo", {"scale_rewards": "batch"}, "scale_rewards=batch"),
        ("grpo", {"multi_objective_aggregation": "normalize_then_sum"}, "sum_then_normalize"),
        ("grpo", {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "group"}, "sum_then_norm"),
        ("rloo", {"normalize_advantages": True, "beta": 0.0}, "normalize_advantages=false"),
    ],
)
def test_a_normalizer_that_would_be_cancelled_is_refused(path, tmp_path, kind, options, message):
    trainer = rl_trainer(kind, path, tmp_path, **options)
    with pytest.raises(ConfigError, match=message):
        RunningNorm(trainer=trainer)
    RewardNorm(clip=1.0, trainer=trainer)


# ---- References ----


def with_references(chat: bool) -> Dataset:
    rows = []
    for i, prompt in enumerate(prompts(16)["prompt"]):
        answer = " ".join(["a"] * (i % 4) + ["b"])
        asked = [{"role": "user", "content": prompt}] if chat else prompt
        rows.append({"prompt": asked, "reference": answer, "bonus": 100.0})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_reference_answers_are_scored_before_training(path, tmp_path, kind, chat):
    asked = []

    def reward(completions, completion_ids, bonus, log_metric, **kwargs):
        asked.append(completion_ids)
        log_metric("length", 1e9 if len(asked) == 1 else 1.0)
        return [x + b for x, b in zip(count_of_a(completions), bonus, strict=True)]

    data = with_references(chat)
    trainer = rl_trainer(kind, path, tmp_path, data=data, reward_funcs=reward)
    norm = ReferenceNorm(column="reference", mean=1.0, std=2.0, trainer=trainer)
    trainer.add_callback(norm)
    trainer.train()
    std = torch.tensor([0.0, 1, 2, 3]).repeat(4).std().item()
    assert norm.gain == [pytest.approx(2 / std)] and norm.bias == [pytest.approx(1 - 2 / std * 101.5)]
    assert len(asked[0]) == 16 and all(ids[-1] == trainer._tokenizer.eos_token_id for ids in asked[0])
    assert sorted(map(len, asked[0])) == sorted([2, 3, 4, 5] * 4)
    assert logged(trainer, "length") == [1.0] * 4


def test_as_many_reference_answers_as_asked_for_and_on_resume_none(path, tmp_path):
    calls = []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        return count_of_a(completions)

    def start(out, resume=None):
        trainer = rl_trainer(
            "ppo", path, out, data=with_references(False), reward_funcs=reward, save_strategy="steps", save_steps=2
        )
        norm = ReferenceNorm(column="reference", rows=6, trainer=trainer)
        trainer.add_callback(norm)
        trainer.train(resume_from_checkpoint=resume)
        return norm

    norm = start(tmp_path)
    assert calls == [6, 8, 8, 8, 8]
    calls.clear()
    assert start(tmp_path / "again", resume=f"{tmp_path}/checkpoint-2").state() == norm.state()
    assert calls == [8, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "answer"}, r"`reward_norm.column` is 'answer', and the training data has \['prompt', 'reference'"),
        ({"column": "bonus"}, "`reward_norm.column=bonus` holds 100.0"),
        ({"reward_funcs": lambda completions, **_: [None] * len(completions)}, "fewer than two"),
    ],
)
def test_references_that_cannot_serve(path, tmp_path, change, message):
    options = {"column": "reference", "reward_funcs": count_of_a} | change
    trainer = rl_trainer("grpo", path, tmp_path, data=with_references(False), reward_funcs=options.pop("reward_funcs"))
    trainer.add_callback(ReferenceNorm(trainer=trainer, **options))
    with pytest.raises(ConfigError, match=message):
        trainer.train()


@pytest.mark.parametrize("kind", ["ppo", "rloo"])
def test_a_reward_that_brings_its_calibration(path, tmp_path, kind):
    brought, measured = (FunctionReward(count_of_a, name=name) for name in ("brought", "measured"))
    brought.calibration = Moments(2.5, 4.0)
    trainer = rl_trainer(kind, path, tmp_path, reward_funcs=[FiniteReward(brought), measured])
    norm = ReferenceNorm(trainer=trainer)
    trainer.add_callback(norm)
    trainer.train()
    assert (norm.gain[0], norm.bias[0]) == (0.25, -0.625) and norm.gain[1] != 0.25


def test_calibration_lies_beside_a_reward_model(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.helpers.tiny import make_tokenizer

    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert ModelReward(str(tmp_path)).calibration is None
    (tmp_path / "calibration.json").write_text('{"mean": 1, "std": 2.5, "rows": 256}')
    assert ModelReward(str(tmp_path)).calibration == (1.0, 2.5)
    for wrong in ('{"mean": 1}', '{"mean": 1, "std": 0}', "[1, 2]", "{", '{"mean": null, "std": 1}'):
        (tmp_path / "calibration.json").write_text(wrong)
        with pytest.raises(ConfigError, match="calibration.json` must hold"):
            read_calibration(str(tmp_path))
