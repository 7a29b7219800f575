"""One whole PPO update against plain PyTorch, and the promises TRL's last PPO broke."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from rlhf_trl.rewards.lagrange import Lagrange
from tests.helpers.plain_ppo import LAMBDA_LR, LAMBDA_MAX, WINDOW, moved, reference_ppo, same
from tests.helpers.ppo import logged, make_trainer, prompts, score
from tests.helpers.tiny import save_model


@pytest.mark.parametrize("critic", ["head", "model"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_iterations": 3, "kl_estimator": "k3", "gamma": 0.9, "missing_eos_penalty": 1.0},
        {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "kl_estimator": "k2"},
        {"per_device_train_batch_size": 8, "steps_per_generation": 1, "max_grad_norm": 0.1},
    ],
    ids=["two mini-batches", "epochs", "accumulation", "one mini-batch, clipped"],
)
def test_one_update_equals_plain_pytorch(tmp_path, options, critic):
    path = save_model(tmp_path / "model")
    trainer, rollouts = make_trainer(path, tmp_path, data=prompts(16), critic=critic, **options)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    head = copy.deepcopy(trainer.model.value_head)
    trainer.train()
    assert len(rollouts.calls) == 16 // trainer.args.generation_batch_size

    policy, reference, network = (AutoModelForCausalLM.from_pretrained(path) for _ in range(3))
    network = network if critic == "model" else policy
    given = policy, reference, network, head, rollouts.calls, trainer.args, trainer.processing_class
    _, kls, _ = reference_ppo(*given)
    actual = trainer.model.state_dict()
    same(actual, policy.state_dict())
    same(actual, {f"value_head.{name}": value for name, value in head.state_dict().items()})
    if critic == "model":
        same(actual, {f"critic.{name}": value for name, value in network.model.state_dict().items()})
    assert moved(start, policy.state_dict())
    logged = [entry["objective/kl"] for entry in trainer.state.log_history if "objective/kl" in entry]
    assert logged == pytest.approx(kls, abs=1e-4)


def words(completions, **kwargs):
    return [float(len(text.split())) for text in completions]


def words_constrained():
    return Lagrange({"words": "<= 3"}, lambda_lr=LAMBDA_LR, lambda_max=LAMBDA_MAX, window=WINDOW)


@pytest.mark.parametrize("critic", ["head", "model"])
def test_one_update_with_a_constraint_equals_plain_pytorch(tmp_path, critic):
    """Two signals, each with values of its own: the policy, both heads and the multiplier are those of the paper."""
    path = save_model(tmp_path / "model")
    trainer, rollouts = make_trainer(
        path,
        tmp_path,
        data=prompts(24),
        critic=critic,
        num_iterations=2,
        missing_eos_penalty=1.0,
        reward_funcs=[score, words],
        combine=words_constrained(),
    )
    head = copy.deepcopy(trainer.model.value_head)
    assert head.weight.size(0) == 2
    trainer.train()
    assert len(rollouts.calls) == 3

    policy, reference, network = (AutoModelForCausalLM.from_pretrained(path) for _ in range(3))
    network = network if critic == "model" else policy
    given = policy, reference, network, head, rollouts.calls, trainer.args, trainer.processing_class
    _, kls, multipliers = reference_ppo(*given, constrained=True)
    actual = trainer.model.state_dict()
    same(actual, policy.state_dict())
    same(actual, {f"value_head.{name}": value for name, value in head.state_dict().items()})
    if critic == "model":
        same(actual, {f"critic.{name}": value for name, value in network.model.state_dict().items()})
    assert moved(reference.state_dict(), policy.state_dict())
    assert logged(trainer, "objective/kl") == pytest.approx(kls, abs=1e-4)
    assert logged(trainer, "constraints/words/lambda") == pytest.approx(multipliers, rel=1e-6)
    assert 1.01 < multipliers[0] != multipliers[1]


@pytest.mark.parametrize(
    ("checkpointing", "options", "constrained"),
    [
        (False, None, False),
        (True, None, False),
        (True, {"use_reentrant": True}, False),  # by TRL under ZeRO-3
        (False, None, True),
    ],
    ids=["plain", "gradient checkpointing", "reentrant", "constraint"],
)
def test_one_update_with_a_critic_adapter_equals_plain_pytorch(tmp_path, checkpointing, options, constrained):
    """Policy and critic as adapters of one base train like two networks of their own."""
    path = save_model(tmp_path / "model")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    PeftModel(AutoModelForCausalLM.from_pretrained(path), config).save_pretrained(tmp_path / "sft")

    def with_adapter():
        base = AutoModelForCausalLM.from_pretrained(path)
        return PeftModel.from_pretrained(base, tmp_path / "sft", is_trainable=True)

    trainer, rollouts = make_trainer(
        with_adapter(),
        tmp_path,
        path=path,
        data=prompts(16),
        critic="adapter",
        num_iterations=2,
        gradient_checkpointing=checkpointing,
        reward_funcs=[score, words] if constrained else score,
        combine=words_constrained() if constrained else None,
        gradient_checkpointing_kwargs=options,
    )
    head = copy.deepcopy(trainer.model.get_base_model().value_head)
    trainer.train()
    policy, reference, critic = (with_adapter() for _ in range(3))
    given = policy, reference, critic, head, rollouts.calls, trainer.args, trainer.processing_class
    reference_ppo(*given, constrained)
    actual = trainer.model.state_dict()
    trained = {name: value for name, value in policy.state_dict().items() if ".default." in name}
    same(actual, trained)
    assert moved(reference.state_dict(), trained)
    same(actual, {n.replace(".default.", ".critic."): v for n, v in critic.state_dict().items() if ".default." in n})
    same(actual, {f"base_model.model.value_head.{name}": value for name, value in head.state_dict().items()})


def test_optimizer_steps_per_rollout_are_epochs_times_mini_batches(tmp_path):
    path = save_model(tmp_path / "model")
    trainer, rollouts = make_trainer(
        path,
        tmp_path,
        data=prompts(32),
        num_iterations=3,
        steps_per_generation=8,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        total_episodes=20,
    )
    assert trainer.args.num_mini_batches == 4
    trainer.train()
    assert len(rollouts.calls) == 2  # 20 episodes in rollouts of 16
    assert trainer.state.global_step == 2 * 3 * 4
    logged = [entry for entry in trainer.state.log_history if "episodes" in entry]
    assert [entry["episodes"] for entry in logged] == [16, 32]


def test_max_grad_norm_acts(tmp_path):
    path = save_model(tmp_path / "model")
    options = {"optim": "sgd", "learning_rate": 1.0, "num_iterations": 1, "steps_per_generation": 1}
    moved = {}
    for limit in (1e-3, 1e9):
        trainer, _ = make_trainer(path, tmp_path, data=prompts(4), max_grad_norm=limit, **options)
        before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        trainer.train()
        after = trainer.model.state_dict()
        moved[limit] = math.sqrt(sum(((after[k] - before[k]) ** 2).sum().item() for k in before))
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert moved[1e9] > 0.01


def test_extra_padding_and_pad_equal_to_eos_change_nothing(tmp_path):
    results = []
    for folder, options, pad_is_eos in (
        ("plain", {}, False),
        ("padded", {"pad_to_multiple_of": 16}, False),
        ("pad_is_eos", {}, True),
    ):
        path = save_model(tmp_path / folder, pad_is_eos=pad_is_eos)
        trainer, _ = make_trainer(path, tmp_path, num_iterations=2, **options)
        trainer.train()
        entry = next(e for e in trainer.state.log_history if "objective/kl" in e)
        results.append((trainer.model.state_dict(), entry))
    plain, entry = results[0]
    for state, other in results[1:]:
        for name, value in plain.items():
            torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-5)
        for key in ("objective/kl", "objective/scores", "completions/eos_rate", "value/loss", "policy/entropy"):
            assert other[key] == pytest.approx(entry[key], abs=1e-5)
