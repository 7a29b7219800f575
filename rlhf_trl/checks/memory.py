"""Memory that a training needs on each rank, beside what its device has; and what to set where it doesn't suffice."""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from hydra.utils import instantiate
from omegaconf import DictConfig
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_trl.build import models_of
from rlhf_trl.checks.devices import Device, device
from rlhf_trl.config.dotpaths import find
from rlhf_trl.config.values import as_dict
from rlhf_trl.data.lengths import prompt_and_row_length
from rlhf_trl.models.adapters import adapter_config
from rlhf_trl.models.dry_passes import Batch, Computation
from rlhf_trl.models.initial import score_config
from rlhf_trl.models.memory import (
    GIB,
    Engine,
    MemoryPlan,
    Training,
    adapted,
    scores_moment,
)
from rlhf_trl.models.precision import weights_dtype
from rlhf_trl.models.sizes import empty_model
from rlhf_trl.models.weight_bytes import weight_bytes
from rlhf_trl.patches.engines import whole_weights
from rlhf_trl.rewards.adapter import AdapterReward
from rlhf_trl.rewards.classifier import classifier_config
from rlhf_trl.rewards.options import CLASSIFIER
from rlhf_trl.runs.engines import used_engine
from rlhf_trl.runs.paths import ensemble_members, project_dir, resolve_path
from rlhf_trl.runs.ranks import world_size

ROWS = 256  # whose lengths are measured
# Share of a device's memory that a plan may take: the runtime, communication and fragments take the rest
USABLE = 0.9
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)  # that of `adapter=qlora`


class Estimate(NamedTuple):
    """
    Memory of a training as far as it is known before the start.

    Attributes:
        plan ([`~rlhf_trl.models.memory.MemoryPlan`], *optional*): the plan; `None` where there is none.
        has ([`Device`]): what a rank has.
        text (`str`): the plan in one line, or why there is none.
        warning (`str`, *optional*): what to set where it doesn't fit.
    """

    plan: MemoryPlan | None
    has: Device
    text: str
    warning: str | None = None

    @property
    def lines(self) -> dict[str, str]:
        """The plan as lines of a dry run."""
        return {"memory": self.text} if self.plan is None else memory_lines(self.plan, self.has)


def estimate(cfg: DictConfig, args: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> Estimate:
    """Return the memory that a training needs on this rank, see [`training_of`]."""
    has = device(args.use_cpu)
    try:
        training = training_of(cfg, args, tokenizer, rows)
        plan = training.plan
        return Estimate(plan, has, memory_line(plan, has), memory_warning(training, plan, has))
    except Exception as error:  # code of a model, such as remote code, that needs the values of its tensors
        return Estimate(
            None, has, f"unknown: the model can't be run without weights ({' '.join(str(error).split())[:200]})"
        )


# ---- From a config ----


def training_of(
    cfg: DictConfig, args: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset, launched: Engine | None = None
) -> Training:
    """
    Return the training that a config describes, without weights.

    Args:
        cfg (`DictConfig`): the composed config of a stage that trains.
        args (`transformers.TrainingArguments`): its arguments.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        rows (`Dataset`): training rows, as the trainer gets them. The first 256 are measured.
        launched ([`~rlhf_trl.models.memory.Engine`], *optional*): another engine than the launch's.
    """
    values = as_dict(cfg)
    policy, quantization = _policy(cfg, args), instantiate(cfg.adapter.quantization)
    trainer, launched = find(cfg.stage.trainer._target_).func, launched or launched_engine(args)
    shards = launched.name not in ("none", "DDP")
    mixed = None if shards or not (args.bf16 or args.fp16) else torch.bfloat16 if args.bf16 else torch.float16
    training = Training(
        policy=policy,
        output=_output(trainer, cfg.stage.task_type),
        batch=_batch(cfg, args, tokenizer, rows),
        computation=Computation(mixed, torch.cuda.is_available() and not args.use_cpu),
        engine=launched,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        quantization=quantization,
        checkpointing=bool(args.gradient_checkpointing),
        accumulates=args.gradient_accumulation_steps > 1,
        temperature=getattr(args, "temperature", 1.0),
        disable_dropout=bool(getattr(args, "disable_dropout", False)),
        demonstrations=bool(getattr(args, "ptx_coef", 0.0)),
        device_memory=device(args.use_cpu).memory,
    )
    training.sides = training.batch.rows // args.per_device_train_batch_size
    if hasattr(args, "num_generations"):
        _add_rollouts(training, args)
    elif hasattr(args, "precompute_ref_log_probs"):
        training.scores_reference = not args.precompute_ref_log_probs
        training.reference = training.scores_reference and not isinstance(policy, PeftModel)
    if hasattr(args, "critic"):
        _add_critic(training, args, bool(cfg.model.trust_remote_code))
    for name, node in values.get("reward", {}).items():
        if isinstance(node, dict) and {"run", "path"} <= node.keys():
            training.rewards.append(_reward(str(name), node, values))
        elif isinstance(node, dict) and node.get("_target_") == CLASSIFIER:
            training.rewards.append(_classifier(str(name), node))
    return training


def launched_engine(args: Any) -> Engine:
    """Return the engine that accelerate runs for this launch, with its ranks and precision."""
    return Engine(
        used_engine(args.use_cpu),
        world_size(),
        bool(args.bf16) or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",
    )


def _policy(cfg: DictConfig, args: Any) -> PreTrainedModel | PeftModel:
    """Return the model that is trained, without weights, in its types and with its adapter."""
    path = resolve_path(cfg.model.path, cfg.model.run, project_dir(cfg))
    peft = instantiate(cfg.adapter.peft)
    base = copy.deepcopy(empty_model(path, cfg.stage.task_type, cfg.model.trust_remote_code, cfg.model.revision))
    dtype = weights_dtype(cfg.model.dtype, is_trained=peft is None, bf16=args.bf16)
    base = base if dtype == "auto" else base.to(getattr(torch, dtype))  # pyright: ignore[reportArgumentType] wrapped
    if cfg.model.attn_implementation == "eager":  # others keep no probabilities, as here
        base.set_attn_implementation("eager")
    if peft is None:
        return base
    saved = adapter_config(path, cfg.model.revision)
    config = saved if isinstance(saved, LoraConfig) else peft
    if cfg.stage.task_type == "SEQ_CLS" and config.task_type != "SEQ_CLS":  # goes on with a policy's adapter
        config = score_config(config)
    return adapted(base, config)


def _output(trainer: Any, task_type: str) -> str:
    """Return what the loss reads of a model, see [`~rlhf_trl.models.memory.Training`]."""
    if task_type == "SEQ_CLS":
        return "scores"
    modules = [sys.modules[each.__module__] for each in trainer.__mro__]
    return "log_probs" if any(hasattr(module, "add_fused_lm_head") for module in modules) else "logits"


def _batch(cfg: DictConfig, args: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> Batch:
    """Return the largest micro-batch that the first rows of the data give."""
    sample = rows.select(range(min(ROWS, len(rows)))).to_list()
    lengths = [prompt_and_row_length(tokenizer, row) for row in sample]
    longest, count = max(length for _, length in lengths), args.per_device_train_batch_size
    padded = cfg.model.attn_implementation != "flash_attention_2"
    if hasattr(args, "num_generations"):
        count *= getattr(args, "sides", 1)
        return Batch(count, longest + args.max_completion_length, args.max_completion_length, padded)
    limit = getattr(args, "max_length", None) or longest
    if getattr(args, "packing", False):
        return Batch(count, limit, limit, padded=False)
    scored = max(min(length, limit) - prompt for prompt, length in lengths)
    sides = 2 if "chosen" in rows.column_names else 1
    if "completion_ids" in rows.column_names:  # comparisons: all completions of a prompt
        sides = max(len(row["completion_ids"]) for row in sample)
    return Batch(count * sides, min(longest, limit), max(scored, 1), padded)


def _add_rollouts(training: Training, args: Any) -> None:
    is_adapter, length = isinstance(training.policy, PeftModel), training.batch.length
    keeps_reference = hasattr(args, "critic") or bool(args.beta)  # PPO at a coefficient of 0, too
    training.reference = keeps_reference and not is_adapter
    if dtype := getattr(args, "ref_dtype", None):
        training.reference_dtype = getattr(torch, dtype)
    if getattr(args, "use_vllm", False):
        training.vllm = args.vllm_gpu_memory_utilization if args.vllm_mode == "colocate" else 0.0
        training.vllm_sleeps = bool(args.vllm_enable_sleep_mode)
        return
    if getattr(args, "use_transformers_continuous_batching", False):
        return  # its cache takes a share of what is free
    rows = args.generation_batch_size // training.engine.ranks
    training.rollout = rows, length - args.max_completion_length, args.max_completion_length


def _add_critic(training: Training, args: Any, trust_remote_code: bool) -> None:
    training.critic = args.critic
    if args.critic == "model":
        dtype = getattr(torch, args.critic_dtype or "float32")
        if args.critic_path is not None:
            trunk: Any = copy.deepcopy(empty_model(args.critic_path, "SEQ_CLS", trust_remote_code).base_model)
        elif isinstance(training.policy, PeftModel):
            trunk = empty_copy(training.policy.get_base_model())
        else:
            trunk = copy.deepcopy(training.policy.base_model)
        training.critic_trunk = trunk.to(dtype).requires_grad_(True)
    sharded = training.engine.name not in ("none", "DDP")
    is_plain = training.computation.autocast is None and training.quantization is None and not sharded
    base: Any = training.policy
    training.reuses_sampling = is_plain and training.rollout is not None and base.dtype == torch.float32


def empty_copy(model: Any) -> Any:
    """Return the trunk of a model's class and config without weights, and without an adapter."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config)).base_model


def _reward(name: str, node: dict[str, Any], values: dict[str, Any]) -> tuple[str, PreTrainedModel | None, float, int]:
    """Return a reward model as [`~rlhf_trl.models.memory.Training`] has it."""
    path = next(model.path for model in models_of(values) if model.key == f"reward.{name}")
    folders = ensemble_members(path) or [path]
    adapters = sum(
        file.stat().st_size for folder in folders for file in Path(folder).glob("adapter_model.*") if file.is_file()
    )
    rows, label = int(node.get("batch_size") or 32), f"reward {name}"
    kind = find(node["_target_"]).func
    if isinstance(kind, type) and issubclass(kind, AdapterReward):
        return label, None, float(adapters), rows
    network = in_its_type(copy.deepcopy(empty_model(path, "SEQ_CLS", bool(node.get("trust_remote_code")))), node)
    return label, network, weight_bytes(network) + adapters, rows


def _classifier(name: str, node: dict[str, Any]) -> tuple[str, PreTrainedModel | None, float, int]:
    """Return a classifier as [`~rlhf_trl.models.memory.Training`] has it."""
    trusted = bool(node.get("trust_remote_code"))
    config = classifier_config(f"reward.{name}", node["path"], node["label"], trusted)
    with whole_weights(), torch.device("meta"):
        network = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trusted)
    network = in_its_type(network, node)
    return f"reward {name}", network, weight_bytes(network), int(node["batch_size"])


def in_its_type(network: Any, node: dict[str, Any]) -> PreTrainedModel:
    """Return the model of a reward in the type of its weights."""
    dtype = weights_dtype(node.get("dtype"), is_trained=False)
    return network if dtype == "auto" else network.to(getattr(torch, dtype))


# ---- In words ----


def gib(count: float) -> str:
    """Return bytes in GiB, for people."""
    value = count / GIB
    return f"{value:,.1f}" if value >= 9.95 else f"{value:.2f}" if value >= 0.0995 else f"{value:.4f}"


def memory_lines(plan: MemoryPlan, has: Device) -> dict[str, str]:
    """Return a plan as lines: its total, each role, and what comes and goes."""
    lines = {
        "memory": f"about {gib(plan.total)} GiB per rank at its peak (the {plan.peak.name}); {has.name} has "
        f"{gib(has.memory)} GiB. In GiB:"
    }
    for role in plan.roles:
        parts = {"weights": role.weights, "gradients": role.gradients, "optimizer": role.optimizer}
        lines[f"  {role.name}"] = _parts(parts) + (f" ({role.note})" if role.note else "")
    if plan.other:
        lines["  DDP"] = _parts({"buckets of gradients": plan.other})
    for moment in plan.moments:
        lines[f"  {moment.name}"] = _parts(moment.parts)
    return lines


def _parts(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size) or "nothing of its own"


def memory_line(plan: MemoryPlan, has: Device) -> str:
    """Return a plan as one line, for the head of a run."""
    roles = [
        f"{role.name} {gib(role.weights + role.gradients + role.optimizer)}" for role in plan.roles if role.weights
    ]
    moments = [f"{moment.name} {gib(moment.total)}" for moment in plan.moments if moment.name != "step"]
    return (
        f"Memory per rank, planned: {gib(plan.total)} of {gib(has.memory)} GiB ({has.name}). Roles with gradients and "
        f"optimizer: {', '.join(roles)}; besides, one at a time: {', '.join(moments)}."
    )


def memory_warning(training: Training, plan: MemoryPlan, has: Device) -> str | None:
    """Return what to set where a plan doesn't fit, the cheapest first, each with the total it leaves, or `None`."""
    if plan.total <= USABLE * has.memory:
        return None
    verb = "doesn't fit" if plan.total > has.memory else "may not fit"
    text = f"The plan needs {gib(plan.total)} GiB per rank and {verb}: {has.name} has {gib(has.memory)} GiB."
    steps = []
    for words, changed in remedies(training, USABLE * has.memory):
        total = changed.plan.total
        steps.append(f"{words} ({gib(total)} GiB)")
        if total <= USABLE * has.memory:
            return f"{text} Set, one after another: {'; then '.join(steps)}."
    smaller = " smaller rollouts (`stage.args.steps_per_generation`)," if plan.peak.name == "rollout" else ""
    return f"{text} Nothing here is enough: {'; then '.join(steps)}. Take{smaller} a smaller model or larger devices."


def remedies(training: Training, limit: float) -> Iterator[tuple[str, Training]]:
    """
    Yield what needs less memory, the cheapest first, each with the training that has it and all before it.

    Args:
        limit (`float`): bytes that a rank may take.
    """
    for change in CHANGES:
        if (changed := change(training, limit)) is not None:
            words, training = changed
            yield words, training


Change = tuple[str, Training]


def _smaller_scores(training: Training, limit: float) -> Change | None:
    """Fewer rows of a reward model at a time, where its scores take most: the same numbers."""
    if not training.rewards or not (plan := training.plan).peak.name.startswith("scores of "):
        return None
    others = max(moment.total for moment in plan.moments if not moment.name.startswith("scores of "))
    words, rewards = [], []
    for name, network, weights, given in training.rewards:
        rows = given
        while rows > 1 and scores_moment(training, name, network, weights, rows).total > max(
            limit - plan.held, others
        ):
            rows //= 2
        if rows < given:
            words.append(f"`{name.replace(' ', '.', 1)}.batch_size={rows}`")
        rewards.append((name, network, weights, rows))
    return (" and ".join(words), replace(training, rewards=rewards)) if words else None


def _smaller_batch(training: Training, limit: float) -> Change | None:
    """Smaller micro-batches, more of them: the same numbers, in more time."""
    rows, factor = training.batch.rows, 1
    sides = training.sides
    while rows // factor > sides and rows // factor % (2 * sides) == 0:
        factor *= 2
    if factor == 1:
        return None

    factors = [2**i for i in range(1, factor.bit_length())]
    smaller = {
        by: replace(training, batch=training.batch._replace(rows=rows // by), accumulates=True) for by in factors
    }
    smallest = factor  # first, since nothing between has to be planned where it isn't enough
    if smaller[factor].plan.total <= limit:
        smallest = next(by for by in factors if smaller[by].plan.total <= limit)
    words = f"`stage.args.per_device_train_batch_size={rows // sides // smallest}` with {smallest} times as many "
    more = "`gradient_accumulation_steps`" + (" and `steps_per_generation`" if training.rollout else "")
    return words + more, smaller[smallest]


def _checkpointing(training: Training, limit: float) -> Change | None:
    return (
        None
        if training.checkpointing
        else (
            "`stage.args.gradient_checkpointing=true`",
            replace(training, checkpointing=True),
        )
    )


def _lora(training: Training, limit: float) -> Change | None:
    if isinstance(training.policy, PeftModel):
        return None
    base: Any = copy.deepcopy(training.policy)
    base.to(torch.bfloat16 if training.computation.autocast or training.engine.bf16 else base.dtype)
    task_type = "SEQ_CLS" if training.output == "scores" else "CAUSAL_LM"
    policy = adapted(base, LoraConfig(r=16, target_modules="all-linear", task_type=task_type))
    return "`adapter=lora`", replace(training, policy=policy, reference=False)


def _smaller_critic(training: Training, limit: float) -> Change | None:
    if training.critic != "model":
        return None
    kind = "adapter" if isinstance(training.policy, PeftModel) else "head"
    return f"`critic={kind}`", replace(training, critic=kind, critic_trunk=None)


def _qlora(training: Training, limit: float) -> Change | None:
    if training.quantization is not None or not isinstance(training.policy, PeftModel):
        return None
    return "`adapter=qlora`", replace(training, quantization=NF4)


def _sharding(training: Training, limit: float) -> Change | None:
    engine = training.engine
    # Ranks of a CPU share the memory of one machine
    if engine.shards_weights or training.quantization is not None or not training.computation.on_gpu:
        return None
    launched = Engine("FSDP2", max(2, engine.ranks), training.computation.autocast is not None)
    changed = _with_engine(training, launched)
    while launched.ranks < 8 and changed.plan.total > limit:
        launched = launched._replace(ranks=2 * launched.ranks)
        changed = _with_engine(training, launched)
    words = (
        f"`accelerate launch --config_file launch/accelerate/fsdp2.yaml --num_processes {launched.ranks}` (or zero3)"
    )
    return words, changed


def _with_engine(training: Training, launched: Engine) -> Training:
    return replace(training, engine=launched, computation=training.computation._replace(autocast=None))


def _shorter(training: Training, limit: float) -> Change | None:
    batch = training.batch
    if training.rollout is None:
        key, length = "max_length", batch.length // 2
        return f"`stage.args.{key}={length}`", replace(
            training, batch=batch._replace(length=length, scored=min(batch.scored, length))
        )
    rows, prompt, new = training.rollout
    shorter = batch._replace(length=prompt + new // 2, scored=new // 2)
    return (
        f"`stage.args.max_completion_length={new // 2}`",
        replace(training, batch=shorter, rollout=(rows, prompt, new // 2)),
    )


def _sleep(training: Training, limit: float) -> Change | None:
    if not training.vllm or training.vllm_sleeps:
        return None
    return "`stage.args.vllm_enable_sleep_mode=true`", replace(training, vllm_sleeps=True)


CHANGES: tuple[Callable[[Training, float], Change | None], ...] = (
    _smaller_scores,
    _smaller_batch,
    _checkpointing,
    _lora,
    _smaller_critic,
    _qlora,
    _sharding,
    _shorter,
    _sleep,
)
