"""
Inputs of a model beside token ids, whatever its processor makes: rows of them, and batches of rows.

A batch of a processor has two kinds. Some have a value for each token (`token_type_ids`). The others count images,
patches or tiles along their first dimension, or rows (padded along the others).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from trl.trainer.utils import split_pixel_values_by_grid

from rlhf_trl.data.multimodal import ExtraInputs
from rlhf_trl.errors import ConfigError


def holds_rows(inputs: Mapping[str, Any]) -> bool:
    """
    Return whether the pixels of a batch have one entry for each row, padded to the most images of one (Idefics,
    SmolVLM), and not one for each image.
    """
    pixels = inputs.get("pixel_values")
    rows = isinstance(pixels, Tensor) and pixels.dim() > 4
    return rows and inputs.get("num_tiles") is None and inputs.get("image_sizes") is None


def split_rows(
    inputs: dict[str, Any], attention_mask: Tensor, num_images: list[int] | None, num_tiles: list[int] | None = None
) -> list[ExtraInputs]:
    """
    Split the inputs of a batch, as `trl.GRPOTrainer` passes them, into those of its rows, on the CPU.

    Args:
        inputs (`dict[str, Tensor]`): inputs beside ids and mask.
        attention_mask (`Tensor` of shape (N, L)): 1 at the tokens of the rows.
        num_images (`list[int]`, *optional*), num_tiles (`list[int]`, *optional*): images and tiles of each row.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: for an input whose first dimension counts neither rows nor images.
    """
    count, rows = len(attention_mask), [ExtraInputs() for _ in attention_mask]
    kept = attention_mask.bool().cpu()
    known: dict[str, Any] = {"num_images": num_images} if num_images is not None else {}
    known |= {"num_tiles": num_tiles} if num_tiles is not None else {}
    if holds_rows(inputs | known):
        known = {}
    split: dict[str, Any] = dict(split_pixel_values_by_grid({**inputs, **known}))
    for name, value in split.items():
        if name in ("num_images", "num_tiles") or value is None:
            continue
        if isinstance(value, Tensor) and value.shape[:2] == attention_mask.shape and value.dim() == 2:
            for row, values, mask in zip(rows, value.cpu(), kept, strict=True):
                row.by_token[name] = values[mask]
            continue
        if isinstance(value, Tensor):
            if len(value) == count:
                value = value.split(1)
            elif num_images is not None and len(value) == sum(num_images):
                value = value.split(num_images)
            else:
                raise ConfigError(
                    f"The processor's `{name}` has the shape {tuple(value.shape)} for {count} rows, so it can't be "
                    "told which part of it is of which row. Its first dimension must count rows or images."
                )
        for row, part in zip(rows, value, strict=True):
            if len(part):
                row.others[name] = part.cpu()
    return rows


def batches(
    input_ids: Tensor, attention_mask: Tensor, batch_size: int, extra: Sequence[ExtraInputs] | None
) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Yield ids, mask and the other inputs of `batch_size` rows at a time."""
    for start in range(0, len(input_ids), batch_size):
        rows = slice(start, start + batch_size)
        mask = attention_mask[rows]
        yield input_ids[rows], mask, batch_inputs(extra[rows] if extra else (), mask)


def reading(model: Callable, extra: Sequence[ExtraInputs] | None) -> Callable:
    """Return a model that reads the other inputs of rows too, which it is called with a batch at a time, in order."""
    if not extra:
        return model
    done = 0

    def forward(**inputs: Any) -> Any:
        nonlocal done
        rows = extra[done : done + len(inputs["input_ids"])]
        done += len(rows)
        return model(**inputs, **batch_inputs(rows, inputs["attention_mask"]))

    return forward


def batch_inputs(rows: Sequence[ExtraInputs], attention_mask: Tensor) -> dict[str, Tensor]:
    """
    Return the inputs of some rows as one batch, on the device of `attention_mask`.

    Args:
        rows (`Sequence[ExtraInputs]`): inputs of each row, of its first tokens at the least; none, which gives none.
        attention_mask (`Tensor` of shape (N, L)): 1 at the tokens of the rows, on whatever side padding is.

    Returns:
        `dict[str, Tensor]`: inputs by token of shape (N, L), 0 at padding and at tokens that were written since; the
            others one row after another, padded with 0 in the dimensions in which they differ.
    """
    device, made = attention_mask.device, {}
    for name in dict.fromkeys(name for row in rows for name in row.by_token):
        first = next(row.by_token[name] for row in rows if name in row.by_token)
        laid = torch.zeros(attention_mask.shape, dtype=first.dtype, device=device)
        for out, row, mask in zip(laid, rows, attention_mask.bool(), strict=True):
            if (values := row.by_token.get(name)) is not None:
                out[mask.nonzero()[: len(values), 0]] = values.to(device)
        made[name] = laid
    for name in dict.fromkeys(name for row in rows for name in row.others):
        parts = [row.others[name] for row in rows if name in row.others]
        sizes = [max(part.shape[i] for part in parts) for i in range(1, parts[0].dim())]
        made[name] = torch.cat([_padded(part, sizes) for part in parts]).to(device)
    return made


def _padded(part: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return a tensor padded with zeros to `sizes`, those of all dimensions but the first."""
    missing = [(0, size - have) for size, have in zip(sizes, part.shape[1:], strict=True)]
    return F.pad(part, [each for pair in reversed(missing) for each in pair]) if any(b for _, b in missing) else part
