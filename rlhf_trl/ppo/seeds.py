"""Randomness that depends on named integers alone, so that it is the same on every rank and after a resume."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from trl.trainer.utils import RepeatSampler


def derived_seed(*key: int) -> int:
    """Return a seed that depends on the integers of `key` alone."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def permutation(n: int, *key: int) -> Tensor:
    """Return a permutation of 0 to n - 1 that depends on the integers of `key` alone, shape (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(derived_seed(*key)))


class EpochSampler(RepeatSampler):
    """
    TRL's `RepeatSampler` with an order that comes from (seed, epoch), so that a resumed epoch is the interrupted one.

    Args:
        *args, **kwargs: arguments of `trl.trainer.utils.RepeatSampler`.
        epoch (callable): function that returns the epoch that begins.
    """

    def __init__(self, *args, epoch: Callable[[], int], **kwargs):
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(derived_seed(self.seed or 0, self.epoch()))
        return super().__iter__()
