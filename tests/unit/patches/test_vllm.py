"""The weights that vLLM gets and the log-probabilities that come back, with a model in place of its server."""

import copy
from typing import Any

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

from rlhf_trl.models.roles import CRITIC
from rlhf_trl.patches.vllm import _merged_copies, merge_for_sending
from tests.helpers.architectures import save_architecture
from tests.helpers.fake_vllm import FakeServer, serve
from tests.helpers.ppo import LORA, sampled
from tests.helpers.rl import TRAINERS, logged, rl_trainer
from tests.helpers.tiny import save_model

SERVER = {"use_vllm": True, "vllm_mode": "server"}


@pytest.mark.parametrize(
    ("critic", "lora"), [("head", False), ("head", True), ("adapter", True), ("model", False), ("model", True)]
)
def test_vllm_gets_the_weights_of_the_policy_only(tmp_path, monkeypatch, critic, lora):
    path = save_model(tmp_path / "model")
    server = FakeServer(path)
    serve(monkeypatch, server)
    adapter = {"peft_config": LoraConfig(**LORA, task_type="CAUSAL_LM", init_lora_weights=False)} if lora else {}
    trainer = sampled(path, tmp_path, critic=critic, **SERVER, **adapter)
    assert any(CRITIC in name or "value_head" in name for name, _ in trainer.model.named_parameters())
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    policy = copy.deepcopy(trainer.model)
    policy = policy.merge_and_unload() if lora else policy
    names = {name for name, _ in AutoModelForCausalLM.from_pretrained(path).named_parameters()}
    expected = {name: parameter for name, parameter in policy.named_parameters() if name in names}

    trainer.vllm_generation.sync_weights()
    (weights,) = server.sent
    assert weights.keys() == expected.keys() == names
    for name, parameter in expected.items():
        torch.testing.assert_close(weights[name], parameter.data, msg=name)
    assert server.announced == [(name, "float32", list(weight.shape)) for name, weight in weights.items()]
    assert server.resets == 1


ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "embedding": {"target_modules": ["wte", "c_attn"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "lora"), ("llama", "dora"), ("gpt2", "lora"), ("gpt_neox", "bias"), ("gpt2", "embedding")],
)
def test_a_sync_leaves_the_base_under_an_adapter_as_it_was(tmp_path, monkeypatch, architecture, kind):
    """In bfloat16, where to add an adapter and to subtract it again doesn't give the same weight."""
    path = save_architecture(tmp_path / "model", architecture)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    plain = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | ADAPTERS[kind]
    model = get_peft_model(base, LoraConfig(**options, task_type="CAUSAL_LM"))
    monkeypatch.setattr(VLLMGeneration, "_init_vllm", lambda self: None)
    generation = VLLMGeneration(model, Accelerator(cpu=True), None)
    merge_for_sending(generation)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    for _ in range(2):
        sent = dict(generation._iter_named_params())  # kept, as a packed transfer does
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert not any(layer.merged_adapters for layer in model.modules() if hasattr(layer, "merged_adapters"))

    merged = copy.deepcopy(model).merge_and_unload()
    expected = {name: parameter for name, parameter in merged.named_parameters() if name in sent}
    assert plain.keys() <= sent.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(sent[name].float(), parameter.data.float(), msg=name)
    adapted = [name for name in plain if not torch.equal(sent[name], plain[name])]
    assert len(adapted) >= 3


def test_a_sync_leaves_a_weight_in_4_bits_quantized():
    """PEFT marks it as not quantized while it merges, and the next `to` would quantize its packed bytes again."""
    model: Any = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)).to("cpu")
    model.is_loaded_in_4bit = True
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    layer: Any = lora.base_model.get_submodule("model.0")
    inputs = torch.randn(2, 64)
    expected, packed = lora(inputs), layer.base_layer.weight.data.clone()
    with _merged_copies(layer):
        assert not torch.equal(layer.base_layer.weight.data, packed)
    assert layer.base_layer.weight.bnb_quantized and torch.equal(layer.base_layer.weight.data, packed)
    torch.testing.assert_close(lora.to("cpu")(inputs), expected)


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_difference_of_sampler_and_policy_is_logged(tmp_path, monkeypatch, kind):
    path = save_model(tmp_path / "model")
    adapter = LoraConfig(**LORA, task_type="CAUSAL_LM")

    def differences(deaf: bool) -> tuple[list[float], list[str]]:
        serve(monkeypatch, FakeServer(path, deaf))
        trainer = rl_trainer(kind, path, tmp_path, peft_config=adapter, learning_rate=0.1, max_steps=2, **SERVER)
        trainer.train()
        names = [name for name in trainer.state.log_history[0] if name.startswith("sampling/")]
        return logged(trainer, "sampling/prob_error"), names

    synced, names = differences(deaf=False)
    assert len(synced) == 2 and max(synced) < 1e-5
    assert {"sampling/sampling_logp_difference/mean", "sampling/sequence_logp_difference/max"} <= set(names)
    assert ("sampling/clipfrac_long" in names) == (kind != "rloo")
    if kind == "ppo":
        first, second = differences(deaf=True)[0]
        assert first < 1e-5 and second > 1e-3
