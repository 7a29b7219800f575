"""One whole PPO update against plain PyTorch, and the promises TRL's last PPO broke."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from rlhf_trl.ppo.seeds import permutation
from rlhf_trl.rewards.lagrange import Lagrange
from tests.helpers.ppo import completion_of, logged, make_trainer, prompts, score
from tests.helpers.tiny import save_model

LAMBDA_LR, LAMBDA_MAX, WINDOW = 0.1, 5.0, 12


def forward(model, critic, head, rows, temperature):
    """Per row: log-probabilities of its completion tokens, and values before them. No padding anywhere."""
    out = []
    for prompt, completion in rows:
        ids = torch.tensor([prompt + completion])
        result = model(input_ids=ids, output_hidden_states=True)
        seen = result if critic is model else critic(input_ids=ids, output_hidden_states=True)
        logits = result.logits[0, len(prompt) - 1 : -1] / temperature
        values = head(seen.hidden_states[-1][0, len(prompt) - 1 : -1])  # a column for each signal
        logp = logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        out.append((logp, values))
    return out


def length_cost(completions):
    """By how much each completion is longer than three words, the cost of the constraint `words <= 3`."""
    return [len(text.split()) - 3.0 for text in completions]


def reference_ppo(policy, reference, critic, head, asked, args, tokenizer, constrained=False):
    """
    PPO as the papers have it, row by row, over the given rollouts. Trains the networks it is given (`critic` may be
    `policy`) and returns the gradient norms, and the KL and the multiplier of each rollout.

    With `constrained` there is a second signal (Safe RLHF, arXiv 2310.12773): a cost with values of its own, which the
    KL adds to, and whose advantage a multiplier subtracts.
    """
    multiplier, multipliers, window = 1.0, [], []
    networks = torch.nn.ModuleList([policy, critic, head])
    parameters = [p for p in networks.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.learning_rate, betas=(0.9, 0.999), eps=args.adam_epsilon, weight_decay=0.0
    )
    norms, kls = [], []
    for index, batch in enumerate(asked):
        rows = [(tokenizer(p)["input_ids"], completion_of(tokenizer, p)) for p in batch]
        with torch.no_grad():
            old = forward(policy, critic, head, rows, args.temperature)
            ref = forward(reference, reference, head, rows, args.temperature)
        texts = [tokenizer.decode(c, skip_special_tokens=True) for _, c in rows]
        signals = list(zip(score(texts), length_cost(texts), strict=True))
        if constrained:
            window = (window + [cost for _, cost in signals])[-max(len(signals), WINDOW) :]
            multiplier = min(multiplier * math.exp(LAMBDA_LR * multiplier * sum(window) / len(window)), LAMBDA_MAX)
            multipliers.append(multiplier)
        advantages, returns = [], []
        for (_, completion), (logp, values), (ref_logp, _), (s, cost) in zip(rows, old, ref, signals, strict=True):
            if args.missing_eos_penalty and completion[-1] != tokenizer.eos_token_id:
                s -= args.missing_eos_penalty
            d = logp - ref_logp
            kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[args.kl_estimator]
            reward = torch.stack([-args.beta * kl, args.beta * kl], dim=1)[:, : values.size(1)]
            reward[-1] += torch.tensor([s, cost])[: values.size(1)]
            advantage = torch.zeros_like(reward)
            carried = next_value = 0.0
            for t in reversed(range(len(reward))):
                delta = reward[t] + args.gamma * next_value - values[t]
                carried = delta + args.gamma * args.lam * carried
                advantage[t], next_value = carried, values[t]
            returns.append(advantage + values)
            if constrained:
                advantages.append((advantage[:, 0] - multiplier * advantage[:, 1]) / (1 + multiplier))
            else:
                advantages.append(advantage[:, 0])
        kls.append(sum((o[0] - r[0]).sum().item() for o, r in zip(old, ref, strict=True)) / len(rows))
        flat = torch.cat(advantages)
        mean, std = flat.mean(), torch.sqrt(flat.var(unbiased=False) + 1e-8)
        advantages = [(a - mean) / std for a in advantages]
        size = len(rows) // args.num_mini_batches
        for epoch in range(args.num_iterations):
            order = permutation(len(rows), args.seed, index, epoch).tolist()
            for start in range(0, len(rows), size):
                chosen = order[start : start + size]
                new = forward(policy, critic, head, [rows[i] for i in chosen], args.temperature)
                tokens = sum(len(rows[i][1]) for i in chosen)
                loss = 0.0
                for (logp, values), i in zip(new, chosen, strict=True):
                    ratio = torch.exp(logp - old[i][0])
                    a, r, old_v = advantages[i], returns[i], old[i][1]
                    surrogate = torch.min(ratio * a, ratio.clamp(1 - args.epsilon, 1 + args.epsilon) * a)
                    clipped = old_v + (values - old_v).clamp(-args.cliprange_value, args.cliprange_value)
                    value = 0.5 * torch.max((values - r) ** 2, (clipped - r) ** 2).sum(dim=1)
                    loss = loss + (-surrogate + args.vf_coef * value).sum() / tokens
                optimizer.zero_grad()
                loss.backward()
                norms.append(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item())
                optimizer.step()
    return norms, kls, multipliers


def same(actual, expected):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def moved(before, after):
    return any(not torch.allclose(before[name], after[name], atol=1e-4) for name in after)


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
