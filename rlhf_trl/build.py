"""
Objects from config nodes: arguments, data, rewards, models, trainers and callbacks.

Beside `stages/` the only code that sees the whole config.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
from accelerate import PartialState
from accelerate.utils import patch_environment, str_to_bool
from datasets import Dataset, DatasetDict
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import is_torch_bf16_gpu_available

from rlhf_trl.callbacks.nonfinite import NonfiniteGuard
from rlhf_trl.callbacks.progress import ProgressLine
from rlhf_trl.callbacks.record import RunRecord
from rlhf_trl.callbacks.samples import SampleLog
from rlhf_trl.callbacks.unrewarded import UnrewardedGuard
from rlhf_trl.config.dotpaths import find
from rlhf_trl.config.ranges import RULES as LIBRARY_RULES
from rlhf_trl.config.ranges import check_values
from rlhf_trl.config.values import as_dict, at, section
from rlhf_trl.data.chat_template import (
    check_template_answers,
    check_template_syntax,
    keep_template_kwargs,
    refusals_named,
    text_as_chat,
)
from rlhf_trl.data.lengths import head_names, keep_one_bos, measure
from rlhf_trl.data.messages import is_chat
from rlhf_trl.data.multimodal import processor_of
from rlhf_trl.data.splits import drop_held_out, prompt_keys
from rlhf_trl.data.tokenize import end_tokens, note_template_end
from rlhf_trl.data.unknown import check_known
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.generation import Policy
from rlhf_trl.evaluation.judges import pair_judge
from rlhf_trl.models.initial import load_initial_model
from rlhf_trl.models.loading import load_model
from rlhf_trl.models.precision import computed_in, precision_line, rounding_problem, trained_types, weights_dtype
from rlhf_trl.models.roles import begin_training
from rlhf_trl.models.sizes import Sizes, empty_model, id_problem, length_problem, sizes_of
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.patches.engines import bf16_on_cpu_ranks
from rlhf_trl.patches.one_device import use_one_device
from rlhf_trl.ppo.options import RULES as PPO_RULES
from rlhf_trl.reward_modeling.options import RULES as REWARD_MODEL_RULES
from rlhf_trl.rewards.base import RESERVED_COLUMNS, Reward
from rlhf_trl.rewards.conditioned import ConditionedReward
from rlhf_trl.rewards.conditions import unmet_conditions
from rlhf_trl.rewards.lagrange import Lagrange
from rlhf_trl.runs.engines import cpu_arguments, deepspeed_on_cpu
from rlhf_trl.runs.paths import ensemble_members, find_policy, named_policies, project_dir, resolve_path
from rlhf_trl.runs.ranks import world_size
from rlhf_trl.terminal import say
from rlhf_trl.trainers.construction import build_trainer
from rlhf_trl.trainers.images import check_images, check_readers
from rlhf_trl.trainers.options import RULES as TRAINER_RULES
from rlhf_trl.trainers.rollout_hook import RolloutHook

# Keys of a reward that its class doesn't get
OURS = ("run", "when")
ARGUMENT_RULES = LIBRARY_RULES | PPO_RULES | REWARD_MODEL_RULES | TRAINER_RULES


class Model(NamedTuple):
    """
    A model that the config names.

    Attributes:
        key (`str`): where it is named.
        path (`str`), tokenizer (`str`, *optional*): folder or hub id; that of another tokenizer than its own.
        writes (`bool`): whether it generates completions.
        chat_template (`str`, *optional*): file or name of another chat template than its tokenizer's.
    """

    key: str
    path: str
    task_type: str = "CAUSAL_LM"
    tokenizer: str | None = None
    writes: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    chat_template: str | None = None

    def sizes(self) -> Sizes:
        """Return its sizes."""
        return sizes_of(empty_model(self.path, self.task_type, self.trust_remote_code, self.revision), self.path)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer that it is used with."""
        path = next(iter(ensemble_members(self.path)), self.path)
        return load_tokenizer(path, self.tokenizer, self.chat_template, self.trust_remote_code, self.revision)


def models_of(values: dict[str, Any]) -> list[Model]:
    """Return every model that the config names: the policy or policies, rewards, critic and judge."""
    found, stage, model = [], section(values, "stage"), section(values, "model")
    runs = project_dir(values)
    trusted = bool(model.get("trust_remote_code"))
    places = named_policies(stage.get("policies") or {})
    if stage.get("policy") is not None:
        places = {"policy": stage["policy"]}
    if model and not places:
        path = resolve_path(model["path"], model["run"], runs)
        task_type = stage.get("task_type") or "CAUSAL_LM"
        writes = stage.get("dataset_type", "prompt") == "prompt"
        options: dict[str, Any] = {name: model[name] for name in ("revision", "chat_template")}
        found.append(Model("model", path, task_type, model["tokenizer"], writes, trusted, **options))
    for name, place in places.items():
        key = "stage.policy" if stage.get("policy") is not None else f"stage.policies.{name}"
        found.append(Model(key, find_policy(place, runs), writes=True, trust_remote_code=trusted))
    for name, node in section(values, "reward").items():
        if isinstance(node, dict) and {"run", "path"} <= node.keys():
            path = resolve_path(node["path"], node["run"], runs)
            found.append(
                Model(f"reward.{name}", path, "SEQ_CLS", trust_remote_code=bool(node.get("trust_remote_code")))
            )
    critic = section(values, "critic")
    if critic.get("run") is not None or critic.get("path") is not None:
        path = resolve_path(critic["path"], critic["run"], runs)
        found.append(Model("critic", path, "SEQ_CLS", trust_remote_code=trusted))
    if at(values, "judge.path") is not None:
        found.append(Model("judge", resolve_path(values["judge"]["path"], None, runs)))
    return found


def check_rows_fit(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, dataset: DatasetDict) -> None:
    """
    Stop a run whose rows are longer than its models' positions, or hold ids that they have no embedding for. Rows are
    measured only where that could be.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with what to set.
    """
    values, args = as_dict(cfg), cfg.stage.args
    vocabulary = tokenizer.get_vocab()
    # A model with another tokenizer (a reward model's) gets other ids: it measures its rows itself
    sizes = [
        model.sizes()
        for model in models_of(values)
        if model.key in ("model", "critic") or model.load_tokenizer().get_vocab() == vocabulary
    ]
    generates = cfg.stage.dataset_type == "prompt"
    more = (args.max_completion_length or 0) if generates else 0
    limit = at(values, "stage.prepare.max_prompt_length") if generates else args.get("max_length")
    positions = min((each.positions for each in sizes if each.positions is not None), default=None)
    too_long = positions is not None and (limit is None or limit + more > positions)
    if not too_long and len(tokenizer) <= min(each.embeddings for each in sizes):
        return
    longest, largest = measure(dataset, tokenizer, limit)
    if not generates and args.get("packing") and args.get("packing_strategy") == "wrapped":
        longest = limit or longest
    for each in sizes:
        room = (each.positions or 0) - longest
        if not generates:
            remedy = f"Set `stage.args.max_length={each.positions}`."
        elif room > 0:
            remedy = (
                f"Set `stage.args.max_completion_length={room}`, or drop the longest prompts with "
                "`stage.prepare.max_prompt_length=...`."
            )
        else:
            remedy = f"Drop long prompts: `stage.prepare.max_prompt_length={max((each.positions or 0) - more, 1)}`."
        if problem := length_problem(each, longest, more, remedy) or id_problem(each, largest):
            raise ConfigError(problem)


def load_policies(cfg: DictConfig) -> list[Policy]:
    """
    Load the policies of `cfg.stage.policies`, or the one that `cfg.model` names, with the options of `cfg.model`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if one is missing, is not finished, or writes no text.
    """
    return list(each_policy(cfg))


def each_policy(cfg: DictConfig) -> Iterator[Policy]:
    """Yield the policies of [`load_policies`], each loaded when it is its turn."""
    places = as_dict(cfg.stage, resolve=False).get("policies")
    for name, path in policy_paths(cfg).items():
        kwargs = from_pretrained_kwargs(cfg)
        if places:
            kwargs["revision"] = None  # `model.revision` is of `model.path`
        tokenizer = load_tokenizer(path, None if places else cfg.model.tokenizer, cfg.model.chat_template, **kwargs)
        kwargs |= {"dtype": cfg.model.dtype, "attn_implementation": cfg.model.attn_implementation}
        kwargs["init_kwargs"] = as_dict(cfg.model)["init_kwargs"]
        model: Any = load_model(path, **kwargs).eval()
        yield Policy(name, path, model.to(PartialState().device), tokenizer)


def policy_paths(cfg: DictConfig) -> dict[str, str]:
    """Return folder or hub id of each policy of [`load_policies`], by its name."""
    places, runs = as_dict(cfg.stage, resolve=False).get("policies"), project_dir(cfg)
    if places:
        return {name: find_policy(place, runs) for name, place in named_policies(places).items()}
    return {cfg.model.run or cfg.model.path: resolve_path(cfg.model.path, cfg.model.run, runs)}


def critic_start(cfg: DictConfig) -> dict[str, str]:
    """Return the argument `critic_path`, where the critic starts from a reward model."""
    critic = cfg.get("critic")
    if not critic or (critic.run is None and critic.path is None):
        return {}
    return {"critic_path": resolve_path(critic.path, critic.run, project_dir(cfg))}


def training_arguments(node: DictConfig, **resolved: Any) -> TrainingArguments:
    """
    Return the trainer's arguments; an unset `bf16` becomes whether the device supports it.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if TRL's dataclass refuses a value, or bf16 is asked for where there is none.
    """
    values = as_dict(node) | resolved
    supported = is_torch_bf16_gpu_available() and not values.get("use_cpu")
    rehearsed = deepspeed_on_cpu()
    if values.get("bf16") and not (supported or values.get("use_cpu") or rehearsed):
        raise ConfigError(
            "`stage.args.bf16=true` asks for bfloat16, which this machine has no accelerator for. Set "
            "`stage.args.bf16=false`, or `+stage.args.use_cpu=true` to compute in bfloat16 on the CPU."
        )
    if values.get("bf16") is None and not values.get("fp16"):
        values["bf16"] = supported
    values.setdefault("logging_nan_inf_filter", False)  # it would replace a loss of NaN by the mean of earlier ones
    if not torch.accelerator.is_available():
        values = cpu_arguments() | values
    check_values(ARGUMENT_RULES.get(values["_target_"], {}), values, "stage.args.")
    on_cpu = values.get("use_cpu") or str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false"))
    if on_cpu and world_size() > 1 and (timeout := values.get("ddp_timeout")) is not None:
        # The ranks meet here, since transformers 5.23 passes the timeout on for accelerators alone
        PartialState(cpu=True, backend=values.get("ddp_backend"), timeout=timedelta(seconds=timeout))
    precision = "bf16" if values.get("bf16") else "fp16" if values.get("fp16") else "no"
    try:
        # Else a launch with a file of another precision would have its own
        on_ranks = bf16_on_cpu_ranks() if rehearsed else nullcontext()
        with patch_environment(accelerate_mixed_precision=precision), on_ranks:
            args = instantiate(values)
    except InstantiationException as error:
        raise ConfigError(f"`stage.args` is refused by `{node._target_}`: {error.__cause__ or error}") from error
    use_one_device(args)
    return args


def load_data(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, args: Any = None) -> DatasetDict:
    """
    Load the splits `train` and, where there is one, `eval`, in the dataset type that the stage trains on.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        args (`TrainingArguments`, *optional*): those of the trainer, to check that it reads the images of the rows.
    """
    template_source = cfg.model.chat_template or tokenizer.name_or_path
    with PartialState().main_process_first():
        if tokenizer.chat_template is not None:
            check_template_syntax(tokenizer, template_source)
        with refusals_named(tokenizer):
            dataset = instantiate_data(cfg, tokenizers=[tokenizer])
        check_images(find(cfg.stage.trainer._target_).func, args, dataset)
        remedy = "Set `model=hf model.path=...` to a model of their language, or `data=demo` for the embedded model."
        check_known(dataset["train"], tokenizer, cfg.model.tokenizer or tokenizer.name_or_path, remedy)
        options = as_dict(cfg.stage.args)
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


def demonstrations(cfg: DictConfig, dataset: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the training rows of `ptx_data` without those whose prompt is held out in `dataset`."""
    with text_as_chat([tokenizer]):
        rows = instantiated(cfg.ptx_data)(dataset_type="prompt_completion", seed=cfg.seed)["train"]
    if "eval" not in dataset or cfg.data.get("split_by") == "row":
        return rows
    notes = []
    rows = drop_held_out("ptx_data", rows, prompt_keys(rows), set(prompt_keys(dataset["eval"])), notes)
    for note in notes:
        say(note)
    return rows


def instantiate_data(
    cfg: DictConfig, dataset_type: str | None = None, tokenizers: Sequence[PreTrainedTokenizerBase] | None = None
) -> DatasetDict:
    """
    Instantiate `cfg.data` in the dataset type that the stage trains on, or in another one.

    Args:
        dataset_type (`str`, *optional*): another one than the stage's.
        tokenizers (`Sequence[PreTrainedTokenizerBase]`, *optional*): those of the models that read the rows, which
            decide what `data.to_chat: null` does; by default of the policies that the config names or, of annotated
            rows, of its reward models.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: of an option of `data.feedback`, or of the rows.
    """
    dataset_type = dataset_type or cfg.stage.dataset_type
    if tokenizers is None:
        models = models_of(as_dict(cfg))
        rewards = [model for model in models if model.key.startswith("reward.")]
        policies = [model for model in models if model.writes]
        readers = (dataset_type == "annotated" and rewards) or policies
        tokenizers = [model.load_tokenizer() for model in readers]
    with text_as_chat(tokenizers):
        dataset = instantiated(cfg.data)(dataset_type=dataset_type, seed=cfg.seed)
    check_readers(dataset, tokenizers)
    return dataset


def instantiated(node: DictConfig, **options):
    """
    Instantiate a node of the config; errors of the config are raised without Hydra's wrapper.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: of one of its options.
    """
    try:
        return instantiate(node, **options)
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        raise


def make_trainer(
    cfg: DictConfig,
    args: Any,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    dataset: DatasetDict,
    **extra: Any,
) -> Trainer:
    """Return the stage's trainer, with model, rewards and callbacks; `extra` is passed on to the trainer's class."""
    if "reward" in cfg:
        extra["reward_funcs"] = reward_functions(cfg, tokenizer, dataset["train"].column_names)
        args.reward_weights = [reward.weight for reward in extra["reward_funcs"]]
        if problems := unmet_conditions(as_dict(cfg.reward), dataset["train"]):
            raise ConfigError.join(problems)
    combine = instantiated(cfg.combine) if "combine" in cfg else None
    extra |= {"combine": combine} if isinstance(combine, Lagrange) else {}  # a critic has a value for each constraint
    extra |= {"judge": pair_judge(instantiated(cfg.judge))} if "judge" in cfg else {}
    set_seed(args.seed)  # a new score head must not depend on what was loaded before
    peft = instantiate(cfg.adapter.peft)
    model, peft_config = load_initial_model(
        path,
        cfg.stage.task_type,
        peft,
        merge_dir=f"{cfg.run_dir}/start",
        heads=head_names(dataset["train"]),
        dtype=weights_dtype(cfg.model.dtype, is_trained=peft is None, bf16=args.bf16),
        attn_implementation=cfg.model.attn_implementation,
        vision=cfg.adapter.get("vision") or "lora",
        quantization_config=instantiate(cfg.adapter.quantization),
        **from_pretrained_kwargs(cfg),
        **(as_dict(cfg.model)["init_kwargs"] or {}),
    )
    if model.can_generate():  # TRL's rollouts stop there, and so does whoever loads what is saved
        model.generation_config.eos_token_id = end_tokens(tokenizer) or None
    trainer = build_trainer(
        cfg,
        model=model,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset.get("eval"),
        processing_class=processor_of(tokenizer) or tokenizer,
        peft_config=peft_config,
        **extra,
    )
    for reward in extra.get("reward_funcs", ()):
        reward.attach(trainer.model)
    if isinstance(trainer.model, PeftModel):
        begin_training(trainer.model)
    trained = cast(torch.nn.Module, trainer.model)
    say(precision_line(trained, args))
    keeps_float32 = trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and computed_in(args) is not None)
    if problem := rounding_problem(trained_types(trained), keeps_float32):
        say(f"warning: {problem}")
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    for callback in callbacks(cfg, trainer, combine):
        trainer.add_callback(callback)
    return trainer


def reward_functions(
    cfg: DictConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    columns: Sequence[str] | None = None,
    models: bool = True,
) -> list[Reward]:
    """
    Return the rewards of the group `reward`, by their names; runs become paths.

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
        if not models and getattr(kind, "loads_model", False):
            continue
        if "run" in node:
            options["path"] = resolve_path(node.path, node.run, project_dir(cfg))
        when = as_dict(node).get("when")
        reward = instantiated(OmegaConf.masked_copy(node, [key for key in node if key not in OURS]), **options)
        reward = reward if when is None else ConditionedReward(reward, when)
        reward.bind(tokenizer)
        rewards.append(instantiate(cfg.stage.wrap_reward)(reward) if cfg.stage.wrap_reward else reward)
    problems = [reward.column_problem(columns) for reward in rewards] if columns is not None else []
    if rewards and (taken := [name for name in columns or () if name in RESERVED_COLUMNS]):
        problems.append(
            f"The data has a column `{taken[0]}`, a name under which each reward gets something else. Rename it in "
            "the data."
        )
    if problems := [problem for problem in problems if problem]:
        raise ConfigError.join(problems)
    return rewards


def callbacks(cfg: DictConfig, trainer: Any, combine: Callable | None) -> Iterator[TrainerCallback]:
    """Yield the callbacks of the run: always the record and the progress line, and those that the config names."""
    if cfg.get("reward") and isinstance(trainer, RolloutHook):
        yield UnrewardedGuard(trainer)
    if "reward_norm" in cfg:
        yield instantiate(cfg.reward_norm)(trainer=trainer, combine=combine)
    elif combine is not None:
        trainer.combine_rewards = combine
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
    if "reward" in cfg and isinstance(trainer, RolloutHook):
        yield SampleLog(trainer, cfg.run_dir)
    yield from (ProgressLine(), RunRecord(cfg.run_dir))


def from_pretrained_kwargs(cfg: DictConfig) -> dict[str, Any]:
    """Return the keyword arguments that every `from_pretrained` of the model takes."""
    return {"trust_remote_code": cfg.model.trust_remote_code, "revision": cfg.model.revision}
