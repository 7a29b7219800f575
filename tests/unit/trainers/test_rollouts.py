"""Rollouts on every architecture: positions under padding, no dropout, no setting that the stage doesn't know."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.utils import add_fused_lm_head

from rlhf_trl.build import load_data, make_trainer, training_arguments
from rlhf_trl.evaluation.generation import Policy, generation_config, sample
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.patches.positions import count_positions_from_mask
from rlhf_trl.ppo import losses, update
from rlhf_trl.stages.chat import answer
from tests.helpers.architectures import MORE_ARCHITECTURES, make_architecture, save_architecture
from tests.helpers.data import write_letter_pairs
from tests.helpers.ppo import prompts
from tests.helpers.rl import TRAINERS, logged, rl_trainer

# Absolute positions, absolute positions with an offset that come from the mask, rotary ones, dropout by functions
SOME = ["gpt2", "opt", "gpt_neox", "llama"]


def log_probs_alone(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probabilities of a completion's tokens in a row without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


# ---- Positions ----


@pytest.mark.parametrize("name", MORE_ARCHITECTURES)
def test_padding_on_the_left_moves_no_token(name):
    rows = [([5, 6, 7, 8, 9, 10], [11, 12, 1]), ([7, 9], [14, 8, 1]), ([13], [5, 6, 9])]
    model = make_architecture(name).eval()
    alone = torch.stack([log_probs_alone(model, *row) for row in rows])
    add_fused_lm_head(model)
    count_positions_from_mask(model)
    width = max(len(prompt) for prompt, _ in rows)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt + completion for prompt, completion in rows])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt + completion) for prompt, completion in rows])
    labels = ids.masked_fill(torch.arange(ids.size(1)) < width, -100)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -3:]
    assert alone.std() > 0.3
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("name", SOME)
def test_a_rollout_is_scored_as_each_row_alone(tmp_path, kind, name):
    """By the policy that samples, by the reference, and in the update."""
    path = save_architecture(tmp_path / "model", name)
    trainer = rl_trainer(kind, path, tmp_path, steps_per_generation=2, per_device_train_batch_size=4)
    trainer.model.train()
    heard, score = [], trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: heard.append(score(*a, **k)[0]) or (heard[-1],) * 3
    rollout = trainer._generate_and_score_completions([{"prompt": p} for p in prompts(8)["prompt"]])
    assert len(set(rollout["prompt_mask"].sum(dim=1).tolist())) > 1
    assert len(heard) == 2
    ids, masks = (torch.cat([rollout[f"prompt_{x}"], rollout[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
    mask = rollout["completion_mask"].bool()
    heard.append(score(trainer.model, ids, masks, mask.size(1))[0])
    model = AutoModelForCausalLM.from_pretrained(path)
    for i in range(len(mask)):
        prompt = rollout["prompt_ids"][i][rollout["prompt_mask"][i].bool()].tolist()
        alone = log_probs_alone(model, prompt, rollout["completion_ids"][i][mask[i]].tolist())
        for log_probs in heard:
            torch.testing.assert_close(log_probs[i][mask[i]], alone, atol=1e-4, rtol=1e-4)


# ---- Dropout ----


@pytest.mark.parametrize("name", MORE_ARCHITECTURES)
def test_the_first_rollout_of_ppo_is_of_its_policy(tmp_path, name):
    """KL 0 and ratio 1, with a dropout of one half wherever the config knows one."""
    path = save_architecture(tmp_path / "model", name, dropout=0.5)
    trainer = rl_trainer("ppo", path, tmp_path, eval_dataset=prompts(4), eval_strategy="steps", eval_on_start=True)
    trainer.train()
    assert logged(trainer, "eval_objective/kl")[0] == pytest.approx(0, abs=1e-4)
    assert logged(trainer, "objective/kl")[0] == pytest.approx(0, abs=1e-4)
    assert logged(trainer, "policy/ratio")[0] == pytest.approx(1, abs=1e-4)
    assert logged(trainer, "policy/approxkl")[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon", "qwen2"])
def test_the_first_rollout_of_grpo_and_rloo_is_of_its_policy(tmp_path, kind, name):
    path = save_architecture(tmp_path / "model", name, dropout=0.5)
    trainer = rl_trainer(kind, path, tmp_path)
    trainer.train()
    assert logged(trainer, "objective/kl")[0] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("critic", ["head", "adapter", "model"])
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "bloom"])
def test_values_are_the_same_in_rollout_and_update(tmp_path, monkeypatch, name, critic):
    """Also those of a critic with a trunk of its own, and under gradient checkpointing."""
    path = save_architecture(tmp_path / "model", name, dropout=0.5)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    seen = []

    def value_losses(values, old_values, *args):
        seen.append((values.detach(), old_values))
        return losses.value_losses(values, old_values, *args)

    monkeypatch.setattr(update, "value_losses", value_losses)
    trainer = rl_trainer(
        "ppo",
        path,
        tmp_path,
        critic=critic,
        peft_config=lora if critic == "adapter" else None,
        gradient_checkpointing=True,
    )
    calls = []
    layer = next(m for m in trainer._policy.modules() if isinstance(m, GradientCheckpointingLayer))
    norm = next(m for m in layer.modules() if "Norm" in type(m).__name__)
    norm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert sum(calls) > len(seen)  # repeated in the backward
    values, old_values = (x[seen[0][1] != 0] for x in seen[0])  # 0 at padding, where sampling gave them
    torch.testing.assert_close(values, old_values, atol=1e-4, rtol=1e-4)
    assert values.std() > 0.01


@pytest.mark.parametrize("stage", ["dpo", "kto", "orpo", "reward"])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_other_stages_train_without_dropout(compose, tmp_path, stage, name):
    path = save_architecture(tmp_path / "model", name, dropout=0.5)
    few = ["data.max_samples=64", "data.max_eval_samples=8", "stage.args.per_device_train_batch_size=4"]
    few += ["stage.args.max_length=64", "data=files", f"data.paths={write_letter_pairs(tmp_path / 'pairs.jsonl')}"]
    cfg = compose(f"stage={stage}", f"runs_dir={tmp_path}", "model=hf", f"model.path={path}", *few)
    OmegaConf.resolve(cfg)
    tokenizer = load_tokenizer(path)
    trainer = make_trainer(cfg, training_arguments(cfg.stage.args), path, tokenizer, load_data(cfg, tokenizer))
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    losses = []
    for training in (True, False):
        trainer.model.train(training)
        assert trainer.model.training is training
        losses.append(trainer.compute_loss(trainer.model, inputs).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    if stage == "dpo":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4)


# ---- The model's own generation config ----

OWN = [
    {"no_repeat_ngram_size": 1},
    {"num_beams": 4},
    {"num_beams": 2, "num_return_sequences": 2},
    {"min_new_tokens": 6},
    {"suppress_tokens": list(range(5, 20))},
    {"bad_words_ids": [[i] for i in range(5, 20)]},
    {"begin_suppress_tokens": list(range(5, 20))},
    {"sequence_bias": [[[5], 50.0]]},
    {"forced_eos_token_id": 1},
    {"exponential_decay_length_penalty": [1, 5.0]},
    {"stop_strings": ["a", "b"]},
    {"return_dict_in_generate": True},
    {"min_p": 0.9},
    {"typical_p": 0.1},
    {"epsilon_cutoff": 0.2},
    {"guidance_scale": 3.0},
    {"do_sample": False, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0},
    {"max_length": 3, "use_cache": False, "cache_implementation": "static", "prefill_chunk_size": 2},
]


def completions(trainer) -> list[list[int]]:
    torch.manual_seed(0)
    rollout = trainer._generate_and_score_completions([{"prompt": p} for p in prompts(8)["prompt"]])
    return rollout["completion_ids"].masked_fill(rollout["completion_mask"] == 0, -1).tolist()


def own_settings(path: str, settings: dict) -> dict:
    """Write settings into a model's generation_config.json; return what is in it."""
    file = Path(path, "generation_config.json")
    written = json.loads(file.read_text()) | settings
    file.write_text(json.dumps(written))
    return written


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("grpo", settings) for settings in OWN] + [(kind, OWN[i]) for kind in ("ppo", "rloo") for i in (0, 1, 12, 16)],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_rollouts_take_nothing_from_the_models_own_generation_config(tmp_path, kind, settings, caplog):
    path = save_architecture(tmp_path / "model", "llama")
    plain = completions(rl_trainer(kind, path, tmp_path))
    own_settings(path, settings)
    trainer = rl_trainer(kind, path, tmp_path)
    assert completions(trainer) == plain
    assert any(len(set(row)) > 2 for row in plain)
    name = next(iter(settings))
    assert (f"`{name}={settings[name]}`" in caplog.text) == (name not in ("do_sample", "max_length"))


def test_the_models_own_generation_config_is_saved_with_it_and_its_ids_are_in_force(tmp_path):
    path = save_architecture(tmp_path / "model", "llama")
    written = own_settings(path, {"eos_token_id": [1, 7, 9, 12], "no_repeat_ngram_size": 2, "top_k": 5})
    for lora in (None, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")):
        trainer = rl_trainer("grpo", path, tmp_path, peft_config=lora)
        rows = completions(trainer)
        assert {row[row.index(-1) - 1] for row in rows if -1 in row} & {7, 9, 12}
        assert trainer.model.generation_config.no_repeat_ngram_size == 2
    rl_trainer("grpo", path, tmp_path).save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: saved[name] for name in ("eos_token_id", "no_repeat_ngram_size", "top_k")} == {
        name: written[name] for name in ("eos_token_id", "no_repeat_ngram_size", "top_k")
    }


@pytest.mark.parametrize("kind", TRAINERS)
def test_what_the_stage_sets_is_in_force_and_its_bias_is_said(tmp_path, kind, caplog):
    path = save_architecture(tmp_path / "model", "llama")
    trainer = rl_trainer(kind, path, tmp_path, top_k=3, generation_kwargs={"suppress_tokens": [1, 5]})
    assert not {1, 5} & {token for row in completions(trainer) for token in row}
    assert "sampled with `top_k=3`, `suppress_tokens=[1, 5]`, and scored without" in caplog.text
    caplog.clear()
    rl_trainer(kind, path, tmp_path)
    assert "sampled with" not in caplog.text


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_evaluation_generate_and_chat_take_nothing_from_it_either(tmp_path, adapter):
    path = save_architecture(tmp_path / "model", "llama")

    def written() -> list[list[int]]:
        model = AutoModelForCausalLM.from_pretrained(path)
        if adapter:
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        tokenizer = load_tokenizer(path)
        policy = Policy("policy", path, model.eval(), tokenizer)
        rows = sample(policy.model, tokenizer, [[5, 6], [7, 8, 9]], 8, temperature=1.0, batch_size=2, seed=0)
        torch.manual_seed(0)
        given = answer(policy, "a b", [], generation_config(1.0, 8), None, io.StringIO(), stream=False)
        return [*rows, given.ids]

    plain = written()
    own_settings(path, {name: value for settings in OWN for name, value in settings.items()})
    assert written() == plain


# ---- Evaluation ----


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_evaluation_with_continuous_batching_stays_one(tmp_path, kind):
    """TRL 1.16 leaves the model in training mode after each generation."""
    options = {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 256},
        "per_device_eval_batch_size": 2,
    }
    trainer = rl_trainer(kind, save_architecture(tmp_path / "model", "llama"), tmp_path, None, **options)
    metrics = trainer.evaluate(prompts(2))
    assert not trainer.model.training
    assert ("eval_objective/scores" if kind == "ppo" else "eval_reward") in metrics


def test_continuous_batching_leaves_the_weights_in_float32(tmp_path, monkeypatch):
    """TRL casts the trained model to bfloat16 before it generates, with the frequencies of its positions."""
    path = save_architecture(tmp_path / "model", "llama")
    options = {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 256},
        "bf16": True,
        "peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    trainer = rl_trainer("ppo", path, tmp_path, None, **options)
    seen, generate_batch = [], LlamaForCausalLM.generate_batch

    def spy(self, *args, **kwargs):
        frequencies = {buffer.dtype for name, buffer in self.named_buffers() if "inv_freq" in name}
        seen.append(({weight.dtype for weight in self.parameters()}, frequencies))
        return generate_batch(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate_batch", spy)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    written = completions(trainer)
    assert written and seen == [({torch.bfloat16}, {torch.float32})]
    after = trainer.model.state_dict()
    assert all(
        tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]) for name, tensor in after.items()
    )
    assert {buffer.dtype for name, buffer in trainer.model.named_buffers() if "inv_freq" in name} == {torch.float32}
    assert "generate_batch" not in vars(trainer._policy)
