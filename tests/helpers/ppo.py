"""A tiny policy under PPO."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_trl.ppo import PPOConfig, PPOTrainer
from tests.helpers.tiny import QUIET_ON_CPU, WORDS

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def save_reward_model(base, out, lora=True, seed=5):
    """Return a reward model with random weights: an adapter on `base`, or a full model."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    if lora:
        model = get_peft_model(model, LoraConfig(**LORA, task_type="SEQ_CLS", init_lora_weights=False))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


def sampled(model, tmp_path, **kwargs):
    """Return a trainer that really samples, with PPO's defaults where `make_trainer` has others."""
    trainer, _ = make_trainer(model, tmp_path, **({"rollout_func": None, "temperature": 1.0} | kwargs))
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def count_of_a(completions, **kwargs):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text.split().count("a")) for text in texts]


def completion_of(tokenizer, prompt: str, extra: int = 0) -> list[int]:
    """Return a completion that depends on the prompt alone: 2 to 6 words, with EOS for most."""
    generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
    length = int(torch.randint(2, 7, (1,), generator=generator))
    words = [WORDS[int(i)] for i in torch.randint(0, len(WORDS), (length,), generator=generator)]
    ids = tokenizer(" ".join(words))["input_ids"]
    return ids + ([tokenizer.eos_token_id] if length < 6 else [])


def score(completions, **kwargs):
    return [len(set(c.split())) - 0.3 * len(c.split()) for c in completions]


def prompts(n: int) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    rows = [
        " ".join(WORDS[int(j)] for j in torch.randint(0, len(WORDS), (1 + i % 4,), generator=generator))
        for i in range(n)
    ]
    return Dataset.from_dict({"prompt": [f"{row} {WORDS[i % 16]}" for i, row in enumerate(rows)]})


class Rollouts:
    """A `rollout_func` that answers each prompt the same way, and remembers what it was asked."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.calls = []

    def __call__(self, batch, trainer):
        self.calls.append(list(batch))
        ids = [completion_of(self.tokenizer, prompt) for prompt in batch]
        return {
            "prompt_ids": self.tokenizer(batch)["input_ids"],
            "completion_ids": ids,
            "logprobs": [[0.0] * len(row) for row in ids],
        }


def make_trainer(model, tmp_path, data=None, path=None, **kwargs):
    """Return a trainer with small sizes; `path` says where the tokenizer is if `model` is no path."""
    tokenizer = AutoTokenizer.from_pretrained(path or model)
    defaults = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "num_iterations": 1,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-4,  # at the default the rounding of a tiny gradient moves a weight by more than 1e-5
        "lr_scheduler_type": "constant",
        "max_completion_length": 8,
        **QUIET_ON_CPU,
        "head_init": "normal",
        "vf_coef": 0.5,
        "beta": 0.1,
        "temperature": 0.7,
        "max_steps": -1,
        "num_train_epochs": 1,
    }
    rollouts = Rollouts(tokenizer)
    rollout_func = kwargs.pop("rollout_func", rollouts)
    extra = {
        k: kwargs.pop(k)
        for k in ("reward_funcs", "combine", "peft_config", "callbacks", "eval_dataset", "ptx_dataset")
        if k in kwargs
    }
    trainer = PPOTrainer(
        model,
        args=PPOConfig(str(tmp_path / "run"), **(defaults | kwargs)),
        train_dataset=data if data is not None else prompts(8),
        processing_class=tokenizer,
        rollout_func=rollout_func,
        **({"reward_funcs": score} | extra),
    )
    return trainer, rollouts
