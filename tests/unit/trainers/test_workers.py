"""Workers of data loaders outlive the signals of schedulers, which are for the process that trains."""

import os

import datasets
import psutil
import pytest
import torch
import trl
from torch.utils.data import DataLoader, Dataset
from trl import SFTConfig

from rlhf_trl.errors import PREEMPTIONS
from rlhf_trl.trainers.rollouts import extended
from rlhf_trl.trainers.workers import ignore_preemptions
from tests.helpers.watching import TEXTS, tiny_model, tiny_tokenizer


class Signaled(Dataset):
    """Rows whose worker gets each signal of a scheduler; from itself, since one from its parent ends it quietly."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        for number in PREEMPTIONS:
            os.kill(os.getpid(), number)
        return torch.initial_seed() if index else 0


@pytest.mark.parametrize("begin", [None, lambda worker: torch.manual_seed(7)])
def test_workers_outlive_signals_and_begin_as_they_did(begin):
    loader = DataLoader(Signaled(), batch_size=None, num_workers=1, worker_init_fn=begin)
    seeds = list(ignore_preemptions(loader))
    assert len(seeds) == 2 and (begin is None or seeds[1] == 7)


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_the_loaders_of_a_trainer_have_such_workers(tmp_path, kind):
    rows = datasets.Dataset.from_dict({"text": TEXTS * 20})
    args = SFTConfig(str(tmp_path), report_to=[], bf16=False, use_cpu=True, dataloader_num_workers=1)
    trainer = extended(trl.SFTTrainer)(
        tiny_model(), args, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer()
    )
    batches = iter(getattr(trainer, f"get_{kind}_dataloader")())
    next(batches)
    for worker in psutil.Process().children():
        worker.terminate()
    assert len(list(batches)) == 9
