"""
Build of the two checkpoints of the embedded world: `python -m rlhf_trl.tasks.demo.build`.

`base` is pretrained on plain text: true statements, and questions with answers of every quality. `sft` is the base
after supervised fine-tuning on demonstrations, as chats. On one machine the files are the same bit for bit.
"""

import random
import sys
from pathlib import Path
from typing import cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_trl.tasks.demo import facts
from rlhf_trl.tasks.demo.annotators import ANSWERS, draw_answer
from rlhf_trl.tasks.demo.data import render, rows
from rlhf_trl.tasks.demo.gold import gold_attributes
from rlhf_trl.tasks.demo.tokenizer import build_tokenizer
from rlhf_trl.tasks.demo.world import draw_prompts, fact_sentence, true_facts
from rlhf_trl.tasks.fitting import fit

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SEED = 0


def comment(prompt: str, text: str) -> str:
    """Return a reader's comment on an answer, one word: for its weakest attribute, if that is low."""
    attributes = gold_attributes(prompt, text)
    worst = min(attributes, key=lambda name: attributes[name])
    if attributes[worst] <= -0.5:
        return facts.COMMENTS[worst]
    return facts.SHRUG if attributes[worst] < 0.5 else facts.PRAISE


def pretraining_texts(count: int, rng: random.Random) -> list[str]:
    """
    Return `count` short documents of the language, without held-out prompts.

    They are true statements, and questions with an answer and a reader's comment on it, so that a model of them learns
    more than it says, as one of the web's text does.
    """
    statements = [fact_sentence(relation, noun, value) for (relation, noun), value in true_facts().items()]
    # All styles equally often, but for the one without end
    styles = {style: 1.0 for style in ANSWERS if style != "rambling"}
    texts = []
    for prompt in draw_prompts(rng, count, held_out=False):
        if rng.random() < 0.2:
            texts.append(" ".join(rng.sample(statements, 4)))
            continue
        text = draw_answer(prompt, styles, rng)
        row = render({"prompt": prompt, "completion": text}, conversational=False)
        texts.append(f"{row['prompt']}{row['completion']} Comment: {comment(prompt, text)}.")
    return texts


def pretraining_ids(tokenizer: PreTrainedTokenizerFast, count: int, rng: random.Random) -> list[tuple[list[int], int]]:
    """Return documents as ids, each with the number of its first ids without loss, 0."""
    return [(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id], 0) for text in pretraining_texts(count, rng)]


def demonstration_ids(
    tokenizer: PreTrainedTokenizerFast, seed: int, held_out: bool, count: int
) -> list[tuple[list[int], int]]:
    """Return demonstrations as ids, each with the number of its first ids without loss, those of its prompt."""
    sequences = []
    for row in rows("prompt_completion", seed, held_out, count):
        chat = render(row, conversational=True)
        ids = [
            tokenizer.apply_chat_template(messages, add_generation_prompt=len(messages) == 1, return_dict=False)
            for messages in (chat["prompt"], chat["prompt"] + chat["completion"])
        ]
        sequences.append((ids[1], len(ids[0])))
    return sequences


def batch_loss(model: LlamaForCausalLM, sequences: list[tuple[list[int], int]]) -> torch.Tensor:
    """Return the mean cross-entropy over the tokens with loss."""
    longest = max(len(ids) for ids, _ in sequences)
    input_ids = torch.tensor([ids + [model.config.pad_token_id] * (longest - len(ids)) for ids, _ in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in sequences])
    labels = input_ids.masked_fill(mask == 0, -100)
    for row, (_, prompt_length) in zip(labels, sequences, strict=True):
        row[:prompt_length] = -100
    return model(input_ids=input_ids, attention_mask=mask, labels=labels).loss


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama of about 0.2 M parameters with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=cast(int, tokenizer.pad_token_id),
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def build(folder: Path, pretraining_steps: int = 1000, sft_steps: int = 120) -> None:
    """Write `folder/base` and `folder/sft`, models with their tokenizer (some minutes on one thread)."""
    # With one thread, floats are always added in the same order
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = build_tokenizer()
    model = new_model(tokenizer)
    fit(model, batch_loss, pretraining_ids(tokenizer, 20_000, rng), pretraining_steps, 64, 3e-3, rng)
    save(model, tokenizer, folder / "base")
    fit(model, batch_loss, demonstration_ids(tokenizer, SEED, False, 2000), sft_steps, 64, 1e-3, rng)
    save(model, tokenizer, folder / "sft")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model and its tokenizer, for plain transformers to load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKPOINTS)
