"""
Randomly initialized models and their tokenizer. Nothing is downloaded.

They are Llamas in the sizes of Qwen2.5: for `model_type="qwen2"` AutoTokenizer ignores the class of the tokenizer that
was saved, and so would not read a word-level one.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bench.setting import LORA


@dataclass(frozen=True)
class Size:
    """Sizes of a model, by the names of `LlamaConfig`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 151_936

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def trunk(self) -> int:
        """Parameters of all layers, without the embedding."""
        d, i, kv = self.hidden_size, self.intermediate_size, self.num_key_value_heads * self.head_dim
        attention = 2 * d * d + 2 * d * kv
        return self.num_hidden_layers * (attention + 3 * d * i + 2 * d) + d

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, which is the output layer too."""
        return self.vocab_size * self.hidden_size

    @property
    def lora(self) -> int:
        """Parameters of LoRA on all linear layers."""
        d, i, kv = self.hidden_size, self.intermediate_size, self.num_key_value_heads * self.head_dim
        widths = 2 * (d + d) + 2 * (d + kv) + 2 * (d + i) + (i + d)
        return self.num_hidden_layers * LORA["r"] * widths


# Those of Qwen2.5-0.5B and Qwen2.5-1.5B, both with tied embeddings, and one for CPUs
SIZES = {
    "0.5B": Size(896, 4864, 24, 14, 2),
    "1.5B": Size(1536, 8960, 28, 12, 2),
    "tiny": Size(64, 128, 2, 4, 2, vocab_size=1_024),
}


def make_config(size: Size) -> LlamaConfig:
    """Return the config of a model."""
    return LlamaConfig(
        **{name: getattr(size, name) for name in size.__dataclass_fields__},
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        num_labels=1,
        dtype="bfloat16",
    )


def empty_model(size: Size, dtype: torch.dtype, model_class: type = LlamaForCausalLM) -> PreTrainedModel:
    """Return a model without weights."""
    with torch.device("meta"):
        return model_class(make_config(size)).to(dtype)


def make_models(size: Size, folder: Path, device: str):
    """
    Write a policy, a reward model of the same size, and a reward model that is an adapter on the policy.

    The tokenizer has a word for each id. EOS and padding are not sampled: all completions have full length.
    """
    tokenizer = make_tokenizer(size.vocab_size)
    config = make_config(size)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            policy, reward = LlamaForCausalLM(config), LlamaForSequenceClassification(config)
    finally:
        torch.set_default_dtype(before)
    policy.generation_config.suppress_tokens = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    policy.save_pretrained(folder / "policy")
    reward.save_pretrained(folder / "reward")
    base = LlamaForSequenceClassification.from_pretrained(folder / "policy", dtype=torch.bfloat16, num_labels=1)
    get_peft_model(base, LoraConfig(**LORA | {"task_type": "SEQ_CLS"})).save_pretrained(folder / "reward_adapter")
    for name in ("policy", "reward", "reward_adapter"):
        tokenizer.save_pretrained(folder / name)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer with `vocab_size` words."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(2, vocab_size))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def make_prompts(size: Size, folder: Path, count: int, tokens: int):
    """Write `count` prompts of `tokens` tokens each, as `bench.setting.Setting.prompts` reads them."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(2, size.vocab_size, (count, tokens), generator=generator).tolist()
    rows = [{"text": " ".join(f"w{i}" for i in ids), "ids": ids} for ids in drawn]
    (folder / "prompts.json").write_text(json.dumps(rows))
