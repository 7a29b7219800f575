"""Arithmetic and memory of PPO by closed formulas, to hold measurements against."""

from typing import Any

from bench.gpu.models import Size
from bench.setting import LORA, Setting

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
GIB = 2**30
# Bytes of a weight in NF4 with double quantization: half a byte, and its share of the constants of a block
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


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
    Return the expected peak of GPU memory by part, in GiB; `peak` is what is needed at a time.

    Args:
        size ([`~bench.gpu.models.Size`]): sizes of all networks.
        setting ([`~bench.setting.Setting`]): lengths, batch, LoRA.
        critic (`str`, *optional*): `head`, `adapter` or `model`; `None` without a critic.
        options (`dict`): those of `bench.ours`; `reward`, `quantized` and gradient checkpointing count.
    """
    bytes_ = 4 if setting.policy_dtype == "float32" else 2
    length, network = setting.prompt_tokens + setting.new_tokens, size.trunk + size.embedding
    d, i, kv = size.hidden_size, size.intermediate_size, size.num_key_value_heads * size.head_dim
    base = size.trunk * NF4_BYTES + size.embedding * bytes_ if options.get("quantized") else network * bytes_
    weights = base if setting.lora else 2 * base  # policy and reference
    weights += {"model": size.trunk + size.embedding, "adapter": 0}.get(critic or "", 0) * bytes_
    weights += {"model": 2 * network, "adapter": 4 * size.lora}[options.get("reward", "model")]
    # Adam's two moments and the gradient, in the type of the weight; LoRA's are float32
    trained = 4 * size.lora if setting.lora else bytes_ * network
    weights += trained if setting.lora else 0
    if critic == "model":
        trained += bytes_ * network
    elif critic == "adapter":
        trained, weights = trained + 4 * size.lora, weights + 4 * size.lora
    # Kept for the backward, in bytes per token and layer, of norms (float32 inside), attention and MLP. Base layers
    # that aren't trained don't keep their inputs, but each LoRA layer keeps its own copy.
    per_layer = 24 * d + 4 * kv + 8 * i
    if setting.lora:
        per_layer += 2 * d + 4 * LORA["r"] * 7
    tokens, layers = setting.mini_batch * length, size.num_hidden_layers * per_layer
    if options.get("arguments", {}).get("gradient_checkpointing"):
        layers = size.num_hidden_layers * 2 * d + per_layer  # the inputs of each layer, and one layer anew
    activations = (2 if critic in ("adapter", "model") else 1) * tokens * layers
    if bytes_ == 4:
        activations += 2 * network  # autocast's copies of the weights
    # TRL's chunked output layer: the float32 gradient of its weight
    head = 0 if setting.lora else 4 * size.embedding
    cache = 4 * size.num_hidden_layers * kv * setting.batch * length
    rollout = cache + 16 * setting.batch * size.vocab_size  # the last: logits of a token, in float32, and their copies
    # Activations go as gradients come
    moment = max(activations + head, trained, rollout)
    parts = {"weights": weights, "moments": 2 * trained, "activations": activations, "head": head, "cache": cache}
    return {name: value / GIB for name, value in (parts | {"peak": weights + 2 * trained + moment}).items()}


def peak_rate(device_name: str) -> float | None:
    """Return the data sheet's dense bfloat16 rate of a card in FLOP/s, `None` if it isn't known here."""
    return next((rate for name, rate in PEAKS.items() if name in device_name), None)
