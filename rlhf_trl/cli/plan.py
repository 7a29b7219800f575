"""Lines of the plan of a training, from the arguments and the objects that it is made of."""

import copy
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from rlhf_trl.checks.disk import Weights
from rlhf_trl.checks.reward_calls import Scale
from rlhf_trl.hints import size_of
from rlhf_trl.models.precision import dtype_name
from rlhf_trl.models.sizes import critic_parameters
from rlhf_trl.rewards.constraints import Bound
from rlhf_trl.trainers.steps import steps_per_rollout

# A share of cut completions that is worth a warning
CUT = 0.05


def weights_of(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> Weights:
    """
    Count the weights of a model without any (on the meta device), and those that a training trains.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the start of the run, an adapter on its base or a full model.
        peft_config (`PeftConfig`, *optional*): new adapter on a full model.
    """
    total = model.num_parameters()
    if isinstance(model, PeftModel):
        adapter = sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())
        return Weights(total - adapter, adapter, torch.float32.itemsize)
    if peft_config is None:
        return Weights(total, total, model.dtype.itemsize)
    config: Any = copy.deepcopy(peft_config)
    config.inference_mode = False
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # others (PiSSA, LoftQ) decompose weights, and there are none
    with torch.device("meta"):
        adapted = get_peft_model(copy.deepcopy(model), config)
    trained, _ = adapted.get_nb_trainable_parameters()
    return Weights(total, trained, torch.float32.itemsize)


def critic_weights(args: Any, model: PreTrainedModel | PeftModel, policy: Weights, trust_remote_code: bool) -> int:
    """Return the number of weights that a critic trains beside the policy's: 0 without one."""
    kind = getattr(args, "critic", None)
    if kind == "head":
        return model.config.get_text_config().hidden_size + 1
    if kind == "adapter":
        return policy.trained
    return critic_parameters(args.critic_path, policy.total, trust_remote_code) if kind == "model" else 0


def adapter_text(peft_config: PeftConfig | None, weights: Weights) -> str:
    """Return which weights are trained."""
    if peft_config is None:
        return f"none, all {size_of(weights.total)} weights are trained"
    options = {name: getattr(peft_config, name, None) for name in ("r", "lora_alpha", "target_modules")}
    shape = ", ".join(f"{name}={value}" for name, value in options.items() if isinstance(value, int | str))
    kind = type(peft_config).__name__.removesuffix("Config").replace("Lora", "LoRA")
    name, share = f"{kind} ({shape})" if shape else kind, 100 * weights.trained / weights.total
    share = f"{share:.0f}" if share >= 10 else f"{share:.2g}"
    return f"{name}: {size_of(weights.trained)} weights are trained, {share} % of {size_of(weights.total)}"


def quantization_text(quantization: Any) -> str | None:
    """Return how the base is quantized, `None` if it isn't."""
    if quantization is None:
        return None
    if not quantization.load_in_4bit:
        return "8 bits" if quantization.load_in_8bit else type(quantization).__name__
    twice = ", its constants too" if quantization.bnb_4bit_use_double_quant else ""
    compute = dtype_name(quantization.bnb_4bit_compute_dtype)
    return f"4 bits ({quantization.bnb_4bit_quant_type}{twice}), computed in {compute}"


def learning_rate_text(args: Any) -> str:
    """Return the learning rates of the policy and its critic, and their schedule."""
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    warmup = args.warmup_steps
    if warmup:
        schedule += f", {f'{warmup:.0%} of the' if warmup < 1 else f'{warmup:g}'} steps of warmup"
    if not hasattr(args, "critic"):
        return f"{args.learning_rate:g}, {schedule}"
    critic = args.critic_learning_rate
    return f"policy {args.learning_rate:g}, critic {args.learning_rate if critic is None else critic:g}, {schedule}"


def lengths_text(args: Any, given: Sequence[int], limit: int | None, positions: int | None) -> str:
    """
    Return the limits in tokens beside what the data have.

    Args:
        given (`Sequence[int]`): tokens of some rows; of a stage that generates, of their prompts.
        limit (`int`, *optional*): limit of a prompt.
        positions (`int`, *optional*): those of the model.
    """
    have = f"{median(given):,.0f} tokens (median; the longest {max(given):,})"
    context = f"; the model reads {positions:,}" if positions is not None else ""
    if not hasattr(args, "num_generations"):
        longest = getattr(args, "max_length", None)
        return f"rows of {have}{f', up to {longest:,} are read' if longest else ''}{context}"
    cut = f", longer than {limit:,} dropped" if limit is not None else ""
    return f"prompts of {have}{cut}; completions of up to {args.max_completion_length:,}{context}"


def cut_warning(key: str, limit: int | None, lengths: Sequence[int], noun: str = "completions") -> str | None:
    """
    Return what is to be expected of a limit that is below the data's own lengths.

    Args:
        key (`str`), limit (`int`, *optional*): where it is set, in tokens.
        lengths (`Sequence[int]`): tokens of completions or rows of the data.
        noun (`str`): what they are of.
    """
    if not lengths or limit is None:
        return None
    cut = sum(tokens > limit for tokens in lengths) / len(lengths)
    if cut < CUT:
        return None
    ordered = sorted(lengths)
    wanted = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)))]
    return (
        f"{cut:.0%} of the {noun} in the data are longer than `{key}={limit}` tokens (median {median(lengths):,.0f}, "
        f"the longest {ordered[-1]:,}): they are cut before their end, or dropped. "
        f"`{key}={wanted}` holds 95 % of them."
    )


def rewards_text(nodes: Mapping[Any, Any], scales: Mapping[str, Scale]) -> str:
    """Return the rewards with their weights, and their scales where these are known."""
    parts = []
    for name, node in nodes.items():
        scale = scales.get(str(name))
        parts.append(f"{name} x {node.weight}")
        if scale and scale.is_real:
            parts[-1] += f" (mean {scale.moments.mean:.3g}, std {scale.moments.std:.2g}: {scale.source})"
    return ", ".join(parts)


def constraints_text(nodes: Mapping[Any, Any], bounds: Mapping[str, str], scales: Mapping[str, Scale]) -> str:
    """
    Return how far each constraint of `combine=lagrange` is from its bound, in the unit of its cost, beside the spread
    of the rewards that it is weighed against; of those whose scale is known.

    Args:
        nodes (`Mapping`): options of each reward, by its name.
        bounds (`Mapping[str, str]`): bound of each constraint, by the name of the reward.
        scales (`Mapping[str, Scale]`): scales of rewards.
    """
    known = {name: scale for name, scale in scales.items() if scale.is_real}
    parts = []
    for name, text in bounds.items():
        parts.append(f"{name} {text}")
        if scale := known.get(name):
            size, (mean, std) = abs(nodes[name].weight), scale.moments
            cost = size * Bound.parse(text).excess(mean)
            parts[-1] += f" (mean cost {cost:+.3g}, std {size * std:.2g}: {scale.source})"
    others = [abs(nodes[name].weight) * scale.moments.std for name, scale in known.items() if name not in bounds]
    spread = f"; std of what is maximized {math.hypot(*others):.2g}" if others else ""
    return ", ".join(parts) + spread


def critic_text(args: Any, trained: int) -> str:
    """Return the kind, the start and the size of the critic."""
    kind = {"head": "a head on the policy", "adapter": "an adapter on the policy's base", "model": "its own network"}
    start = "" if args.critic == "head" else f", from {args.critic_path or 'the policy'}"
    return f"{args.critic}: {kind[args.critic]}{start}, {size_of(trained)} weights"


def offline_steps(args: Any, batches: int) -> int:
    """Return the optimizer steps of a training over a dataloader with that many batches."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def sampler_text(args: Any) -> str:
    """Return the engine that makes the completions, and what it takes beside the trained weights."""
    if args.use_vllm and args.vllm_mode == "server":
        url = args.vllm_server_base_url or f"{args.vllm_server_host}:{args.vllm_server_port}"
        return f"a vLLM server at {url}, {_correction(args)}"
    if args.use_vllm:
        size, asleep = args.vllm_tensor_parallel_size, ", freed in updates" if args.vllm_enable_sleep_mode else ""
        shared = f", a copy per {size} ranks" if size > 1 else ", a copy per rank"
        share = f"{args.vllm_gpu_memory_utilization:.0%} of the GPU's memory{asleep}"
        return f"vLLM in this process{shared}: {share}, {_correction(args)}"
    if not args.use_transformers_continuous_batching:
        return "transformers"
    options = {name: value for name, value in (args.transformers_continuous_batching_config or {}).items() if value}
    return ", ".join(
        ["transformers with continuous batching", *(f"{name}={value}" for name, value in options.items())]
    )


def _correction(args: Any) -> str:
    if not getattr(args, "vllm_importance_sampling_correction", False):
        return "its probabilities not corrected"
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    bounds = " to ".join(f"{bound:g}" for bound in (low or 0, high) if bound is not None)
    return f"its probabilities corrected by {args.vllm_importance_sampling_mode} ({bounds})"


def rollout_lines(args: Any, rows: int) -> tuple[dict[str, str], int]:
    """Return the batch arithmetic of a training on rollouts, and its optimizer steps."""
    rollout, prompts = args.generation_batch_size, args.generation_batch_size // args.num_generations
    each = steps_per_rollout(args)
    per_epoch = rows // prompts if getattr(args, "fills_rollouts", True) else math.ceil(rows / prompts)
    rollouts = per_epoch * args.num_train_epochs if args.max_steps <= 0 else args.max_steps / each
    steps, episodes = rollouts * each, rollouts * rollout
    noun = "pairs of completions" if getattr(args, "sides", 1) == 2 else "completions"
    lines = {
        "rollout": f"{rollout:,} completions of {prompts:,} prompts ({args.num_generations} each)",
        "batch": f"{_batch(args)} {noun} per optimizer step (a mini-batch)",
        "optimization": f"{args.num_iterations} epoch(s) per rollout = {each} optimizer steps",
        "steps": f"{rollouts:,.4g} rollouts, {episodes:,.0f} episodes, {steps:,.0f} optimizer steps",
    }
    return lines, math.ceil(steps)


def offline_lines(args: Any, steps: int) -> dict[str, str]:
    """Return the batch arithmetic of a training on a dataset."""
    return {"batch": f"{_batch(args)} rows per optimizer step", "steps": f"{steps:,} optimizer steps"}


def _batch(args: Any) -> str:
    ranks, micro, accumulation = args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps
    return f"{micro} per device x {ranks} rank(s) x {accumulation} accumulated = {micro * ranks * accumulation}"
