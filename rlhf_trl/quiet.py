"""What the libraries say that a user can do nothing about, each with its reason. All other warnings are shown."""

import logging
import warnings

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
)
# (logger, start of the message, reason)
LOGS = (
    (
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward",
        "an optional faster kernel; said at every import of PEFT, whether or not anything is quantized",
    ),
    ("httpx", "HTTP Request: ", "one line a request, of rewards over HTTP and of the hub's files"),
)


def quiet() -> None:
    """Filters `WARNINGS` and `LOGS`. Call it before the libraries are imported: some speak at once."""
    for message, category, _ in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, message, _ in LOGS:
        logging.getLogger(name).addFilter(Unless(message))


class Unless:
    """A log filter that drops the records that begin with `start`. Equal ones count as one."""

    def __init__(self, start: str):
        self.start = start

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unless) and other.start == self.start

    __hash__ = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is let through."""
        return not record.getMessage().startswith(self.start)
