"""Dry run (`debug=dry_run`): the plan of a run, printed before any model loads."""

import contextlib
import copy
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from datasets import DatasetDict
from hydra.utils import instantiate
from omegaconf import DictConfig
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from rlhf_trl.build import (
    Model,
    critic_start,
    from_pretrained_kwargs,
    instantiate_data,
    instantiated,
    load_data,
    models_of,
    training_arguments,
)
from rlhf_trl.callbacks.schedule import schedule_problem
from rlhf_trl.checks.devices import unused_devices
from rlhf_trl.checks.disk import disk_need
from rlhf_trl.checks.learning_rates import learning_rate_warnings
from rlhf_trl.checks.memory import estimate
from rlhf_trl.checks.reward_calls import Scale, sample_of
from rlhf_trl.checks.services import hub_problem, vllm_problem
from rlhf_trl.checks.vllm import installed_version, version_warning
from rlhf_trl.cli.plan import (
    adapter_text,
    constraints_text,
    critic_text,
    critic_weights,
    cut_warning,
    learning_rate_text,
    lengths_text,
    offline_lines,
    offline_steps,
    quantization_text,
    rewards_text,
    rollout_lines,
    sampler_text,
    weights_of,
)
from rlhf_trl.cli.probes import (
    ROWS,
    Collected,
    check_other_tokenizers,
    chosen_answers,
    completion_lengths,
    disk_text,
    first_rows,
    own_answers,
    reward_scales,
    scale_warning,
)
from rlhf_trl.cli.timing import time_steps, timing_lines
from rlhf_trl.config.values import as_dict, at
from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.counts import check_enough_rows, check_evaluated_groups
from rlhf_trl.data.lengths import head_names, row_lengths
from rlhf_trl.data.multimodal import processor_of
from rlhf_trl.data.preview import count_trained, render_batch, render_sample
from rlhf_trl.data.splits import eval_split
from rlhf_trl.data.unknown import check_known
from rlhf_trl.evaluation.annotations import read_annotated
from rlhf_trl.evaluation.generation import TOO_LONG, Policy
from rlhf_trl.models.adapters import adapter_config
from rlhf_trl.models.initial import load_initial_model
from rlhf_trl.models.loading import load_model, load_reward_model
from rlhf_trl.models.precision import computed_in, dtype_name, precision_text, rounding_problem, weights_dtype
from rlhf_trl.models.sizes import Sizes, check_rows, empty_model, sizes_of
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.models.vision import auto_class
from rlhf_trl.rewards.conditions import unmet_conditions
from rlhf_trl.runs.engines import uses_deepspeed, uses_fsdp
from rlhf_trl.runs.paths import project_dir, resolve_path
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.stages.evaluate import reference_answers
from rlhf_trl.stages.evaluate_reward import rows_of
from rlhf_trl.stages.generate import as_chat, given_prompt, prompts_of
from rlhf_trl.stages.reward import member_seeds
from rlhf_trl.terminal import printable
from rlhf_trl.trainers.construction import build_trainer

OTHER_TEXTS = "Name a policy of their language, or other prompts."
END = "Dry run: nothing was started and nothing written. Remove `debug=dry_run` to run it."
END_OF_TIMING = "Nothing was written. Remove `debug=plan` to run it."


def show_plan(cfg: DictConfig, timed: bool = False) -> None:
    """
    Print what a run comes to: models, data, learning rates, lengths, batch arithmetic, disk, and a rendered sample
    with its loss mask; and warnings of what is to be expected of it.

    The data are read and the tokenizers are loaded; the files of models are inspected, reward functions are called on
    a few rows, and nothing is written.

    Args:
        cfg (`DictConfig`): the composed config, checked.
        timed (`bool`): whether to run a few micro-batches of a training and to print how long the run will take.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with everything that would stop the run later and can be found now.
    """
    lines, warnings, sample = plan_of_training(cfg) if "args" in cfg.stage else (*plan_without_training(cfg), "")
    times = timing_lines(time_steps(cfg)) if timed and "args" in cfg.stage else {}
    if not is_main_process():
        return
    lines |= times
    width = max(len(name) for name in lines if not name.startswith(" "))
    print("\nPlan")
    for name, text in lines.items():
        print(f"  {name:<{width}}  {text}")
    if warnings:
        print("\nWarnings")
    for text in warnings:
        print(f"  - {printable(text)}")
    if sample:
        print("\nFirst row")
    for line in sample.splitlines():
        print(f"  {printable(line)}")
    print(f"\n{END_OF_TIMING if timed else END}")


def plan_of_training(cfg: DictConfig) -> tuple[dict[str, str], list[str], str]:
    """
    Return the plan of a training: its lines by name, warnings, and the first row as text.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with every problem.
    """
    found, stage = Collected(), cfg.stage
    path = resolve_path(cfg.model.path, cfg.model.run, project_dir(cfg))
    args: Any = training_arguments(stage.args, **critic_start(cfg))
    tokenizer = load_tokenizer(path, cfg.model.tokenizer, cfg.model.chat_template, **from_pretrained_kwargs(cfg))
    found.note(vllm_problem(args, path, cfg.model.trust_remote_code))
    found.note(hub_problem(args))
    dataset = DatasetDict()
    with found():
        dataset = load_data(cfg, tokenizer, args)
    start = check_model_files(cfg, args.bf16, head_names(dataset["train"]) if dataset else None, found)
    if not dataset or start is None:
        found.stop()
        raise AssertionError("what is missing is a problem")
    model, peft_config = start
    rows, generates = dataset["train"], stage.dataset_type == "prompt"
    with found():
        check_enough_rows(args, len(rows))
    with found():
        if "eval" in dataset:
            check_evaluated_groups(args)
    check_other_tokenizers(cfg, tokenizer, rows, found)
    answers = own_answers(cfg, [tokenizer]) if generates else chosen_answers(rows)
    scales: dict[str, Scale] = {}
    if "reward" in cfg:
        sample = sample_of(cast(Iterable[dict], rows), answers, tokenizer)
        scales = reward_scales(cfg, tokenizer, rows.column_names, sample, found)
        found.problems += unmet_conditions(as_dict(cfg.reward), rows)
    weights = weights_of(model, peft_config)
    critic = critic_weights(args, model, weights, cfg.model.trust_remote_code)
    if "judge" in cfg:
        with found():
            instantiated(cfg.judge).check()
    batch, steps = None, 0
    if generates:
        batches, steps = rollout_lines(args, len(rows))
    elif not found.problems:
        with found():
            batch, steps = first_batch(cfg, tokenizer, dataset)
        batches = offline_lines(args, steps)
    else:
        batches = {}
    need = disk_need(args, weights, critic, steps, merged_bytes(cfg, path, weights.total))
    disk = disk_text(cfg, need, found)
    found.stop()

    memory = estimate(cfg, args, tokenizer, rows)
    found.warn(memory.warning)
    quantization = quantization_text(instantiate(cfg.adapter.quantization))
    limit, positions = at(as_dict(stage), "prepare.max_prompt_length"), sizes_of(model).positions
    given = row_lengths(first_rows(rows), tokenizer)  # of a stage that generates: the prompts
    has_adapter, base = bool(cfg.adapter.peft), dtype_name(model.dtype)
    trained_in = "float32" if has_adapter else base
    lines = {
        "stage": f"{stage.name} ({stage.trainer._target_})",
        "run directory": cfg.run_dir,
        "starts from": path,
        "adapter": adapter_text(instantiate(cfg.adapter.peft), weights),
        **({"quantization": quantization} if quantization else {}),
        "precision": precision_text(trained_in, base if has_adapter else "", args),
        "learning rate": learning_rate_text(args),
        "data": ", ".join(f"{len(part):,} rows for {name}" for name, part in dataset.items()),
        "lengths": lengths_text(args, given, limit, positions),
        **({"temperature": f"{args.temperature:g}", "sampled by": sampler_text(args)} if generates else {}),
        **batches,
        "disk": disk,
        **memory.lines,
    }
    if stage.get("members", 1) > 1:
        seeds = member_seeds(cfg)
        lines["members"] = f"{len(seeds)}, one after another, each as above; seeds {seeds[0]} to {seeds[-1]}"
    if "reward" in cfg:
        lines["rewards"] = rewards_text(cfg.reward, scales) or "none"
    if "judge" in cfg:
        lines["judge"] = f"{cfg.judge._target_.rsplit('.', 1)[-1]}, in the rewards' place"
    if cfg.get("reward") and "combine" in cfg:
        lines["score"] = cfg.combine._target_.rsplit(".", 1)[-1].replace("_", " ") + " of the rewards"
    if bounds := at(as_dict(cfg), "combine.lambda_init") and as_dict(cfg.combine)["constraints"]:
        lines["constraints"] = constraints_text(cfg.reward, bounds, scales)
    if hasattr(args, "critic"):
        lines["critic"] = critic_text(args, critic)
    if batch is not None:
        trained, tokens = count_trained(batch)
        lines["first batch"] = f"{trained:,} of {tokens:,} tokens are trained on"
    found.warn(unused_devices(args))
    trained_in = f"{trained_in} and {getattr(args, 'critic_dtype', None)}"  # a critic of its own is trained in this
    found.warn(rounding_problem(trained_in, uses_deepspeed() or (uses_fsdp() and computed_in(args) is not None)))
    found.warnings += learning_rate_warnings(args, stage.dataset_type, weights.total, critic, has_adapter)
    found.warn(schedule_problem(args, steps))
    if generates:
        key, lengths = "stage.args.max_completion_length", completion_lengths(tokenizer, answers)
        found.warn(cut_warning(key, args.max_completion_length, lengths))
        found.warn(scale_warning(cfg, args, scales))
        found.warn(version_warning(installed_version()) if args.use_vllm else None)
    else:
        found.warn(cut_warning("stage.args.max_length", getattr(args, "max_length", None), given, noun="rows"))
    is_scored = batch is None or "completion_ids" in rows.column_names
    return lines, found.warnings, render_sample(tokenizer, rows[0]) if is_scored else render_batch(tokenizer, batch)


def plan_without_training(cfg: DictConfig) -> tuple[dict[str, str], list[str]]:
    """
    Return the plan of a stage that trains nothing, by what its config has (models, prompts or data, rewards, a judge,
    a file to write): its lines by name, and warnings.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with every problem.
    """
    found, stage = Collected(), cfg.stage
    lines = {"stage": f"{stage.name} ({stage.run._target_})", "run directory": cfg.run_dir}
    models = models_of(as_dict(cfg))
    for model in models:
        lines[model.key] = model.path
        with found():
            _check_files(model)
    if "max_completion_length" in stage and any(model.writes for model in models):
        lines["lengths"] = f"completions of up to {stage.max_completion_length:,} tokens"
        lines["temperature"] = f"{stage.temperature:g}"
    rows: list[dict] = []
    annotated: list[dict] = []
    with found():
        if "max_prompts" in stage:
            rows = prompts_of(cfg, stage.max_prompts)
            lines["prompts"] = f"{len(rows):,}"
        elif "data" in cfg:
            dataset = instantiate_data(cfg)
            lines["data"] = ", ".join(f"{len(part):,} rows for {name}" for name, part in dataset.items())
            if stage.dataset_type == "annotated":
                annotations = read_annotated(rows_of(dataset))
                rows = annotations.first_prompts(stage.get("prompts") or ROWS).to_list()
                pairs = zip(annotations.prompts, annotations.completions, strict=True)
                annotated = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
            elif stage.dataset_type == "prompt":
                rows = eval_split(dataset).to_list()
            if stage.get("references"):
                reference_answers(cfg)
    policies = list(_generating_policies(cfg)) if rows and "prompt" in rows[0] else []
    for policy, sizes in policies:
        with found():
            wants_chat = "to_chat" in stage and as_chat(policy, stage.to_chat)
            given = [given_prompt(row["prompt"], policy, wants_chat, stage.get("system_prompt")) for row in rows]
            check_known([{"prompt": prompt} for prompt in given], policy.tokenizer, policy.path, OTHER_TEXTS)
            ids = [policy.ids(prompt, **template_kwargs(row)) for prompt, row in zip(given, rows, strict=True)]
            check_rows(sizes, ids, stage.max_completion_length, TOO_LONG)
            rows = [{**row, "prompt": prompt} for row, prompt in zip(rows, given, strict=True)]
    tokenizer = policies[0][0].tokenizer if policies else None
    answers = own_answers(cfg, [tokenizer]) if tokenizer and "data" in cfg else []
    if "reward" in cfg:
        sample = sample_of(rows, annotated or answers, tokenizer) if rows and "prompt" in rows[0] else None
        columns = sorted(set().union(*rows)) if policies else None
        scales = reward_scales(cfg, tokenizer, columns, sample, found, finite=False)
        lines["rewards"] = rewards_text(cfg.reward, scales) or "none"
    if "judge" in cfg:
        lines["judge"] = cfg.judge._target_.rsplit(".", 1)[-1]
        with found():
            instantiated(cfg.judge).check()
    if "output" in stage:
        lines["output"] = stage.output
        if Path(stage.output).exists() and not cfg.overwrite:
            found.note(f"`stage.output` is `{stage.output}`, which exists. Name another file, or `overwrite=true`.")
    found.stop()
    if tokenizer is not None:
        lengths = completion_lengths(tokenizer, answers)
        found.warn(cut_warning("stage.max_completion_length", stage.max_completion_length, lengths))
    return lines, found.warnings


def _generating_policies(cfg: DictConfig) -> Iterator[tuple[Policy, Sizes]]:
    """Yield the policies that generate, without weights, and their sizes."""
    for model in models_of(as_dict(cfg)):
        if model.writes:
            tokenizer = model.load_tokenizer()
            # Without weights: only its tokenizer and template are used
            yield Policy(model.key, model.path, None, tokenizer), model.sizes()  # pyright: ignore[reportArgumentType]


def check_model_files(
    cfg: DictConfig, bf16: bool, heads: list[str] | None, found: Collected
) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None] | None:
    """
    Check the files of the models that a training starts from and is rewarded by: that they can be read and have every
    weight (a reward model its score head), and that the adapter finds its layers.

    Args:
        bf16 (`bool`): whether the run computes in bfloat16.
        heads (`list[str]`, *optional*): names of the heads of a reward model that is trained.
        found ([`Collected`]): gets the problems.

    Returns:
        `tuple` or `None`: the model that the run starts from, without weights, and the adapter that it puts on it;
            `None` if its files have a problem.
    """
    start = None
    for model in models_of(as_dict(cfg)):
        with found():
            if model.key == "model":
                start = _start(cfg, model, bf16, heads)
            else:
                _check_files(model)
    return start


def _start(
    cfg: DictConfig, model: Model, bf16: bool, heads: list[str] | None
) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
    """Return the model that a training starts from, on the meta device, and the adapter that it puts on it."""
    peft = instantiate(cfg.adapter.peft)
    dtype = weights_dtype(cfg.model.dtype, is_trained=peft is None, bf16=bf16)
    if is_merged_first(cfg, model.path):
        _check_files(model)
        merged = copy.deepcopy(empty_model(model.path, model.task_type, model.trust_remote_code, model.revision))
        return (merged if dtype == "auto" else merged.to(getattr(torch, dtype))), None
    options = {
        "dtype": dtype,
        "attn_implementation": cfg.model.attn_implementation,
        "device_map": "meta",
        **from_pretrained_kwargs(cfg),
        **(as_dict(cfg.model)["init_kwargs"] or {}),
    }
    with _no_progress_bars():
        return load_initial_model(model.path, model.task_type, peft, "", heads=heads, **options)


def is_merged_first(cfg: DictConfig, path: str) -> bool:
    """Return whether a run starts from an adapter and trains all weights: it is merged when the run starts."""
    return not cfg.adapter.peft and adapter_config(path, cfg.model.revision) is not None


def merged_bytes(cfg: DictConfig, path: str, parameters: int) -> int:
    """Return the bytes of the merged models that a run writes at its start and end, in the type of the base."""
    base = empty_model(path, cfg.stage.task_type, cfg.model.trust_remote_code, cfg.model.revision)
    return (cfg.merge + is_merged_first(cfg, path)) * parameters * base.dtype.itemsize


def _check_files(model: Model) -> None:
    saved = adapter_config(model.path, model.revision)
    with _no_progress_bars():
        if model.task_type == "SEQ_CLS" and model.key != "model":
            load_reward_model(model.path, trust_remote_code=model.trust_remote_code, device_map="meta")
        else:
            task_type = str(saved.task_type) if saved and saved.task_type else "CAUSAL_LM"
            load_model(model.path, task_type, "auto", None, model.trust_remote_code, model.revision, device_map="meta")


def first_batch(
    cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, dataset: DatasetDict
) -> tuple[dict[str, Tensor], int]:
    """
    Return the first batch that this rank will train on, and the optimizer steps of the run, from the trainer itself:
    its preparation of the rows (packing, truncation), its sampler and its collator, on a model of a few thousand
    weights in place of the run's.

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
            processing_class=processor_of(tokenizer) or tokenizer,
        )
        batches = trainer.get_train_dataloader()
        return next(iter(batches)), offline_steps(args, len(batches))


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
    loader = auto_class(config, task_type)
    loader.from_config(config).save_pretrained(folder)
    return loader.from_pretrained(folder)
