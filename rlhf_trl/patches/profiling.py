"""TRL's profiling without its rows in Weights & Biases."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_wandb_profiling() -> Iterator[None]:
    """
    Keep TRL's times of functions (`profiling/Time taken: ...`) out of the active W&B run.

    TRL logs each as a row of its own, about ten per step, between the rows of the metrics: charts get steps without
    values, and a section of their own. There is no option for it.

    Seen in: TRL 1.16, `trl.extras.profiling`.
    Test: `test_metrics_of_rollouts_stand_in_sections_over_rollouts`.
    """
    from trl.extras.profiling import ProfilingContext

    original = ProfilingContext.__init__

    def init(self, name, report_to, *args, **kwargs):
        original(self, name, [each for each in report_to or () if each != "wandb"], *args, **kwargs)

    ProfilingContext.__init__ = init
    try:
        yield
    finally:
        ProfilingContext.__init__ = original
