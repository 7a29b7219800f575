"""
The critics of [`PPOTrainer`]: a value head on the policy's own hidden states, on those of a LoRA adapter on the
policy's base, or on those of a network of its own.

All live inside the policy's module and are computed in its fused forward, where DDP, FSDP and ZeRO see every parameter
that is used.
"""

import copy
import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import FusedCausalLMOutput

from rlhf_trl.data.multimodal import ExtraInputs
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import adapter_config
from rlhf_trl.models.inputs import batches
from rlhf_trl.models.loading import load_reward_model
from rlhf_trl.models.merging import load_merged
from rlhf_trl.models.roles import CRITIC, adapter_layers, add_role, policy_is_active
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.patches.engines import whole_weights
from rlhf_trl.patches.forward import wrap_forward
from rlhf_trl.patches.peft import active_adapter, recompute_with_the_same_adapter
from rlhf_trl.patches.positions import counts_positions, positions, takes_positions
from rlhf_trl.ppo.config import PPOConfig

CRITIC_FILE = "critic.safetensors"
VALUE_HEAD = "value_head"
# Inputs of the fused forward that are no inputs of a trunk
OF_THE_HEAD = ("labels", "position_ids", "output_router_logits", "at_temperature_1")


def is_critic(name: str) -> bool:
    """Return whether a parameter of the policy's module belongs to the critic, by its full name."""
    return not {VALUE_HEAD, CRITIC}.isdisjoint(name.split("."))


@dataclass
class PolicyAndValueOutput(FusedCausalLMOutput):
    """
    Output of a model with a critic: TRL's fused output, and the values.

    `value_preds` has the shape of `log_probs`, (batch, seq_len - 1): V read before each next-token label; `None` where
    they were not asked for. With S > 1 signals it has one dimension more, of size S. (A field called `values` would
    hide `dict.values`, and a bare extra key breaks accelerate's conversion to float32.)
    """

    value_preds: Tensor | None = None


class ValueHead(nn.Linear):
    """Linear layer that computes in float32, whatever the type of its weights: engines and TRL cast whole models."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the values of S signals, (..., width) -> (..., S)."""
        return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())


def add_critic(
    model: PreTrainedModel | PeftModel, args: PPOConfig, tokenizer: PreTrainedTokenizerBase, signals: int = 1
) -> None:
    """
    Give the policy the critic that `args.critic` names, started from `args.critic_path`.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the policy, with `trl.trainer.utils.add_fused_lm_head` applied.
        args ([`PPOConfig`]): its options that begin with `critic`, and `head_init`.
        tokenizer: the policy's, which a critic with a start of its own must share.
        signals (`int`, defaults to `1`): signals with a value of their own, the score first. `args.critic_score_head`
            is about the score's.

    Raises:
        ConfigError: if the critic can't start from what `args.critic_path` holds, or needs an adapter on the policy.
    """
    policy: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if args.critic_path is not None:
        _check_tokenizer(args.critic_path, tokenizer, bool(args.trust_remote_code))
    trunk: Callable | None = None
    score: Tensor | None = None
    if args.critic == "adapter":
        if not isinstance(model, PeftModel):
            raise ConfigError(
                "`critic=adapter` is an adapter on the policy's frozen base, and this policy has none: all its "
                "weights are trained. Give the policy an adapter too (`adapter=lora`), or use `critic=head` or "
                "`critic=model`."
            )
        score = add_role(model, CRITIC, args.critic_path)
        layers = adapter_layers(policy)
        recompute_with_the_same_adapter(policy, layers)

        def adapter_trunk(**inputs) -> Tensor:
            with active_adapter(layers, CRITIC):
                return _hidden_states(policy.base_model, **inputs)

        trunk = adapter_trunk

    elif args.critic == "model":
        network, score = _network(model, args)
        policy.add_module(CRITIC, network)
        trunk = functools.partial(_hidden_states, network)
    width = score.size(1) if score is not None else policy.get_output_embeddings().in_features
    head = ValueHead(width, signals, device=policy.device, dtype=torch.float32)
    nn.init.zeros_(head.bias)
    if args.head_init == "zero":
        nn.init.zeros_(head.weight)
    else:
        nn.init.normal_(head.weight, std=1 / math.sqrt(width + 1))
    if args.critic_score_head:
        if score is None:
            raise ConfigError(
                "`critic_score_head=True` starts the value head as a reward model's score head. Name the reward "
                "model: `critic.run=reward` or `critic.path=...`."
            )
        head.weight.data[:1] = score[:1]
    policy.add_module(VALUE_HEAD, head)
    policy.detach_values = args.critic_detach
    _compute_values(policy, trunk, adapter_layers(policy))


def _compute_values(policy: PreTrainedModel, trunk: Callable | None, layers: list[nn.Module]) -> None:
    """
    Make the fused forward return [`PolicyAndValueOutput`]; without a `trunk`, the head reads the policy's own.

    `with_values` asks for values, and `values_only` spares the policy's pass where a `trunk` gives them.
    """

    def forward(model, fused_forward, *args, fused_lm_head=False, with_values=False, values_only=False, **kwargs):
        if not fused_lm_head:
            return fused_forward(*args, **kwargs)
        if not with_values or not policy_is_active(layers):  # a reference made of the policy's base has no critic
            return PolicyAndValueOutput(**fused_forward(*args, fused_lm_head=True, **kwargs))
        if trunk is None:
            seen = {}
            hook = model.base_model.register_forward_hook(
                lambda _, __, output: seen.update(h=output.last_hidden_state)
            )
            try:
                output = fused_forward(*args, fused_lm_head=True, **kwargs)
            finally:
                hook.remove()
            hidden = seen["h"]
        else:
            output = {} if values_only else fused_forward(*args, fused_lm_head=True, **kwargs)
            hidden = trunk(**{name: value for name, value in kwargs.items() if name not in OF_THE_HEAD})
        hidden = hidden[:, :-1]
        if model.detach_values and trunk is None:
            hidden = hidden.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            values = getattr(model, VALUE_HEAD)(hidden).squeeze(-1)
        return PolicyAndValueOutput(**output, value_preds=values)

    wrap_forward(policy, forward)


def _hidden_states(trunk: Any, attention_mask: Tensor, **inputs: Any) -> Tensor:
    if takes_positions(trunk) and not counts_positions(trunk, inputs):
        inputs["position_ids"] = positions(attention_mask)
    return trunk(attention_mask=attention_mask, use_cache=False, **inputs).last_hidden_state


def _network(model: PreTrainedModel | PeftModel, args: PPOConfig) -> tuple[Any, Tensor | None]:
    """Return a trainable trunk, a reward model's or a copy of the policy's, and the score head that it came with."""
    policy: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    dtype = getattr(torch, args.critic_dtype or "float32")  # also of a copy of a frozen base in bfloat16
    if args.critic_path is not None:
        load = load_merged if adapter_config(args.critic_path) is not None else load_reward_model
        started: Any = load(args.critic_path, args.critic_dtype or "float32", trust_remote_code=args.trust_remote_code)
        head = next(module for module in started.children() if isinstance(module, nn.Linear))
        trunk, score = started.base_model, head.weight.detach().clone()
    elif getattr(policy, "is_loaded_in_4bit", False) or getattr(policy, "is_loaded_in_8bit", False):
        raise ConfigError(
            "`critic=model` would be a trainable copy of the policy, whose weights are quantized and can't be "
            "trained. Start it from a reward model (`critic.run=reward`), or use `critic=adapter`."
        )
    else:
        with gather_params_ctx(list(model.parameters()), modifier_rank=None):  # which ZeRO-3 has dealt out
            started: Any = copy.deepcopy(model)
        with whole_weights():
            trunk = (started.merge_and_unload() if is_peft_model(started) else started).base_model
        score = None
    return trunk.to(policy.device, dtype).requires_grad_(True), score


def critic_values(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    width: int,
    batch_size: int,
    extra: Sequence[ExtraInputs] | None = None,
) -> Tensor:
    """
    Return the values of a critic with a trunk of its own, without a pass of the policy.

    Args:
        model (`nn.Module`): the policy's module, with the critic.
        input_ids (`Tensor` of shape (N, P + T)), attention_mask (`Tensor` of shape (N, P + T)): prompts and
            completions.
        width (`int`): completion tokens, T.
        batch_size (`int`): rows of a pass.
        extra (`Sequence[ExtraInputs]`, *optional*): inputs of each row beside its ids.

    Returns:
        `Tensor` of shape (N, T), or (N, T, S) of S > 1 signals.
    """
    values = []
    for ids, mask, inputs in batches(input_ids, attention_mask, batch_size, extra):
        options = {"fused_lm_head": True, "with_values": True, "values_only": True}
        output = model(input_ids=ids, attention_mask=mask, **inputs, **options)
        values.append(output.value_preds[:, -width:])
    return torch.cat(values)


def critic_parameter_group(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float) -> None:
    """Move the critic's parameters into groups of their own, with a learning rate of their own."""
    ids = {id(parameter) for name, parameter in model.named_parameters() if is_critic(name)}
    for group in list(optimizer.param_groups):
        critic = [parameter for parameter in group["params"] if id(parameter) in ids]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        if critic:
            optimizer.add_param_group({"params": critic, "lr": learning_rate, "weight_decay": group["weight_decay"]})


def without_critic(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the policy's part of the state of its module."""
    return {key: value for key, value in state_dict.items() if not is_critic(key)}


def save_critic(state_dict: dict[str, Tensor], folder: str) -> None:
    """Write the critic's part of the state of the policy's module into a folder."""
    critic = {key: value.contiguous() for key, value in state_dict.items() if is_critic(key)}
    save_file(critic, os.path.join(folder, CRITIC_FILE))


def read_critic(model: nn.Module, folder: str, kind: str) -> dict[str, Tensor]:
    """
    Return the state of the critic that [`save_critic`] wrote.

    Args:
        model (`nn.Module`): the policy's module, with a critic.
        folder (`str`): a checkpoint.
        kind (`str`): the critic's kind (`args.critic`), for the error.

    Raises:
        ConfigError: if there is no critic in the folder, or one of another kind.
    """
    path = os.path.join(folder, CRITIC_FILE)
    if not os.path.isfile(path):
        raise ConfigError(f"`{folder}` has no `{CRITIC_FILE}`. Resume from a checkpoint of PPO.")
    critic = load_file(path)
    expected = {key: value.shape for key, value in model.state_dict().items() if is_critic(key)}
    if critic.keys() == expected.keys() and any(critic[key].shape != shape for key, shape in expected.items()):
        raise ConfigError(
            f"`{path}` holds a critic of another shape: its number of constraints, or its model, is another one. "
            "Resume with the `combine` and the `critic` that the run began with."
        )
    if critic.keys() != expected.keys():
        raise ConfigError(
            f"`{path}` holds another kind of critic than `critic={kind}`. Resume with the critic that the run began "
            "with."
        )
    return critic


def _check_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool) -> None:
    theirs = load_tokenizer(path, trust_remote_code=trust_remote_code).get_vocab()
    if theirs != tokenizer.get_vocab():
        raise ConfigError(
            f"The critic reads the policy's tokens, and `{path}` has another tokenizer ({len(theirs)} tokens, the "
            f"policy's {len(tokenizer.get_vocab())}). Start the critic from a reward model with the "
            "policy's."
        )
