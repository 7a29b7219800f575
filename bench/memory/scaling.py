"""
Planned memory of PPO for policies of 1, 8 and 70 billion parameters on 1, 8 and 64 GPUs. Nothing is run.

The sizes are those of Llama 3.2 1B, Llama 3.1 8B and 70B, from their configs alone. A micro-batch is 4 sequences of
1,024 tokens, half of which are the completion; a rank samples 32 completions at a time; layers are recomputed
(`gradient_checkpointing`). The reward model has the policy's size, in bfloat16.
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_trl.checks.memory import NF4, USABLE
from rlhf_trl.models.dry_passes import Batch, Computation
from rlhf_trl.models.memory import GIB, Engine, Training, adapted, plan_memory, roles_of
from rlhf_trl.models.weight_bytes import weight_bytes

CARD = 80  # GiB of an A100 or H100
SIZES: dict[str, dict[str, Any]] = {
    "1B": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    },
    "8B": {
        **{"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8},
    },
    "70B": {
        **{"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 8},
    },
}
ENGINES = {1: Engine(), 8: Engine("FSDP2", 8, bf16=True), 64: Engine("FSDP2", 64, bf16=True)}
PROMPT, NEW, ROWS, SAMPLED = 512, 512, 4, 32


class Way(NamedTuple):
    """
    A way to hold the four roles.

    Attributes:
        name (`str`): shown in the table.
        words (`str`): overrides of its config.
        adapter (`str`, *optional*): `lora` or `qlora`.
        critic (`str`), on_base (`bool`): kind of the critic, and whether the reward model is an adapter.
    """

    name: str
    words: str
    adapter: str | None
    critic: str
    on_base: bool


WAYS = (
    Way("all weights, a critic network", "critic=model", None, "model", False),
    Way("all weights, a value head", "critic=head", None, "head", False),
    Way("LoRA, four roles on one base", "adapter=lora critic=adapter reward=adapter", "lora", "adapter", True),
    Way("QLoRA, four roles on one base", "adapter=qlora critic=adapter reward=adapter", "qlora", "adapter", True),
)


class Cell(NamedTuple):
    """
    A plan.

    Attributes:
        size (`str`), way ([`Way`]), gpus (`int`): what is planned.
        gib (`float`, *optional*): planned peak of a rank; `None` where PyTorch's FSDP2 doesn't take a 4-bit base.
    """

    size: str
    way: Way
    gpus: int
    gib: float | None

    @property
    def fits(self) -> bool:
        return self.gib is not None and self.gib <= USABLE * CARD


def training(size: str, way: Way, gpus: int) -> Training:
    """Return a training without weights."""
    config = LlamaConfig(**SIZES[size], vocab_size=128_256, num_labels=1, max_position_embeddings=8192)
    engine = ENGINES[gpus]
    with torch.device("meta"):
        policy: Any = LlamaForCausalLM(config).to(torch.float32 if way.adapter is None else torch.bfloat16)
        reward = LlamaForSequenceClassification(config).to(torch.bfloat16)
    trunk = copy.deepcopy(policy.base_model).float() if way.critic == "model" else None
    lora = 0.0
    if way.adapter is not None:
        policy = adapted(policy, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        lora = float(sum(4 * p.numel() for p in policy.parameters() if p.requires_grad))
    scored = ("reward", None, lora, 32) if way.on_base else ("reward", reward, weight_bytes(reward), 32)
    return Training(
        policy,
        "log_probs",
        Batch(ROWS, PROMPT + NEW, NEW),
        Computation(torch.bfloat16 if engine.ranks == 1 else None, on_gpu=True),
        engine=engine,
        quantization=NF4 if way.adapter == "qlora" else None,
        checkpointing=True,
        accumulates=True,
        reference=way.adapter is None,
        critic=way.critic,
        critic_trunk=trunk,
        rewards=[scored],
        rollout=(SAMPLED, PROMPT, NEW),
    )


def cells() -> Iterator[Cell]:
    """Yield a plan of each size, way and number of GPUs."""
    for size in SIZES:
        for way in WAYS:
            yield Cell(size, way, 1, plan_memory(training(size, way, 1)).total / GIB)
            if way.adapter == "qlora":
                yield from (Cell(size, way, gpus, None) for gpus in (8, 64))
                continue
            plan = plan_memory(training(size, way, 8))
            yield Cell(size, way, 8, plan.total / GIB)
            # With more ranks the shares alone are smaller: what a rank computes stays the same
            plan.roles = roles_of(training(size, way, 64))
            for moment in plan.moments:
                if "gradients" in moment.parts:
                    moment.parts["gradients"] = sum(role.gradients for role in plan.roles)
            yield Cell(size, way, 64, plan.total / GIB)


def table() -> str:
    """Return the plans as Markdown: GiB per GPU, in bold where they fit into 90 % of a card of 80 GiB."""
    lines = [f"| policy | roles | {' | '.join(f'{gpus} GPU' + 's' * (gpus > 1) for gpus in ENGINES)} |"]
    lines.append("|---|---|" + "---:|" * len(ENGINES))
    found = {(cell.size, cell.way, cell.gpus): cell for cell in cells()}
    for size in SIZES:
        for way in WAYS:
            row = [found[size, way, gpus] for gpus in ENGINES]
            lines.append(f"| {size} | {way.name} (`{way.words}`) | {' | '.join(map(_text, row))} |")
    return "\n".join(lines)


def _text(cell: Cell) -> str:
    if cell.gib is None:
        return "-"
    text = f"{cell.gib:,.0f}"
    return f"**{text}**" if cell.fits else text
