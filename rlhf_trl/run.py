"""
The flow of a run, from the composed config to a saved model: the only module that sees the whole config.

What differs between stages is in conf/stage/*.yaml; keys that a stage has no use for are simply not there.
"""

import contextlib
import functools
import os
import shlex
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, DatasetDict
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_torch_bf16_gpu_available

from rlhf_trl.adapters import begin_training
from rlhf_trl.callbacks import SaveAndStop
from rlhf_trl.callbacks.interrupt import Interrupt
from rlhf_trl.callbacks.nonfinite import NonfiniteGuard
from rlhf_trl.callbacks.progress import ProgressLine
from rlhf_trl.callbacks.record import RunRecord
from rlhf_trl.callbacks.samples import SampleLog
from rlhf_trl.callbacks.unrewarded import UnrewardedGuard
from rlhf_trl.checks.run_directory import run_directory_problems
from rlhf_trl.checks.sizes import check_rows_fit
from rlhf_trl.checks.values import plain
from rlhf_trl.data.chat_template import (
    check_template_answers,
    check_template_syntax,
    keep_template_kwargs,
    refusals_named,
)
from rlhf_trl.data.lengths import head_names, keep_one_bos
from rlhf_trl.data.messages import is_chat
from rlhf_trl.data.preview import note_rows_without_end
from rlhf_trl.data.splits import leave_out, prompt_keys
from rlhf_trl.data.tokenize import end_tokens, note_template_end
from rlhf_trl.directory import claimed, discard_old, holds_old, put_back, recover, set_aside
from rlhf_trl.dotpaths import find
from rlhf_trl.errors import ConfigError, DataError, disk_is_full
from rlhf_trl.hints import did_you_mean
from rlhf_trl.inputs import inputs_of, resume_problems
from rlhf_trl.launching import config_dirs
from rlhf_trl.loggers import is_first_rank
from rlhf_trl.models import (
    adapter_config,
    base_path,
    fingerprint,
    load_start,
    load_tokenizer,
    merge_adapter,
    start_quantization,
    trained_quantization,
)
from rlhf_trl.overrides import as_typed
from rlhf_trl.patches.warnings import filter_warnings
from rlhf_trl.paths import resolve_path
from rlhf_trl.ranges import RULES, check_values
from rlhf_trl.rewards import ModelReward
from rlhf_trl.rewards.base import GIVEN
from rlhf_trl.runs.checkpoints import clear_unfinished, last_checkpoint, last_whole_checkpoint
from rlhf_trl.runs.record import finish_run, read_run, start_run, write_metrics
from rlhf_trl.terminal import say
from rlhf_trl.trainers.base import extended


def claims_directory(stage: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """
    Let a stage begin only when its run directory is this process's alone, and used as the config says, see
    `rlhf_trl.directory`. Every rank calls it; rank 0 claims for all.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: on every rank, if another process has claimed the directory, or an earlier
            run in it doesn't allow this one: it may have begun since the checks.
    """

    @functools.wraps(stage)
    def claimed_stage(cfg: DictConfig) -> Any:
        with contextlib.ExitStack() as stack:
            problems = []
            if PartialState().is_main_process:
                try:
                    stack.enter_context(claimed(cfg.run_dir))
                    recover(cfg.run_dir)
                    problems = run_directory_problems(plain(cfg)[0])
                except ConfigError as error:
                    problems = [str(error)]
            raise_everywhere(problems)
            return stage(cfg)

    return claimed_stage


def raise_everywhere(problems: list[str]) -> None:
    """Raise on every rank what rank 0 has found, if anything: a rank that goes on alone would wait for ever."""
    (problems,) = broadcast_object_list([problems])
    if problems:
        raise ConfigError.join(problems)


@claims_directory
def train(cfg: DictConfig) -> float | None:
    """
    Trains what `cfg.stage` names, evaluates the model, and saves it into `cfg.run_dir`.

    Args:
        cfg (`DictConfig`):
            The composed config (conf/train.yaml), checked.

    Returns:
        `float` or `None`: the metric named by `cfg.objective`; `None` if it was not measured or the run was stopped.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if arguments, models, data or an earlier run in `run_dir` don't allow it.
    """
    return train_claimed(cfg)


def train_claimed(cfg: DictConfig) -> float | None:
    """[`train`] in a directory that is claimed already, such as that of a member of an ensemble."""
    OmegaConf.resolve(cfg)
    filter_warnings()
    set_seed(cfg.seed)
    args = training_arguments(cfg.stage.args, **critic_start(cfg))
    path = resolve_path(cfg.model.path, cfg.model.run, project_dir(cfg))
    tokenizer = load_tokenizer(path, cfg.model.tokenizer, cfg.model.chat_template, **source(cfg))
    dataset = load_data(cfg, tokenizer)
    check_prompts(args, len(dataset["train"]))
    if "eval" not in dataset:
        args.eval_strategy, args.do_eval, args.eval_on_start = IntervalStrategy.NO, False, False

    extra = {"ptx_dataset": demonstrations(cfg, dataset)} if "ptx_data" in cfg else {}
    checkpoint = begin(cfg, path, inputs_of(cfg, path, dataset | extra))
    interrupt = Interrupt(resume_command=command(cfg, "resume=true"))
    try:
        logger = instantiate(cfg.logger.run)
        with logger(run_dir=cfg.run_dir, name=args.run_name, config=OmegaConf.to_container(cfg)):
            trainer = make_trainer(cfg, args, path, tokenizer, dataset, **extra)
            trainer.add_callback(interrupt)  # the last one, so that its message stands last
            trainer.train(resume_from_checkpoint=checkpoint)
            metrics = {} if interrupt.interrupted else finish(cfg, trainer)
    except BaseException as error:
        interrupt.restore()
        fail(cfg, error)
        raise
    # A stop by the KL guard or the health monitor is an end the user asked for: the run is done, its record says why
    reasons = [callback.reason for callback in trainer.callback_handler.callbacks if isinstance(callback, SaveAndStop)]
    reasons = [reason for reason in reasons if reason]
    end(cfg, "stopped" if interrupt.interrupted else "done", **({"reason": reasons[0]} if reasons else {}))
    if interrupt.interrupted:
        raise SystemExit(130)  # as a shell says that Ctrl-C ended a command
    if cfg.objective is not None and cfg.objective not in metrics and "eval" in dataset:
        measured = sorted(name for name in metrics if name.startswith("eval_"))
        say(f"`objective` is `{cfg.objective}`, which was not measured. {did_you_mean(cfg.objective, measured)}")
    return metrics.get(cfg.objective)


def merge(cfg: DictConfig) -> None:
    """
    Writes the merged model of the adapter that `cfg.model` names: into `merged` inside its folder, or inside
    `cfg.run_dir` for an adapter of the hub.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if it is no adapter, or a run that is missing or not finished.
    """
    filter_warnings()
    path = resolve_path(cfg.model.path, cfg.model.run, project_dir(cfg))
    output_dir = Path(path if Path(path).is_dir() else cfg.run_dir, "merged")
    if is_first_rank():
        merge_adapter(path, str(output_dir), dequantize=cfg.stage.dequantize, **source(cfg))
        print(f"Merged model: {output_dir}")
        if trained_quantization(path) is not None and cfg.stage.dequantize:
            print("Its base is the quantized one that the adapter was trained on, dequantized.")
        elif trained_quantization(path) is not None:
            print("Its base is the unquantized one, which the adapter was not trained on: it is another model.")


def critic_start(cfg: DictConfig) -> dict[str, str]:
    """The argument that says which reward model the critic starts from, where it starts from one."""
    critic = cfg.get("critic")
    if not critic or (critic.run is None and critic.path is None):
        return {}
    return {"critic_path": resolve_path(critic.path, critic.run, project_dir(cfg))}


def training_arguments(node: DictConfig, **resolved: Any) -> TrainingArguments:
    """
    The trainer's arguments; `bf16` left open becomes what the device can do.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if TRL's dataclass refuses a value, or bf16 is asked for where there is none.
    """
    values = OmegaConf.to_container(node, resolve=True) | resolved
    supported = is_torch_bf16_gpu_available() and not values.get("use_cpu")
    if values.get("bf16") and not supported and not values.get("use_cpu"):
        raise ConfigError(
            "`stage.args.bf16=true` asks for bfloat16, which this machine has no accelerator for. Set "
            "`stage.args.bf16=false`, or `+stage.args.use_cpu=true` to compute in bfloat16 on the CPU."
        )
    if values.get("bf16") is None and not values.get("fp16"):
        values["bf16"] = supported
    values.setdefault("logging_nan_inf_filter", False)  # it would show a loss of NaN as the mean of those before
    if not torch.accelerator.is_available():
        values.setdefault("use_cpu", True)  # without it each of several CPU ranks would train by itself
    check_values(RULES.get(values["_target_"], {}), values, "stage.args.")
    try:
        args = instantiate(values)
    except InstantiationException as error:
        raise ConfigError(f"`stage.args` is refused by `{node._target_}`: {error.__cause__ or error}") from error
    if node.get("bf16") is None and not args.bf16 and not args.fp16 and args.process_index == 0:
        print("bf16 is off: this machine has no accelerator with bfloat16, so training is in float32.")
    return args


def load_data(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """The splits `train` and, where there is one, `eval`, in the form the stage wants."""
    template_source = cfg.model.chat_template or tokenizer.name_or_path
    with PartialState().main_process_first():
        if tokenizer.chat_template is not None:
            check_template_syntax(tokenizer, template_source)
        with refusals_named(tokenizer):
            dataset = instantiate_data(cfg)
        options = OmegaConf.to_container(cfg.stage.args, resolve=True)
        dataset = keep_template_kwargs(dataset, tokenizer, options.get("chat_template_kwargs"))
        dataset = keep_one_bos(dataset, tokenizer)
        if is_chat(dataset["train"][0]) and tokenizer.chat_template is not None:
            check_template_answers(tokenizer, template_source)
            note_template_end(tokenizer, options.get("eos_token"))
        if cfg.stage.prepare is not None:
            prepare = instantiate(cfg.stage.prepare)
            dataset = prepare(dataset, tokenizer)
        check_rows_fit(cfg, tokenizer, dataset)
    return dataset


def check_prompts(args: TrainingArguments, count: int) -> None:
    """
    Stop a run with fewer prompts than a rollout takes: TRL drops what doesn't fill one, and would train on nothing.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with what to lower.
    """
    if not hasattr(args, "generation_batch_size"):
        return
    needed = args.generation_batch_size // args.num_generations
    if count < needed:
        raise ConfigError(
            f"There are {count} prompts, fewer than the {needed} of one rollout. Lower "
            "`stage.args.per_device_train_batch_size` or `stage.args.steps_per_generation`, or give more prompts."
        )


def demonstrations(cfg: DictConfig, dataset: DatasetDict) -> Dataset:
    """The training rows of `ptx_data`, but for those whose prompt is held out in `dataset`."""
    rows = instantiated(cfg.ptx_data)(form="prompt_completion", seed=cfg.seed)["train"]
    if "eval" not in dataset or cfg.data.get("split_by") == "row":
        return rows
    notes = []
    rows = leave_out("ptx_data", rows, prompt_keys(rows), set(prompt_keys(dataset["eval"])), notes)
    for note in notes:
        say(note)
    return rows


def instantiate_data(cfg: DictConfig, form: str | None = None) -> DatasetDict:
    """
    The rows of `cfg.data` in the form that the stage wants, or in another one.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: of an option of `data.feedback`, or of the rows.
    """
    return instantiated(cfg.data)(form=form or cfg.stage.form, seed=cfg.seed)


def instantiated(node: DictConfig, **options):
    """
    What a node of the config makes; Hydra's wrapping of an error that is about the config is taken off.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: of one of its options.
    """
    try:
        return instantiate(node, **options)
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        raise


def begin(cfg: DictConfig, path: str, inputs: Mapping[str, Any] | None = None) -> str | None:
    """
    Makes the run directory ready and leaves the config and `run.json` in it. An earlier run that is overwritten is set
    aside until this one has begun.

    Args:
        path (`str`): what the run starts from.
        inputs (`Mapping`, *optional*): what else its result depends on, see [`~rlhf_trl.inputs.inputs_of`].

    Returns:
        `str` or `None`: the checkpoint to go on from.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a resumed run depends on something that has changed since.
    """
    state, run_dir = PartialState(), Path(cfg.run_dir)
    checkpoint, damaged = last_whole_checkpoint(run_dir) if cfg.resume else (None, {})
    lacking = [f"`{path}` isn't whole ({', '.join(files)} missing or cut off)" for path, files in damaged.items()]
    problems = []
    state.wait_for_everyone()  # no rank may look at the directory after rank 0 has changed it
    if state.is_main_process:
        record = read_run(run_dir)
        if checkpoint:
            problems = resume_problems(run_dir, record.get("inputs", {}), inputs or {})
        elif lacking:
            problems = [f"No checkpoint can be resumed: {'; '.join(lacking)}. Start again: `overwrite=true`."]
        elif record is not None and not cfg.resume:
            set_aside(run_dir)
    raise_everywhere(problems)
    if state.is_main_process:
        if checkpoint:
            for text in lacking:
                print(f"{text}, so the one before it is taken.")
            print(f"Going on from {checkpoint}.")
        start_run(
            run_dir,
            stage=cfg.stage.name,
            command=command(cfg),
            model=path,
            inputs=inputs,
            quantization=quantization(cfg, path),
        )
        OmegaConf.save(cfg, run_dir / "config.yaml")
    state.wait_for_everyone()
    return checkpoint


def quantization(cfg: DictConfig, path: str) -> dict[str, Any] | None:
    """How the base under the adapter of a run that starts from `path` is quantized; `None` where it isn't."""
    if not (adapter := cfg.get("adapter")) or adapter.peft is None:
        return None
    found = start_quantization(path, instantiate(adapter.quantization))
    return found and found.to_dict()


def make_trainer(
    cfg: DictConfig,
    args: TrainingArguments,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    dataset: DatasetDict,
    **extra: Any,
) -> Trainer:
    """The stage's trainer, with model, rewards and callbacks; `extra` are further arguments of the trainer's class."""
    if "reward" in cfg:
        extra["reward_funcs"] = reward_functions(cfg, tokenizer, dataset["train"].column_names)
        args.reward_weights = [reward.weight for reward in extra["reward_funcs"]]
    set_seed(args.seed)  # a new score head must not depend on what was loaded before
    model, peft_config = load_start(
        path,
        cfg.stage.task_type,
        instantiate(cfg.adapter.peft),
        merge_dir=f"{cfg.run_dir}/start",
        heads=head_names(dataset["train"]),
        dtype=cfg.model.dtype,
        attn_implementation=cfg.model.attn_implementation,
        quantization_config=instantiate(cfg.adapter.quantization),
        **source(cfg),
    )
    if model.can_generate():  # TRL's rollouts stop there, and so does whoever loads what is saved
        model.generation_config.eos_token_id = end_tokens(tokenizer) or None
    trainer = build_trainer(
        cfg,
        model=model,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset.get("eval"),
        processing_class=tokenizer,
        peft_config=peft_config,
        **extra,
    )
    for reward in extra.get("reward_funcs", ()):
        reward.attach(trainer.model)
    if is_peft_model(trainer.model):
        begin_training(trainer.model)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    for callback in callbacks(cfg, trainer):
        trainer.add_callback(callback)
    return trainer


def build_trainer(cfg: DictConfig, **objects: Any) -> Trainer:
    """
    Make the trainer that `cfg.stage.trainer` names. Its dataset is prepared as it will be trained on.

    Where its class, such as one of TRL's own, isn't a [`~rlhf_trl.trainers.base.TrainerMixin`], a subclass of it is.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if it is no class of trainers, or TRL refuses the arguments or the rows, or
            leaves none.
    """
    named = instantiate(cfg.stage.trainer)
    if not (isinstance(named.func, type) and issubclass(named.func, Trainer)):
        raise ConfigError(
            f"`stage.trainer` names `{cfg.stage.trainer._target_}`, which is no class of trainers. Name a subclass of "
            "`transformers.Trainer`, such as one of TRL's."
        )
    try:
        trainer = extended(named.func)(*named.args, **named.keywords, **objects)
    except Exception as error:
        frame = traceback.walk_tb(error.__traceback__)
        *_, (last, _) = frame
        if isinstance(error, ConfigError) or not last.f_globals.get("__name__", "").startswith("trl."):
            raise
        raise ConfigError(f"`{cfg.stage.trainer._target_}` refuses the run: {error}") from error
    if len(trainer.train_dataset) == 0:
        raise DataError(
            f"`{cfg.stage.trainer._target_}` keeps no row of the {len(objects['train_dataset']):,} for training: in "
            "none is anything left to train on after `stage.args.max_length` tokens. Set it higher."
        )
    if hasattr(trainer.args, "eos_token"):  # SFT teaches where to stop
        rows = [trainer.train_dataset[i] for i in range(min(32, len(trainer.train_dataset)))]
        note_rows_without_end(trainer.data_collator(rows), trainer.processing_class)
    return trainer


def reward_functions(
    cfg: DictConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    columns: Sequence[str] | None = None,
    models: bool = True,
) -> list[Callable]:
    """
    The rewards of the group `reward`, under the names they have there; runs become paths.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the policy's.
        columns (`Sequence[str]`, *optional*): those of the data, where the rewards are given any.
        models (`bool`): whether rewards that load a model are made too.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: of an option of a reward, or of a column that one misses or can't be given.
    """
    rewards = []
    for name, node in cfg.reward.items():
        options = {"name": name}
        kind = find(node._target_).func
        if not models and isinstance(kind, type) and issubclass(kind, ModelReward):
            continue
        if "run" in node:
            options["path"] = resolve_path(node.path, node.run, project_dir(cfg))
            node = OmegaConf.masked_copy(node, [key for key in node if key != "run"])
        reward = instantiated(node, **options)
        reward.bind(tokenizer)
        rewards.append(instantiate(cfg.stage.wrap_reward)(reward) if cfg.stage.wrap_reward else reward)
    problems = [reward.column_problem(columns) for reward in rewards] if columns is not None else []
    if rewards and (taken := [name for name in columns or () if name in GIVEN]):
        problems.append(
            f"The data has a column `{taken[0]}`, a name under which each reward gets something else. Rename it in "
            "the data."
        )
    if problems := [problem for problem in problems if problem]:
        raise ConfigError.join(problems)
    return rewards


def callbacks(cfg: DictConfig, trainer: Trainer) -> Iterator[TrainerCallback]:
    """What watches and steers the run: always the record and the progress line, and what the config names."""
    if "reward" in cfg:
        yield UnrewardedGuard(trainer)  # before a normalizer changes what the rewards are
    if "reward_norm" in cfg:
        yield instantiate(cfg.reward_norm)(trainer=trainer, combine=instantiate(cfg.combine))
    if not cfg.get("health"):  # the health monitor is such a guard
        yield NonfiniteGuard(trainer)
    for node in (cfg.get("kl"), cfg.get("health"), cfg.logger.get("callback")):
        if node:  # health=none is empty
            yield instantiate(node)(trainer=trainer)
    for name, node in cfg.callbacks.items():
        callback = instantiated(node)
        callback = callback(trainer=trainer) if isinstance(callback, functools.partial) else callback
        if not isinstance(callback, TrainerCallback):
            raise ConfigError(
                f"`callbacks.{name}` makes {type(callback).__name__}, which is no `transformers.TrainerCallback`. Let "
                f"`{node._target_}` be a subclass of it, or return one."
            )
        yield callback
    if "reward" in cfg:
        yield SampleLog(trainer, cfg.run_dir)
    yield ProgressLine()
    yield RunRecord(cfg.run_dir)


def finish(cfg: DictConfig, trainer: Trainer) -> dict[str, float]:
    """Evaluates and saves a trained model; returns the last value of every metric."""
    history = trainer.state.log_history
    measured = any(
        entry["step"] == trainer.state.global_step and any(key.startswith("eval_") for key in entry)
        for entry in history
    )
    if trainer.eval_dataset is not None and (not measured or trainer.args.load_best_model_at_end):
        trainer.evaluate()
    trainer.save_model(cfg.run_dir)
    if trainer.is_world_process_zero():
        # The reference belongs to the training; what is left of the run is the policy alone
        shutil.rmtree(Path(cfg.run_dir, "ref"), ignore_errors=True)
        write_metrics(cfg.run_dir, history)
        if cfg.merge and adapter_config(cfg.run_dir) is not None:
            merge_adapter(cfg.run_dir, f"{cfg.run_dir}/merged", trust_remote_code=cfg.model.trust_remote_code)
    PartialState().wait_for_everyone()
    return {key: value for entry in history for key, value in entry.items()}


def end(cfg: DictConfig, status: str, **extra) -> None:
    """Writes on rank 0 how the run ended; of an adapter also its base, and a hash of a local one."""
    if PartialState().is_main_process:
        adapter = adapter_config(cfg.run_dir) if status == "done" else None
        if adapter is not None:
            extra["base"] = adapter.base_model_name_or_path
            extra["base_fingerprint"] = fingerprint(base_path(cfg.run_dir, adapter))
        discard_old(cfg.run_dir)  # of a stage that takes no steps
        finish_run(cfg.run_dir, status, **extra)


def fail(cfg: DictConfig, error: BaseException) -> None:
    """
    Writes on rank 0 what ended the run. One that didn't begin leaves the directory as it was: with the earlier run
    that it was to overwrite, or, where the config was wrong, free.
    """
    if not PartialState().is_main_process:
        return
    is_wrong = isinstance(error, ConfigError) and not cfg.resume and last_checkpoint(cfg.run_dir) is None
    if is_wrong or holds_old(cfg.run_dir):
        put_back(cfg.run_dir)
    else:
        if disk_is_full(error):  # room for the record: what was half written is of no use
            clear_unfinished(cfg.run_dir)
        end(
            cfg,
            "stopped" if isinstance(error, KeyboardInterrupt) else "failed",
            error=f"{type(error).__name__}: {error}",
        )


def project_dir(cfg: DictConfig) -> str:
    """The folder of the project's runs."""
    return f"{cfg.runs_dir}/{cfg.project}"


def source(cfg: DictConfig) -> dict[str, Any]:
    """What every loading from the hub needs to know besides the path."""
    return {"trust_remote_code": cfg.model.trust_remote_code, "revision": cfg.model.revision}


def command(cfg: DictConfig, *added: str) -> str:
    """The command of this run as one would type it, with `added` instead of how it was begun."""
    if HydraConfig.initialized():
        given = [*config_dirs(), *as_typed(HydraConfig.get().overrides.task)]
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # this job alone: its name is not in what was typed
            given = [*(word for word in given if not word.startswith("run_name=")), f"run_name={cfg.run_name}"]
    else:
        given = [f"stage={cfg.stage.name}", f"project={cfg.project}"]
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "RANK" in os.environ
    words = ["accelerate", "launch", "train.py"] if launched else ["python", "train.py"]
    if added:
        given = [word for word in given if not word.startswith(("resume=", "overwrite="))]
    return shlex.join([*words, *given, *added])
