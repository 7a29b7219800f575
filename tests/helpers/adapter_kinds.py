"""Adapters of every kind."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.helpers.architectures import ARCHITECTURES

# Names of the embedding, of the output layer, and of an attention's layers
LAYERS = dict.fromkeys(ARCHITECTURES, ("embed_tokens", "lm_head", ["q_proj", "v_proj"])) | {
    "gpt2": ("wte", "lm_head", ["c_attn"]),
    "gpt_neox": ("embed_in", "embed_out", ["query_key_value"]),
}


def kinds(name: str) -> dict[str, dict]:
    """Options of adapters on the architecture `name`."""
    embedding, head, attention = LAYERS[name]
    return {
        "all-linear": {},
        "attention": {"target_modules": attention},
        "one layer": {"target_modules": attention, "layers_to_transform": [1]},
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True, "rank_pattern": {attention[0]: 2}, "lora_bias": name == "llama"},
        "gaussian": {"init_lora_weights": "gaussian"},
        "embedding in full": {"modules_to_save": [embedding]},
        "both ends in full": {"modules_to_save": [embedding, head]},
        "tied ends in full": {"modules_to_save": [embedding], "ensure_weight_tying": True},
        "tokens": {"trainable_token_indices": [6, 7, 1]},
        "lora of the embedding": {"target_modules": [*attention, embedding]},
        "dora of the embedding": {"target_modules": [*attention, embedding], "use_dora": True},
    }


def config(options: dict, task_type: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": task_type} | options)


def save_adapter(base: str, out: str, options: dict, task_type: str = "CAUSAL_LM") -> str:
    """Return an adapter all of whose weights have moved."""
    torch.manual_seed(1)
    auto_class = AutoModelForSequenceClassification if task_type == "SEQ_CLS" else AutoModelForCausalLM
    labels = {"num_labels": 1} if task_type == "SEQ_CLS" else {}
    model = get_peft_model(auto_class.from_pretrained(base, **labels), config(options, task_type))
    move(model)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def move(model: PeftModel) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
