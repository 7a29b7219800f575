"""Trainings whose planned memory is held against a measured peak, and the models and data that they take."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedConfig,
)

from bench.gpu.models import make_tokenizer

ROWS = 32
GRPO = (
    "stage.args.num_generations=4",
    "stage.args.gradient_accumulation_steps=1",
    "stage.args.steps_per_generation=2",
)
PPO = ("stage=ppo", "stage.args.num_iterations=1", "stage.args.steps_per_generation=2")
NO_CHECKPOINTING = "stage.args.gradient_checkpointing=false"


@dataclass(frozen=True)
class Configuration:
    """
    A training to measure.

    Attributes:
        name (`str`): shown in the table.
        model (`str`): one of `MODELS`.
        words (`tuple[str, ...]`): overrides of its config. `{folder}` is that of the model.
        ranks (`int`), engine (`str`): how it is launched, `DDP` with several ranks.
    """

    name: str
    model: str
    words: tuple[str, ...]
    ranks: int = 1
    engine: str = "none"


def ppo(*words: str, reward: str = "model", accumulated: int = 1) -> tuple[str, ...]:
    """Return the words of a PPO run with two rollouts of 16 completions of 48 tokens."""
    scored = f"reward.{reward}.path={{folder}}/{'reward' if reward == 'model' else 'reward_adapter'}"
    sizes = (f"stage.args.gradient_accumulation_steps={accumulated}", "stage.args.per_device_train_batch_size=8")
    lengths = ("stage.args.max_completion_length=48", "stage.args.total_episodes=32", f"reward.{reward}.batch_size=8")
    return (*PPO, f"reward={reward}", f"reward.{reward}.run=null", scored, *sizes, *lengths, *words)


CRITIC_START = "critic.path={folder}/reward_adapter"
CONFIGURATIONS = (
    Configuration("sft, full", "llama", ("stage=sft", NO_CHECKPOINTING)),
    Configuration("sft, full, checkpointing", "llama", ("stage=sft",)),
    Configuration("sft, full, autocast in bfloat16", "olmo2", ("stage=sft", NO_CHECKPOINTING, "stage.args.bf16=true")),
    Configuration("sft, LoRA", "olmo2", ("stage=sft", NO_CHECKPOINTING, "adapter=lora")),
    Configuration("sft, full, dropout", "gpt2", ("stage=sft", NO_CHECKPOINTING)),
    Configuration("reward, full", "llama", ("stage=reward", NO_CHECKPOINTING)),
    Configuration("reward, LoRA, checkpointing", "gpt_neox", ("stage=reward", "adapter=lora")),
    Configuration("dpo, full", "gpt2", ("stage=dpo", NO_CHECKPOINTING)),
    Configuration("dpo, LoRA", "llama", ("stage=dpo", NO_CHECKPOINTING, "adapter=lora")),
    Configuration("kto, full, checkpointing", "gpt_neox", ("stage=kto",)),
    Configuration("orpo, full", "olmo2", ("stage=orpo", NO_CHECKPOINTING)),
    Configuration("grpo, full", "olmo2", ("stage=grpo", *GRPO, NO_CHECKPOINTING)),
    Configuration("rloo, LoRA, checkpointing", "llama", ("stage=rloo", *GRPO, "adapter=lora")),
    Configuration("ppo, critic=head, full", "llama", ppo("critic=head", NO_CHECKPOINTING)),
    Configuration("ppo, critic=head, full, accumulated", "gpt2", ppo("critic=head", NO_CHECKPOINTING, accumulated=2)),
    Configuration("ppo, critic=model, full", "olmo2", ppo("critic=model", NO_CHECKPOINTING)),
    Configuration("ppo, critic=model, full, checkpointing", "llama", ppo("critic=model")),
    Configuration("ppo, critic=head, LoRA", "SmolLM2-135M", ppo("critic=head", NO_CHECKPOINTING, "adapter=lora")),
    Configuration(
        "ppo, four roles on one base",
        "SmolLM2-135M",
        ppo("critic=adapter", CRITIC_START, NO_CHECKPOINTING, "adapter=lora", reward="adapter"),
    ),
    Configuration("ppo, critic=head, QLoRA", "SmolLM2-135M", ppo("critic=head", NO_CHECKPOINTING, "adapter=qlora")),
    Configuration("sft, full, DDP", "llama", ("stage=sft", NO_CHECKPOINTING), 2, "DDP"),
    Configuration("ppo, critic=model, full, DDP", "olmo2", ppo("critic=model", NO_CHECKPOINTING), 2, "DDP"),
    Configuration("sft, full, FSDP2", "llama", ("stage=sft", NO_CHECKPOINTING), 2, "FSDP2"),
    Configuration("sft, LoRA, FSDP2", "olmo2", ("stage=sft", NO_CHECKPOINTING, "adapter=lora"), 2, "FSDP2"),
    Configuration("dpo, full, checkpointing, FSDP2", "gpt_neox", ("stage=dpo",), 2, "FSDP2"),
    Configuration("ppo, critic=head, full, FSDP2", "llama", ppo("critic=head", NO_CHECKPOINTING), 2, "FSDP2"),
    Configuration("ppo, critic=model, full, FSDP2", "olmo2", ppo("critic=model", NO_CHECKPOINTING), 2, "FSDP2"),
)


def words(configuration: Configuration, folder: Path, output: Path) -> list[str]:
    """Return the whole command line of a configuration, without the program."""
    stage = next(word for word in configuration.words if word.startswith("stage="))
    online = stage in ("stage=ppo", "stage=grpo", "stage=rloo")
    data = {"stage=reward": "pairs", "stage=dpo": "pairs", "stage=orpo": "pairs", "stage=kto": "thumbs"}
    file = data.get(stage, "completions")
    feedback = [f"data/feedback={file}"] if file != "completions" else []
    given = [word.format(folder=folder) for word in configuration.words]
    if online and not any(word.startswith("reward=") for word in given):
        given += ["reward=length", "reward.length.kwargs.max_length=20"]
    steps = ["stage.args.max_steps=2"] if stage != "stage=ppo" else []
    sizes = ["stage.args.per_device_train_batch_size=8"] if stage != "stage=ppo" else []
    if online and stage != "stage=ppo":
        sizes.append("stage.args.max_completion_length=48")
    return [
        "model=hf",
        f"model.path={folder}/policy",
        "data=files",
        f"data.paths={folder.parent}/{file}.jsonl",
        *feedback,
        "data.eval_size=null",
        f"runs_dir={output}",
        "stage.args.eval_on_start=false",
        "stage.args.save_strategy=no",
        "+stage.args.use_cpu=true",
        "+stage.args.dataloader_drop_last=true",
        *steps,
        *sizes,
        *given,
    ]


SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 8192}
POSITIONS = {"max_position_embeddings": 512}
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, **POSITIONS, intermediate_size=1024, num_key_value_heads=2),
    "olmo2": lambda: Olmo2Config(
        **(SIZES | {"num_hidden_layers": 4, "vocab_size": 24_576}),
        **POSITIONS,
        intermediate_size=1024,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "gpt2": lambda: GPT2Config(n_embd=384, n_layer=6, n_head=6, n_positions=512, vocab_size=8192),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, **POSITIONS, intermediate_size=1536),
    "SmolLM2-135M": lambda: LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
        tie_word_embeddings=True,
        **POSITIONS,
    ),
}


def make_models(name: str, folder: Path) -> None:
    """Write a policy with random weights, a reward model of its size, one that is an adapter, and their tokenizer."""
    config = MODELS[name]()
    tokenizer = make_tokenizer(config.get_text_config().vocab_size)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        None,
    )
    config.num_labels = 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "policy")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    base: Any = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    get_peft_model(
        base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    ).save_pretrained(folder / "reward_adapter")
    for part in ("policy", "reward", "reward_adapter"):
        tokenizer.save_pretrained(folder / part)


def make_data(folder: Path) -> None:
    """Write texts of words that every model has, of different lengths: completions, pairs and thumbs."""
    generator = random.Random(0)

    def text(shortest: int, longest: int) -> str:
        return " ".join(f"w{generator.randrange(2, 8192)}" for _ in range(generator.randint(shortest, longest)))

    files: dict[str, list[dict[str, Any]]] = {"completions": [], "pairs": [], "thumbs": []}
    for i in range(ROWS * 4):
        prompt, first, second = text(32, 64), text(64, 96), text(64, 96)
        files["completions"].append({"prompt": prompt, "completion": first})
        pair = {"completion_a": first, "completion_b": second, "preferred": "a"}
        files["pairs"].append({"prompt": prompt} | pair)
        files["thumbs"].append({"prompt": prompt, "completion": first, "thumb": i % 2 == 0})
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
