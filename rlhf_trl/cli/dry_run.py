"""Dry run (`debug=dry_run`): the plan of a run, printed before any model loads."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from rlhf_trl.build import (
    Model,
    build_trainer,
    check_prompts,
    critic_start,
    from_pretrained_kwargs,
    instantiate_data,
    instantiated,
    load_data,
    models_of,
    reward_functions,
    training_arguments,
)
from rlhf_trl.callbacks.base import steps_per_rollout
from rlhf_trl.checks.outputs import nearest_folder
from rlhf_trl.config.values import as_dict
from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.lengths import head_names
from rlhf_trl.data.preview import count_trained, render_batch, render_sample
from rlhf_trl.data.splits import eval_split
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.generation import TOO_LONG, Policy
from rlhf_trl.models.adapters import adapter_config
from rlhf_trl.models.initial import load_initial_model
from rlhf_trl.models.loading import AUTO_CLASSES, load_model, load_reward_model
from rlhf_trl.models.precision import weights_dtype
from rlhf_trl.models.sizes import Sizes, check_rows, empty_model
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.runs.paths import project_dir, resolve_path
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.stages.evaluate import reference_answers
from rlhf_trl.stages.evaluate_reward import rows_of
from rlhf_trl.stages.generate import as_chat, given_prompt, prompts_of
from rlhf_trl.stages.reward import member_seeds
from rlhf_trl.terminal import printable

READERS = {"prompt": eval_split, "annotated": rows_of}  # which rows a stage reads that trains nothing
END = "Dry run: nothing was started and nothing written. Remove `debug=dry_run` to run it."


def show_plan(cfg: DictConfig) -> None:
    """
    Print stage, model, data, batch arithmetic, steps, and a rendered sample with its loss mask.

    The data are read and the tokenizer is loaded; the files of models are inspected, and nothing is written.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: for everything that would stop the run later and can be found now.
    """
    if "args" not in cfg.stage:
        lines = plan_without_training(cfg)
        if is_main_process():
            _show(lines)
            print(f"\n{END}")
        return
    path = resolve_path(cfg.model.path, cfg.model.run, project_dir(cfg))
    args: Any = training_arguments(cfg.stage.args, **critic_start(cfg))
    tokenizer = load_tokenizer(path, cfg.model.tokenizer, cfg.model.chat_template, **from_pretrained_kwargs(cfg))
    dataset = load_data(cfg, tokenizer)
    check_prompts(args, len(dataset["train"]))
    check_model_files(cfg, head_names(dataset["train"]))
    rows = {name: len(part) for name, part in dataset.items()}
    lines = {
        "stage": f"{cfg.stage.name} ({cfg.stage.trainer._target_})",
        "run directory": cfg.run_dir,
        "starts from": path,
        "adapter": cfg.adapter.peft._target_ if cfg.adapter.peft else "none, all weights are trained",
        "data": ", ".join(f"{count:,} rows for {name}" for name, count in rows.items()),
        **_steps(args, rows["train"]),
        **_disk(cfg),
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
    }
    if cfg.stage.get("members", 1) > 1:
        seeds = member_seeds(cfg)
        lines["members"] = f"{len(seeds)}, one after another, each as above; seeds {seeds[0]} to {seeds[-1]}"
    if "reward" in cfg:
        for reward in reward_functions(cfg, tokenizer, dataset["train"].column_names, models=False):
            reward.check()
        lines["rewards"] = ", ".join(f"{name} x {node.weight}" for name, node in cfg.reward.items())
    if "combine" in cfg:
        lines["score"] = cfg.combine._target_.rsplit(".", 1)[-1].replace("_", " ") + " of the rewards"
    if hasattr(args, "critic"):
        lines["critic"] = f"{args.critic}, from {args.critic_path or 'the policy'}"
    batch = None if cfg.stage.dataset_type == "prompt" else first_batch(cfg, tokenizer, dataset)
    if batch is not None:
        trained, tokens = count_trained(batch)
        lines["first batch"] = f"{trained:,} of {tokens:,} tokens are trained on"
    if not is_main_process():
        return
    _show(lines)
    print("\nFirst row")
    scored = batch is None or "completion_ids" in dataset["train"].column_names
    shown = render_sample(tokenizer, dataset["train"][0]) if scored else render_batch(tokenizer, batch)
    for line in shown.splitlines():
        print(f"  {printable(line)}")
    print(f"\n{END}")


def _show(lines: dict[str, str]) -> None:
    width = max(map(len, lines))
    print("\nPlan")
    for name, text in lines.items():
        print(f"  {name:<{width}}  {text}")


def plan_without_training(cfg: DictConfig) -> dict[str, str]:
    """
    Return the plan of a stage that trains nothing, by what its config has: models, prompts or data, rewards, a judge,
    a file to write.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with every problem.
    """
    problems, stage = [], cfg.stage
    lines = {"stage": f"{stage.name} ({stage.run._target_})", "run directory": cfg.run_dir}

    @contextlib.contextmanager
    def collected() -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            problems.append(str(error))

    for model in models_of(as_dict(cfg)):
        lines[model.key] = model.path
        with collected():
            _check_files(model)
    rows: list[dict] = []
    with collected():
        if "max_prompts" in stage:
            rows = prompts_of(cfg)
            lines["prompts"] = f"{len(rows):,}"
        elif "data" in cfg:
            dataset = instantiate_data(cfg)
            lines["data"] = ", ".join(f"{len(part):,} rows for {name}" for name, part in dataset.items())
            if stage.dataset_type in READERS:
                rows = READERS[stage.dataset_type](dataset).to_list()
            if stage.get("references"):
                reference_answers(cfg)
    if rows and "prompt" in rows[0]:
        for policy, sizes in _generating_policies(cfg):
            with collected():
                wants_chat = "to_chat" in stage and as_chat(policy, stage.to_chat)
                given = [given_prompt(row["prompt"], policy, wants_chat, stage.get("system_prompt")) for row in rows]
                ids = [policy.ids(prompt, **template_kwargs(row)) for prompt, row in zip(given, rows, strict=True)]
                check_rows(sizes, ids, stage.max_completion_length, TOO_LONG)
    if "reward" in cfg:
        lines["rewards"] = ", ".join(f"{name} x {node.weight}" for name, node in cfg.reward.items()) or "none"
        with collected():
            for reward in reward_functions(cfg, None, models=False):
                reward.check()
    if "judge" in cfg:
        lines["judge"] = cfg.judge._target_.rsplit(".", 1)[-1]
        with collected():
            instantiated(cfg.judge).check()
    if "output" in stage:
        lines["output"] = stage.output
        if Path(stage.output).exists() and not cfg.overwrite:
            problems.append(
                f"`stage.output` is `{stage.output}`, which exists. Name another file, or `overwrite=true`."
            )
    if problems:
        raise ConfigError.join(problems)
    return lines


def _generating_policies(cfg: DictConfig) -> Iterator[tuple[Policy, Sizes]]:
    """Yield the policies that generate, without weights, and their sizes."""
    for model in models_of(as_dict(cfg)):
        if model.writes:
            tokenizer = model.load_tokenizer()
            # Without weights: only its tokenizer and template are used
            yield Policy(model.key, model.path, None, tokenizer), model.sizes()  # pyright: ignore[reportArgumentType]


def check_model_files(cfg: DictConfig, heads: list[str] | None) -> None:
    """
    Check the files of the models that a training starts from and is rewarded by: that they can be read and have every
    weight (a reward model its score head), and that the adapter finds its layers.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: as loading does.
    """
    for model in models_of(as_dict(cfg)):
        if model.key != "model":
            _check_files(model)
            continue
        peft, saved = instantiate(cfg.adapter.peft), adapter_config(model.path, model.revision)
        if saved is not None and peft is None:
            _check_files(model)  # it is merged when the run starts
            continue
        options = {
            "attn_implementation": cfg.model.attn_implementation,
            "device_map": "meta",
            **from_pretrained_kwargs(cfg),
        }
        with _no_progress_bars():
            load_initial_model(model.path, model.task_type, peft, "", heads=heads, dtype=cfg.model.dtype, **options)


def _check_files(model: Model) -> None:
    saved = adapter_config(model.path, model.revision)
    with _no_progress_bars():
        if model.task_type == "SEQ_CLS" and model.key != "model":
            load_reward_model(model.path, trust_remote_code=model.trust_remote_code, device_map="meta")
        else:
            task_type = str(saved.task_type) if saved and saved.task_type else "CAUSAL_LM"
            load_model(model.path, task_type, "auto", None, model.trust_remote_code, model.revision, device_map="meta")


def first_batch(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, dataset: DatasetDict) -> dict[str, Tensor]:
    """
    Return the first batch that this rank will train on, from the trainer itself: its preparation of the rows, its
    sampler and its collator, on a model of a few thousand weights in place of the run's.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if TRL refuses the arguments or the rows.
    """
    with tempfile.TemporaryDirectory() as folder, _no_progress_bars():
        args: Any = training_arguments(cfg.stage.args, output_dir=folder, report_to="none", push_to_hub=False)
        args.eval_strategy = IntervalStrategy.NO
        args.precompute_ref_log_probs = False  # of DPO and KTO: those of the placeholder would mean nothing
        trainer = build_trainer(
            cfg,
            model=_placeholder_model(tokenizer, cfg.stage.task_type, head_names(dataset["train"]), folder),
            args=args,
            train_dataset=dataset["train"],
            processing_class=tokenizer,
        )
        return next(iter(trainer.get_train_dataloader()))


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Disable Transformers' progress bars, which would show the placeholder being written and loaded."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _placeholder_model(tokenizer: PreTrainedTokenizerBase, task_type: str, heads: list[str] | None, folder: str):
    """Return a tiny Llama of the tokenizer's vocabulary, saved in `folder` for trainers that load a reference."""
    pad_token_id: Any = tokenizer.pad_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=pad_token_id,
    )
    config.num_labels = len(heads or ["score"])
    AUTO_CLASSES[task_type].from_config(config).save_pretrained(folder)
    return AUTO_CLASSES[task_type].from_pretrained(folder)


def _disk(cfg: DictConfig) -> dict[str, str]:
    """
    Return the free disk space and the space that the trained weights need.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if they don't fit.
    """
    model = models_of(as_dict(cfg))[0]
    empty = empty_model(model.path, model.task_type, model.trust_remote_code, model.revision)
    name = weights_dtype(cfg.model.dtype, is_trained=cfg.adapter.peft is None)
    dtype = empty.dtype if name == "auto" else getattr(torch, name)
    folder = nearest_folder(Path(cfg.run_dir))
    weights, free = empty.num_parameters() * dtype.itemsize, shutil.disk_usage(folder).free
    if not cfg.adapter.peft and weights > free:
        raise ConfigError(
            f"The trained model needs {_bytes(weights)}, and the disk of `{folder}` has {_bytes(free)} free. Make "
            "room, or set another `runs_dir=...`."
        )
    if cfg.adapter.peft:
        return {"disk": f"{_bytes(free)} free; an adapter needs little"}
    return {"disk": f"{_bytes(free)} free; the weights need {_bytes(weights)}, a checkpoint about three times that"}


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _steps(args: Any, rows: int) -> dict[str, str]:
    ranks, micro = args.world_size, args.per_device_train_batch_size
    accumulation = args.gradient_accumulation_steps
    per_step = micro * ranks * accumulation
    batch = f"{micro} per device x {ranks} rank(s) x {accumulation} accumulated = {per_step}"
    if not hasattr(args, "steps_per_generation"):
        in_epoch = -(-rows // per_step)
        steps = args.max_steps if args.max_steps > 0 else round(in_epoch * args.num_train_epochs)
        return {"batch": f"{batch} rows per optimizer step", "steps": f"{steps:,} optimizer steps"}
    rollout, prompts = args.generation_batch_size, args.generation_batch_size // args.num_generations
    each = steps_per_rollout(args)
    rollouts = rows // prompts * args.num_train_epochs
    if args.max_steps > 0:
        rollouts = args.max_steps / each
    steps, episodes = rollouts * each, rollouts * rollout
    return {
        "rollout": f"{rollout:,} completions of {prompts:,} prompts ({args.num_generations} each)",
        "batch": f"{batch} completions per optimizer step (a mini-batch)",
        "optimization": f"{args.num_iterations} epoch(s) per rollout = {each} optimizer steps",
        "steps": f"{rollouts:,.4g} rollouts, {episodes:,.0f} episodes, {steps:,.0f} optimizer steps",
    }
