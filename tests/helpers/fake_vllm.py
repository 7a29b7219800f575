"""A model in place of a vLLM server, behind the interface of TRL's client: it samples from the weights it was sent."""

import torch
from transformers import AutoModelForCausalLM


class FakeServer:
    """
    Client of a server whose model is here.

    Args:
        path (`str`): model that is served.
        deaf (`bool`): whether it drops the weights that it is sent.

    Attributes:
        announced (`list[tuple]`): name, type and shape of the weights that it was told of.
        sent (`list[dict]`): weights of each sync, by name.
        resets (`int`): how often its prefix cache was emptied.
    """

    def __init__(self, path, deaf=False):
        self.model = AutoModelForCausalLM.from_pretrained(path)
        self.deaf, self.announced, self.sent, self.resets = deaf, [], [], 0

    def __call__(self, **kwargs):
        """Stand for the client's class."""
        return self

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named_params):
        self.announced = [tuple(row) for row in metadata]
        self.sent.append(dict(named_params))  # all at once, as a packed transfer has them
        if not self.deaf:
            weights = self.model.state_dict()
            assert self.sent[-1].keys() == {name for name, _ in self.model.named_parameters()}
            self.model.load_state_dict(weights | self.sent[-1])

    def reset_prefix_cache(self):
        self.resets += 1

    @torch.no_grad()
    def generate(self, prompts, n, temperature, max_tokens, logprobs, generation_kwargs, **kwargs):
        assert logprobs == 0
        ends = generation_kwargs["stop_token_ids"]
        completions, log_probs = [], []
        for prompt in (prompt for prompt in prompts for _ in range(n)):
            ids, found = [], []
            while len(ids) < max_tokens and not (ids and ids[-1] in ends):
                logits = self.model(torch.tensor([prompt + ids])).logits[0, -1] / temperature
                ids.append(int(torch.multinomial(logits.softmax(-1), 1)))
                found.append([logits.log_softmax(-1)[ids[-1]].item()])
            completions.append(ids)
            log_probs.append(found)
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": log_probs}


def serve(monkeypatch, server) -> None:
    """Let TRL find a fake server where it would connect to one."""
    monkeypatch.setattr("trl.generation.vllm_generation.is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr("trl.generation.vllm_generation.VLLMClient", server)
