"""Training of any stage (`stage=sft|dpo|orpo|kto|grpo|rloo|ppo`), and of one reward model."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.trainer_utils import IntervalStrategy

from rlhf_trl.build import (
    critic_start,
    demonstrations,
    from_pretrained_kwargs,
    load_data,
    make_trainer,
    training_arguments,
)
from rlhf_trl.callbacks.base import SaveAndStop
from rlhf_trl.callbacks.interrupt import Interrupt
from rlhf_trl.callbacks.lengthened import Lengthened
from rlhf_trl.callbacks.schedule import ScheduleWarning
from rlhf_trl.checks.devices import unused_devices
from rlhf_trl.checks.learning_rates import learning_rate_warnings
from rlhf_trl.checks.memory import estimate
from rlhf_trl.checks.services import vllm_problem
from rlhf_trl.checks.vllm import installed_version, quantized_problem, version_warning
from rlhf_trl.config.values import as_dict, at, nodes, plain
from rlhf_trl.data.counts import check_enough_rows, check_evaluated_groups
from rlhf_trl.data.fingerprint import rows_fingerprint
from rlhf_trl.errors import Interrupted, Preempted
from rlhf_trl.hints import did_you_mean
from rlhf_trl.models.adapters import adapter_config, model_fingerprint
from rlhf_trl.models.merging import merge_adapter
from rlhf_trl.models.sizes import critic_parameters, empty_model
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.runs.directory import STEP
from rlhf_trl.runs.engines import engine, used_engine, uses_deepspeed, uses_fsdp
from rlhf_trl.runs.paths import project_dir, resolve_path
from rlhf_trl.runs.ranks import is_main_process, raise_on_all_ranks
from rlhf_trl.runs.record import write_metrics
from rlhf_trl.stages.base import base_quantization, command, open_run
from rlhf_trl.terminal import say

# Parameters from which the head of a run has a plan of its memory: smaller models fit anywhere
PLANNED_FROM = 10**7


def train(cfg: DictConfig) -> float | None:
    """
    Train what `cfg.stage` names, evaluate the model, and save it into `cfg.run_dir`.

    Args:
        cfg (`DictConfig`):
            The composed config (conf/train.yaml), checked.

    Returns:
        `float` or `None`: the metric named by `cfg.objective`; `None` if it was not measured or the run was stopped.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if arguments, models, data or an earlier run in `run_dir` don't allow it.
        [`~rlhf_trl.errors.Interrupted`]: after Ctrl-C.
        [`~rlhf_trl.errors.Preempted`]: after a signal of a scheduler.
    """
    OmegaConf.resolve(cfg)
    set_seed(cfg.seed)
    args = training_arguments(cfg.stage.args, **critic_start(cfg))
    path = resolve_path(cfg.model.path, cfg.model.run, project_dir(cfg))
    tokenizer = load_tokenizer(path, cfg.model.tokenizer, cfg.model.chat_template, **from_pretrained_kwargs(cfg))
    dataset = load_data(cfg, tokenizer, args)
    check_enough_rows(args, len(dataset["train"]))
    if "eval" in dataset:
        check_evaluated_groups(args)
    for warning in filter(None, [unused_devices(args), *_learning_rates(cfg, args, path), *_vllm(cfg, args, path)]):
        say(f"warning: {warning}")
    if is_main_process() and _parameters(cfg, path) >= PLANNED_FROM:  # which says it, and the plan takes seconds
        memory = estimate(cfg, args, tokenizer, dataset["train"])
        say(memory.text)
        if memory.warning:
            say(f"warning: {memory.warning}")
    if "eval" not in dataset:
        args.eval_strategy, args.do_eval, args.eval_on_start = IntervalStrategy.NO, False, False

    extra = {"ptx_dataset": demonstrations(cfg, dataset, tokenizer)} if "ptx_data" in cfg else {}
    with open_run(cfg, start=path, inputs=inputs_of(cfg, path, dataset | extra)) as run:
        if run.checkpoint:
            args.eval_on_start = False  # the run has evaluated its start
        interrupt = Interrupt(resume_command=command(cfg, "resume=true"))
        logger = instantiate(cfg.logger.run)
        with logger(run_dir=cfg.run_dir, name=args.run_name, config=as_dict(cfg, resolve=False)):
            trainer = make_trainer(cfg, args, path, tokenizer, dataset, **extra)
            if text := engine_left_out(trainer.accelerator.distributed_type):
                say(f"warning: {text}")
            trainer.add_callback(ScheduleWarning())
            if run.checkpoint:
                trainer.add_callback(Lengthened(run.checkpoint))
            trainer.add_callback(interrupt)  # the last one, so that its message stands last
            try:
                trainer.train(resume_from_checkpoint=run.checkpoint)
            finally:
                interrupt.restore()
            metrics = {} if interrupt.interrupted else finish(cfg, trainer)
        # A stop by the KL guard or the health monitor is an end the user asked for: the run is done
        stoppers = [each for each in trainer.callback_handler.callbacks if isinstance(each, SaveAndStop)]
        if reasons := [stopper.reason for stopper in stoppers if stopper.reason]:
            run.record["reason"] = reasons[0]
        if interrupt.interrupted:
            raise Preempted if interrupt.preempted else Interrupted
    if cfg.objective is not None and cfg.objective not in metrics and "eval" in dataset:
        measured = sorted(name for name in metrics if name.startswith("eval_"))
        say(f"`objective` is `{cfg.objective}`, which was not measured. {did_you_mean(cfg.objective, measured)}")
    return None if cfg.objective is None else metrics.get(cfg.objective)


def _parameters(cfg: DictConfig, path: str) -> int:
    """Return the parameters of the model at `path`."""
    return _empty(cfg, path).num_parameters()


def _own_quantization(cfg: DictConfig, path: str) -> Any:
    """Return the quantization in which the files of the model at `path` are, `None` where they aren't."""
    return getattr(_empty(cfg, path).config, "quantization_config", None)


def _empty(cfg: DictConfig, path: str) -> PreTrainedModel:
    """Return the model at `path` without weights."""
    return empty_model(path, cfg.stage.task_type, cfg.model.trust_remote_code, cfg.model.revision)


def _learning_rates(cfg: DictConfig, args: Any, path: str) -> list[str]:
    """Return what is to be expected of learning rates that are far off."""
    parameters = _parameters(cfg, path)
    critic = critic_parameters(getattr(args, "critic_path", None), parameters, cfg.model.trust_remote_code)
    return learning_rate_warnings(args, cfg.stage.dataset_type, parameters, critic, bool(cfg.adapter.peft))


def _vllm(cfg: DictConfig, args: Any, path: str) -> list[str]:
    """Check the vLLM server that a run asks, and return what is to be expected of the version that is installed."""
    if not getattr(args, "use_vllm", False):
        return []
    problem = None
    if is_main_process():  # TRL asks from this rank alone
        problem = quantized_problem(base_quantization(cfg, path) or _own_quantization(cfg, path))
        problem = problem or vllm_problem(args, path, cfg.model.trust_remote_code, wait=args.vllm_server_timeout)
    raise_on_all_ranks([problem] if problem else [])
    warning = version_warning(installed_version())
    return [warning] if warning else []


def engine_left_out(kind: DistributedType) -> str | None:
    """
    Return what is to be said where accelerate runs without the engine that the launch asks for, as it does in silence
    in one process and, for DeepSpeed, with `use_cpu` (`AcceleratorState` of accelerate 1.15); `None` where it runs
    with it.
    """
    without_fsdp = uses_fsdp() and kind != DistributedType.FSDP
    without_deepspeed = uses_deepspeed() and kind != DistributedType.DEEPSPEED
    if not (without_fsdp or without_deepspeed):
        return None
    remedy = "Remove `use_cpu`, also of the launch." if without_deepspeed else "Launch several processes."
    instead = "one process" if kind == DistributedType.NO else "DDP"
    return (
        f"the launch asks for {engine()}, which accelerate leaves out here: this is {instead}, and each rank holds "
        f"the whole model, its gradients and its optimizer. {remedy}"
    )


def inputs_of(cfg: DictConfig, path: str, dataset: Mapping[Any, Dataset]) -> dict[str, Any]:
    """
    Return what the result of a training depends on besides its config; a resumed run must depend on the same.

    Args:
        path (`str`): path or hub id of the model that the training starts from.
        dataset (`Mapping[str, Dataset]`): rows of each split, as the trainer gets them.

    Returns:
        `dict`: the number of ranks, the engine, the rows of a step, a hash of the rows of each split, and fingerprints
            of the models that the config names: the start (which is the reference too), reward models, the critic's
            start.
    """
    values, _ = plain(cfg)
    ranks = PartialState().num_processes
    inputs: dict[str, Any] = {"ranks": ranks, "engine": used_engine(bool(cfg.stage.args.get("use_cpu")))}
    inputs[STEP] = cfg.stage.args.per_device_train_batch_size * ranks
    inputs |= {f"data ({split})": rows_fingerprint(rows) for split, rows in dataset.items()}
    models = {"model": (path, at(values, "model.revision"))}
    for name, node in nodes({key: values.get(key) for key in ("reward", "critic")}):
        if node.get("run") or isinstance(node.get("path"), str):
            where = resolve_path(node.get("path"), node.get("run"), project_dir(cfg))
            models[name] = (where, node.get("revision"))
    for name, (where, revision) in models.items():
        if found := model_fingerprint(where, revision):
            inputs[name] = found
    return inputs


def finish(cfg: DictConfig, trainer: Trainer) -> dict[str, float]:
    """Evaluate and save a trained model, and return the last value of every metric."""
    history = trainer.state.log_history
    measured = any(
        entry["step"] == trainer.state.global_step and any(key.startswith("eval_") for key in entry)
        for entry in history
    )
    if trainer.eval_dataset is not None and (not measured or trainer.args.load_best_model_at_end):
        trainer.evaluate()
    if is_main_process():
        write_metrics(cfg.run_dir, history)  # before the model: where it is uploaded, its card shows them
    trainer.save_model(cfg.run_dir)
    if is_main_process():
        # The reference belongs to the training; what is left of the run is the policy alone
        shutil.rmtree(Path(cfg.run_dir, "ref"), ignore_errors=True)
        trainer.create_model_card()
        if cfg.merge and adapter_config(cfg.run_dir) is not None:
            merge_adapter(cfg.run_dir, f"{cfg.run_dir}/merged", trust_remote_code=cfg.model.trust_remote_code)
    PartialState().wait_for_everyone()
    return {key: value for entry in history for key, value in entry.items()}
