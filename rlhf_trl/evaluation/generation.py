"""Completions of policies, and their log-probabilities."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from rlhf_trl.data.multimodal import extra_of
from rlhf_trl.data.tokenize import end_tokens, prompt_ids
from rlhf_trl.models.inputs import batch_inputs
from rlhf_trl.models.loading import load_model
from rlhf_trl.models.sizes import check_rows, sizes_of
from rlhf_trl.models.tokenizers import load_tokenizer

Prompt = str | list[dict[str, str]]
TOO_LONG = "Set `stage.max_completion_length` lower, or drop the longest prompts."


class Policy(NamedTuple):
    """A model that generates, with its own tokenizer."""

    name: str
    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def ids(self, prompt: Prompt, **template_kwargs) -> list[int]:
        """Return the token ids of a prompt, as training gives it to the policy; keywords are the chat template's."""
        return prompt_ids(self.tokenizer, prompt, **template_kwargs)

    def completion(self, prompt: Prompt, ids: list[int]) -> Prompt:
        """Return what was written after `prompt`: text, or one assistant message where that is a chat."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    @property
    def chats(self) -> bool:
        """True for a policy with a chat template; another one continues a text."""
        return self.tokenizer.chat_template is not None


def load_policy(name: str, path: str, dtype: str | None) -> Policy:
    """Load a policy onto the device, in evaluation mode."""
    model: Any = load_model(path, dtype=dtype)  # `PreTrainedModel.to` is declared without `self`
    return Policy(name, path, model.eval().to(PartialState().device), load_tokenizer(path))


def as_prompt(text: str, policy: Policy, system_prompt: str | None = None) -> Prompt:
    """Return a text as the policy takes it: a user's turn for one with a chat template, else the text itself."""
    if not policy.chats:
        return text if system_prompt is None else f"{system_prompt}\n\n{text}"
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": text}]


def generation_config(temperature: float, max_completion_length: int, top_p: float = 1.0) -> dict[str, Any]:
    """Return the arguments of sampling, by default from the full distribution; at temperature 0 decoding is greedy."""
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    return {**(drawing if temperature > 0 else {"do_sample": False}), "max_new_tokens": max_completion_length}


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_completion_length: int,
    temperature: float,
    batch_size: int,
    seed: int,
    top_p: float = 1.0,
) -> list[list[int]]:
    """
    Sample one completion per prompt, by default from the policy's full distribution (no top-k or repetition penalty).

    Args:
        model ([`~transformers.PreTrainedModel`]), tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Policy to sample from.
        prompts (`Sequence[list[int]]`):
            Token ids.
        max_completion_length (`int`):
            Limit in tokens.
        temperature (`float`):
            Logits are divided by it; at 0 decoding is greedy.
        batch_size (`int`):
            Number of prompts at a time.
        seed (`int`):
            Set before the first batch: the same policy, prompts and seed lead to the same completions.
        top_p (`float`):
            Only the likeliest tokens with this probability in all are drawn from.

    Returns:
        `list[list[int]]`: token ids, up to the end token and with it where it was written.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if prompts and completions are longer than the policy's positions.
    """
    sizes = sizes_of(model)
    check_rows(sizes, prompts, max_completion_length, TOO_LONG)
    set_seed(seed)
    ends, pad = end_tokens(tokenizer), tokenizer.pad_token_id
    # The model's own generation config would fill in whatever is unset here
    model.generation_config = GenerationConfig(
        **generation_config(temperature, max_completion_length, top_p), eos_token_id=ends, pad_token_id=pad
    )
    completions = []
    # A sampled place of an image would have no image (as TRL's rollouts have it)
    if (place := getattr(model.config, "image_token_id", None)) is not None:
        model.generation_config.suppress_tokens = [place]
    for batch in _batches(prompts, batch_size):
        width = max(len(ids) for ids in batch)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=model.device)
        # From the lengths: the pad token may be the end token, and be part of a prompt
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": mask} | batch_inputs(extra_of(batch), mask)
        written = model.generate(**inputs)[:, width:].tolist()  # pyright: ignore[reportCallIssue] of GenerationMixin
        completions += [_to_the_end(row, ends) for row in written]
    check_rows(sizes, [[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)], 0, TOO_LONG)
    return completions


def _to_the_end(ids: list[int], ends: list[int]) -> list[int]:
    """Return `ids` up to the first end token, included."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]


def sample_in_turns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_completion_length: int,
    temperature: float,
    batch_size: int,
    seed: int,
) -> list[list[int]]:
    """
    Sample as [`sample`] does, from the same distribution by other draws, for many completions: after every quarter of
    the length (16 tokens at least) finished ones are removed, so that a batch doesn't wait for its longest.
    """
    step, ends = max(16, -(-max_completion_length // 4)), end_tokens(tokenizer)
    completions, going = [[] for _ in prompts], list(range(len(prompts)))
    for turn, done in enumerate(range(0, max_completion_length, step)):
        if not going:
            break
        starts = [prompts[row] + completions[row] for row in going]
        length = min(step, max_completion_length - done)
        more = sample(model, tokenizer, starts, length, temperature, batch_size, seed=seed + turn)
        for row, ids in zip(going, more, strict=True):
            completions[row] += ids
        going = [row for row in going if completions[row][-1] not in ends]
    return completions


class TokenStatistics(NamedTuple):
    """Log-probability and entropy of each token of a completion, in nats, shape (T,) each."""

    logps: Tensor
    entropy: Tensor


@torch.inference_mode()
def token_statistics(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    temperature: float,
    batch_size: int,
) -> list[TokenStatistics]:
    """
    Compute the log-probability of each token of each completion, and the entropy of its distribution.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy whose distribution is used.
        prompts (`Sequence[list[int]]`), completions (`Sequence[list[int]]`):
            Token ids, one completion per prompt, each of at least one token.
        temperature (`float`):
            Logits are divided by it, as they were in sampling.
        batch_size (`int`):
            Number of rows at a time.
    """
    found = []
    rows = list(zip(prompts, completions, strict=True))
    check_rows(sizes_of(model), [[*prompt, *completion] for prompt, completion in rows], 0, TOO_LONG)
    for batch in _batches(rows, batch_size):
        width = max(len(prompt) + len(completion) for prompt, completion in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask, counts = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, (prompt, completion) in enumerate(batch):
            end = len(prompt) + len(completion)
            ids[i, :end] = torch.tensor(prompt + completion)
            mask[i, :end] = 1
            counts[i, len(prompt) : end] = 1
        ids, mask, counts = (tensor.to(model.device) for tensor in (ids, mask, counts))
        inputs = {"input_ids": ids, "attention_mask": mask} | batch_inputs(
            extra_of(prompt for prompt, _ in batch), mask
        )
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        # Only the completions' tokens: the others can be most of them
        kept = counts[:, 1:].bool()
        logits = logits[kept].float() / temperature
        logps = selective_log_softmax(logits, ids[:, 1:][kept]).cpu()
        entropy = entropy_from_logits(logits).cpu()
        lengths = [len(completion) for _, completion in batch]
        found += map(TokenStatistics, logps.split(lengths), entropy.split(lengths))
    return found


@torch.inference_mode()
def last_hidden_states(
    model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[list[int]], batch_size: int
) -> Tensor:
    """
    Return the last hidden state at the last token of each completion, shape (N, hidden size), in float32 on the CPU.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy that reads them.
        prompts, completions (`Sequence[list[int]]`):
            Token ids, one completion per prompt; together at least one token.
        batch_size (`int`):
            Number of rows at a time.
    """
    found = []
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    check_rows(sizes_of(model), rows, 0, TOO_LONG)
    for batch in _batches(rows, batch_size):
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=model.device)
        lengths = torch.tensor([len(row) for row in batch], device=model.device)
        mask = (torch.arange(width, device=model.device) < lengths.unsqueeze(1)).long()
        inputs = {"input_ids": ids, "attention_mask": mask} | batch_inputs(extra_of(batch), mask)
        states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
        found.append(states[torch.arange(len(batch), device=model.device), lengths - 1].float().cpu())
    return torch.cat(found)


def _batches(rows: Sequence, size: int) -> Iterator[Sequence]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
