"""Tiny reward models, and what their training needs."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_trl.models.initial import load_initial_model
from tests.helpers.tiny import WORDS, save_model


def save_reward_model(tmp_path, pad_is_eos=False, lora=False) -> str:
    """Save a reward model with random weights, full or an adapter, and return its path."""
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
    """Return columns of texts as columns of chats."""
    role = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {key: [[{"role": role[key], "content": text}] for text in column] for key, column in rows.items()}


def arguments(cls, folder, **options):
    """Return arguments of the class `cls` for a training on the CPU that saves and reports nothing."""
    common = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    return cls(str(folder), **(common | options))


def classifier(path, heads=("score",), seed=0):
    """Return a reward model on the model at `path`, with new heads."""
    torch.manual_seed(seed)
    return load_initial_model(path, "SEQ_CLS", None, merge_dir=f"{path}/start", heads=heads, dtype="float32")[0]


def rankings(count: int, k: int = 4) -> Dataset:
    """Return rows of `k` completions of 1 to `k` words, of which the longer one is better."""
    rows = []
    for i in range(count):
        order = [(i * 5 + j * 3) % k for j in range(k)] if k == 4 else list(range(k))
        texts = [" ".join(WORDS[(i + j) % 16] for j in range(n + 1)) for n in order]
        pairs = [(a, b) for a in range(k) for b in range(k) if order[a] > order[b]]
        better, worse = map(list, zip(*pairs, strict=True))
        rows.append({"prompt": WORDS[i % 16], "completions": texts, "better": better, "worse": worse})
    return Dataset.from_list(rows)
