"""Merging of adapters, and adapters on quantized bases."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.initial import load_initial_model
from rlhf_trl.models.loading import load_model, load_reward_model
from rlhf_trl.models.merging import load_merged, merge_adapter
from rlhf_trl.models.quantization import trained_quantization
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.runs.record import write_json
from tests.helpers.adapter_kinds import LAYERS, config, kinds, save_adapter
from tests.helpers.architectures import ARCHITECTURES, save_architecture
from tests.helpers.run_files import record
from tests.helpers.spies import IDS, SPY, Spy, logits

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_model_has_the_outputs_of_the_adapter_on_its_base(tmp_path, name):
    base = save_architecture(tmp_path / "base", name)
    embedding, head, attention = LAYERS[name]
    several = kinds(name) | {
        "lora of the output layer": {"target_modules": [*attention, head]},
        "lora of both ends": {"target_modules": [*attention, embedding], "ensure_weight_tying": True},
        "output layer in full": {"modules_to_save": [head]},
        "biases": {"bias": "all"},
        "pissa": {"target_modules": attention, "init_lora_weights": "pissa"},
    }
    tied = AutoModelForCausalLM.from_pretrained(base).config.tie_word_embeddings
    for kind, options in several.items():
        path = save_adapter(base, str(tmp_path / kind), {**options, "lora_bias": False})
        merge_adapter(path, f"{path}/merged")
        merged, adapter = AutoModelForCausalLM.from_pretrained(f"{path}/merged"), load_model(path)
        torch.testing.assert_close(logits(merged), logits(adapter), rtol=1e-3, atol=1e-3, msg=kind)
        assert (logits(merged) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2, kind
        one = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
        assert one == merged.config.tie_word_embeddings, kind
        if kind in ("all-linear", "dora", "tokens", "biases"):  # what doesn't part tied layers leaves them one
            assert one == tied, kind
        elif kind in ("lora of the embedding", "lora of the output layer", "embedding in full"):
            assert not one, kind


def quantized_run(path: str, **options) -> BitsAndBytesConfig:
    """Record in the folder of an adapter that its base was quantized."""
    quantization = BitsAndBytesConfig(**NF4 | options)
    write_json(Path(path, "run.json"), {"stage": "sft", "status": "done", "quantization": quantization.to_dict()})
    return quantization


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_adapter_is_loaded_on_the_base_as_quantized_in_training(tmp_path, name):
    base = save_architecture(tmp_path / "base", name)
    policy = save_adapter(base, str(tmp_path / "policy"), {})
    reward = save_adapter(base, str(tmp_path / "reward"), {}, "SEQ_CLS")
    full = logits(load_model(policy))
    on_quantized = {path: quantized_run(path) for path in (policy, reward)}
    trained = logits(load_model(policy, quantization=on_quantized[policy]))
    assert (trained - full).abs().max() > 0.05  # four bits compute something else
    torch.testing.assert_close(logits(load_model(policy)), trained, rtol=0, atol=0)
    assert load_reward_model(reward).is_loaded_in_4bit
    scored = ModelReward(reward).score_ids(IDS.tolist())
    assert scored == pytest.approx(logits(load_reward_model(reward))[:, 0].tolist(), abs=1e-4)
    # a checkpoint of the run, too
    Path(policy, "checkpoint-8").mkdir()
    for file in Path(policy).glob("adapter*"):
        Path(policy, "checkpoint-8", file.name).write_bytes(file.read_bytes())
    torch.testing.assert_close(logits(load_model(f"{policy}/checkpoint-8")), trained, rtol=0, atol=0)

    # what goes on, and what is merged: into the dequantized base, or into the unquantized one
    model, _ = load_initial_model(policy, "CAUSAL_LM", config({}), "", dtype="float32")
    torch.testing.assert_close(logits(model), trained, rtol=0, atol=0)
    start, _ = load_initial_model(policy, "CAUSAL_LM", None, str(tmp_path / "start"), dtype="float32")
    torch.testing.assert_close(logits(start), trained, rtol=1e-3, atol=1e-3)
    merge_adapter(policy, str(tmp_path / "original"), dequantize=False)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    torch.testing.assert_close(logits(original), full, rtol=1e-3, atol=1e-3)
    merge_adapter(reward, str(tmp_path / "scores"))
    scores = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scores")
    torch.testing.assert_close(logits(scores), logits(load_reward_model(reward)), rtol=1e-3, atol=1e-3)
    assert not hasattr(load_merged(policy).config, "quantization_config")


def test_quantization_other_than_in_training_is_an_error(tmp_path):
    base = save_architecture(tmp_path / "base", "llama")
    policy = save_adapter(base, str(tmp_path / "policy"), {})
    quantized_run(policy)
    other = BitsAndBytesConfig(**NF4 | {"bnb_4bit_quant_type": "fp4"})
    with pytest.raises(ConfigError, match="`bnb_4bit_quant_type=nf4`, and `adapter.quantization` has fp4"):
        load_initial_model(policy, "CAUSAL_LM", config({}), "", dtype="float32", quantization_config=other)


def test_qlora_run_records_the_quantization_of_its_base(train, tmp_path, compose, capsys):
    from hydra.utils import instantiate

    few = ["adapter.peft.r=4", "stage.args.max_steps=2", "adapter=qlora"]
    sft = train(tmp_path, "stage=sft", *few, SPY)
    assert record(sft)["quantization"]["bnb_4bit_quant_type"] == "nf4"
    torch.testing.assert_close(logits(load_model(sft)), logits(Spy.model), rtol=1e-5, atol=1e-5)
    # it goes on so, whether or not it is asked for, and its record says so
    dpo = train(tmp_path, "stage=dpo", "model.run=sft", *few[:2], "adapter=lora")
    assert record(dpo)["quantization"] == record(sft)["quantization"]
    lora = train(tmp_path, "stage=sft", "run_name=lora", *few[:2], "adapter=lora")
    assert record(lora)["quantization"] is None and trained_quantization(lora) is None
    for dequantize, said in ((True, "dequantized"), (False, "another model")):
        cfg = compose("stage=merge", "model.run=sft", f"runs_dir={tmp_path}", "project=test")
        cfg.stage.dequantize = dequantize
        instantiate(cfg.stage.run)(cfg)
        assert said in capsys.readouterr().out
    # an adapter that was trained on a quantized base shares no other
    reward = train(tmp_path, "stage=reward", *few)
    assert load_reward_model(reward).is_loaded_in_4bit
    words = ["stage=ppo", "model.run=lora", *few[:2], "adapter=lora", "reward=adapter", "reward.adapter.run=reward"]
    with pytest.raises(ConfigError, match="was trained on a quantized base, and the policy's is not quantized"):
        train(tmp_path, *words)
