"""Pretraining of the embedded checkpoints."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def fit(
    model: nn.Module,
    batch_loss: Callable[[Any, list], Tensor],
    rows: list,
    steps: int,
    batch_size: int,
    lr: float,
    rng: random.Random,
) -> None:
    """
    Train with AdamW and a one-cycle schedule that ends near zero, on batches drawn from `rows`.

    Args:
        model (`nn.Module`): trained in place.
        batch_loss (callable): function that returns the loss of the model on some rows.
        rows (`list`): what batches are drawn from.
        steps (`int`), batch_size (`int`), lr (`float`): optimizer steps, rows of each, and the highest learning rate.
        rng (`random.Random`): draws the batches.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for step in range(1, steps + 1):
        loss = batch_loss(model, rng.sample(rows, batch_size))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps} loss {loss.item():.3f}", flush=True)
