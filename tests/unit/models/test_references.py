"""Equality of policy and reference before the first step, for every kind of adapter and architecture."""

import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from rlhf_trl.checks import check
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.initial import load_initial_model
from rlhf_trl.models.loading import load_full, load_model
from rlhf_trl.models.roles import REFERENCE, begin_training
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.rewards.adapter import AdapterReward
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.runs.paths import resolve_path
from tests.helpers.adapter_kinds import config, kinds, move, save_adapter
from tests.helpers.architectures import ARCHITECTURES, save_architecture
from tests.helpers.ppo import logged, sampled
from tests.helpers.run_files import metrics
from tests.helpers.spies import IDS, logits

PAIRS = Dataset.from_list(
    [
        {"prompt": "a b c", "chosen": " d e f", "rejected": " g h"},
        {"prompt": "c b", "chosen": " i a b", "rejected": " b b b c"},
    ]
)


def log_probs(model: PeftModel) -> torch.Tensor:
    """Return the log-probabilities that TRL's trainers compute for the tokens, shape (2, 7)."""
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS, "use_cache": False}
    model.eval()
    with torch.no_grad():
        return model(**inputs, fused_lm_head=True).log_probs


def plain_log_probs(model) -> torch.Tensor:
    return logits(model).log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]


def reference_log_probs(model: PeftModel) -> torch.Tensor:
    with use_adapter(model, REFERENCE if REFERENCE in model.peft_config else None):
        return log_probs(model)


def slow_but_for(*quick: str) -> list:
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in ARCHITECTURES]


@pytest.mark.parametrize("begun", ["fresh", "continued"])
@pytest.mark.parametrize("name", slow_but_for("llama", "gpt2", "gemma2"))
def test_policy_equals_its_reference_at_the_start_and_the_reference_stays(tmp_path, name, begun):
    begins_and_stays(tmp_path, name, begun, None)


@pytest.mark.parametrize("begun", ["fresh", "continued"])
@pytest.mark.parametrize("name", slow_but_for("qwen2"))
def test_policy_in_4_bits_equals_its_reference_at_the_start_and_the_reference_stays(tmp_path, name, begun):
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    begins_and_stays(tmp_path, name, begun, BitsAndBytesConfig(load_in_4bit=True, **options))


def begins_and_stays(tmp_path, name, begun, quantization):
    base = save_architecture(tmp_path / "base", name)
    args = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    for kind, options in kinds(name).items():
        path = base if begun == "fresh" else save_adapter(base, str(tmp_path / kind), options)
        model, peft_config = load_initial_model(
            path, "CAUSAL_LM", config(options), "", dtype="float32", quantization_config=quantization
        )
        trainer = DPOTrainer(
            model,
            args=DPOConfig(str(tmp_path / "run"), **args),
            train_dataset=PAIRS,
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=peft_config,
        )
        begin_training(trainer.model)
        policy, reference = log_probs(trainer.model), reference_log_probs(trainer.model)
        assert torch.equal(policy, reference), kind
        # both are the start, and what TRL's output layer computes is what the model says
        started = plain_log_probs(load_model(path, quantization=quantization))
        torch.testing.assert_close(policy, started, rtol=1e-4, atol=1e-4, msg=kind)
        move(trainer.model)
        assert torch.equal(reference_log_probs(trainer.model), reference), kind
        moved = log_probs(trainer.model)
        assert (moved - policy).abs().max() > 1e-3, kind
        torch.testing.assert_close(moved, plain_log_probs(trainer.model), rtol=1e-4, atol=1e-4, msg=kind)


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("stage", ["dpo", "kto", "grpo", "rloo", "ppo"])
def test_kl_of_every_stage_is_0_at_the_start(train, tmp_path, stage, adapter):
    options = {"target_modules": ["q_proj", "embed_tokens"], "r": 16, "lora_alpha": 32}
    start = save_adapter(resolve_path("demo:sft", None, ""), str(tmp_path / "start"), options)
    history = metrics(
        train(
            tmp_path, f"stage={stage}", f"model.path={start}", f"adapter={adapter}",
            "adapter.peft.target_modules=[q_proj,embed_tokens]", "stage.args.max_steps=1", "data.max_samples=64",
            "data.max_eval_samples=8", "stage.args.per_device_train_batch_size=16",
        )
    )["history"]  # fmt: skip
    if stage in ("dpo", "kto"):
        assert history[0]["eval_loss"] == pytest.approx({"dpo": math.log(2), "kto": 0.5}[stage], abs=1e-6)
    else:
        key = "objective/kl" if stage == "ppo" else "kl"
        found = [entry[key] for entry in history if key in entry] + [history[0].get("eval_objective/kl", 0.0)]
        assert found == pytest.approx([0.0] * len(found), abs=1e-4) and len(found) > 1


@pytest.mark.parametrize("trainable", [False, True], ids=["as the stages load it", "as PEFT loads it"])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", slow_but_for("llama", "opt"))
def test_kl_of_four_roles_is_0_at_the_start(tmp_path, name, bits, trainable):
    """On a quantized base TRL rounds a trainable policy to bfloat16, after it has copied it to the reference."""
    if bits == 4 and name == "gpt2":
        pytest.skip("its layers are no linear ones")
    base = save_architecture(tmp_path / "base", name)
    path = save_adapter(base, str(tmp_path / "start"), {})
    reward = save_adapter(base, str(tmp_path / "reward"), {}, "SEQ_CLS")
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    loading = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4) if bits == 4 else None}
    if trainable:
        model = PeftModel.from_pretrained(
            load_full(base, "CAUSAL_LM", dtype="bfloat16", **loading), path, is_trainable=True
        )
    else:
        model, _ = load_initial_model(path, "CAUSAL_LM", config({}), "", dtype="bfloat16", **loading)
    roles = {"critic": "adapter", "critic_path": reward, "reward_funcs": AdapterReward(reward)}
    trainer = sampled(model, tmp_path, path=base, max_steps=2, **roles)
    begin_training(trainer.model)
    if not trainable:
        weights, state = load_file(f"{path}/adapter_model.safetensors"), trainer.model.state_dict()
        for key, value in weights.items():
            assert torch.equal(state[key.replace(".weight", ".default.weight")], value), key
    trainer.train()
    assert logged(trainer, "objective/kl")[0] == 0
    assert any(abs(entry["policy/approxkl"]) > 0 for entry in trainer.state.log_history if "policy/approxkl" in entry)


def test_adapter_with_trainable_tokens_gets_a_score_head(tmp_path):
    for name in ("llama", "qwen2"):
        base = save_architecture(tmp_path / name, name)
        for kind, options in kinds(name).items():
            path = save_adapter(base, str(tmp_path / f"{name} {kind}"), options)
            model, _ = load_initial_model(path, "SEQ_CLS", config(options, "SEQ_CLS"), "", dtype="float32")
            begin_training(model)
            trained = {key.split(".")[-2] for key, p in model.named_parameters() if p.requires_grad and "score" in key}
            assert trained == {"default"}, kind


@pytest.mark.parametrize("kind", ["all-linear", "dora", "embedding in full", "tokens", "lora of the embedding"])
def test_roles_of_any_kind_share_a_base(tmp_path, kind):
    """A reward beside a policy on one base scores as by itself, and the policy writes as by itself."""
    base = save_architecture(tmp_path / "base", "qwen2")
    policy = save_adapter(base, str(tmp_path / "policy"), kinds("qwen2")[kind])
    rows = IDS.tolist()
    for theirs in ("all-linear", kind):
        path = save_adapter(base, str(tmp_path / f"reward {theirs}"), kinds("qwen2")[theirs], "SEQ_CLS")
        model, _ = load_initial_model(policy, "CAUSAL_LM", config(kinds("qwen2")[kind]), "", dtype="float32")
        reward = AdapterReward(path)
        reward.bind(load_tokenizer(base))
        reward.attach(model)
        assert reward.score_ids(rows) == pytest.approx(ModelReward(path).score_ids(rows), abs=1e-4)
        torch.testing.assert_close(logits(model), logits(load_model(policy)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("+adapter.peft.bias=all", "`adapter.peft.bias` is all, and .* which would move with those biases"),
        ("+adapter.peft.bias=lora_only", "`adapter.peft.bias` is lora_only"),
        ("+adapter.peft.init_lora_weights=pissa", "`adapter.peft.init_lora_weights` is pissa"),
        ("+adapter.peft.init_lora_weights=false", "`adapter.peft.init_lora_weights` is False"),
    ],
)
def test_adapters_that_change_the_reference_are_refused(compose, tmp_path, words, said):
    for stage in ("dpo", "kto", "grpo", "rloo", "ppo"):
        with pytest.raises(ConfigError, match=said):
            check(compose(f"stage={stage}", "adapter=lora", words, f"runs_dir={tmp_path}"))
    for stage in ("sft", "reward", "orpo"):  # without a reference
        check(compose(f"stage={stage}", "adapter=lora", words, f"runs_dir={tmp_path}"))


@pytest.mark.parametrize(
    ("saved", "wanted", "said"),
    [
        ({"bias": "all"}, {}, "`bias` is all there and none in `adapter.peft`"),
        ({}, {"trainable_token_indices": [1]}, r"`trainable_token_indices` is None there and \[1\]"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights=pissa`, which changes its base"),
        ({"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}, "output layer"),
    ],
)
def test_adapter_that_can_not_be_trained_further_is_refused(tmp_path, saved, wanted, said):
    base = save_architecture(tmp_path / "base", "llama")
    path = save_adapter(base, str(tmp_path / "adapter"), saved)
    with pytest.raises(ConfigError, match=said):
        load_initial_model(path, "CAUSAL_LM", config(wanted), "", dtype="float32")


def test_a_role_that_changes_the_shared_base_is_refused(tmp_path):
    base = save_architecture(tmp_path / "base", "qwen2")
    policy, _ = load_initial_model(
        save_adapter(base, str(tmp_path / "policy"), {}), "CAUSAL_LM", config({}), "", dtype="float32"
    )
    for option in ({"bias": "all"}, {"init_lora_weights": "pissa"}):
        reward = AdapterReward(save_adapter(base, str(tmp_path / next(iter(option))), option, "SEQ_CLS"))
        reward.bind(load_tokenizer(base))
        with pytest.raises(ConfigError, match=f"trained with `{next(iter(option))}=.* changes the base"):
            reward.attach(policy)
