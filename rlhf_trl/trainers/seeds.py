"""Random states of a process, left as they were, and evaluation that samples and leaves them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from transformers import Trainer


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


class SampledEvaluation(Trainer):
    """Mixin for trainers that evaluate on completions which they sample, and have no held-out loss."""

    args: Any

    def evaluate(self, *args, **kwargs):
        """Score held-out prompts, sampled with the run's seed each time, leaving the training's random state alone."""
        with preserved_rng_state():
            set_seed(self.args.seed, device_specific=True)
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        """Sample and score a batch of held-out prompts. A loss of new completions means nothing."""
        with torch.no_grad(), self.compute_loss_context_manager():
            self._prepare_inputs(inputs)
        return None, None, None
