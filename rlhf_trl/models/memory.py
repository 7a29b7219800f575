"""Memory of a training by role and by moment, from models without weights."""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_trl.models.dry_passes import Batch, Computation, Passes, without_adapter
from rlhf_trl.models.optimizers import optimizer_bytes
from rlhf_trl.models.sizes import sizes_of
from rlhf_trl.models.weight_bytes import quantized_layers, tensor_bytes, weight_bytes
from rlhf_trl.patches.dropout import disable_dropout

GIB = 2**30


def adapted(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Return a model without weights with a new adapter on it."""
    config: Any = copy.deepcopy(peft_config)
    config.inference_mode = False
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # others (PiSSA, LoftQ) decompose weights, and there are none
    with torch.device("meta"):
        made: Any = get_peft_model(model, config)
    return made


class Engine(NamedTuple):
    """
    Engine by which ranks share a training.

    Attributes:
        name (`str`): `none`, `DDP`, `FSDP2`, `DeepSpeed ZeRO-2` or `DeepSpeed ZeRO-3`.
        ranks (`int`): number of ranks.
        bf16 (`bool`): whether the engine computes in bfloat16, as mixed precision.
    """

    name: str = "none"
    ranks: int = 1
    bf16: bool = False

    @property
    def casts(self) -> bool:
        """Whether the engine computes with weights that it has cast to bfloat16."""
        return self.bf16 and self.name not in ("none", "DDP")

    @property
    def shards_weights(self) -> bool:
        return self.ranks > 1 and (self.name.startswith("FSDP") or self.name.endswith("ZeRO-3"))

    @property
    def shards_gradients(self) -> bool:
        return self.ranks > 1 and (self.shards_weights or self.name.endswith("ZeRO-2"))


ALONE = Engine()


@dataclass
class Role:
    """
    Bytes that a network takes on one rank for as long as the training lasts.

    Attributes:
        name (`str`): policy, reference, critic or reward.
        weights (`float`), gradients (`float`), optimizer (`float`): bytes.
        note (`str`): what it shares.
    """

    name: str
    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    note: str = ""


@dataclass
class Moment:
    """
    Bytes that a part of a step takes on one rank besides what all roles hold.

    Attributes:
        name (`str`): update, rollout, scores, or (optimizer) step.
        parts (`dict`): bytes by what they are for.
    """

    name: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass
class MemoryPlan:
    """
    Memory of a training on one rank, in bytes.

    Attributes:
        roles (`list[Role]`): what is there all the time.
        moments (`list[Moment]`): what comes and goes, one after another.
        other (`float`): buffers of the engine.
    """

    roles: list[Role]
    moments: list[Moment]
    other: float = 0.0

    @property
    def held(self) -> float:
        """Weights, optimizer and the engine's buffers; gradients come and go with the update."""
        return sum(role.weights + role.optimizer for role in self.roles) + self.other

    @property
    def peak(self) -> Moment:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def total(self) -> float:
        """The most that is needed at a time."""
        return self.held + self.peak.total


@dataclass
class Training:
    """
    A training without weights.

    Attributes:
        policy (`PreTrainedModel` or `PeftModel`): what is trained, in its types, with the right parameters trainable.
        output (`str`): `log_probs` (TRL's output layer in tiles), `logits` (all of them) or `scores`.
        batch ([`~rlhf_trl.models.dry_passes.Batch`]): a micro-batch.
        computation ([`~rlhf_trl.models.dry_passes.Computation`]): how the device computes.
        engine ([`Engine`]), optimizer (`str`), quantization: of the trained network.
        checkpointing (`bool`): whether layers are computed anew in the backward.
        accumulates (`bool`): whether an optimizer step takes several micro-batches.
        reference (`bool`): whether there is one with weights of its own; without it, an adapter is switched off.
        reference_dtype (`torch.dtype`, *optional*): of the reference's weights, where it isn't the policy's.
        scores_reference (`bool`): whether the reference reads each micro-batch, beside the policy's activations.
        critic (`str`, *optional*): `head`, `adapter` or `model`.
        critic_trunk (`PreTrainedModel`, *optional*): network of a critic of the kind `model`.
        rewards (`list`): name, network without weights, bytes of its weights and rows of a pass, of each reward model;
            `None` for the network where an adapter on the policy is meant.
        rollout (`tuple`, *optional*): rows that are sampled at a time, tokens of a prompt, and of a completion.
        temperature (`float`): that of sampling.
        disable_dropout (`bool`): whether dropout is disabled in training.
        reuses_sampling (`bool`): whether PPO keeps the logits that it sampled from (`rlhf_trl.ppo.sampled`).
        vllm (`float`): share of the device's memory that vLLM takes in this process.
        vllm_sleeps (`bool`): whether it takes it for the rollout alone.
        sides (`int`): sequences of a row, such as chosen and rejected.
        demonstrations (`bool`): whether each micro-batch has as many demonstrations beside it (PPO-ptx).
        device_memory (`int`): bytes of the device, of which vLLM takes its share.
        known (`dict`): what passes take that were run for this training, or for the one it is a changed copy of.
    """

    policy: PreTrainedModel | PeftModel
    output: str
    batch: Batch
    computation: Computation
    engine: Engine = ALONE
    optimizer: str = "adamw_torch_fused"
    quantization: Any = None
    checkpointing: bool = False
    accumulates: bool = False
    reference: bool = False
    reference_dtype: torch.dtype | None = None
    scores_reference: bool = False
    critic: str | None = None
    critic_trunk: PreTrainedModel | None = None
    rewards: list[tuple[str, PreTrainedModel | None, float, int]] = field(default_factory=list)
    rollout: tuple[int, int, int] | None = None
    temperature: float = 1.0
    disable_dropout: bool = False
    reuses_sampling: bool = False
    vllm: float = 0.0
    vllm_sleeps: bool = False
    sides: int = 1
    demonstrations: bool = False
    device_memory: int = 0
    known: dict[tuple, Any] = field(default_factory=dict, repr=False)

    def once(self, name: str, run: Callable[[], Any], *given: Any) -> Any:
        """
        Return what `run` returns, run once for this training and the copies of it (`dataclasses.replace`) that agree
        in `given`, which must be all that it reads.
        """
        key = (name, *(id(each) if isinstance(each, nn.Module) else each for each in given))
        if key not in self.known:
            self.known[key] = run(), given  # kept, so that no other model gets the id of one of them
        return self.known[key][0]

    @functools.cached_property
    def plan(self) -> MemoryPlan:
        """Its memory on one rank, worked out once: a training isn't changed any more, but copied with changes."""
        return plan_memory(self)


def plan_memory(training: Training) -> MemoryPlan:
    """Return the memory of a training on one rank."""
    roles = roles_of(training)
    moments = [update_moment(training, sum(role.gradients for role in roles))]
    if training.rollout is not None:
        moments.insert(0, rollout_moment(training))
    vllm = training.vllm * training.device_memory
    if vllm and training.vllm_sleeps:
        moments.insert(0, Moment("rollout", {"vLLM": vllm}))
    elif vllm:
        roles.append(Role("vLLM", vllm, note="weights and cache"))
    moments += [scores_moment(training, *reward) for reward in training.rewards]
    moments.append(_step_moment(training, roles))
    buckets = sum(role.gradients for role in roles) if training.engine.name == "DDP" else 0.0
    return MemoryPlan(roles, [moment for moment in moments if moment.total], buckets)


# ---- What is there all the time ----


def roles_of(training: Training) -> list[Role]:
    """Return what each network takes for as long as the training lasts."""
    policy, engine = training.policy, training.engine
    lora = isinstance(policy, PeftModel)
    trained = [p for p in policy.parameters() if p.requires_grad]
    own = _trained_role("policy", weight_bytes(policy, training.quantization), trained, training)
    roles = [own]
    base = without_adapter(policy)
    if training.reference:
        dtype, weights = training.reference_dtype, weight_bytes(base)
        if dtype is None and engine.name.startswith("DeepSpeed") and engine.bf16:  # which casts it too
            dtype = torch.bfloat16
        weights = weights if dtype is None else dtype.itemsize * base.num_parameters()
        roles.append(Role("reference", weights / (engine.ranks if engine.shards_weights else 1), note="frozen"))
    elif (lora and training.critic is not None) or training.scores_reference:
        roles.append(Role("reference", 0.0, note="the policy's base"))
    if training.critic == "head":
        width = base.config.get_text_config().hidden_size
        head = [nn.Parameter(torch.empty(width + 1, device="meta"))]
        roles.append(_trained_role("critic", 4 * (width + 1), head, training, "head on the policy"))
    elif training.critic == "adapter":
        roles.append(_trained_role("critic", tensor_bytes(trained), trained, training, "adapter on the policy's base"))
    elif training.critic == "model" and training.critic_trunk is not None:
        trunk = list(training.critic_trunk.parameters())
        roles.append(_trained_role("critic", tensor_bytes(trunk), trunk, training, "its own network"))
    for name, network, weights, _ in training.rewards:
        roles.append(Role(name, weights, note="" if network is not None else "adapter on the policy's base"))
    return roles


def _trained_role(name: str, weights: float, trained: list[nn.Parameter], training: Training, note: str = "") -> Role:
    """Return a role that is trained, with the share of a rank: see the engines' own documentation."""
    engine, count, gradients = training.engine, sum(p.numel() for p in trained), tensor_bytes(trained)
    itemsize = trained[0].itemsize if trained else 4
    states = optimizer_bytes(training.optimizer, count, itemsize)
    if engine.name.startswith("DeepSpeed"):
        if engine.bf16:  # weights and gradients in bfloat16; the optimizer has a float32 copy of the weights
            weights, gradients = weights - gradients + 2 * count, 2 * count
            states = optimizer_bytes(training.optimizer, count, 4)
        states += 4 * count
    share = engine.ranks
    return Role(
        name,
        weights / (share if engine.shards_weights else 1),
        gradients / (share if engine.shards_gradients else 1),
        states / (share if engine.shards_gradients else 1),
        note,
    )


# ---- What comes and goes ----


def update_moment(training: Training, gradients: float) -> Moment:
    """
    Return what a micro-batch of the update takes.

    Args:
        gradients (`float`): bytes of all gradients, or of this rank's share.
    """
    activations, peak = training.once(
        "update",
        lambda: _update_bytes(training),
        *(training.policy, training.critic_trunk, training.batch, training.computation, training.engine.casts),
        *(training.output, training.critic, training.checkpointing, _keeps_gradients(training)),
        *(training.disable_dropout, training.demonstrations, training.scores_reference),
    )
    if _keeps_gradients(training):
        parts = {"activations": activations, "gradients": gradients, "backward": peak - activations}
    else:
        parts = {"activations": activations, "gradients and backward": peak - activations}
    return Moment("update", parts | _gathered(training) | _unpacked(training))


def _keeps_gradients(training: Training) -> bool:
    """Return whether there are gradients already when a micro-batch begins."""
    return training.accumulates or training.engine.shards_gradients


def _update_bytes(training: Training) -> tuple[int, int]:
    """Return what is alive between forward and backward of a micro-batch, and the most of both."""
    policy, trunk, batch = _computing(training, training.policy), training.critic_trunk, training.batch
    trunk = None if trunk is None else _computing(training, trunk)
    models = [policy] if trunk is None else [policy, trunk]
    with Passes(*models, computation=training.computation, padded=batch.padded) as passes:
        for model in models:
            model.train()
            if training.checkpointing:
                passes.checkpoint(model)
            for parameter in model.parameters() if _keeps_gradients(training) else ():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
                    passes.tracker.ignore([parameter.grad])
        hidden, losses = passes.hidden_states(policy, batch), []
        if training.output == "log_probs":
            losses.append(passes.log_probs(policy, hidden, batch).sum())
        elif training.output == "logits":
            losses.append(passes.loss_of_logits(policy, hidden))
        else:
            losses.append(passes.scores(hidden).sum())
        if training.critic is not None:
            if training.critic != "head":
                hidden = passes.hidden_states(policy if trunk is None else trunk, batch)
            losses.append(passes.scores(hidden[:, :-1]).sum())
        if training.demonstrations:
            losses.append(passes.log_probs(policy, passes.hidden_states(policy, batch), batch).sum())
        del hidden
        if training.scores_reference:
            with torch.no_grad():
                passes.log_probs(policy, passes.hidden_states(policy, batch), batch)
        activations = passes.tracker.current
        torch.autograd.backward(functools.reduce(torch.add, losses))
        return activations, passes.tracker.peak


def rollout_moment(training: Training) -> Moment:
    """Return what sampling by `generate` takes: the prompts' pass, or the last token's with the whole cache."""
    cached, peak = training.once(
        "rollout",
        lambda: _rollout_bytes(training),
        *(training.policy, training.rollout, training.batch.padded, training.computation, training.engine.casts),
        *(training.temperature, training.reuses_sampling, training.disable_dropout),
    )
    parts = {"cache": cached, "logits and layers": peak - cached}
    gathered = _gathered(training)
    if training.engine.name.endswith("ZeRO-3") and training.engine.ranks > 1:  # `ds3_gather_for_generation`
        gathered = {"gathered weights": weight_bytes(_computing(training, training.policy))}
    return Moment("rollout", parts | gathered | _unpacked(training))


def _rollout_bytes(training: Training) -> tuple[int, int]:
    """Return what the whole cache takes, and the most of prefill and last token."""
    assert training.rollout is not None
    rows, prompt, new = training.rollout
    policy = _computing(training, training.policy).eval()
    with Passes(policy, computation=training.computation, padded=training.batch.padded) as passes, torch.no_grad():
        inputs = functools.partial(passes.inputs, Batch(rows, prompt, 0, training.batch.padded))
        first = _next_token(training, passes, policy, **inputs())
        prefill = passes.tracker.peak
        del first
        batch = Batch(rows, prompt + new - 1, 0, training.batch.padded)
        cache = policy(**passes.inputs(batch), use_cache=True).past_key_values
        cached = passes.tracker.current
        passes.tracker.reset_peak()
        ids = torch.empty(rows, 1, dtype=torch.long, device="meta")
        mask = passes.inputs(batch._replace(length=prompt + new)) | {"input_ids": ids}
        _next_token(training, passes, policy, past_key_values=cache, **mask)
        return cached, max(passes.tracker.peak, prefill)


def _next_token(training: Training, passes: Passes, policy: Any, **inputs: Any) -> Any:
    """Sample a token as `generate` of transformers 5.23 does, which holds the last token's probabilities meanwhile."""
    rows, vocabulary = len(inputs["input_ids"]), policy.get_output_embeddings().weight.size(0)
    scores, probs, kept = (torch.empty(rows, vocabulary, device="meta") for _ in range(3))
    if not training.reuses_sampling:
        del kept
    options = {"logits_to_keep": 1} if _keeps_logits(policy) else {}
    output = policy(**inputs, **options, use_cache=True)
    logits = output.logits
    if training.computation.autocast is not None:
        logits = logits.float()  # accelerate's, of every output
    if training.reuses_sampling:  # `rlhf_trl.ppo.sampled`
        floats = logits[:, -1].float() / training.temperature
        floats.logsumexp(dim=1)
        del floats
    scores = logits[:, -1].to(copy=True, dtype=torch.float32)
    processed = scores if training.temperature == 1 else scores / training.temperature
    probs = torch.softmax(processed, dim=-1)  # noqa: F841 held while the draws are made
    torch.empty_like(scores)  # of `torch.multinomial`
    return output


def _keeps_logits(policy: Any) -> bool:
    return "logits_to_keep" in inspect.signature(without_adapter(policy).forward).parameters


def pass_bytes(model: PreTrainedModel | PeftModel, batch: Batch, computation: Computation) -> int:
    """Return what a pass without gradients takes at its peak."""
    with Passes(model, computation=computation, padded=batch.padded) as passes, torch.no_grad():
        passes.hidden_states(model, batch)
    return passes.tracker.peak


def scores_moment(training: Training, name: str, network: PreTrainedModel | None, _: float, rows: int) -> Moment:
    """Return what the pass of a reward model takes."""
    batch = training.batch._replace(rows=rows)
    computation = training.computation if network is None else training.computation._replace(autocast=None)
    if network is not None and (sizes := sizes_of(network)).is_table and sizes.positions:
        batch = batch._replace(length=min(batch.length, sizes.positions))  # a classifier cuts what is longer
    model = training.policy if network is None else network
    size = training.once("scores", lambda: pass_bytes(model, batch, computation), model, batch, computation)
    return Moment(f"scores of {name}", {"layers": size})


def _step_moment(training: Training, roles: list[Role]) -> Moment:
    """Return what an optimizer step takes: AdamW without a fused kernel makes a copy of what it changes on a GPU."""
    gradients = sum(role.gradients for role in roles)
    foreach = training.computation.on_gpu and training.optimizer in ("adamw_torch", "adamw_hf", "sgd", "adagrad")
    return Moment("step", {"gradients": gradients, "copies": gradients if foreach else 0.0})


def _computing(training: Training, model: Any) -> Any:
    """Return a copy of a model in the types that its engine computes in."""
    made = copy.deepcopy(model)
    if training.disable_dropout:
        disable_dropout(made)  # which a copy of a model with it would lose
    if training.engine.casts:
        trained = [p.requires_grad for p in made.parameters()]
        made.to(torch.bfloat16)
        for parameter, is_trained in zip(made.parameters(), trained, strict=True):
            parameter.requires_grad_(is_trained)
    return made


def _gathered(training: Training) -> dict[str, float]:
    """
    Return the weights that ranks gather for a layer at a time: with FSDP2 those outside of the layers, the output
    layer once more, and two layers with the gradients of one; with ZeRO-3 up to DeepSpeed's `max_live_parameters`.
    """
    if not training.engine.shards_weights:
        return {}
    base = without_adapter(training.policy)
    itemsize = 2 if training.engine.bf16 else base.dtype.itemsize
    total = sum(p.numel() for p in base.parameters())
    if training.engine.name.endswith("ZeRO-3"):
        return {"gathered weights": itemsize * min(total, 10**9)}
    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    layers = [sum(p.numel() for p in block.parameters()) for block in blocks]
    largest = max(layers, default=0)
    root, output = total - sum(layers), base.get_output_embeddings()
    head = output.weight.numel() if output is not None else 0
    return {"gathered weights": itemsize * (root + head + 3 * largest)}


def _unpacked(training: Training) -> dict[str, float]:
    """Return the largest layer of a quantized base in the type it is computed in."""
    if training.quantization is None:
        return {}
    return {
        "unpacked layer": 2 * max((layer.weight.numel() for layer in quantized_layers(training.policy)), default=0)
    }
