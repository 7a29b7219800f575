"""
The flow of a run, from the composed config to a saved model: the only module that sees the whole config.

What differs between stages is in conf/stage/*.yaml; keys that a stage has no use for are simply not there.
"""

import functools
import os
import shlex
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import DatasetDict
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_torch_bf16_gpu_available

from rlhf_trl.adapters import fingerprint
from rlhf_trl.callbacks import SaveAndStop
from rlhf_trl.callbacks.interrupt import Interrupt
from rlhf_trl.callbacks.nonfinite import NonfiniteGuard
from rlhf_trl.callbacks.progress import ProgressLine
from rlhf_trl.callbacks.record import (
    RunRecord,
    finish_run,
    last_checkpoint,
    never_past_the_end,
    read_run,
    save_whole_checkpoints,
    start_run,
    write_metrics,
)
from rlhf_trl.callbacks.samples import SampleLog
from rlhf_trl.checks.run_directory import resume_changes
from rlhf_trl.checks.values import plain
from rlhf_trl.data import head_names
from rlhf_trl.data.tokens import end_tokens
from rlhf_trl.errors import ConfigError, DataError
