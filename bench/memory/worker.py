"""
One training in a process of its own, or of each rank: `python -m bench.memory.worker REPORT ENGINE WORDS...`.

The training is the stage's own, as `train.py` runs it. Its peak is that of the storages of all tensors, those of its
models included, which a [`~rlhf_trl.models.tracking.StorageTracker`] counts from the first step to the last; the
process's own peak above what it had before its models stands beside it.
"""

import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from rlhf_trl.checks.memory import training_of
from rlhf_trl.cli.main import prepare_process
from rlhf_trl.cli.overrides import compose
from rlhf_trl.models.memory import Engine, MemoryPlan, plan_memory
from rlhf_trl.models.tracking import StorageTracker
from rlhf_trl.runs.ranks import is_main_process, leave_process_group, world_size
from rlhf_trl.stages import train as stage


class ResizingTracker(StorageTracker):
    """A [`~rlhf_trl.models.tracking.StorageTracker`] that also sees storages which are resized, as FSDP2 does."""

    def __enter__(self):
        resize = self._resize = torch.UntypedStorage.resize_

        def tracked(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self.resized(storage)
            return result

        setattr(torch.UntypedStorage, "resize_", tracked)  # noqa: B010 a method is replaced, which types don't allow
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize


class Measurement:
    """Plan and measured peak of a training."""

    def __init__(self, engine: str):
        self.engine = engine
        self.tracker = ResizingTracker()
        self.plan: MemoryPlan | None = None
        self.base = psutil.Process().memory_info().rss
        self.make_trainer = stage.make_trainer

    def __call__(self, cfg: DictConfig, args: Any, path: str, tokenizer: Any, dataset: Any, **extra: Any) -> Any:
        """Make the stage's trainer, plan its memory, and let its training be tracked."""
        start = time.perf_counter()
        launched = Engine(self.engine, world_size(), bool(args.bf16))
        self.plan = plan_memory(training_of(cfg, args, tokenizer, dataset["train"], launched))
        self.seconds = time.perf_counter() - start
        trainer: Any = self.make_trainer(cfg, args, path, tokenizer, dataset, **extra)
        train = trainer.train

        def tracked(**kwargs: Any) -> Any:
            gc.collect()
            tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
            self.tracker.add([each for each in tensors if not each.is_meta])
            self.tracker.reset_peak()
            with self.tracker:
                return train(**kwargs)

        trainer.train = tracked
        return trainer

    def report(self) -> dict[str, Any]:
        """Return plan and measurement, in bytes."""
        assert self.plan is not None
        roles = {role.name: [role.weights, role.gradients, role.optimizer] for role in self.plan.roles}
        return {
            "planned": self.plan.total,
            "measured": self.tracker.peak,
            "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.base,
            "seconds": self.seconds,
            "roles": roles,
            "moments": {moment.name: moment.parts for moment in self.plan.moments},
        }


def main() -> None:
    """Run the training that the command line names."""
    report, engine, *words = sys.argv[1:]
    prepare_process()
    cfg, problems = compose(words)
    if cfg is None or problems:
        sys.exit("\n".join(problems))
    measurement = Measurement(engine)
    stage.make_trainer = measurement
    instantiate(cfg.stage.run)(cfg)
    if is_main_process():
        Path(report).write_text(json.dumps(measurement.report()))
    leave_process_group()


if __name__ == "__main__":
    main()
