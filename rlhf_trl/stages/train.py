"""Training of any stage (`stage=sft|dpo|orpo|kto|grpo|rloo|ppo`), and of one reward model."""

import shutil
from pathlib import Path

from accelerate import PartialState
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import Trainer, set_seed
from transformers.trainer_utils import IntervalStrategy

from rlhf_trl.build import (
    check_prompts,
    critic_start,
    demonstrations,
    load_data,
    make_trainer,
    project_dir,
    source,
    training_arguments,
)
from rlhf_trl.callbacks.base import SaveAndStop
from rlhf_trl.callbacks.interrupt import Interrupt
from rlhf_trl.config.values import as_dict
from rlhf_trl.hints import did_you_mean
from rlhf_trl.models.adapters import adapter_config
from rlhf_trl.models.merging import merge_adapter
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.runs.paths import resolve_path
from rlhf_trl.runs.record import write_metrics
from rlhf_trl.stages.base import begin, claims_directory, command, end, fail
from rlhf_trl.stages.inputs import inputs_of
from rlhf_trl.terminal import say


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
        with logger(run_dir=cfg.run_dir, name=args.run_name, config=as_dict(cfg, resolve=False)):
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
