"""Old log-probabilities and values from the passes that sampled: the numbers of a pass of their own, without it."""

import logging

import pytest
import torch
from peft import LoraConfig

from rlhf_trl.ppo import sampled as sampled_tokens
from tests.helpers.ppo import make_trainer, prompts, sampled
from tests.helpers.tiny import save_gpt2, save_model

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}


def roll_out(trainer, training=True, count=8) -> dict:
    trainer.model.train(training)
    return trainer._generate_and_score_completions([{"prompt": p} for p in prompts(count)["prompt"]])


def by_a_pass(trainer, rollout):
    """Log-probabilities and values of the rollout's tokens by a pass over them, 0 at padding."""
    mask = rollout["completion_mask"]
    with torch.no_grad():
        scores = trainer._score_tokens(
            trainer.model,
            torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1),
            torch.cat([rollout["prompt_mask"], mask], dim=1),
            mask.size(1),
        )
    return scores.logps * mask, scores.values * mask


@pytest.mark.parametrize("save", [save_model, save_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"critic": "head"},
        {"critic": "head", "temperature": 0.7, "steps_per_generation": 1, "num_iterations": 1},
        {"critic": "model"},
        {"critic": "adapter", "lora": True},
        {"critic": "head", "lora": True, "per_device_train_batch_size": 3},
    ],
    ids=["head", "one step a rollout", "model", "adapter", "lora"],
)
def test_sampling_gives_the_numbers_of_a_pass_without_it(tmp_path, options, save):
    options = dict(options)
    lora = options.pop("lora", False)
    if lora:
        options["peft_config"] = LoraConfig(**LORA)
    trainer = sampled(save(tmp_path / "model"), tmp_path, data=prompts(24), **options)
    trainer.create_optimizer()  # as training does
    roll_out(trainer)  # compares once
    passes = []
    for part in (trainer._policy.base_model, getattr(trainer._policy, "critic", None)):
        if part is not None:
            part.register_forward_pre_hook(
                lambda _, args, kwargs: passes.append((args[0] if args else kwargs["input_ids"]).size(1)),
                with_kwargs=True,
            )
    width = max(len(ids) for ids in trainer.processing_class(list(prompts(8)["prompt"]))["input_ids"])
    rollout = roll_out(trainer)
    whole_passes = [length for length in passes if length > width]
    batches = -(-8 // trainer.args.per_device_train_batch_size)
    # a pass of the reference, where it is the base below the policy, and one of a critic with a trunk of its own
    assert len(whole_passes) == batches * (lora + (options["critic"] != "head"))

    lengths = rollout["completion_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) > 1 and len(set(rollout["prompt_mask"].sum(dim=1).tolist())) > 1
    log_probs, values = by_a_pass(trainer, rollout)
    torch.testing.assert_close(rollout["old_per_token_logps"], log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rollout["old_values"] * rollout["completion_mask"], values, atol=1e-5, rtol=1e-5)
    assert values.abs().max() > 0.01


def test_evaluation_needs_no_second_pass_either(tmp_path):
    trainer = sampled(save_model(tmp_path / "model"), tmp_path, eval_dataset=prompts(8))
    trainer.evaluate()
    passes = []
    score_tokens = trainer._score_tokens
    trainer._score_tokens = lambda *a, **k: passes.append("policy") or score_tokens(*a, **k)
    trainer.ref_model.register_forward_pre_hook(lambda *_: passes.append("reference"))
    assert trainer.evaluate()["eval_objective/kl"] == pytest.approx(0, abs=1e-5)
    assert passes and set(passes) == {"reference"}


def test_a_model_whose_cache_gives_other_numbers_gets_a_pass(tmp_path, monkeypatch, caplog):
    log_prob = sampled_tokens.SampledTokens._log_prob
    monkeypatch.setattr(sampled_tokens.SampledTokens, "_log_prob", lambda self, *args: log_prob(self, *args) - 0.01)
    trainer = sampled(save_model(tmp_path / "model"), tmp_path)
    with caplog.at_level(logging.WARNING):
        rollouts = [roll_out(trainer) for _ in range(2)]
    assert sum("other log-probabilities with a cache" in record.message for record in caplog.records) == 1
    for rollout in rollouts:
        log_probs, values = by_a_pass(trainer, rollout)
        torch.testing.assert_close(rollout["old_per_token_logps"], log_probs)
        torch.testing.assert_close(rollout["old_values"] * rollout["completion_mask"], values)


def test_other_completions_than_those_sampled_get_a_pass(tmp_path):
    """Tokens that a subclass adds or cuts, or a `generate` that reads its prompts in chunks."""
    trainer = sampled(save_model(tmp_path / "model"), tmp_path)
    generate = trainer._generate

    def cut(prompts):
        prompt_ids, completion_ids, *rest = generate(prompts)
        return prompt_ids, [ids[:3] for ids in completion_ids], *rest

    trainer._generate = cut
    rollout = roll_out(trainer)
    assert rollout["completion_ids"].size(1) == 3
    log_probs, _ = by_a_pass(trainer, rollout)
    torch.testing.assert_close(rollout["old_per_token_logps"], log_probs)
    trainer._generate = generate
    trainer.generation_config.prefill_chunk_size = 2
    rollout = roll_out(trainer)
    log_probs, _ = by_a_pass(trainer, rollout)
    torch.testing.assert_close(rollout["old_per_token_logps"], log_probs)


def test_half_precision_and_foreign_rollouts_get_a_pass(tmp_path):
    path = save_model(tmp_path / "model")
    assert sampled(path, tmp_path)._sampled is not None
    for options in (
        {"model_init_kwargs": {"dtype": "bfloat16"}},
        {"bf16": True},
        {"disable_dropout": False},
        {"cache_implementation": "static"},
    ):
        trainer = sampled(path, tmp_path, **options)
        assert trainer._sampled is None, options
        assert roll_out(trainer)["old_per_token_logps"].abs().sum() > 0
    assert make_trainer(path, tmp_path)[0]._sampled is None  # a `rollout_func`
