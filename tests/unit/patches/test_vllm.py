"""The weights that vLLM gets, with a client in place of its server."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from rlhf_trl.models.roles import CRITIC
from tests.helpers.ppo import LORA, sampled
from tests.helpers.tiny import save_model


class Client:
    """Client that keeps what it is sent."""

    def __init__(self, **kwargs):
        self.announced, self.weights, self.resets = None, {}, 0

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named_params):
        self.announced = [tuple(row) for row in metadata]
        self.weights = {name: parameter.detach().clone() for name, parameter in named_params}

    def reset_prefix_cache(self):
        self.resets += 1


@pytest.mark.parametrize(
    ("critic", "lora"), [("head", False), ("head", True), ("adapter", True), ("model", False), ("model", True)]
)
def test_vllm_gets_the_weights_of_the_policy_only(tmp_path, monkeypatch, critic, lora):
    monkeypatch.setattr("trl.generation.vllm_generation.is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr("trl.generation.vllm_generation.VLLMClient", Client)
    path = save_model(tmp_path / "model")
    adapter = {"peft_config": LoraConfig(**LORA, task_type="CAUSAL_LM", init_lora_weights=False)} if lora else {}
    trainer = sampled(path, tmp_path, critic=critic, use_vllm=True, vllm_mode="server", **adapter)
    assert any(CRITIC in name or "value_head" in name for name, _ in trainer.model.named_parameters())
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    policy = copy.deepcopy(trainer.model)
    policy = policy.merge_and_unload() if lora else policy
    names = {name for name, _ in AutoModelForCausalLM.from_pretrained(path).named_parameters()}
    expected = {name: parameter for name, parameter in policy.named_parameters() if name in names}

    trainer.vllm_generation.sync_weights()
    client = trainer.vllm_generation.vllm_client
    assert client.weights.keys() == expected.keys() == names
    for name, parameter in expected.items():
        torch.testing.assert_close(client.weights[name], parameter, msg=name)
    assert client.announced == [(name, "float32", list(weight.shape)) for name, weight in client.weights.items()]
    assert client.resets == 1
