"""The critics of PPO, and four roles on one base."""

import copy
import gc
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.fingerprints import weights_fingerprint
from rlhf_trl.patches.engines import cast_to_shards
from rlhf_trl.ppo import PPOConfig
from rlhf_trl.ppo.critic import is_critic
from rlhf_trl.ppo.ptx import Demonstrations
from rlhf_trl.rewards.adapter import AdapterReward
from rlhf_trl.rewards.model import ModelReward
from tests.helpers.architectures import save_architecture
from tests.helpers.ppo import LORA, count_of_a, logged, make_trainer, prompts, sampled, save_reward_model
from tests.helpers.spies import SPY, Spy
from tests.helpers.tiny import make_tokenizer, save_model


@pytest.fixture
def path(tmp_path):
    return save_model(tmp_path / "model")


def one_base(path, tmp_path, **kwargs):
    """Policy, reference, critic and reward as adapters on one base."""
    rewards = kwargs.pop("reward_funcs", None)
    reward = save_reward_model(path, tmp_path / "reward") if rewards is None else None
    return sampled(
        path,
        tmp_path,
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
        reward_funcs=rewards or AdapterReward(reward),
        **({"critic": "adapter", "critic_path": reward} | kwargs),
    )


def snapshot(trainer, critic: bool):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if is_critic(name) == critic}


def changed(before, trainer):
    now = dict(trainer.model.named_parameters())
    return {name for name, value in before.items() if not torch.equal(now[name], value)}


@pytest.mark.parametrize("pad_is_eos", [False, True], ids=["pad", "pad is eos"])
def test_a_reward_on_the_policys_base_scores_as_a_model_of_its_own(tmp_path, pad_is_eos):
    path = save_model(tmp_path / "model", pad_is_eos=pad_is_eos)
    reward = save_reward_model(path, tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(path)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path),
        LoraConfig(**LORA, task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.5),
    )
    policy.train()
    shared, own = AdapterReward(reward), ModelReward(reward)
    for each in (shared, own):
        each.bind(tokenizer)
    shared.attach(policy)
    ids = [[5, 6, 1], [7, 8, 9, 10, 11], [12]]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    given = {"prompts": ["a b", "c", "d e f"], "completions": texts, "completion_ids": ids}
    assert shared(**given) == pytest.approx(own(**given), abs=1e-6)
    assert policy.training and policy.active_adapter == "default"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_four_roles_hold_one_copy_of_the_base(tmp_path, tied):
    path = save_model(tmp_path / "model", tie_word_embeddings=tied, intermediate_size=44)
    gc.collect()
    ours = {id(t) for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    trainer = one_base(path, tmp_path, num_iterations=2)
    trainer.train()
    gc.collect()
    shape = trainer.model.get_base_model().model.layers[0].mlp.gate_proj.weight.shape  # not a target of the adapters
    copies = {
        t.data_ptr()
        for t in gc.get_objects()
        if isinstance(t, torch.nn.Parameter) and id(t) not in ours and t.shape == shape and t.device.type == "cpu"
    }
    assert len(copies) == 2 * 2  # gate and up projection of two layers, once
    base = AutoModelForCausalLM.from_pretrained(path).state_dict()
    state = trainer.model.get_base_model().state_dict()
    trunk = {name.replace(".base_layer", ""): value for name, value in state.items()}
    for name, value in base.items():
        assert torch.equal(trunk[name], value), name


def test_policy_and_critic_are_trained_and_reference_and_reward_are_not(path, tmp_path):
    trainer = one_base(path, tmp_path, num_iterations=2, num_train_epochs=2)
    adapters = {name.split(".")[-2] for name in snapshot(trainer, True) | snapshot(trainer, False) if "lora" in name}
    assert adapters == {"default", "critic", "reward_reward_adapter"}
    before = snapshot(trainer, True) | snapshot(trainer, False)
    trainer.train()
    moved = changed(before, trainer)
    for name in before:
        role = {"default", "critic", "value_head"} & set(name.split("."))
        assert (name in moved) == bool(role), name
    assert logged(trainer, "objective/kl")[0] == pytest.approx(0, abs=1e-5)


def test_an_adapter_critic_starts_as_the_reward_model(path, tmp_path):
    """With its score head, V before the token after a row is the row's score."""
    trainer = one_base(path, tmp_path, critic_score_head=True)
    own = ModelReward(trainer.args.critic_path)
    rows = [[5, 6, 7, 8], [9, 10, 11, 12]]
    ids = torch.tensor([[*row, 5] for row in rows])
    policy = trainer.model.get_base_model()
    output = policy(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True, with_values=True
    )
    assert output.value_preds[:, -1].tolist() == pytest.approx(own.score_ids(rows), abs=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapter"])
def test_a_critic_of_its_own_starts_as_the_reward_model(path, tmp_path, lora):
    reward = save_reward_model(path, tmp_path / "reward", lora=lora)
    trainer = sampled(path, tmp_path, critic="model", critic_path=reward, critic_score_head=True)
    rows = [[5, 6, 7, 8], [9, 10, 11, 12]]
    ids = torch.tensor([[*row, 5] for row in rows])
    mask = torch.ones_like(ids)
    output = trainer.model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True, with_values=True)
    assert output.value_preds[:, -1].tolist() == pytest.approx(ModelReward(reward).score_ids(rows), abs=1e-5)
    before = snapshot(trainer, True)
    trainer.train()
    assert changed(before, trainer) == set(before)


@pytest.mark.parametrize("critic, lora", [("head", False), ("head", True), ("adapter", True), ("model", False)])
def test_the_policys_files_hold_the_policy_alone(path, tmp_path, critic, lora):
    peft = {"peft_config": LoraConfig(**LORA, task_type="CAUSAL_LM")} if lora else {}
    trainer = sampled(path, tmp_path, critic=critic, **peft)
    trainer.train()
    trainer.save_model()
    out = trainer.args.output_dir
    assert load_file(f"{out}/critic.safetensors").keys() == {k for k in trainer.model.state_dict() if is_critic(k)}
    weights = load_file(f"{out}/{'adapter_' if lora else ''}model.safetensors")
    assert not any(is_critic(name) for name in weights)
    assert not [entry for entry in os.listdir(out) if os.path.isdir(f"{out}/{entry}")]
    if lora:
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), out)
    else:
        plain = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(plain(ids).logits, trainer.model(ids).logits)


@pytest.mark.parametrize("critic, lora", [("head", False), ("adapter", True), ("model", False)])
def test_warm_up_trains_the_critic_alone(path, tmp_path, critic, lora):
    peft = {"peft_config": LoraConfig(**LORA, task_type="CAUSAL_LM")} if lora else {}
    options = {"critic": critic, "weight_decay": 0.1, "num_iterations": 2, "head_init": "normal", **peft}
    trainer = sampled(path, tmp_path, data=prompts(16), critic_warmup_steps=2, **options)
    critic_before, policy_before = snapshot(trainer, True), snapshot(trainer, False)
    trainer.train()
    assert len(logged(trainer, "value/loss")) == 2
    assert changed(critic_before, trainer) == set(critic_before)
    assert changed(policy_before, trainer) == set()

    trainer = sampled(path, tmp_path / "longer", data=prompts(24), critic_warmup_steps=2, **options)
    policy_before = snapshot(trainer, False)
    trainer.train()
    assert changed(policy_before, trainer)


def history(run_dir, key):
    entries = json.loads(Path(run_dir, "metrics.json").read_text())["history"]
    return [entry[key] for entry in entries if key in entry]


def test_a_critic_from_the_reward_model_explains_more_at_first(train, tmp_path):
    """On the embedded world, over the first rollouts: with the reward model's weights, and more so with its head."""
    steps = ("stage.args.max_steps=60", "data.max_samples=2000", "stage.args.eval_on_start=false")
    train(tmp_path, "stage=reward", "stage.args.learning_rate=1e-3", *steps)
    few = ("reward=model", "critic=model", "stage.args.num_iterations=1", "stage.args.max_steps=16")
    few += ("data.max_samples=512", "stage.args.learning_rate=1e-4")
    explained = {}
    for name, options in (
        ("fresh", ()),
        ("weights", ("critic.run=reward",)),
        ("score head", ("critic.run=reward", "stage.args.critic_score_head=true")),
    ):
        run_dir = train(tmp_path, "stage=ppo", f"run_name={name.replace(' ', '_')}", *few, *options)
        explained[name] = sum(history(run_dir, "value/explained_variance")) / 4
    assert explained["fresh"] + 0.02 < explained["weights"] < explained["score head"] - 0.1


def test_a_run_with_every_role_on_one_base(train, tmp_path):
    """From the command line: SFT adapter, reward adapter from it, PPO with both and a critic from the reward."""
    lora = ("adapter=lora", "adapter.peft.r=4", "stage.args.learning_rate=1e-2")
    train(tmp_path, "stage=sft", *lora)
    train(tmp_path, "stage=reward", "model.run=sft", *lora)
    ours = ("stage=ppo", "model.run=sft", "reward=adapter", "critic=adapter", "critic.run=reward", *lora)
    run_dir = Path(train(tmp_path, *ours, "stage.args.save_steps=1"))
    assert history(run_dir, "objective/kl")[0] == pytest.approx(0, abs=1e-4)
    assert history(run_dir, "rewards/adapter/mean")[0] == pytest.approx(history(run_dir, "objective/scores")[0])
    record = json.loads((run_dir / "run.json").read_text())
    assert record["base_fingerprint"] == weights_fingerprint(record["base"])
    folders = {path.name for path in run_dir.iterdir() if path.is_dir() and not path.name.startswith(("check", "."))}
    assert not folders
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((run_dir / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    policy = PeftModel.from_pretrained(base, run_dir)
    assert list(policy.peft_config) == ["default"]
    # on a base in 4 bits
    run_dir = train(tmp_path, *ours, "adapter=qlora", "run_name=ppo_q", "stage.args.max_steps=2", SPY)
    assert "Linear4bit" in {type(module).__name__ for module in Spy.model.modules()}
    assert set(Spy.model.peft_config) == {"default", "ref", "critic", "reward_adapter"}
    assert all(math.isfinite(value) for value in history(run_dir, "value/loss"))
    # and on TRL's own trainers
    run_dir = train(tmp_path, "stage=rloo", "model.run=sft", "reward=adapter", *lora, "stage.args.max_steps=2")
    assert {path.name for path in Path(run_dir).iterdir() if path.is_dir()} <= {"checkpoint-2"}


def test_ptx_adds_the_language_model_loss(path, tmp_path):
    """At a coefficient that drowns PPO's loss the update is a step of language modelling."""
    demonstrations = Dataset.from_dict({"prompt": ["a b", "c d e"] * 4, "completion": ["f g h", "i j"] * 4})

    def nll(model):
        tokenizer = AutoTokenizer.from_pretrained(path)
        rows = Demonstrations(demonstrations, tokenizer, seed=0)
        batch = rows.batch(list(range(8)), torch.device("cpu"))
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1]
        logp = logits.log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
        width = batch["completion_ids"].size(1)
        return -(logp[:, -width:] * batch["completion_mask"]).sum() / batch["completion_mask"].sum()

    losses = {}
    for coef in (0.0, 100.0):
        trainer, _ = make_trainer(
            path,
            tmp_path / str(coef),
            temperature=1.0,
            ptx_coef=coef,
            optim="sgd",
            max_grad_norm=1.0,
            learning_rate=0.5,
            **({"ptx_dataset": demonstrations} if coef else {}),
        )
        before = nll(trainer.model).item()
        trainer.train()
        losses[coef] = nll(trainer.model).item()
    assert losses[100.0] < before - 0.3 < losses[0.0]
    first = logged(trainer, "policy/ptx_loss")[0]
    assert first == pytest.approx(before, abs=0.6)  # the mean over two steps


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2", "bloom"])
def test_ptx_is_a_language_models_loss_whatever_the_temperature_of_sampling(tmp_path, name, lora):
    """Its value and gradients are those of each row alone, at temperature 1."""
    path = save_architecture(tmp_path / "model", name)
    rows = {"prompt": ["a b", "c d e", "f", "g h i j"], "completion": ["f g h", "i j", "k l m n o", "p"]}
    trainer, _ = make_trainer(
        path,
        tmp_path,
        temperature=0.6,
        ptx_coef=1.0,
        ptx_dataset=Dataset.from_dict(rows),
        peft_config=LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False) if lora else None,
    )
    inputs = SimpleNamespace(mini_batch_size=4, rows=slice(0, 4), tokens=torch.tensor(4))
    trainer._ptx_loss(trainer.model, inputs).backward()
    parameters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad and "value_head" not in n}
    gradients = {n: p.grad.clone() for n, p in parameters.items()}
    trainer.model.zero_grad()
    losses = []
    for prompt, completion in trainer._demonstrations.rows:
        logits = trainer.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        losses.append(-logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]))
    loss = torch.cat(losses).mean()
    loss.backward()
    for n, parameter in parameters.items():
        torch.testing.assert_close(gradients[n], parameter.grad, atol=1e-5, rtol=1e-4, msg=n)
    assert trainer._ptx_loss(trainer.model, inputs).item() == pytest.approx(loss.item(), abs=1e-5)


def test_ptx_doesnt_depend_on_the_micro_batch(path, tmp_path):
    demonstrations = Dataset.from_dict(
        {"prompt": list("abcdefgh"), "completion": ["a b c d e f"[: 1 + 2 * (i % 5)] for i in range(8)]}
    )
    states = []
    for size, accumulated in ((8, 1), (2, 4)):
        trainer, _ = make_trainer(
            path,
            tmp_path / str(size),
            data=prompts(16),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            steps_per_generation=2 * accumulated,
            ptx_coef=1.0,
            ptx_dataset=demonstrations,
        )
        trainer.train()
        states.append(trainer.model.state_dict())
        assert logged(trainer, "policy/ptx_loss")
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-5)


def test_demonstrations_are_dealt_once_an_epoch():
    tokenizer = make_tokenizer()
    data = Dataset.from_dict({"prompt": list("abcde"), "completion": list("fghij")})
    rows = Demonstrations(data, tokenizer, seed=1)
    whole = rows.indices(0, 15)
    assert [sorted(whole[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert whole[:5] != whole[5:10]
    assert rows.indices(3, 7) == whole[3:10]
    assert rows.rows[0][1] == [tokenizer.convert_tokens_to_ids("f"), tokenizer.eos_token_id]
    assert rows.tokens([0, 1]) == 4


def test_a_micro_batch_over_the_ratio_threshold_is_left_out(path, tmp_path):
    options = {"data": prompts(8), "num_iterations": 4, "steps_per_generation": 1, "per_device_train_batch_size": 8}
    trainer, _ = make_trainer(path, tmp_path, optim="sgd", ratio_threshold=1.0 + 1e-4, learning_rate=1.0, **options)
    trainer.train()
    assert logged(trainer, "policy/skipped")[0] > 0
    states = []
    for threshold in (None, 1e6):
        trainer, _ = make_trainer(path, tmp_path / str(threshold), ratio_threshold=threshold, **options)
        trainer.train()
        states.append(copy.deepcopy(trainer.model.state_dict()))
    assert logged(trainer, "policy/skipped") == [0]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_each_role_has_its_own_type(path, tmp_path):
    trainer = sampled(path, tmp_path, critic="model", critic_dtype="bfloat16", ref_dtype="bfloat16", num_iterations=2)
    trainer.train()
    types = {name: parameter.dtype for name, parameter in trainer.model.named_parameters()}
    assert types["critic.norm.weight"] == torch.bfloat16 and types["model.norm.weight"] == torch.float32
    assert types["value_head.weight"] == torch.float32
    assert trainer.ref_model.dtype == torch.bfloat16


def refused(path, tmp_path, **options):
    with pytest.raises(ConfigError) as error:
        one_base(path, tmp_path, **options)
    return str(error.value)


def test_an_adapter_of_another_base_is_refused(path, tmp_path):
    other = save_reward_model(save_model(tmp_path / "other", seed=1), tmp_path / "theirs")
    message = refused(path, tmp_path, reward_funcs=AdapterReward(other), critic="head", critic_path=None)
    assert "trained on the base" in message and str(tmp_path / "other") in message
    assert "trained on the base" in refused(path, tmp_path, reward_funcs=count_of_a, critic_path=other)


def test_a_copy_of_the_base_is_the_same_base(path, tmp_path):
    copied = save_reward_model(save_model(tmp_path / "copy"), tmp_path / "theirs")
    one_base(path, tmp_path, reward_funcs=AdapterReward(copied), critic_path=copied)


def test_an_adapter_on_a_base_that_has_changed_since_is_refused(tmp_path):
    base = save_model(tmp_path / "base")
    reward = save_reward_model(base, tmp_path / "theirs")
    Path(reward, "run.json").write_text(
        json.dumps({"status": "done", "base_fingerprint": weights_fingerprint(str(base))})
    )
    one_base(base, tmp_path, reward_funcs=AdapterReward(reward), critic_path=reward)
    save_model(tmp_path / "base", seed=1)
    for load in (AdapterReward, ModelReward):
        with pytest.raises(ConfigError, match="weights have changed since"):
            load(reward)
    assert "weights have changed since" in refused(base, tmp_path, reward_funcs=count_of_a, critic_path=reward)


def test_wrong_starts_of_a_critic_are_refused(path, tmp_path):
    full = save_reward_model(path, tmp_path / "full", lora=False)
    assert "holds no adapter" in refused(path, tmp_path, reward_funcs=count_of_a, critic_path=full)
    with pytest.raises(ConfigError, match="holds no adapter"):
        AdapterReward(full)
    nothing = str(tmp_path / "nothing")
    assert "doesn't exist" in refused(path, tmp_path, reward_funcs=count_of_a, critic_path=nothing)
    with pytest.raises(ConfigError, match="no score head"):
        sampled(path, tmp_path, critic="model", critic_path=path)
    with pytest.raises(ConfigError, match="start of|starts the value head"):
        sampled(path, tmp_path, critic="model", critic_score_head=True)
    with pytest.raises(ConfigError, match="this policy has none"):
        sampled(path, tmp_path, critic="adapter")
    with pytest.raises(ConfigError, match="this policy has none"):
        sampled(path, tmp_path, reward_funcs=AdapterReward(save_reward_model(path, tmp_path / "reward")))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(full)
    with pytest.raises(ConfigError, match="another tokenizer"):
        sampled(path, tmp_path, critic="model", critic_path=full)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"critic_path": "x"}, "critic_path"),
        ({"critic_dtype": "bfloat16"}, "critic_dtype"),
        ({"critic": "own"}, "There are: `adapter`, `head`, `model`"),
        ({"ref_dtype": "int8"}, "ref_dtype"),
        ({"ratio_threshold": 0.5}, "ratio_threshold"),
        ({"ptx_coef": -1.0}, "ptx_coef"),
        ({"critic_warmup_steps": -1}, "critic_warmup_steps"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


def test_ptx_needs_both_its_coefficient_and_its_data(path, tmp_path):
    with pytest.raises(ConfigError, match="ptx_coef"):
        sampled(path, tmp_path, ptx_coef=0.1)
    with pytest.raises(ConfigError, match="ptx_coef"):
        sampled(path, tmp_path, ptx_dataset=Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}))
    with pytest.raises(ConfigError, match="`completion` is missing"):
        sampled(path, tmp_path, ptx_coef=0.1, ptx_dataset=Dataset.from_dict({"prompt": ["a"]}))


@pytest.mark.parametrize("critic", ["head", "model"])
def test_values_are_float32_whatever_the_weights_are_cast_to(path, tmp_path, critic):
    """TRL's continuous batching casts the policy's module, value head included, as engines do for a forward."""
    trainer = sampled(path, tmp_path, critic=critic)
    trainer.model.to(torch.bfloat16)
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones_like(ids)
    output = trainer.model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True, with_values=True)
    assert output.value_preds.dtype == torch.float32


@pytest.mark.parametrize("engine, dtype", [("ZeRO-3", torch.bfloat16), ("another", torch.float32)])
def test_zero_3_gets_weights_of_one_type(path, tmp_path, engine, dtype):
    """Its shards are marked by `ds_id`, and it takes trained weights of one type only."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for i, parameter in enumerate(model.parameters() if engine == "ZeRO-3" else ()):
        parameter.ds_id = i
    trainer = sampled(model, tmp_path, path=path, critic="head")
    cast_to_shards(trainer.model)
    assert {trainer.model.value_head.weight.dtype, trainer.model.value_head.bias.dtype} == {dtype}
    ids = torch.tensor([[5, 6, 7, 8]])
    output = trainer.model(ids, torch.ones_like(ids), labels=ids, fused_lm_head=True, with_values=True)
    assert output.value_preds.dtype == torch.float32


def test_a_compiled_model_is_patched_below_the_compilation(path, tmp_path):
    """With `torch_compile` accelerate wraps the reference when it is made."""
    trainer = sampled(path, tmp_path, torch_compile=True)
    assert hasattr(trainer.ref_model, "_orig_mod")
    ids, mask, seen = torch.tensor([[0, 0, 7, 8]]), torch.tensor([[0, 0, 1, 1]]), []
    for model in (trainer.model, trainer.ref_model._orig_mod):
        model.base_model.register_forward_pre_hook(
            lambda _, __, inputs: seen.append(inputs["position_ids"].tolist()), with_kwargs=True
        )
        model.forward(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
    assert seen == [[[0, 0, 0, 1]]] * 2
