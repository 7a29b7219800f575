"""Randomness that depends on named integers alone, so that it is the same on every rank and after a resume."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def preserved_rng_state() -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch (CPU and GPU) as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def derived_seed(*key: int) -> int:
    """A seed that depends on all the integers of `key`, and on nothing else."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def permutation(n: int, *key: int) -> Tensor:
    """A permutation of 0 to n - 1 that depends on nothing but the integers of `key`. Shape (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(derived_seed(*key)))
