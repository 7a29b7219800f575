"""
PPO in plain PyTorch, the practical limit: no metrics, no padding, no resuming.

Option: `critic`, either `head` (on the policy's hidden states) or `model` (a separate network).
"""

import copy
from contextlib import nullcontext

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from bench.setting import LORA, Meter, Setting, contend

EPSILON, CLIPRANGE_VALUE, VF_COEF, LAM, MAX_GRAD_NORM = 0.2, 0.2, 0.1, 0.95, 1.0


class Loop:
    """
    PPO with the defaults of our PPOConfig.

    Shapes: B sequences of P prompt and T completion tokens; `ids` is (B, P + T), everything per token (B, T).
    """

    def __init__(self, setting: Setting, critic: str = "head"):
        self.setting = setting
        device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, setting.dtype)
        self.policy = AutoModelForCausalLM.from_pretrained(setting.policy, dtype=dtype).to(device)
        self.causal = self.policy  # without the adapter around it
        if setting.lora:
            self.policy = get_peft_model(self.policy, LoraConfig(**LORA))
            self.reference = None
        else:
            self.reference = copy.deepcopy(self.policy).requires_grad_(False)

        def classifier():
            return AutoModelForSequenceClassification.from_pretrained(setting.reward, dtype=dtype).to(device)

        self.reward = classifier().requires_grad_(False)
        self.critic = classifier() if critic == "model" else None
        self.head = torch.nn.Linear(self.causal.config.hidden_size, 1, device=device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        critic_parameters = self.head.parameters() if self.critic is None else self.critic.parameters()
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad] + list(critic_parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=setting.learning_rate, eps=1e-5, weight_decay=0.0, fused=True
        )

    def hidden(self, model, ids: Tensor) -> Tensor:
        """Return the last hidden states before each completion token, (B, T, width)."""
        return model.model(input_ids=ids, use_cache=False).last_hidden_state[:, self.setting.prompt_tokens - 1 : -1]

    def log_probs(self, model, hidden: Tensor, ids: Tensor) -> Tensor:
        labels = ids[:, self.setting.prompt_tokens :]
        # In two dimensions, since torch copies the head's weight once per row for a strided view in three
        logits = model.lm_head(hidden.flatten(0, 1)).float()
        return -cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape)

    def values(self, hidden: Tensor, ids: Tensor) -> Tensor:
        if self.critic is not None:
            return self.critic.score(self.hidden(self.critic, ids)).squeeze(-1).float()
        return self.head(hidden.float()).squeeze(-1)

    @torch.no_grad()
    def generate(self, prompts: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return sampled ids; in float32 also their log-probabilities and (of a head) values, from sampling."""
        exact = self.setting.dtype == "float32"
        sampled = self.policy.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=GenerationConfig(
                max_new_tokens=self.setting.new_tokens, do_sample=True, top_k=0, top_p=1.0, temperature=1.0
            ),
            return_dict_in_generate=True,
            output_logits=exact,
            output_hidden_states=exact and self.critic is None,
        )
        ids, logp, values = sampled.sequences, None, None
        if exact:
            tokens = ids[:, self.setting.prompt_tokens :, None].unbind(dim=1)
            steps = zip(sampled.logits, tokens, strict=True)
            logp = torch.cat([step.log_softmax(dim=-1).gather(1, token) for step, token in steps], dim=1)
        if exact and self.critic is None:
            values = self.values(torch.cat([step[-1][:, -1:] for step in sampled.hidden_states], dim=1), ids)
        return ids, logp, values

    @torch.no_grad()
    def old(self, ids: Tensor, logp: Tensor | None, values: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of policy and reference, and values; those that are given aren't computed again."""
        logps, refs, all_values = [], [], []
        for rows in ids.split(self.setting.mini_batch):
            hidden = self.hidden(self.causal, rows) if logp is None else None
            if logp is None:
                logps.append(self.log_probs(self.causal, hidden, rows))
            if values is None:
                all_values.append(self.values(hidden, rows))
            reference = self.causal if self.reference is None else self.reference
            with self.policy.disable_adapter() if self.reference is None else nullcontext():
                refs.append(self.log_probs(reference, self.hidden(reference, rows), rows))
        logp = torch.cat(logps) if logp is None else logp
        values = torch.cat(all_values) if values is None else values
        return logp, torch.cat(refs), values

    @torch.no_grad()
    def score(self, ids: Tensor) -> Tensor:
        return torch.cat([self.reward(input_ids=rows).logits[:, 0] for rows in ids.split(self.setting.mini_batch)])

    def advantages(self, logp: Tensor, ref: Tensor, values: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return whitened advantages, and returns."""
        rewards = -self.setting.beta * (logp - ref)
        rewards[:, -1] += scores.float()
        advantages = torch.zeros_like(rewards)
        carried = next_value = torch.zeros_like(rewards[:, 0])
        for t in reversed(range(rewards.size(1))):
            carried = rewards[:, t] + next_value - values[:, t] + LAM * carried
            advantages[:, t], next_value = carried, values[:, t]
        whitened = (advantages - advantages.mean()) * torch.rsqrt(advantages.var(unbiased=False) + 1e-8)
        return whitened, advantages + values

    def step(self, ids: Tensor, old_logp: Tensor, old_values: Tensor, advantages: Tensor, returns: Tensor):
        """Take one optimizer step on a mini-batch."""
        hidden = self.hidden(self.causal, ids)
        values = self.values(hidden, ids)
        ratio = torch.exp(self.log_probs(self.causal, hidden, ids) - old_logp)
        policy = torch.maximum(-ratio * advantages, -ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages).mean()
        within = torch.clamp(values, old_values - CLIPRANGE_VALUE, old_values + CLIPRANGE_VALUE)
        value = 0.5 * torch.maximum((values - returns).square(), (within - returns).square()).mean()
        (policy + VF_COEF * value).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rollout(self, prompts: Tensor, meter: Meter):
        meter.start_rollout()
        with meter.phase("generate"):
            ids, logp, values = self.generate(prompts)
        assert ids.size(1) == self.setting.prompt_tokens + self.setting.new_tokens
        with meter.phase("log-probabilities"):
            logp, ref, values = self.old(ids, logp, values)
        with meter.phase("score"):
            scores = self.score(ids)
        advantages, returns = self.advantages(logp, ref, values, scores)
        with meter.phase("update"):
            for _ in range(self.setting.epochs):
                for rows in torch.randperm(len(ids), device=ids.device).split(self.setting.mini_batch):
                    self.step(ids[rows], logp[rows], values[rows], advantages[rows], returns[rows])


def train(setting: Setting, options: dict, meter: Meter) -> Loop:
    """Train for `setting.rollouts` rollouts; `options` go to [`Loop`]."""
    loop = Loop(setting, **options)
    ids = torch.tensor([prompt["ids"] for prompt in setting.prompts()], device=loop.head.weight.device)
    for i in range(setting.rollouts):
        rows = torch.arange(i * setting.batch, (i + 1) * setting.batch) % len(ids)
        loop.rollout(ids[rows], meter)
    return loop


if __name__ == "__main__":
    contend(train)
