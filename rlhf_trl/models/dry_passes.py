"""
Forward and backward passes of a model without weights (on the meta device): nothing is computed or allocated, and a
[`~rlhf_trl.models.tracking.StorageTracker`] counts what they would take.

The passes run the model's own code, so they hold for any architecture. What depends on the device is done as there:
the casts of autocast, what the kernels of attention keep for the backward, and TRL's output layer in tiles.
"""

import contextlib
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, grouped_mm, linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import selective_log_softmax

from rlhf_trl.models.tracking import StorageTracker, parameters_and_buffers
from rlhf_trl.patches.log_probs import MAX_LOGITS

# Width of TRL's tiles of the output layer (`trl.trainer.utils.add_fused_lm_head`)
TILE_WIDTH = 32_768
# Tiles in float32 that its steps hold at a time without Triton, beside the tile itself
TILE_COPIES = 4
MATRIX_PRODUCTS = (linear, torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm, torch.addmm, Tensor.addmm, torch.mm)


class Batch(NamedTuple):
    """
    Shape of a micro-batch.

    Attributes:
        rows (`int`), length (`int`): sequences, and tokens of each with padding.
        scored (`int`): tokens of each that get a log-probability, the completion's.
        padded (`bool`): whether rows differ in length, so that attention takes a mask.
    """

    rows: int
    length: int
    scored: int
    padded: bool = True


class Kernels(TorchFunctionMode):
    """
    Context in which operators on the meta device take what they take on a GPU or a CPU.

    Args:
        autocast (`torch.dtype`, *optional*): type in which autocast computes matrix products.
        padded (`bool`): whether rows differ in length: the answer to what models ask of the values of their masks.
        on_gpu (`bool`): whether attention has kernels with dropout that keep no probabilities.
    """

    def __init__(self, autocast: torch.dtype | None, padded: bool, on_gpu: bool = True):
        super().__init__()
        self.autocast, self.padded, self.on_gpu = autocast, padded, on_gpu
        self._copies: dict[int, Tensor] = {}  # autocast casts a weight once a forward

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.__bool__:
            return not self.padded  # "is every token real?"
        if self.autocast is not None and func in MATRIX_PRODUCTS:
            args = tuple(self._cast(arg) for arg in args)
        if func is scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is grouped_mm:  # without an implementation for float32 here: as if one expert read all tokens
            return args[0] @ args[1][0]
        return func(*args, **kwargs)

    def _cast(self, arg: Any) -> Any:
        if not isinstance(arg, Tensor) or arg.dtype != torch.float32:
            return arg
        if not (arg.is_leaf and arg.requires_grad):
            return arg.to(self.autocast)
        if id(arg) not in self._copies:
            self._copies[id(arg)] = arg.to(self.autocast)
        return self._copies[id(arg)]

    def end_forward(self) -> None:
        """Drop autocast's copies of weights, as it does at the end of a forward."""
        self._copies.clear()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.end_forward()  # of a layer that is computed anew

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, **kwargs):
        if dropout_p and not self.on_gpu:
            return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **kwargs)
        if self.autocast is not None:
            query, key, value = (self._cast(each) for each in (query, key, value))
        if attn_mask is not None and attn_mask.dtype != query.dtype:
            attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device="meta")
        return _Attention.apply(query, key, value, attn_mask)


class _Attention(torch.autograd.Function):
    """Attention that keeps its inputs, its output and a number per query, as the fused kernels do."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, sums)
        return output

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride] PyTorch's own way
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _TiledLogProbs(torch.autograd.Function):
    """
    TRL's output layer in tiles (`trl.kernels.ChunkedLogProbFunction`): one tile of logits at a time, and the gradients
    of hidden states and weight in float32. Without Triton a tile is taken several times over, in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, dtype, copies):
        ctx.save_for_backward(hidden, weight)
        ctx.dtype, ctx.copies = dtype, copies
        _tile(hidden, weight, dtype, copies)
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride] PyTorch's own way
        hidden, weight = ctx.saved_tensors
        grads = [
            torch.empty(each.shape, dtype=torch.float32, device="meta") if needed else None
            for each, needed in zip((hidden, weight), ctx.needs_input_grad, strict=False)
        ]
        _tile(hidden, weight, ctx.dtype, ctx.copies)
        given = [
            None if grad is None else grad.to(each.dtype) for grad, each in zip(grads, (hidden, weight), strict=True)
        ]
        return *given, None, None


def _tile(hidden: Tensor, weight: Tensor, dtype: torch.dtype, copies: int) -> None:
    rows, width = min(len(hidden), TOKEN_CHUNK_SIZE), min(len(weight), TILE_WIDTH)
    tile = torch.empty(rows, width, dtype=dtype, device="meta")  # noqa: F841 alive beside the copies
    weights = torch.empty(width, weight.size(1), dtype=dtype, device="meta") if weight.dtype != dtype else None
    floats = [torch.empty(rows, width, dtype=torch.float32, device="meta") for _ in range(copies)]
    del weights, floats


class Computation(NamedTuple):
    """
    Precision and kernels of a device.

    Attributes:
        autocast (`torch.dtype`, *optional*): type of mixed precision.
        on_gpu (`bool`): whether the device has Triton's and the GPU's kernels.
    """

    autocast: torch.dtype | None
    on_gpu: bool


class Passes:
    """
    Passes of one or several models without weights.

    Args:
        models (`nn.Module`): what is in memory already; its weights are not counted.
        computation ([`Computation`]): how the device computes.
        padded (`bool`): whether attention takes a mask.
    """

    def __init__(self, *models: nn.Module, computation: Computation, padded: bool = True):
        self.computation = computation
        self.tracker = StorageTracker()
        self.tracker.ignore(parameters_and_buffers(*models))
        self.kernels = Kernels(computation.autocast, padded, computation.on_gpu)

    def __enter__(self) -> "Passes":
        self.tracker.__enter__()
        self.kernels.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.kernels.__exit__(*error)
        self.tracker.__exit__(*error)

    def checkpoint(self, model: PreTrainedModel | PeftModel) -> None:
        """Recompute layers of a model in the backward, with these kernels: PyTorch leaves a mode to call it."""
        options = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), self.kernels)}
        without_adapter(model).activation_checkpointing_enable(options | {"preserve_rng_state": False})

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the ids of a batch and their mask."""
        ids = torch.empty(batch.rows, batch.length, dtype=torch.long, device="meta")
        return {"input_ids": ids, "attention_mask": torch.empty_like(ids)}

    def hidden_states(self, model: PreTrainedModel | PeftModel, batch: Batch) -> Tensor:
        """Return the last hidden states of a model, (rows, length, width)."""
        network = without_adapter(model)
        # Encoders that keep no cache take no such argument
        options = {"use_cache": False} if hasattr(network.config.get_text_config(), "use_cache") else {}
        output = network.base_model(**self.inputs(batch), **options)
        self.kernels.end_forward()
        return output.last_hidden_state

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the scores of a head in float32, of a critic or a reward model, (rows, length, 1)."""
        weight = torch.empty(1, hidden.size(-1), device="meta", requires_grad=True)
        self.tracker.ignore([weight])
        floats = hidden.float()
        return torch.bmm(floats, weight.T.expand(len(floats), -1, -1))

    def log_probs(self, model: PreTrainedModel | PeftModel, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the log-probabilities of the tokens that are scored, by TRL's output layer."""
        layer = without_adapter(model).get_output_embeddings()
        chosen = hidden[:, :-1][:, -batch.scored :].reshape(-1, hidden.size(-1))
        on_gpu, dtype = self.computation.on_gpu, self.computation.autocast or chosen.dtype
        if not on_gpu and len(chosen) * len(layer.weight) <= MAX_LOGITS:
            every = torch.log_softmax(linear(chosen, layer.weight).float(), dim=-1)
            return every[:, 0] - (every.exp() * every).sum(dim=-1).detach()
        return cast(Tensor, _TiledLogProbs.apply(chosen, layer.weight, dtype, 0 if on_gpu else TILE_COPIES))

    def loss_of_logits(self, model: PreTrainedModel | PeftModel, hidden: Tensor) -> Tensor:
        """Return a loss that is made of all logits at once, as ORPO's is in TRL 1.16."""
        logits = linear(hidden, without_adapter(model).get_output_embeddings().weight)
        if self.computation.autocast is not None:
            logits = logits.float()  # accelerate's, of every output
        ids = torch.empty(logits.shape[:2], dtype=torch.long, device="meta")
        half = len(logits) // 2
        chosen, labels = logits[:half, :-1].contiguous(), ids[:half, 1:].contiguous()
        loss = cross_entropy(chosen.view(-1, chosen.size(-1)), labels.view(-1))
        return loss + selective_log_softmax(logits[:, :-1], ids[:, 1:]).mean()


def without_adapter(model: Any) -> Any:
    """Return the model that an adapter is in, or the model."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
