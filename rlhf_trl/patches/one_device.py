"""One GPU for a single process."""

import torch
from transformers import TrainingArguments


def use_one_device(args: TrainingArguments) -> None:
    """
    Let a single process train on one GPU of several.

    Transformers would wrap the model in `nn.DataParallel`, for which TRL's trainers are not made: those that generate
    refuse it, and the others would take the batch of one device times the number of GPUs. The Trainer itself sets the
    same number where a model is spread over GPUs. Seen in: transformers 5.23. Test:
    test_a_single_process_trains_on_one_of_several_gpus.
    """
    if args.n_gpu > 1:
        args._n_gpu = 1


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
