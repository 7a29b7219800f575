"""Configurations to measure, in the order of their importance: the time may not suffice for all."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from bench.setting import Setting


@dataclass(frozen=True, eq=False)
class Configuration:
    """
    A training to measure.

    Attributes:
        name (`str`): shown in the table.
        size (`str`): one of `bench.gpu.models.SIZES`.
        contender (`str`): `ours`, `grpo`, `rloo` or `trl112`.
        lora (`bool`): LoRA on all linear layers, instead of full fine-tuning.
        options (`dict`): see `bench.ours`.
        changes (`dict`): fields of the setting that differ.
        needs (`tuple[str, ...]`): packages without which it is skipped.
        seconds (`float`): time limit, start included.
    """

    name: str
    size: str
    contender: str = "ours"
    lora: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    seconds: float = 60

    @property
    def critic(self) -> str | None:
        if self.contender in ("grpo", "rloo"):
            return None
        return "model" if self.contender == "trl112" else self.options.get("critic", "head")

    def setting(self, folder: str, tiny: bool) -> Setting:
        """Return the setting; `tiny` is for a rehearsal on a CPU."""
        lengths = {"prompt_tokens": 128, "new_tokens": 128, "batch": 128, "mini_batches": 4, "rollouts": 3}
        if self.size == "1.5B":
            lengths |= {"mini_batches": 8}
        if tiny:
            lengths = {"prompt_tokens": 12, "new_tokens": 8, "batch": 8, "mini_batches": 2, "rollouts": 2}
        common = {"epochs": 4, "lora": self.lora, "dtype": "bfloat16", "autocast": True}
        return Setting(folder, **(common | lengths | self.changes))


def _arguments(**arguments: Any) -> dict[str, Any]:
    return {"arguments": arguments}


MODEL = {"critic": "model", "arguments": {"critic_dtype": "bfloat16"}}
FOUR_ROLES = {"critic": "adapter", "reward": "adapter"}
CONFIGURATIONS = (
    Configuration("PPO, critic=head", "0.5B"),
    Configuration("GRPO of TRL", "0.5B", "grpo"),
    Configuration("PPO, critic=head, LoRA", "0.5B", lora=True),
    Configuration("PPO, critic=model", "0.5B", options=MODEL),
    Configuration("PPO, critic=adapter, LoRA", "0.5B", lora=True, options={"critic": "adapter"}),
    Configuration("PPO, four roles on one base, LoRA", "0.5B", lora=True, options=FOUR_ROLES),
    Configuration("PPO of TRL 1.12", "0.5B", "trl112"),
    Configuration("RLOO of TRL", "0.5B", "rloo"),
    Configuration("GRPO of TRL, LoRA", "0.5B", "grpo", lora=True),
    Configuration("PPO, critic=head", "1.5B"),
    Configuration("GRPO of TRL", "1.5B", "grpo"),
    Configuration("PPO, critic=model", "1.5B", options=MODEL),
    Configuration("PPO, four roles on one base, LoRA", "1.5B", lora=True, options=FOUR_ROLES),
    Configuration("PPO, critic=model, LoRA", "0.5B", lora=True, options=MODEL),
    Configuration(
        "PPO, four roles on one base, NF4",
        "1.5B",
        lora=True,
        options=FOUR_ROLES | {"quantized": True},
        needs=("bitsandbytes",),
        seconds=75,
    ),
    # The first configuration with one thing changed
    Configuration("PPO, static cache", "0.5B", options=_arguments(cache_implementation="static"), seconds=90),
    Configuration("PPO, float32 weights", "0.5B", changes={"policy_dtype": "float32"}),
    Configuration("PPO, gradient checkpointing", "0.5B", options=_arguments(gradient_checkpointing=True)),
    Configuration("PPO, Liger", "0.5B", options=_arguments(use_liger_kernel=True), needs=("liger_kernel",)),
    Configuration(
        "PPO, continuous batching",
        "0.5B",
        options=_arguments(
            use_transformers_continuous_batching=True,
            transformers_continuous_batching_config={"max_memory_percent": 0.3},
            generation_kwargs=None,
        ),
    ),
    Configuration("PPO, torch.compile", "0.5B", options=_arguments(torch_compile=True), seconds=90),
    Configuration(
        "PPO, FlashAttention 2",
        "0.5B",
        options={"loading": {"attn_implementation": "flash_attention_2"}},
        needs=("flash_attn",),
    ),
    Configuration("PPO, eager attention", "0.5B", options={"loading": {"attn_implementation": "eager"}}),
)


def missing(configuration: Configuration) -> list[str]:
    """Return the packages that a configuration needs and that aren't installed."""
    return [name for name in configuration.needs if importlib.util.find_spec(name) is None]
