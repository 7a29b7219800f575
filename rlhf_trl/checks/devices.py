"""GPUs that a run leaves unused."""

import torch
from transformers import TrainingArguments


def unused_devices(args: TrainingArguments) -> str | None:
    """Return that GPUs stay unused, and how to use them; `None` where there are no others."""
    visible = torch.cuda.device_count()
    if args.n_gpu == 0 or args.world_size > 1 or visible < 2:
        return None
    return (
        f"{visible} GPUs are visible, and this one process trains on the first alone. To train on all of them: "
        f"`accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes {visible} train.py ...`; to "
        "choose another one, or to be told no more: `export CUDA_VISIBLE_DEVICES=0`."
    )
