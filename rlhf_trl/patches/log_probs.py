"""TRL: fused log-probabilities that are faster on a CPU, with the same numbers. Inactive on accelerators."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import _use_triton
from trl.trainer import utils

from rlhf_trl.patches.forward import wrap_forward

# Positions times vocabulary: 256 MiB of float32. A step holds about four such tensors at a time, as with the tiles
MAX_LOGITS = 2**26


def speed_up_log_probs(model: PreTrainedModel) -> None:
    """
    Make the fused forward of a model (`trl.trainer.utils.add_fused_lm_head`) faster on a CPU.

    - Score only positions with a label. TRL does so on GPUs; elsewhere it scores every position, prompts and padding
      included, because some accelerators recompile for each number of positions.
    - Keep small logits (`MAX_LOGITS`) from forward to backward. TRL recomputes them tile by tile to save the memory of
      large ones, which took half of the time of the output layer.

    TRL has no option for either. The two functions are replaced only while this model's forward runs.

    Seen in: TRL 1.16; its own plans for these kernels are https://github.com/huggingface/trl/issues/7244.
    Test: `test_only_labelled_positions_are_scored_and_the_numbers_stay`.

    Args:
        model (`PreTrainedModel`):
            Causal language model. One without a fused head is left as it is.
    """
    if "forward" not in vars(model):
        return

    def fast(model, forward, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return forward(*args, **kwargs)
        with _fast_on_cpu():
            return forward(*args, fused_lm_head=True, **kwargs)

    wrap_forward(model, fast)


@contextmanager
def _fast_on_cpu() -> Iterator[None]:
    before = utils._use_triton, utils._ChunkedLogProbFunction
    utils._use_triton, utils._ChunkedLogProbFunction = _scores_labels_only, SimpleNamespace(apply=_log_probs)
    try:
        yield
    finally:
        utils._use_triton, utils._ChunkedLogProbFunction = before


def _scores_labels_only(device: torch.device) -> bool:
    return device.type == "cpu" or _use_triton(device)


def _log_probs(hidden, weight, bias, targets, temperature, chunk_size, *settings):
    small = hidden.device.type == "cpu" and len(hidden) * len(weight) <= MAX_LOGITS
    if not small or hasattr(weight, "ds_id"):  # ZeRO-3 releases the weight before the backward
        return ChunkedLogProbFunction.apply(hidden, weight, bias, targets, temperature, chunk_size, *settings)
    return _log_probs_of_kept_logits(hidden, weight, bias, targets, temperature, *settings)


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
    Return what `trl.kernels.ChunkedLogProbFunction` returns, with the logits kept for the backward.

    Args:
        hidden (`Tensor` of shape `(N, H)`):
            Hidden states.
        weight (`Tensor` of shape `(V, H)`), bias (`Tensor` of shape `(V,)`, *optional*):
            Output layer.
        targets (`Tensor` of shape `(N,)`):
            Token ids.

    Returns:
        `tuple`: tensors of shape `(N,)`, `None` where `outputs` doesn't name them: log-probabilities, entropy,
            `log(sum_v p_v^2)`, mean logit, and whether the target is the most likely token.
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
