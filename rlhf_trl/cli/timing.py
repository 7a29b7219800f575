"""Expected duration of a training (`debug=plan`), from a few micro-batches of the training itself."""

import contextlib
import tempfile
import time
from statistics import median
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy

from rlhf_trl.build import (
    critic_start,
    demonstrations,
    from_pretrained_kwargs,
    load_data,
    make_trainer,
    training_arguments,
)
from rlhf_trl.checks.memory import gib
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.runs.paths import project_dir, resolve_path
from rlhf_trl.terminal import say

TIMED = 3  # micro-batches, of which the first is slower: it waits for kernels and buffers


class Timing(NamedTuple):
    """
    Durations of the parts of a training, in seconds.

    Attributes:
        micro_batch (`float`): forward and backward of a micro-batch, with the optimizer step where each takes one.
        rollout (`float`, *optional*): a rollout, scores and log-probabilities included; `None` without any, or where
            each micro-batch has one, which is then part of it.
        micro_batches (`int`), rollouts (`float`): how many of them the training has.
        tokens (`int`): tokens of a micro-batch on all ranks, padding included.
        peak (`int`, *optional*): bytes that the GPU's tensors took at most.
        members (`int`): trainings of an ensemble, one after another, of which one was timed.
    """

    micro_batch: float
    rollout: float | None
    micro_batches: int
    rollouts: float
    tokens: int
    peak: int | None
    members: int = 1

    @property
    def total(self) -> float:
        """Duration of the whole training, without evaluations and checkpoints."""
        one = self.micro_batch * self.micro_batches + (self.rollout or 0.0) * self.rollouts
        return self.members * one


class _Enough(Exception):
    """The end of the micro-batches that are timed."""


class _Stopwatch(TrainerCallback):
    """Callback that notes when each micro-batch begins and ends, and ends the training after some."""

    def __init__(self):
        self.begins: list[float] = []
        self.ends: list[float] = []

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if not self.begins:
            self.begins.append(_now())

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._end()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._end()

    def _end(self) -> None:
        self.ends.append(_now())
        say(f"micro-batch {len(self.ends)} of {TIMED} after {self.ends[-1] - self.begins[0]:.1f} s")
        if len(self.ends) == TIMED:
            raise _Enough


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def time_steps(cfg: DictConfig) -> Timing:
    """
    Run a rollout, where the stage has them, and a few micro-batches of a training, and time them. Nothing is written
    but to a temporary folder.

    Args:
        cfg (`DictConfig`): the composed config of a stage that trains, checked.
    """
    cfg = cfg.copy()
    with tempfile.TemporaryDirectory() as folder:
        cfg.run_dir, cfg.stage.args.output_dir, cfg.stage.args.report_to = folder, folder, "none"
        OmegaConf.resolve(cfg)
        set_seed(cfg.seed)
        args: Any = training_arguments(cfg.stage.args, **critic_start(cfg))
        args.eval_strategy, args.do_eval, args.eval_on_start = IntervalStrategy.NO, False, False
        args.save_strategy, args.push_to_hub, args.disable_tqdm = "no", False, True
        path = resolve_path(cfg.model.path, cfg.model.run, project_dir(cfg))
        tokenizer = load_tokenizer(path, cfg.model.tokenizer, cfg.model.chat_template, **from_pretrained_kwargs(cfg))
        dataset = load_data(cfg, tokenizer)
        extra = {"ptx_dataset": demonstrations(cfg, dataset, tokenizer)} if "ptx_data" in cfg else {}
        trainer: Any = make_trainer(cfg, args, path, tokenizer, dataset, **extra)
        watch, tokens = _Stopwatch(), _count_tokens(trainer)
        trainer.add_callback(watch)
        with contextlib.suppress(_Enough):
            trainer.train()
        timing = _timing(args, trainer.state.max_steps, watch, tokens)
        return timing._replace(members=cfg.stage.get("members", 1))


def _count_tokens(trainer: Any) -> list[int]:
    """Return a list that gets the tokens of each micro-batch that goes through the model with a gradient."""
    tokens: list[int] = []
    model = trainer.accelerator.unwrap_model(trainer.model)

    def note(_, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if torch.is_grad_enabled() and isinstance(ids, torch.Tensor):
            tokens.append(ids.numel())

    model.register_forward_pre_hook(note, with_kwargs=True)
    return tokens


def _timing(args: Any, steps: int, watch: _Stopwatch, tokens: list[int]) -> Timing:
    """Return the durations that a stopwatch has."""
    durations = [end - begin for begin, end in zip([*watch.begins, *watch.ends], watch.ends, strict=False)]
    micro_batches = steps * args.gradient_accumulation_steps
    per_rollout = args.steps_per_generation * args.num_iterations if hasattr(args, "steps_per_generation") else None
    micro_batch, rollout = parts_of(durations, per_rollout)
    return Timing(
        micro_batch,
        rollout,
        micro_batches,
        micro_batches / per_rollout if per_rollout else 0,
        args.world_size * (sum(tokens) // max(len(watch.ends), 1)),
        torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    )


def parts_of(durations: list[float], per_rollout: int | None) -> tuple[float, float | None]:
    """
    Return the durations of a micro-batch and of a rollout.

    Args:
        durations (`list[float]`): of the first micro-batches; each that begins a rollout waits for it.
        per_rollout (`int`, *optional*): micro-batches per rollout; `None` without rollouts.
    """
    alone = [each for number, each in enumerate(durations) if per_rollout and number % per_rollout]
    if not alone:  # no rollouts, or one in each micro-batch
        return median(durations[1:] or durations), None
    return median(alone), max(durations[0] - median(alone), 0.0)


def timing_lines(timing: Timing) -> dict[str, str]:
    """Return what was measured as lines of a plan."""
    parts = f"{timing.micro_batches:,} micro-batches x {timing.micro_batch:.3g} s"
    sampled = timing.rollouts > 0 and timing.rollout is None
    if sampled:
        parts += ", each with its rollout"
    if timing.rollout is not None:
        parts = f"{timing.rollouts:,.4g} rollouts x {timing.rollout:.3g} s + {parts}"
    if timing.members > 1:
        parts = f"{timing.members} members x ({parts})"
    rate = timing.tokens / timing.micro_batch
    where = "the update and its rollout" if sampled else "the update"
    lines = {
        "time": f"about {duration(timing.total)} without evaluations and checkpoints: {parts}",
        "speed": f"{rate:,.0f} tokens per second in {where} ({timing.tokens:,} per micro-batch, with padding)",
    }
    if timing.peak is not None:
        lines["memory measured"] = f"{gib(timing.peak)} GiB at the peak of what was run"
    return lines


def duration(seconds: float) -> str:
    """Return a duration for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return (
        f"{minutes:.0f} min"
        if minutes < 100
        else f"{minutes / 60:.1f} h"
        if minutes < 2880
        else f"{minutes / 1440:.1f} days"
    )
