"""Library messages that a user can do nothing about, each with its reason. All other warnings are shown."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# (start of the message, category, reason)
WARNINGS = (
    ("`gradient_checkpointing` is deprecated", FutureWarning, "TRL 1.16 sets it in each of its configs"),
    ("`is_gradient_checkpointing` is deprecated", FutureWarning, "TRL 1.16 reads it around each generation"),
    ("`gradient_checkpointing_enable` is deprecated", FutureWarning, "TRL 1.16 calls it around each generation"),
    ("`gradient_checkpointing_disable` is deprecated", FutureWarning, "TRL 1.16 calls it around each generation"),
    (
        "'pin_memory' argument is set as true but no accelerator",
        UserWarning,
        "the Trainer's default; no harm on a CPU",
    ),
    (
        "Input and output embeddings are no longer tied after merging",
        UserWarning,
        "PEFT writes the merged model so that it loads with the right weights",
    ),
    (
        "fan_in_fan_out is set to False but the target module is `Conv1D`",
        UserWarning,
        "PEFT sets it as the layers of GPT-2 need it",
    ),
    (
        "TRL currently supports vLLM versions",
        UserWarning,
        "a run says it once before it starts, with what to install (`rlhf_trl.checks.vllm`)",
    ),
)
# (logger, start of the message without accelerate's `[RANK 0]`, reason)
LOGS = (
    (
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward",
        "an optional faster kernel; logged at every import of PEFT, whether or not anything is quantized",
    ),
    (
        "accelerate.accelerator",
        "The used dataset had no length",
        "evaluation splits the rows over the ranks itself, see `rlhf_trl.trainers.held_out`: there is no remainder",
    ),
    (
        "transformers.modeling_utils",
        "We strongly recommend passing in an `attention_mask`",
        "`generate` passes none to GPT-2 where no prompt is padded, and takes the padding of finished rows for input",
    ),
    *(
        (
            f"trl.trainer.{name}_trainer",
            "All reward functions returned None for the following kwargs",
            "`rlhf_trl.callbacks.unrewarded` says it, with the number of completions instead of one whole row",
        )
        for name in ("grpo", "rloo")
    ),
    *(
        (
            f"trl.trainer.{name}_trainer",
            "You passed `model_init_kwargs` to the",
            "the policy was loaded with the same `model.init_kwargs`, and TRL loads the reference with them",
        )
        for name in ("dpo", "grpo", "kto", "rloo")
    ),
    (
        "matplotlib.font_manager",
        "Matplotlib is building the font cache",
        "once per machine, and nothing to do about it",
    ),
    ("matplotlib.font_manager", "generated new fontManager", "the end of the same"),
    ("httpx", "HTTP Request: ", "one line per request, of rewards over HTTP and of the hub's files"),
)
# Loggers with a handler of their own, whose lines (retries of a download) Hydra's handler would print once more
ONCE = ("datasets", "huggingface_hub")


def filter_warnings() -> None:
    """
    Filter `WARNINGS` and `LOGS`, and print the lines of `ONCE` once. This is for the whole process, which must be the
    command line's own.

    Call it before the libraries are imported: some warn at once.

    Seen in: TRL 1.16, transformers 5.23, torch 2.13, bitsandbytes 0.50.
    Test: `test_library_messages_that_help_nobody_are_dropped_and_others_stay`.
    """
    for message, category, _ in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, message, _ in LOGS:
        logging.getLogger(name).addFilter(DropPrefix(message))
    for name in ONCE:
        logging.getLogger(name).propagate = False


class DropPrefix:
    """
    Log filter that drops records that begin with a prefix. Equal ones count as one.

    Args:
        prefix (`str`):
            Start of the messages to drop.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DropPrefix) and other.prefix == self.prefix

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # as Python does where a class has `__eq__` alone

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged."""
        return not re.sub(r"^\[RANK \d+\] ", "", record.getMessage()).startswith(self.prefix)


@contextmanager
def no_load_report() -> Iterator[None]:
    """
    Drop transformers' table of missing and unexpected weights while a model loads.

    `load_weights` raises an error or logs one line for what matters of it.

    Seen in: transformers 5.23.
    Test: `test_the_load_report_is_dropped_while_a_model_loads`.
    """

    def drop(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    transformers_logger = logging.getLogger("transformers.modeling_utils")
    transformers_logger.addFilter(drop)
    try:
        yield
    finally:
        transformers_logger.removeFilter(drop)
