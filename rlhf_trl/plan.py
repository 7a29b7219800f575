"""What `debug=dry_run` prints: everything a run would do, before any model loads."""

import contextlib
import io
import tempfile
from collections.abc import Iterator

from accelerate import PartialState
from datasets import DatasetDict
from omegaconf import DictConfig
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from rlhf_trl.callbacks import steps_per_rollout
from rlhf_trl.data import count_trained, head_names, render_batch, render_sample
from rlhf_trl.ensemble import member_seeds
from rlhf_trl.models import AUTO_CLASSES, load_tokenizer
from rlhf_trl.paths import resolve_path
from rlhf_trl.run import (
    build_trainer,
    check_prompts,
    critic_start,
    load_data,
    project_dir,
    reward_functions,
    source,
    training_arguments,
)
from rlhf_trl.terminal import printable


def show_plan(cfg: DictConfig) -> None:
    """
    Print stage, model, data, batch arithmetic, steps, and a rendered sample with its loss mask.

    The data are read and the tokenizer is loaded; no model is, and nothing is written.
    """
    if "args" not in cfg.stage:
        print(f"Plan: stage {cfg.stage.name} -> {cfg.run_dir}. It trains nothing. Nothing was started.")
        return
    path = resolve_path(cfg.model.path, cfg.model.run, project_dir(cfg))
    args = training_arguments(cfg.stage.args, **critic_start(cfg))
    tokenizer = load_tokenizer(path, cfg.model.tokenizer, cfg.model.chat_template, **source(cfg))
    dataset = load_data(cfg, tokenizer)
    check_prompts(args, len(dataset["train"]))
    rows = {name: len(part) for name, part in dataset.items()}
    lines = {
        "stage": f"{cfg.stage.name} ({cfg.stage.trainer._target_})",
        "run directory": cfg.run_dir,
        "starts from": path,
        "adapter": cfg.adapter.peft._target_ if cfg.adapter.peft else "none, all weights are trained",
        "data": ", ".join(f"{count:,} rows for {name}" for name, count in rows.items()),
        **_steps(args, rows["train"]),
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
    }
    if cfg.stage.get("members", 1) > 1:
        seeds = member_seeds(cfg)
        lines["members"] = f"{len(seeds)}, one after another, each as above; seeds {seeds[0]} to {seeds[-1]}"
    if "reward" in cfg:
        reward_functions(cfg, tokenizer, dataset["train"].column_names, models=False)
        lines["rewards"] = ", ".join(f"{name} x {node.weight}" for name, node in cfg.reward.items())
    if "combine" in cfg:
        lines["score"] = cfg.combine._target_.rsplit(".", 1)[-1].replace("_", " ") + " of the rewards"
    if hasattr(args, "critic"):
        lines["critic"] = f"{args.critic}, from {args.critic_path or 'the policy'}"
    batch = None if cfg.stage.form == "prompt" else first_batch(cfg, tokenizer, dataset)
    if batch is not None:
        trained, tokens = count_trained(batch)
        lines["first batch"] = f"{trained:,} of {tokens:,} tokens are trained on"
    if not PartialState().is_main_process:
        return
    width = max(map(len, lines))
    print("\nPlan")
    for name, text in lines.items():
        print(f"  {name:<{width}}  {text}")
    print("\nFirst row")
    scored = batch is None or "completion_ids" in dataset["train"].column_names
    shown = render_sample(tokenizer, dataset["train"][0]) if scored else render_batch(tokenizer, batch)
    for line in shown.splitlines():
        print(f"  {printable(line)}")
    print("\nDry run: nothing was started and nothing written. Leave out `debug=dry_run` to run it.")


def first_batch(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, dataset: DatasetDict) -> dict[str, Tensor]:
    """
    The first batch that this rank will train on, from the trainer itself: its preparation of the rows, its sampler and
    its collator, on a model of a few thousand weights in place of the run's.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if TRL refuses the arguments or the rows.
    """
    said = contextlib.redirect_stdout(io.StringIO())  # of bf16, which is said already
    with tempfile.TemporaryDirectory() as folder, _no_progress_bars():
        with said:
            args = training_arguments(cfg.stage.args, output_dir=folder, report_to="none", push_to_hub=False)
        args.eval_strategy = IntervalStrategy.NO
        args.precompute_ref_log_probs = False  # of DPO and KTO: those of the stand-in would mean nothing
        trainer = build_trainer(
            cfg,
            model=_stand_in(tokenizer, cfg.stage.task_type, head_names(dataset["train"]), folder),
            args=args,
            train_dataset=dataset["train"],
            processing_class=tokenizer,
        )
        return next(iter(trainer.get_train_dataloader()))


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without Transformers' bars, which would show the stand-in being written and loaded."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _stand_in(tokenizer: PreTrainedTokenizerBase, task_type: str, heads: list[str] | None, folder: str):
    """A tiny Llama of the tokenizer's vocabulary, in `folder`, where a trainer that needs a reference finds it."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_labels=len(heads or ["score"]),
        pad_token_id=tokenizer.pad_token_id,
    )
    AUTO_CLASSES[task_type].from_config(config).save_pretrained(folder)
    return AUTO_CLASSES[task_type].from_pretrained(folder)


def _steps(args: TrainingArguments, rows: int) -> dict[str, str]:
    ranks, micro = args.world_size, args.per_device_train_batch_size
    accumulation = args.gradient_accumulation_steps
    per_step = micro * ranks * accumulation
    batch = f"{micro} a device x {ranks} rank(s) x {accumulation} accumulated = {per_step}"
    if not hasattr(args, "steps_per_generation"):
        in_epoch = -(-rows // per_step)
        steps = args.max_steps if args.max_steps > 0 else round(in_epoch * args.num_train_epochs)
        return {"batch": f"{batch} rows an optimizer step", "steps": f"{steps:,} optimizer steps"}
    rollout, prompts = args.generation_batch_size, args.generation_batch_size // args.num_generations
    each = steps_per_rollout(args)
    rollouts = rows // prompts * args.num_train_epochs
    if args.max_steps > 0:
        rollouts = args.max_steps / each
    steps, episodes = rollouts * each, rollouts * rollout
    return {
        "rollout": f"{rollout:,} completions of {prompts:,} prompts ({args.num_generations} each)",
        "batch": f"{batch} completions an optimizer step (a mini-batch)",
        "optimization": f"{args.num_iterations} epoch(s) over a rollout = {each} optimizer steps",
        "steps": f"{rollouts:,.4g} rollouts, {episodes:,.0f} episodes, {steps:,.0f} optimizer steps",
    }
