"""Tiny reward models."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.helpers.tiny import save_model


def save_reward_model(tmp_path, pad_is_eos=False, lora=False) -> str:
    base = save_model(tmp_path / "base", pad_is_eos=pad_is_eos)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    if lora:
        config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
        model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "rm")
    return str(tmp_path / "rm")


ROWS = {
    "prompt": ["a b", "c", "d e f g", "h"],
    "chosen": ["i j k", "l", "m n", "o p a b c d"],
    "rejected": ["p", "o n m", "l", "k j"],
}


def as_chat(rows):
    role = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {key: [[{"role": role[key], "content": text}] for text in column] for key, column in rows.items()}
