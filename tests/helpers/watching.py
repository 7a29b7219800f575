"""Trainings of seconds for the tests of callbacks and loggers. As a script it trains one until it is stopped."""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from trl import GRPOConfig, SFTConfig

from rlhf_trl.callbacks.interrupt import Interrupt
from rlhf_trl.callbacks.progress import ProgressLine
from rlhf_trl.callbacks.record import RunRecord
from rlhf_trl.callbacks.samples import SampleLog
from rlhf_trl.runs.checkpoints import last_checkpoint
from rlhf_trl.runs.record import finish_run, start_run
from rlhf_trl.trainers.checkpoints import CompleteCheckpoints
from rlhf_trl.trainers.rollout_hook import RolloutHookWithKL
from rlhf_trl.trainers.rollouts import Rollouts


class SFTTrainer(CompleteCheckpoints, trl.SFTTrainer):
    """As `rlhf_trl.build` makes them, but for the evaluation."""


class GRPOTrainer(RolloutHookWithKL, Rollouts, CompleteCheckpoints, trl.GRPOTrainer):
    """As `rlhf_trl.build` makes them, but for the evaluation."""


WORDS = "<pad> <eos> the cat dog sat ran on a mat red blue".split()
TEXTS = ["the cat sat on a mat", "the dog ran on a mat", "a red dog sat", "a blue cat ran"]


def tiny_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**ids, **sizes))


def add_callbacks(trainer, run_dir):
    """As `rlhf_trl.build` does; returns the one that knows of an interruption."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    interrupt = Interrupt("accelerate launch train.py stage=sft resume=true")
    for callback in (ProgressLine(), RunRecord(str(run_dir)), interrupt):
        trainer.add_callback(callback)
    return interrupt


def common(run_dir, **kwargs):
    defaults = {
        "output_dir": str(run_dir),
        "report_to": "none",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "seed": 1,
    }
    return {**defaults, **kwargs}


def sft(run_dir, callbacks=(), **kwargs):
    options = {"max_length": 16, "eval_strategy": "steps", "eval_steps": 2}
    args = SFTConfig(**{**options, **common(run_dir, **kwargs)})
    rows = Dataset.from_dict({"text": TEXTS * 4})
    return SFTTrainer(
        tiny_model(),
        args,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )


def count_cats(completions, **kwargs):
    return [float(completion.split().count("cat")) for completion in completions]


def shortness(completions, **kwargs):
    return [-0.1 * len(completion.split()) for completion in completions]


def grpo(run_dir, max_rows=8, **kwargs):
    options = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "num_iterations": 2}
    args = GRPOConfig(**{**options, **common(run_dir, **kwargs)})
    prompts = Dataset.from_dict({"prompt": ["the cat", "a dog", "the red", "on a"] * 4})
    # From a path, since GRPO loads its reference from there
    start = os.path.join(run_dir, "start")
    tiny_model().save_pretrained(start)
    trainer = GRPOTrainer(
        LlamaForCausalLM.from_pretrained(start),
        [count_cats, shortness],
        args,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(2)),
        processing_class=tiny_tokenizer(),
    )
    trainer.add_callback(SampleLog(trainer, str(run_dir), max_rows=max_rows))
    return trainer


class Slow(TrainerCallback):
    """Makes each step last, so that a signal falls into the middle of one."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_step_begin(self, args, state, control, **kwargs):
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.01)


class SlowEvaluation(TrainerCallback):
    """Makes the evaluation after the last step last, and shows by a file that it has begun."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            Path(args.output_dir, "evaluating").touch()
            time.sleep(self.seconds)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=["sft", "grpo"])
    parser.add_argument("run_dir")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--max-steps", type=int, default=10000)
    parser.add_argument("--save-steps", type=int, default=10000)
    given = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        start_run(given.run_dir, given.stage, " ".join(sys.argv), None)
    make = {"sft": sft, "grpo": grpo}[given.stage]
    trainer = make(given.run_dir, max_steps=given.max_steps, save_steps=given.save_steps, eval_strategy="no")
    interrupt = add_callbacks(trainer, given.run_dir)
    trainer.add_callback(Slow(given.seconds))
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(given.run_dir) if given.resume else None)
    except KeyboardInterrupt:
        print("stopped at once", file=sys.stderr)
        sys.exit(130)
    if rank == 0:
        finish_run(given.run_dir, "stopped" if interrupt.interrupted else "done")
    if interrupt.interrupted:
        sys.exit(130)


if __name__ == "__main__":
    main()
