"""Policies to talk to (`stage=chat`, `stage=generate`): their prompts and answers, and what rewards say of these."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trl.data.chat_template import template_columns
from rlhf_trl.data.tokenize import prompt_ids
from rlhf_trl.rewards.combine import combined, reward_array

Prompt = str | list[dict[str, str]]


class Policy(NamedTuple):
    """A model that writes, with its own tokenizer."""

    name: str
    path: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase

    def ids(self, prompt: Prompt, **template_kwargs) -> list[int]:
        """Ids of a prompt, as training gives it to the policy; `template_kwargs` are the chat template's."""
        return prompt_ids(self.tokenizer, prompt, **template_kwargs)

    def completion(self, prompt: Prompt, ids: Sequence[int]) -> Prompt:
        """What was written after `prompt`: text, or one assistant message where that is a chat."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    @property
    def chats(self) -> bool:
        """Whether it has a chat template; else it goes on with a text."""
        return self.tokenizer.chat_template is not None


def as_prompt(text: str, policy: Policy, system_prompt: str | None = None) -> Prompt:
    """What someone wrote, as the policy takes it: a user's turn for one with a chat template, else the text itself."""
    if not policy.chats:
        return text if system_prompt is None else f"{system_prompt}\n\n{text}"
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": text}]


def score(
    rewards: Sequence[Callable], policy: Policy, prompts: list[Prompt], ids: list[list[int]], columns: dict[str, list]
) -> list[dict[str, float | None]]:
    """
    What each reward says of completions, one dict each; `None` where it doesn't apply.

    Args:
        rewards (`Sequence[Callable]`): as in `rlhf_trl.rewards.model`.
        policy ([`Policy`]): who wrote them.
        prompts (`list`): one for each completion.
        ids (`list[list[int]]`): token ids of the completions, with the end token where it was written.
        columns (`dict[str, list]`): what function rewards may read besides.
    """
    completions = [policy.completion(prompt, row) for prompt, row in zip(prompts, ids, strict=True)]
    found, columns = {}, template_columns(policy.tokenizer, columns, len(ids))
    for reward in rewards:
        reward.bind(policy.tokenizer)
        found[reward.__name__] = reward(prompts=prompts, completions=completions, completion_ids=ids, **columns)
    return [{name: values[i] for name, values in found.items()} for i in range(len(ids))]


def total(values: dict[str, float | None], rewards: Sequence[Callable], combine: Callable) -> float | None:
    """One score of a completion's rewards; `None` where none applies, not finite where one of them is no number."""
    if not rewards:
        return None
    score = combined({name: reward_array([value]) for name, value in values.items()}, rewards, combine).item()
    return None if math.isnan(score) else score
