"""TRL's fused log-probabilities made quicker on a CPU, with the same numbers. On an accelerator none of this acts."""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import linear

# Positions times vocabulary: 256 MiB of float32, of which a step holds about four at a time, as the tiles then do
MOST_LOGITS = 2**26


def quicken_log_probs() -> None:
    """
    Makes TRL's fused log-probabilities (`trl.trainer.utils.add_fused_lm_head`) on a CPU

    - compute the positions with a label alone. TRL 1.16 does so on GPUs and scores every position, prompts and padding
      as well, elsewhere, because some accelerators compile anew for each number of positions.
    - keep the logits from forward to backward where they are small (`MOST_LOGITS`). TRL's tiles save the memory of
      large ones by computing each again, which took half of the time of the output layer.
    """
    from trl.trainer import utils

    if hasattr(utils._use_triton, "on_gpus"):
        return
    on_gpus, original = utils._use_triton, utils._ChunkedLogProbFunction

    def compact(device) -> bool:
        return device.type == "cpu" or on_gpus(device)

    def log_probs(hidden, weight, bias, targets, temperature, chunk_size, *settings):
        small = hidden.device.type == "cpu" and len(hidden) * len(weight) <= MOST_LOGITS
        if not small or hasattr(weight, "ds_id"):  # ZeRO-3 lets go of the weight before the backward
            return original.apply(hidden, weight, bias, targets, temperature, chunk_size, *settings)
        return _log_probs_of_kept_logits(hidden, weight, bias, targets, temperature, *settings)

    compact.on_gpus = on_gpus
    utils._use_triton = compact
    utils._ChunkedLogProbFunction = SimpleNamespace(apply=log_probs, original=original)


def _log_probs_of_kept_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """
    As `trl.kernels.ChunkedLogProbFunction`, of hidden states (N, H), an output layer (V, H) and targets (N,).

    Returns:
        Tensors of shape (N,), `None` where `outputs` doesn't name them: log-probabilities, entropy,
        `log(sum_v p_v^2)`, mean logit, and whether the target is the likeliest token.
    """
    logits = linear(hidden, weight, bias).float()
    if logit_scale != 1:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature != 1:
        logits = logits / temperature
    every = torch.log_softmax(logits, dim=-1)
    target = every.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(every.exp() * every).sum(dim=-1) if "entropy" in outputs else None
    with torch.no_grad():
        log_sum_sq_probs = torch.logsumexp(2 * every, dim=-1) if "log_sum_sq_probs" in outputs else None
        mean_logits = logits.mean(dim=-1) if "mean_logits" in outputs else None
        is_top1 = logits.argmax(dim=-1) == targets if "is_top1" in outputs else None
    return target, entropy, log_sum_sq_probs, mean_logits, is_top1
