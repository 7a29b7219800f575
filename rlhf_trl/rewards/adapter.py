"""Rewards from reward models that are adapters on the policy's base."""

import copy
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.calibration import read_calibration
from rlhf_trl.models.heads import adapter_head_names
from rlhf_trl.models.roles import POLICY, adapter_layers, add_role, shared_adapter_config
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.models.vision import auto_class
from rlhf_trl.patches.peft import cast_head_inputs, save_only
from rlhf_trl.rewards.base import BaseReward
from rlhf_trl.rewards.model import Member, ModelReward


class AdapterReward(ModelReward):
    """
    A reward from a reward model, or an ensemble of them, that is an adapter on the policy's own base.

    The weights of the base are in memory once for both. `PPOTrainer` attaches the reward to its policy; with another
    trainer call `attach(trainer.model)` before training.

    Args:
        path (`str`): folder or hub id of a reward model that was trained as an adapter on the policy's base.
        weight (`float`), name (`str`, defaults to `"reward_adapter"`), batch_size (`int`), head_weights (`dict`,
            *optional*), ensemble (`str`), std_coef (`float`): see [`ModelReward`].
    """

    def __init__(
        self,
        path: str,
        weight: float = 1.0,
        name: str = "reward_adapter",
        batch_size: int = 32,
        head_weights: dict[str, float] | None = None,
        ensemble: str = "mean",
        std_coef: float = 1.0,
    ):
        BaseReward.__init__(self, name, weight)  # ModelReward's own loads a base
        self.path = path
        self._paths = self._member_folders(path, ensemble) or [path]
        for member in self._paths:
            shared_adapter_config(member)
        self.heads = adapter_head_names(self._paths[0])
        self._set_options(path, read_calibration(path), head_weights, ensemble, std_coef, batch_size)
        self.tokenizer = load_tokenizer(self._paths[0])
        self._members: list[Member] = []  # until `attach`

    def attach(self, policy: PreTrainedModel | PeftModel) -> None:
        """
        Add the reward's adapters, frozen, to the policy, and their score heads to this reward.

        Raises:
            ConfigError: if the policy has no adapter, or the reward's adapter was trained on another base.
        """
        if self._members:
            return
        if not isinstance(policy, PeftModel):
            raise ConfigError(
                f"The reward `{self.__name__}` is an adapter on the policy's frozen base, and this policy has none: "
                "all its weights are trained. Give the policy an adapter too (`adapter=lora`), or use `reward=model`."
            )
        if self._policy_tokenizer is None or self._policy_tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise ConfigError(
                f"The reward model `{self.path}` has another tokenizer than the policy, so it can't share its base. "
                "Use `reward=model`."
            )
        base = cast(PreTrainedModel, policy.get_base_model())
        for i, path in enumerate(self._paths):
            adapter = f"reward_{self.__name__}{f'_{i}' if len(self._paths) > 1 else ''}".replace(".", "_")
            score = add_role(policy, adapter, path)
            if score is None:
                raise ConfigError(
                    f"`{path}` is no reward model: it has no score head. Train one with `stage=reward adapter=lora`."
                )
            for name, parameter in policy.named_parameters():
                if adapter in name.split("."):
                    parameter.requires_grad_(False)
            self._members.append(Member(adapter, _classifier_on(base, score, self.tokenizer)))
        save_only(policy, [POLICY])
        self._layers = adapter_layers(base)

    def head_scores(self, rows: list[list[int]]) -> Tensor:
        """See [`ModelReward.head_scores`]."""
        if not self._members:
            raise ConfigError(
                f"The reward `{self.__name__}` is an adapter on the policy. Call `attach(policy)` first."
            )
        training = [module for _, model in self._members for module in model.modules() if module.training]
        try:
            for _, model in self._members:
                model.eval()
            return super().head_scores(rows)
        finally:
            for module in training:
                module.training = True


def _classifier_on(policy: PreTrainedModel, score: Tensor, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a sequence classifier with the policy's own trunk and the head `score`, shape (heads, width)."""
    config = copy.deepcopy(policy.config)
    config.num_labels = score.size(0)
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):
        model = auto_class(config, "SEQ_CLS").from_config(config)
    setattr(model, model.base_model_prefix, policy.base_model)
    head = next(module for module in model.children() if isinstance(module, nn.Linear))
    head.weight = nn.Parameter(score.float().to(policy.device), requires_grad=False)
    cast_head_inputs(head)
    return model
