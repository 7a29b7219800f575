"""PPOTrainer: rewards, evaluation, controllers, checkpoints, adapters, and what it refuses."""

import dataclasses
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig

from rlhf_trl.callbacks.kl import AdaptiveKL, LinearKL
from rlhf_trl.callbacks.reward_norm import RewardNorm, RunningNorm
from rlhf_trl.ppo import PPOConfig
from rlhf_trl.ppo.config import added_fields
from rlhf_trl.ppo.options import REFUSED
from tests.helpers.ppo import count_of_a, logged, make_trainer, prompts, sampled
from tests.helpers.tiny import make_tokenizer, save_gpt2, save_model


@pytest.fixture
def path(tmp_path):
    return save_model(tmp_path / "model")


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_reward_rises(path, tmp_path, chat):
    data = prompts(64)
    if chat:
        data = Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in data["prompt"]]})
    trainer = sampled(
        path,
        tmp_path,
        data=data,
        reward_funcs=count_of_a,
        per_device_train_batch_size=8,
        steps_per_generation=4,
        num_iterations=4,
        num_train_epochs=10,
        learning_rate=5e-3,
        head_init="zero",
        beta=0.01,
    )
    trainer.train()
    scores = logged(trainer, "objective/scores")
    assert len(scores) == 20
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 1
    assert logged(trainer, "objective/kl")[0] == pytest.approx(0, abs=1e-5)
    assert logged(trainer, "objective/kl")[-1] > 0.1
    assert logged(trainer, "episodes")[-1] == 20 * 32
    keys = {"policy/approxkl", "policy/clipfrac", "policy/entropy", "value/loss", "value/explained_variance"}
    assert keys | {"objective/kl_per_token", "completions/eos_rate", "completions/mean_length"} <= {
        key for entry in trainer.state.log_history for key in entry
    }


def test_weights_and_none_of_several_rewards(path, tmp_path):
    def first(completions, **kwargs):
        return [1.0] * len(completions)

    def second(prompts, **kwargs):
        return [None if i % 2 else 10.0 for i in range(len(prompts))]

    trainer = sampled(path, tmp_path, reward_funcs=[first, second], reward_weights=[2.0, 0.5])
    trainer.train()
    assert logged(trainer, "objective/scores") == [pytest.approx(4.5)]  # half get 2 + 5, half 2
    assert logged(trainer, "rewards/second/mean") == [pytest.approx(10)]
    assert logged(trainer, "objective/invalid_rewards") == [0]


def test_async_reward(path, tmp_path):
    async def slow(completions, **kwargs):
        return [2.0] * len(completions)

    trainer = sampled(path, tmp_path, reward_funcs=slow)
    trainer.train()
    assert logged(trainer, "rewards/slow/mean") == [pytest.approx(2)]


class Answers:
    """A `rollout_func`: word `a` for every prompt, `b` for the prompts named."""

    def __init__(self, tokenizer, others=()):
        self.tokenizer, self.others = tokenizer, others

    def __call__(self, batch, trainer):
        ids = [self.tokenizer("b b b" if p in self.others else "a a")["input_ids"] + [1] for p in batch]
        return {
            "prompt_ids": self.tokenizer(batch)["input_ids"],
            "completion_ids": ids,
            "logprobs": [[0.0] * len(row) for row in ids],
        }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_invalid_rewards_are_left_out_and_counted(path, tmp_path, bad, caplog):
    data = prompts(8)
    answers = Answers(make_tokenizer(), others=data["prompt"][:1])

    def reward(completions, **kwargs):
        return [bad if "b" in c else float(i) for i, c in enumerate(completions)]

    trainer, _ = make_trainer(
        path,
        tmp_path,
        data=data,
        reward_funcs=reward,
        rollout_func=answers,
        max_invalid_fraction=0.2,
        num_iterations=2,
    )
    trainer.train()
    assert logged(trainer, "objective/invalid_rewards") == [1]
    assert "1 of 8 completions got a NaN or infinite reward (row" in caplog.text and "`reward`" in caplog.text
    assert trainer.last_rollout.num_sequences == 7
    assert all(math.isfinite(value) for value in logged(trainer, "value/loss") + logged(trainer, "objective/scores"))
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_too_many_invalid_rewards_stop_the_run(path, tmp_path):
    trainer = sampled(path, tmp_path, reward_funcs=lambda completions, **_: [math.nan] * len(completions))
    with pytest.raises(ValueError, match="8 of 8 completions got a NaN.*max_invalid_fraction=0.1"):
        trainer.train()


def test_missing_eos_is_penalized(path, tmp_path):
    def constant(completions, **kwargs):
        return [1.0] * len(completions)

    options = {"reward_funcs": constant, "max_completion_length": 1, "num_iterations": 1}
    trainer = sampled(path, tmp_path, missing_eos_penalty=3.0, **options)
    trainer.train()
    eos_rate = logged(trainer, "completions/eos_rate")[0]
    assert eos_rate < 1
    assert logged(trainer, "objective/scores") == [1.0]
    assert logged(trainer, "objective/rlhf_reward")[0] == pytest.approx(1 - 3 * (1 - eos_rate), abs=1e-5)


def scored(trainer, rewards):
    """
    Return the rewards-to-go that the trainer gives three completions: one that ends after 3 tokens, one of 4 tokens
    that doesn't end, one of 4 tokens of which a tool wrote the second. k1 is .1 per token.
    """
    eos = trainer.processing_class.eos_token_id
    completions = torch.tensor([[5, 6, eos, 0], [5, 6, 7, 8], [5, 6, 7, eos]])
    logp = torch.full((3, 4), -1.0)
    output = {
        "prompt_ids": torch.full((3, 1), 5),
        "prompt_mask": torch.ones(3, 1, dtype=torch.long),
        "completion_ids": completions,
        "completion_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
        "tool_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1]]),
        "old_per_token_logps": logp,
        "ref_per_token_logps": logp - 0.1,
        "old_values": torch.zeros(3, 4),
    }

    def made(inputs):
        trainer.reward_funcs = [lambda **_: rewards]
        trainer._calculate_rewards([{}] * 3, ["a"] * 3, ["b"] * 3, completions.tolist())
        return output

    trainer._invalid_rewards = lambda values: torch.zeros_like(values, dtype=torch.bool)
    trainer._generate_and_score_completions = made
    trainer.model.train()
    return trainer._make_rollout([]).returns[:, 0].tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2, -4]),
        ({"missing_eos_penalty": 3.0}, [1, -1, -4]),
        ({"missing_eos_score": -3.0}, [1, -3, -4]),
        ({"missing_eos_score": 0.0}, [1, 0, -4]),
        ({"length_penalty": 0.5}, [-0.5, 0, -5.5]),  # of the policy's own tokens: 3, 4 and 3
        ({"length_penalty": 0.5, "missing_eos_score": -3.0}, [-0.5, -5, -5.5]),
        ({"clip": 1.5}, [1, 1.5, -1.5]),
        ({"clip": 1.5, "missing_eos_penalty": 3.0, "length_penalty": 0.5}, [-0.5, -3.5, -3]),
        ({"running": True}, [0.4147807, 0.7258662, -1.1406469]),
        ({"running": True, "clip": 0.5, "missing_eos_penalty": 1.0, "length_penalty": 0.1}, [0.1147807, -0.9, -0.8]),
    ],
    ids=str,
)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_scores_are_normalized_clipped_and_then_pay_for_eos_and_length(path, tmp_path, options, expected, beta):
    shaping = {key: value for key, value in options.items() if key not in ("running", "clip")}
    trainer = sampled(path, tmp_path, beta=beta, gamma=1.0, lam=1.0, **shaping)
    (RunningNorm if "running" in options else RewardNorm)(clip=options.get("clip"), trainer=trainer)
    returns = scored(trainer, [1.0, 2.0, -4.0])
    assert returns == pytest.approx([x - beta * 0.1 * n for x, n in zip(expected, (3, 4, 3), strict=True)], abs=1e-6)
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    assert metrics["objective/scores"] == pytest.approx(-1 / 3, abs=1e-6)
    assert metrics["objective/rlhf_reward"] == pytest.approx(sum(returns) / 3, abs=1e-6)
    assert trainer.last_rollout.kl_std == pytest.approx(0.1 * math.sqrt(2) / 3, abs=1e-6)


def test_evaluation_on_held_out_prompts_leaves_the_random_state_alone(path, tmp_path):
    trainer = sampled(
        path,
        tmp_path,
        reward_funcs=count_of_a,
        eval_dataset=prompts(6),
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
        data=prompts(32),
        num_iterations=2,
    )
    states = []

    class Spy(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if control.should_evaluate:
                states.append((torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()))

        def on_evaluate(self, args, state, control, **kwargs):
            pass

    trainer.add_callback(Spy())
    original = trainer.evaluate
    after = []

    def evaluate(*args, **kwargs):
        metrics = original(*args, **kwargs)
        after.append((torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()))
        return metrics

    trainer.evaluate = evaluate
    trainer.train()
    assert len(logged(trainer, "eval_objective/scores")) == 2  # 4 rollouts, every second one
    assert [e["step"] for e in trainer.state.log_history if "eval_objective/scores" in e] == [8, 16]
    for before, then in zip(states, after, strict=True):
        assert torch.equal(before[0], then[0]) and (before[1] == then[1]).all() and before[2] == then[2]
    twice = [original()["eval_objective/scores"] for _ in range(2)]
    assert twice[0] == twice[1]
    assert {"eval_objective/kl", "eval_completions/mean_length", "eval_completions/eos_rate"} <= {
        key for entry in trainer.state.log_history for key in entry
    }


def test_kl_controllers_act_between_rollouts(path, tmp_path):
    trainer = sampled(path, tmp_path, data=prompts(32), num_iterations=2, beta=0.1)
    controller = AdaptiveKL(0.1, target=1e-3, horizon=100, trainer=trainer)
    trainer.add_callback(controller)
    trainer.train()
    coefs, kls = logged(trainer, "objective/kl_coef"), logged(trainer, "objective/kl")
    assert coefs[0] == pytest.approx(0.1)
    expected = 0.1
    for coef, kl in zip(coefs, kls, strict=True):
        assert coef == pytest.approx(expected, rel=1e-6)
        expected *= 1 + min(max(kl / 1e-3 - 1, -0.2), 0.2) * 8 / 100
    assert controller.coef == pytest.approx(expected, rel=1e-6)

    trainer = sampled(path, tmp_path, data=prompts(32), num_iterations=1, beta=0.4)
    trainer.add_callback(LinearKL(0.4, 0.0, trainer=trainer))
    trainer.train()
    assert logged(trainer, "objective/kl_coef") == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_kl_is_measured_at_beta_zero(path, tmp_path):
    trainer = sampled(path, tmp_path, data=prompts(16), beta=0.0, num_iterations=4)
    trainer.train()
    assert trainer.args.beta == 0
    assert logged(trainer, "objective/kl_coef") == [0, 0]
    assert abs(logged(trainer, "objective/kl")[1]) > 1e-4


def run_with_checkpoints(path, out, resume=None, **kwargs):
    trainer = sampled(
        path,
        out,
        reward_funcs=count_of_a,
        data=prompts(24),
        num_train_epochs=2,
        num_iterations=2,
        save_strategy="steps",
        save_steps=1,
        lr_scheduler_type="linear",
        **kwargs,
    )
    trainer.add_callback(AdaptiveKL(0.1, target=0.5, horizon=100, trainer=trainer))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    "lora, critic",
    [(False, "head"), (True, "head"), (True, "adapter"), (False, "model"), (True, "model")],
    ids=["full-head", "lora-head", "lora-adapter", "full-model", "lora-model"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(path, tmp_path, lora, critic):
    """Stopped in the second epoch of the data, after rollout 4 of 6; the critic warms up for one."""
    peft = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")} if lora else {}
    peft |= {"critic": critic, "critic_warmup_steps": 1, "critic_learning_rate": 2e-2}
    whole = run_with_checkpoints(path, tmp_path, **peft)
    steps = whole.args.steps_per_rollout
    checkpoint = f"{whole.args.output_dir}/checkpoint-{4 * steps}"
    saved = json.loads(Path(checkpoint, "trainer_state.json").read_text())["stateful_callbacks"]["AdaptiveKL"]
    assert saved["attributes"]["coef"] != 0.1

    resumed = run_with_checkpoints(path, tmp_path / "again", resume=checkpoint, **peft)
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    for key in ("objective/scores", "objective/kl", "objective/kl_coef", "value/loss", "policy/loss", "episodes"):
        assert logged(whole, key) == logged(resumed, key), key


def test_the_policys_files_hold_the_policy_alone(path, tmp_path):
    trainer = sampled(path, tmp_path)
    trainer.train()
    trainer.save_model()
    out = trainer.args.output_dir
    assert os.path.isfile(f"{out}/critic.safetensors")
    plain, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(plain(ids).logits, trainer.model(ids).logits)


def test_an_adapter_goes_on_from_an_adapter(path, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(path)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    PeftModel(base, config).save_pretrained(tmp_path / "sft")
    start = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "sft", is_trainable=True)
    trainer = sampled(start, tmp_path, path=path, num_iterations=2)
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert all(".default." in name or "value_head" in name for name in trainable)
    reference = {k: v.clone() for k, v in trainer.model.state_dict().items() if ".ref." in k}
    trainer.train()
    assert logged(trainer, "objective/kl")[0] == pytest.approx(0, abs=1e-5)  # the reference is the SFT adapter
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in reference.items())
    assert any(not torch.equal(state[name.replace(".ref.", ".default.")], v) for name, v in reference.items())
    trainer.save_model()
    assert not os.path.exists(f"{trainer.args.output_dir}/ref")
    loaded = AutoPeftModelForCausalLM.from_pretrained(trainer.args.output_dir)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits)


def test_left_padding_with_absolute_positions(tmp_path):
    """GPT-2 scores its tokens at the positions it generated them at, however its neighbours are padded."""
    trainer = sampled(save_gpt2(tmp_path / "gpt2"), tmp_path)
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([{"prompt": p} for p in ("a", "a b c d e f g h")])
    for i in range(2):
        prompt = rollout["prompt_ids"][i][rollout["prompt_mask"][i].bool()]
        completion = rollout["completion_ids"][i][rollout["completion_mask"][i].bool()]
        with torch.no_grad():
            logits = trainer.model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        for key in ("old_per_token_logps", "ref_per_token_logps"):
            torch.testing.assert_close(rollout[key][i, : len(completion)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_inherited_options_without_a_meaning_are_refused(tmp_path, name):
    held, _ = REFUSED[name]
    other = {bool: True, str: "other"}.get(type(held), 0.75) if held is not True else False
    with pytest.raises(ValueError, match=f"`{name}=.*has no place in PPO"):
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: other})


def test_every_inherited_option_is_either_read_or_refused():
    """A new option of TRL's GRPO must be looked at: does PPO honour it, or must it be refused?"""
    honoured = {
        "model_init_kwargs", "trust_remote_code", "disable_dropout", "cast_lm_head_to_fp32",
        "num_generations", "num_generations_eval", "max_completion_length", "ds3_gather_for_generation",
        "shuffle_dataset", "pad_to_multiple_of", "generation_batch_size", "steps_per_generation", "temperature",
        "top_p", "top_k", "min_p", "generation_kwargs", "chat_template_kwargs", "repetition_penalty",
        "cache_implementation", "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode",
        "vllm_structured_outputs_regex", "vllm_server_base_url", "vllm_server_host", "vllm_server_port",
        "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length",
        "vllm_tensor_parallel_size", "beta", "num_iterations", "epsilon", "delta", "epsilon_high", "reward_weights",
        "entropy_coef", "max_tool_calling_iterations", "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
        "log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts",
        "log_completions_hub_repo", "use_transformers_continuous_batching", "transformers_continuous_batching_config",
        "use_transformers_paged", "vllm_importance_sampling_cap",
    }  # fmt: skip
    from trl.trainer.base_config import _BaseConfig

    of_grpo = {f.name for f in dataclasses.fields(GRPOConfig)} - {f.name for f in dataclasses.fields(_BaseConfig)}
    assert of_grpo == honoured | set(REFUSED)
    assert "kl_estimator" in added_fields()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "multiple of `gradient_accumulation_steps`"),
        ({"kl_estimator": "k4"}, "`kl_estimator` is 'k4'. There are: `k1`, `k2`, `k3`"),
        ({"critic": "none"}, "`critic` is 'none'"),
        ({"gamma": 1.5}, "`gamma` is 1.5"),
        ({"missing_eos_penalty": -1.0}, "`missing_eos_penalty` is -1.0"),
        ({"missing_eos_penalty": 1.0, "missing_eos_score": 0.0}, "subtracts .* `missing_eos_score` replaces it"),
        ({"length_penalty": -0.1}, "`length_penalty` is -0.1"),
        ({"total_episodes": 0}, "`total_episodes` is 0"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_defaults_are_those_of_the_papers(tmp_path):
    args = PPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (args.beta, args.kl_estimator, args.num_iterations, args.num_mini_batches) == (0.05, "k1", 4, 4)
    assert (args.epsilon, args.cliprange_value, args.vf_coef, args.gamma, args.lam) == (0.2, 0.2, 0.1, 1.0, 0.95)
    assert (args.adam_epsilon, args.temperature, args.num_generations) == (1e-5, 1.0, 1)
    assert args.disable_dropout and not args.whiten_rewards
    again = PPOConfig(**{k: v for k, v in args.to_dict().items() if k in ("output_dir", "num_generations", "use_cpu")})
    assert type(again.num_generations) is int


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": prompts(4)}, "There are 4 prompts, fewer than the 8 of one rollout"),
        ({"reward_funcs": None}, "PPO needs a reward"),
        ({"peft_config": LoraConfig(lora_dropout=0.1, task_type="CAUSAL_LM")}, "adapter has a dropout of 0.1"),
        ({"data": Dataset.from_dict({"prompt": ["a"] * 8, "image": [None] * 8})}, "column `image`"),
    ],
)
def test_bad_input_is_refused_before_training(path, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        sampled(path, tmp_path, **change)


def test_a_reward_function_with_too_few_values(path, tmp_path):
    trainer = sampled(path, tmp_path, reward_funcs=lambda completions, **_: [1.0])
    with pytest.raises(ValueError, match="1 reward.*8"):
        trainer.train()


def test_every_epoch_is_dealt_anew_and_from_the_seed_alone(path, tmp_path):
    trainer = sampled(path, tmp_path, data=prompts(24))
    orders = []
    for step in (0, 3 * trainer.args.steps_per_rollout, 0):
        trainer.state.global_step = step
        orders.append(list(trainer._get_train_sampler()))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(set(orders[1])) == list(range(24))


def test_the_critic_can_have_a_learning_rate_of_its_own(path, tmp_path):
    trainer = sampled(path, tmp_path, learning_rate=0.0, critic_learning_rate=1e-2, weight_decay=0.1)
    policy = {k: v.clone() for k, v in trainer.model.state_dict().items() if "value_head" not in k}
    head = trainer.model.value_head.weight.clone()
    trainer.train()
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in policy.items())
    assert (trainer.model.value_head.weight - head).abs().max() > 5e-3
    count = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert count == len(list(trainer.model.parameters()))


def test_generation_gives_the_output_layer_contiguous_states(path, tmp_path):
    trainer = sampled(path, tmp_path)
    seen = []
    trainer.model.get_output_embeddings().register_forward_pre_hook(lambda _, x: seen.append(x[0].is_contiguous()))
    trainer.train()
    assert seen and all(seen)


@pytest.mark.parametrize("lora", [False, True], ids=["full, by a watched reward", "lora, by the raw score"])
def test_the_best_checkpoint_is_kept_and_loaded(path, tmp_path, lora):
    """
    The reward rises, then the learning goes wrong on purpose; what is kept and loaded at the end is the best. It is
    the one that is learned from, or one of weight 0.
    """
    rewards = iter([1.0, 3.0, 2.0, 0.0])

    class Scores(TrainerCallback):
        value = 0.0

        def on_step_end(self, args, state, control, **kwargs):
            Scores.value = next(rewards)

    def reward(completions, **kwargs):
        return [Scores.value] * len(completions)

    peft = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")} if lora else {}
    metric = "eval_objective/scores" if lora else "eval_rewards/reward/mean"
    trainer = sampled(
        path,
        tmp_path,
        data=prompts(16),
        eval_dataset=prompts(8),
        reward_funcs=reward if lora else [reward, lambda completions, **kwargs: [1.0 + len(c) for c in completions]],
        reward_weights=None if lora else [0.0, 1.0],
        callbacks=[Scores()],
        steps_per_generation=1,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        metric_for_best_model=metric,
        load_best_model_at_end=True,
        **peft,
    )
    trainer.train()
    assert logged(trainer, metric) == [1.0, 3.0, 2.0, 0.0]
    best = f"{trainer.args.output_dir}/checkpoint-2"
    assert trainer.state.best_model_checkpoint == best and trainer.state.best_metric == 3.0
    assert "checkpoint-2" in os.listdir(trainer.args.output_dir)
    saved = load_file(f"{best}/{'adapter_' if lora else ''}model.safetensors")
    for name, value in saved.items():
        name = name.replace(".weight", ".default.weight") if lora else name
        assert torch.equal(trainer.model.state_dict()[name], value), name
