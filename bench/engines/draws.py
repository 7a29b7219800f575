"""Completions that don't depend on the number of ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import GenerationMixin

PLACES = 4  # divides the rows of a rank, and is divided by the completions per prompt


@contextmanager
def same_draws() -> Iterator[None]:
    """
    Sample with numbers that depend on the place of a token in its completion and of the row in its rank, modulo
    `PLACES`, in the place of those of each rank's own generator: one rank and several have the same completions then.
    """
    generators: Any = GenerationMixin
    generate, count = generators.generate, 0

    def from_the_first(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count = 0
        return generate(*args, **kwargs)

    def multinomial(probs: Tensor, num_samples: int) -> Tensor:
        nonlocal count
        count += 1
        numbers = torch.rand(PLACES, generator=torch.Generator().manual_seed(count))
        numbers = numbers[torch.arange(len(probs)) % PLACES].unsqueeze(1) * probs.sum(dim=1, keepdim=True)
        return torch.searchsorted(probs.cumsum(dim=1), numbers, right=True).clamp_(max=probs.size(1) - 1)

    with patch.object(generators, "generate", from_the_first), patch.object(torch, "multinomial", multinomial):
        yield
