"""One GPU for a single process."""

from transformers import TrainingArguments


def use_one_device(args: TrainingArguments) -> None:
    """
    Let a single process train on one GPU of several.

    Transformers would wrap the model in `nn.DataParallel`, for which TRL's trainers are not made: those that generate
    refuse it, and the others would take the batch of one device times the number of GPUs. The Trainer itself sets the
    same number where a model is spread over GPUs.

    Seen in: transformers 5.23.
    Test: `test_a_single_process_trains_on_one_of_several_gpus`.
    """
    if args.n_gpu > 1:
        args._n_gpu = 1
