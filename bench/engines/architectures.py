"""Small models of other families, with random weights and the tokenizer of the embedded model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from rlhf_trl.runs.paths import resolve_path

MODELS = "models"  # their folder, beside the runs
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GATED: dict[str, Any] = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
# By what engines meet: tied output layers (all but GPT-NeoX), learned positions (GPT-2, OPT), embeddings of another
# width than the layers (OPT), scaled embeddings and capped logits (Gemma), Conv1D (GPT-2)
ARCHITECTURES: dict[str, Callable[[dict[str, Any]], PreTrainedConfig]] = {
    "Qwen2": lambda ids: Qwen2Config(**ids, **GATED, tie_word_embeddings=True),
    "Gemma2": lambda ids: Gemma2Config(**ids, **GATED, head_dim=12, query_pre_attn_scalar=12),
    "GPT-2": lambda ids: GPT2Config(**ids, n_embd=48, n_layer=2, n_head=4, n_positions=256),
    "GPT-NeoX": lambda ids: GPTNeoXConfig(**ids, **SIZES, intermediate_size=96),
    "OPT": lambda ids: OPTConfig(**ids, **SIZES, ffn_dim=96, word_embed_proj_dim=24),
}


def make_models(folder: Path) -> None:
    """Write the models that a folder lacks."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("demo:base", None, "."))
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    for name, config in ARCHITECTURES.items():
        if not (folder / name).is_dir():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config({"vocab_size": len(tokenizer)} | ids))
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
