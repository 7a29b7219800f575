"""Arithmetic and planned memory of PPO, to hold measurements against."""

from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaForSequenceClassification

from bench.gpu.models import Size, empty_model
from bench.setting import LORA, Setting
from rlhf_trl.checks.memory import NF4
from rlhf_trl.models.dry_passes import Batch, Computation
from rlhf_trl.models.memory import GIB, Training, adapted, plan_memory
from rlhf_trl.models.weight_bytes import weight_bytes

# Dense bfloat16 rates of the data sheets in FLOP/s; the first name that the card's holds counts
PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "L4": 121e12,
}


def update_flops(size: Size, setting: Setting, critic: str | None) -> float:
    """
    Return the floating-point operations of the update of a rollout, forward and backward.

    A forward pass takes 2 per parameter and token, and causal attention 2 * S^2 * hidden_size per layer and row; the
    backward takes the same for the inputs of each layer, and once more for its weights where they are trained.
    Recomputation, optimizer and LoRA's own matrices are not counted.

    Args:
        size ([`~bench.gpu.models.Size`]): sizes of policy and critic.
        setting ([`~bench.setting.Setting`]): lengths, batch and epochs.
        critic (`str`, *optional*): `head`, `adapter` or `model`; `None` without a critic.
    """
    rows, length = setting.batch * setting.epochs, setting.prompt_tokens + setting.new_tokens
    attention = 2 * size.num_hidden_layers * size.hidden_size * length**2
    weights = 2 * size.trunk * length
    frozen, trained = 2 * weights + 3 * attention, 3 * weights + 3 * attention
    head = 2 * size.embedding * setting.new_tokens * (2 if setting.lora else 3)
    policy = (frozen if setting.lora else trained) + head
    extra = {"adapter": frozen, "model": trained}.get(critic or "", 0)
    return rows * (policy + extra)


def planned_memory(size: Size, setting: Setting, critic: str | None, options: dict[str, Any]) -> dict[str, float]:
    """
    Return the peak of GPU memory that a run of `rlhf_trl` plans before it starts, and its parts, in GiB.

    Args:
        size ([`~bench.gpu.models.Size`]): sizes of all networks.
        setting ([`~bench.setting.Setting`]): lengths, batch, LoRA.
        critic (`str`, *optional*): `head`, `adapter` or `model`; `None` without a critic.
        options (`dict`): those of `bench.ours`; `reward`, `quantized` and gradient checkpointing count.
    """
    dtype = getattr(torch, setting.policy_dtype or setting.dtype)
    policy: Any = empty_model(size, dtype)
    if setting.lora:
        policy = adapted(policy, LoraConfig(**LORA))
    reward = empty_model(size, torch.bfloat16, LlamaForSequenceClassification)
    lora = 4.0 * size.lora
    on_base = options.get("reward") == "adapter"
    length, rows = setting.prompt_tokens + setting.new_tokens, setting.mini_batch
    training = Training(
        policy,
        "log_probs",
        Batch(rows, length, setting.new_tokens, padded=False),  # all rows have one length
        Computation(torch.bfloat16 if setting.autocast else None, on_gpu=True),
        quantization=NF4 if options.get("quantized") else None,
        checkpointing=bool(options.get("arguments", {}).get("gradient_checkpointing")),
        reference=not setting.lora,
        critic=critic,
        critic_trunk=empty_model(size, torch.bfloat16).base_model if critic == "model" else None,
        rewards=[("reward", None if on_base else reward, lora if on_base else weight_bytes(reward), rows)],
        rollout=(setting.batch, setting.prompt_tokens, setting.new_tokens),
    )
    plan = plan_memory(training)
    parts = {"held": plan.held} | {moment.name: moment.total for moment in plan.moments} | {"peak": plan.total}
    return {name: value / GIB for name, value in parts.items()}


def peak_rate(device_name: str) -> float | None:
    """Return the data sheet's dense bfloat16 rate of a card in FLOP/s, `None` if it isn't known here."""
    return next((rate for name, rate in PEAKS.items() if name in device_name), None)
