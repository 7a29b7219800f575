"""Tiny models of several families, for what has to hold on any architecture."""

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.helpers.tiny import make_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GATED = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
# name: (class, options of its config); by tied or separate output layers, Conv1D or linear layers, rotary or learned
# positions, capped logits, embeddings of another width
ARCHITECTURES = {
    "llama": ("Llama", GATED),
    "qwen2": ("Qwen2", GATED | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", GATED | {"head_dim": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", SIZES | {"intermediate_size": 64, "initializer_range": 0.3}),
    "opt": ("OPT", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 16, "init_std": 0.3}),
}
# And by dropout, positions and attention: functions of the library or modules, values of the config or of a module,
# ALiBi, sliding windows, experts
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
MORE_ARCHITECTURES = ARCHITECTURES | {
    "gpt_bigcode": ("GPTBigCode", GPT2),
    "gpt_neo": (
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        | {"window_size": 4, "max_position_embeddings": 64, "initializer_range": 0.3},
    ),
    "gptj": ("GPTJ", GPT2 | {"rotary_dim": 4}),
    "codegen": ("CodeGen", GPT2 | {"rotary_dim": 4}),
    "xglm": ("XGLM", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "init_std": 0.3}),
    "biogpt": ("BioGpt", SIZES | {"intermediate_size": 64, "initializer_range": 0.3}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "initializer_range": 0.3}),
    "falcon": ("Falcon", FALCON),
    "falcon-alibi": ("Falcon", FALCON | {"alibi": True}),
    "mistral": ("Mistral", GATED | {"sliding_window": 4}),
    "mixtral": ("Mixtral", GATED | {"num_local_experts": 2, "router_jitter_noise": 0.3}),
    "qwen3": ("Qwen3", GATED | {"head_dim": 8}),
    "gemma": ("Gemma", GATED | {"head_dim": 8}),
    "gemma3": ("Gemma3Text", GATED | {"head_dim": 8, "sliding_window": 4}),
    "phi": ("Phi", GATED),
    "phi3": ("Phi3", GATED),
    "stablelm": ("StableLm", GATED),
    "persimmon": ("Persimmon", SIZES | {"intermediate_size": 64, "initializer_range": 0.3}),
    "olmo2": ("Olmo2", GATED),
    "cohere": ("Cohere", GATED | {"logit_scale": 1.0}),
    "starcoder2": ("Starcoder2", GATED | {"initializer_range": 0.3}),
    "granite": ("Granite", GATED | {"logits_scaling": 2.0}),
}


def make_architecture(name: str, dropout: float | None = None, **loading) -> PreTrainedModel:
    """
    Make a randomly initialised model of the family `name`.

    Args:
        name (`str`): one of `MORE_ARCHITECTURES`.
        dropout (`float`, *optional*): in place of all that its config calls some dropout.
        **loading: as of `AutoModelForCausalLM.from_config`.
    """
    family, options = MORE_ARCHITECTURES[name]
    tokenizer = make_tokenizer()
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **ends, **options)
    if dropout is not None:
        for key in [key for key in vars(config) if "drop" in key]:
            setattr(config, key, dropout)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **loading)


def save_architecture(path, name: str, dropout: float | None = None) -> str:
    """Write a model of [`make_architecture`] and its tokenizer to `path`; return it as a string."""
    make_architecture(name, dropout).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)
