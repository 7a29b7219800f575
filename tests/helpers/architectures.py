"""Tiny models of several families, for what has to hold on any architecture."""

import torch
import transformers

from tests.tiny import make_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GATED = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3}
# name: (class, options of its config); by tied or separate output layers, Conv1D or linear layers, rotary or learned
# positions, capped logits, embeddings of another width
ARCHITECTURES = {
    "llama": ("Llama", GATED),
    "qwen2": ("Qwen2", GATED | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", GATED | {"head_dim": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}),
    "gpt_neox": ("GPTNeoX", SIZES | {"intermediate_size": 64, "initializer_range": 0.3}),
    "opt": ("OPT", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 16, "init_std": 0.3}),
}
HEADS = {"GPT2": "GPT2LMHeadModel"}


def save_architecture(path, name: str) -> str:
    """Write a randomly initialised model of the family `name` and its tokenizer to `path`; return it as a string."""
    family, options = ARCHITECTURES[name]
    tokenizer = make_tokenizer()
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **ends, **options)
    torch.manual_seed(0)
    model = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
