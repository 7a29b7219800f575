"""
Rewards for PPO, GRPO and RLOO: callables with TRL's signature
`(prompts, completions, completion_ids, **columns) -> list[float | None]`, each with a `__name__` and a `weight`.
"""

import asyncio
import contextlib
import copy
import inspect
import logging
import math
import os
from collections.abc import Callable, Collection
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_trl.data.chat_template import template_kwargs, trained_template_kwargs
from rlhf_trl.data.formats import PASSED_ON
from rlhf_trl.data.tokenize import end_tokens, row_ids, written_row_ids
from rlhf_trl.hints import names_of

from ..calibration import read_calibration, weighted_calibration
from ..checks.rewards import ensemble_problems
from ..dotpaths import find, not_taken, signature
from ..errors import ConfigError
from ..patches.peft import active_adapter, save_only
from ..ranges import MODEL_REWARD, check_values
from ..sizes import check_rows, sizes_of
from .base import GIVEN, Reward
from .http import HttpReward, tokenizer_hash

logger = logging.getLogger(__name__)


class FunctionReward(Reward):
    """
    A Python function as reward.

    Args:
        function (`str` or callable): the function, or its dot path (`my_package.my_module.my_reward`), sync or async.
            It is called with `prompts`, `completions`, `completion_ids` and the dataset's other columns as lists, and
            with `tokenizer`, the policy's, as far as its signature takes them, and returns one number a completion,
            or None where it doesn't apply. A path may lead to what Hydra allows as `_target_`.
        kwargs (`dict`, *optional*): further arguments of the function.
        weight (`float`), name (`str`, *optional*, defaults to the function's name): see [`Reward`].

    Raises:
        ConfigError: for a function that can't be imported, or `kwargs` that it doesn't take; when called, if an
            argument of the function is missing, or it returns a wrong number of values or something that is no number.
    """

    def __init__(
        self,
        function: str | Callable,
        kwargs: dict[str, Any] | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ):
        self.function = find(function) if isinstance(function, str) else function
        inner = getattr(self.function, "func", self.function)  # of a partial
        super().__init__(name or getattr(inner, "__name__", type(inner).__name__), weight)
        self._said = f"`{function}`" if isinstance(function, str) else f"`{self.__name__}`"
        self.kwargs = dict(kwargs or {})
        parameters = signature(self.function)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._takes = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._needs = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        self._check_arguments()
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def _check_arguments(self) -> None:
        where = f"reward.{self.__name__}.kwargs"
        if taken := [key for key in self.kwargs if key in GIVEN]:
            raise ConfigError(
                f"`{where}.{taken[0]}` would replace the `{taken[0]}` that every reward function gets. Name it "
                f"otherwise, in the signature of {self._said} too."
            )
        if unknown := not_taken(self.function, self.kwargs, strict=True, given=GIVEN):
            key, hint = next(iter(unknown.items()))
            raise ConfigError(
                f"`{where}.{key}` is no argument of {self._said}. {hint} (One that is meant has to stand in the "
                "function's signature.)"
            )
        if by_position := [name for name in self._needs if name not in self._takes]:
            raise ConfigError(
                f"The reward function {self._said} takes `{by_position[0]}` by position only, and a reward gets its "
                "arguments by name. Take the `/` out of its signature."
            )

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """See [`Reward.bind`]."""
        self._tokenizer = tokenizer

    def column_problem(self, columns: Collection[str]) -> str | None:
        """See [`Reward.column_problem`]."""
        return self._missing({*columns, *GIVEN, *self.kwargs}, columns)

    def _missing(self, given: Collection[str], columns: Collection[str]) -> str | None:
        missing = [name for name in self._needs if name not in given]
        if not missing:
            return None
        name = missing[0]
        return (
            f"The reward function {self._said} needs an argument `{name}`, and the data has no such column (it has "
            f"{names_of(sorted(columns)) or 'none besides the prompt'}). Name the column so "
            f"(`+data.columns.{name}=...` renames one), type `+reward.{self.__name__}.kwargs.{name}=...`, or give "
            f"`{name}` a default in the function."
        )

    def __call__(self, prompts: list, completions: list, **columns) -> list[float | None]:
        """Rewards of the completions, one each. `prompts` and `completions` are texts or chat messages."""
        given = {"tokenizer": self._tokenizer} | columns | {"prompts": prompts, "completions": completions}
        given |= self.kwargs
        if problem := self._missing(given, [name for name in columns if name not in GIVEN]):
            raise ConfigError(problem)
        if not self._takes_all:
            given = {key: value for key, value in given.items() if key in self._takes}
        with contextlib.chdir(os.curdir):  # and back: the run's own paths may be relative
            values = self.function(**given)
            if inspect.isawaitable(values):
                values = asyncio.run(_await(values))
        return self._checked(values, len(completions))

    def _checked(self, values, expected: int) -> list[float | None]:
        says = f"The reward function {self._said} returned"
        todo = "Return a list with one number (or None) for each completion."
        if getattr(values, "ndim", 1) != 1:  # of arrays and tensors
            raise ConfigError(f"{says} values of shape {tuple(values.shape)} for {expected} completions. {todo}")
        if not hasattr(values, "__len__") or isinstance(values, (str, bytes, dict, set)):
            raise ConfigError(f"{says} {type(values).__name__}. {todo}")
        if len(values) != expected:
            raise ConfigError(f"{says} {len(values)} values for {expected} completions. {todo}")
        if isinstance(values, Tensor):
            values = values.tolist()
        return [self._number(value, row) for row, value in enumerate(values)]

    def _number(self, value: Any, row: int) -> float | None:
        if value is None:
            return None
        says = f"The reward function {self._said} returned"
        if hasattr(value, "__float__") and not isinstance(value, str):
            try:
                return float(value)
            except OverflowError:
                raise ConfigError(
                    f"{says} for completion {row} a number beyond what a float can hold. Scale it, or bound it."
                ) from None
            except (TypeError, ValueError, RuntimeError):  # an array or tensor of several
                pass
        shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."
        raise ConfigError(
            f"{says} {shown} for completion {row}. Return a number, or None where the function doesn't apply."
        )


class FiniteReward(Reward):
    """
    A reward for trainers that would count NaN as "not applicable" and choke on infinity (TRL's GRPO and RLOO): a NaN
    or infinite value is an error there. `PPOTrainer` leaves such rows out and counts them instead.
    """

    def __init__(self, reward: Reward):
        super().__init__(reward.__name__, reward.weight)
        self.reward, self.calibration = reward, reward.calibration

    def check(self) -> None:
        """See [`Reward.check`]."""
        self.reward.check()

    def column_problem(self, columns: Collection[str]) -> str | None:
        """See [`Reward.column_problem`]."""
        return self.reward.column_problem(columns)

    def attach(self, policy: PreTrainedModel | PeftModel) -> None:
        """See [`Reward.attach`]."""
        self.reward.attach(policy)

    def __call__(self, prompts: list, completions: list, **columns) -> list[float | None]:
        """The wrapped reward's values."""
        values = self.reward(prompts, completions, **columns)
        for row, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                raise ConfigError(
                    f"The reward `{self.__name__}` is {value} for completion {row}: {str(completions[row])[:200]!r}. "
                    "Mend it, or let it return None where it doesn't apply."
                )
        return values


async def _await(values):
    return await values


class ModelReward(Reward):
    """
    A reward model: a sequence classifier with one output, or one a head, full or as an adapter on its base; or an
    ensemble of such adapters (a folder with `ensemble.json`, see `rlhf_trl.ensemble`), whose base is in memory once.

    An ensemble's reward is the mean of its members' scores, their least, or mean - std_coef * std, with the unbiased
    std over the members (arXiv 2310.02743, which takes the variance). That std, its mean over the completions, is
    logged as `rewards/<name>/disagreement`.

    A file `calibration.json` beside the model, with `mean` and `std` of its scores of reference answers, is read for
    `reward_norm=reference` (`calibration`).

    It reads what its own training read. With the policy's tokenizer (see `bind`) it scores the generated ids
    themselves, the end token included if and only if it was generated; where vocabulary, special tokens, chat template
    or the arguments of the template are others, the text built as in its own training
    (`rlhf_trl.data.tokenize.row_ids`). So a completion scores what RewardTrainer gives the same row.

    Args:
        path (`str` or `PreTrainedModel`): directory, hub id, or a loaded model whose config names its tokenizer.
        weight (`float`), name (`str`, defaults to `"reward_model"`): see [`Reward`].
        batch_size (`int`): completions scored at a time.
        dtype (`str`, *optional*): such as `"bfloat16"`; float32 when unset.
        trust_remote_code (`bool`): for hub models with code of their own.
        head_weights (`dict[str, float]`, *optional*): of a model with several heads, the factor of each that counts:
            the reward is their weighted sum.
        ensemble (`str`, defaults to `"mean"`): `mean`, `min` or `mean_minus_std`, of the members' scores.
        std_coef (`float`, defaults to `1.0`): for `mean_minus_std`.

    Attributes:
        heads (`list[str]`): the names of the model's heads.
        members (`int`): of an ensemble; 1 for a single model.

    Raises:
        ConfigError: for a model with several heads without `head_weights`, or one with a head that isn't there; for
            another `ensemble`, or one other than `mean` of a single model.
    """

    def __init__(
        self,
        path: str | PreTrainedModel,
        weight: float = 1.0,
        name: str = "reward_model",
        batch_size: int = 32,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        head_weights: dict[str, float] | None = None,
        ensemble: str = "mean",
        std_coef: float = 1.0,
    ):
        from accelerate import PartialState

        from ..adapters import adapter_layers
        from ..models import load_reward_model, load_tokenizer

        super().__init__(name, weight)
        members = _ensemble_members(path, name, ensemble, std_coef)
        if isinstance(path, str):
            self.model = load_reward_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
            self.tokenizer = load_tokenizer(members[0] if members else path, trust_remote_code=trust_remote_code)
            calibration = read_calibration(path)
        else:
            calibration = None
            self.model = path
            self.tokenizer = load_tokenizer(path.config._name_or_path)
        # The score is read at the last token that isn't this one
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model.requires_grad_(False).eval().to(PartialState().device)
        self.heads = [str(head) for head in self.model.config.id2label.values()]
        self._set_up(path, calibration, head_weights, ensemble, std_coef, batch_size)
        # A member is an adapter, active while it scores, and the model that it scores with
        self._layers = adapter_layers(self.model) if members else []
        self._members = [(name, self.model) for name in self.model.peft_config] if members else [(None, self.model)]

    def _set_up(self, path, calibration, head_weights, ensemble, std_coef, batch_size) -> None:
        options = {"batch_size": batch_size, "std_coef": std_coef}
        check_values(MODEL_REWARD, options, f"reward.{self.__name__}.")
        self.batch_size = batch_size
        self.ensemble, self.std_coef = ensemble, std_coef
        self._head_weights = self._checked_weights(head_weights, path)
        self.calibration = weighted_calibration(calibration, self._head_weights, self._combine)
        self._policy_tokenizer: PreTrainedTokenizerBase | None = None
        self._same_tokenizer = self._said = False

    @property
    def members(self) -> int:
        """See the class."""
        return len(self._members)

    def _combine(self, scores: Tensor) -> Tensor:
        """The reward, shape (rows,), of what an ensemble's members say, (members, rows)."""
        if self.ensemble == "min":
            return scores.amin(dim=0)
        mean = scores.mean(dim=0)
        return mean - self.std_coef * disagreement(scores) if self.ensemble == "mean_minus_std" else mean

    def _checked_weights(self, weights: dict[str, float] | None, path) -> Tensor:
        typed = f"reward.{self.__name__}.head_weights={{{self.heads[0]}: 1.0}}"
        if weights is None and len(self.heads) > 1:
            raise ConfigError(
                f"The reward model `{path}` has the heads {names_of(self.heads)}, and which of them count isn't said. "
                f"Type for example `'{typed}'`."
            )
        if unknown := [name for name in weights or {} if name not in self.heads]:
            raise ConfigError(
                f"`reward.{self.__name__}.head_weights` names `{unknown[0]}`, and the heads of `{path}` are "
                f"{names_of(self.heads)}."
            )
        weights = dict.fromkeys(self.heads, 1.0) if weights is None else weights
        if wrong := {head: value for head, value in weights.items() if not isinstance(value, int | float)}:
            head, value = next(iter(wrong.items()))
            raise ConfigError(
                f"`reward.{self.__name__}.head_weights.{head}` is {value!r} and must be a number. Type for example "
                f"`'{typed}'`."
            )
        return torch.tensor([float(weights.get(head, 0.0)) for head in self.heads])

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Ids are scored as they are if `tokenizer` makes the same ids of text and chats as the reward model's own."""
        self._policy_tokenizer = tokenizer
        self._same_tokenizer = tokenizer is not None and tokenizer_hash(tokenizer) == tokenizer_hash(self.tokenizer)

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None] | None = None,
        with_eos: list[bool] | None = None,
        **columns,
    ) -> list[float]:
        """
        Scores of the completions, one each.

        Args:
            log_metric (callable, *optional*): gets the name and the value of an ensemble's disagreement.
            with_eos (`list[bool]`, *optional*): where texts are scored: which of them end by themselves. By default
                the ids tell.
            **columns: `tools` and `chat_template_kwargs`, with which the policy's chat template was filled.
        """
        scores = self.member_scores(self.token_rows(prompts, completions, completion_ids, with_eos, columns))
        if log_metric is not None and len(scores) > 1:
            log_metric(f"rewards/{self.__name__}/disagreement", disagreement(scores).mean().item())
        return self._combine(scores).tolist()

    def token_rows(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        with_eos: list[bool] | None = None,
        columns: dict[str, list] | None = None,
    ) -> list[list[int]]:
        """The token rows of prompts and completions that the model is to see; `with_eos`, `columns` as in a call."""
        if with_eos is None:
            ends = None if self._policy_tokenizer is None else end_tokens(self._policy_tokenizer)
            with_eos = [ends is None or (len(ids) > 0 and ids[-1] in ends) for ids in completion_ids]
        given = {name: columns[name] for name in PASSED_ON if (columns or {}).get(name) is not None}
        rows = []
        for i, prompt in enumerate(prompts):
            policys = template_kwargs({name: values[i] for name, values in given.items()})
            own = self._own_kwargs(policys)
            if self._same_tokenizer and (own == policys or isinstance(prompt, str)):
                # ids are the model's own words; decoding them and tokenizing again would lose EOS and could differ
                rows.append(written_row_ids(self.tokenizer, prompt, list(completion_ids[i]), **own))
            else:
                rows.append(row_ids(self.tokenizer, prompt, completions[i], eos=with_eos[i], **own))
        return rows

    def _own_kwargs(self, policys: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the chat template for a prompt: those of the model's own training, and the row's tools."""
        trained = trained_template_kwargs(self.tokenizer)
        if trained is None:
            return policys
        own = trained | ({"tools": policys["tools"]} if "tools" in policys else {})
        if own != policys and not self._said:
            self._said = True
            logger.warning(
                "The reward `%s` reads its prompts with `chat_template_kwargs` %s, as in its own training, and the "
                "policy with %s.",
                self.__name__,
                trained,
                {key: value for key, value in policys.items() if key != "tools"},
            )
        return own

    def score_ids(self, rows: list[list[int]]) -> list[float]:
        """Scores of token rows, each prompt and completion together, one each."""
        return self._combine(self.member_scores(rows)).tolist()

    def member_scores(self, rows: list[list[int]]) -> Tensor:
        """What each member says of token rows, its heads summed by `head_weights`; shape `(members, rows)`."""
        return self.head_scores(rows) @ self._head_weights

    def head_scores(self, rows: list[list[int]]) -> Tensor:
        """What each head of each member says of token rows, shape `(members, rows, heads)`."""
        scores = []
        for adapter, model in self._members:
            with active_adapter(self._layers, adapter):
                scores.append(self._scores(model, rows))
        return torch.stack(scores)

    @torch.inference_mode()
    def _scores(self, model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
        check_rows(sizes_of(model, f"reward.{self.__name__}"), rows, 0, "Give it shorter prompts and completions.")
        device, pad = model.device, self.tokenizer.pad_token_id
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together: less padding
        scores = torch.zeros(len(rows), len(self.heads))
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            width = max(len(rows[i]) for i in chunk)
            ids = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in chunk], device=device)
            lengths = torch.tensor([len(rows[i]) for i in chunk], device=device)
            mask = (torch.arange(width, device=device) < lengths.unsqueeze(1)).long()
            scores[chunk] = model(input_ids=ids, attention_mask=mask).logits.float().cpu()
        return scores


class AdapterReward(ModelReward):
    """
    A reward model, or an ensemble of them, that is an adapter on the policy's own base: its weights are in memory once
    for all.

    `PPOTrainer` attaches it to its policy; with another trainer call `attach(trainer.model)` before training.

    Args:
        path (`str`): directory or hub id of a reward model trained as an adapter on the policy's base.
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
        from ..adapters import saved_adapter
        from ..models import adapter_heads, load_tokenizer

        Reward.__init__(self, name, weight)
        self.path = path
        self._paths = _ensemble_members(path, name, ensemble, std_coef) or [path]
        for member in self._paths:
            saved_adapter(member)
        self.heads = adapter_heads(self._paths[0])
        self._set_up(path, read_calibration(path), head_weights, ensemble, std_coef, batch_size)
        self.tokenizer = load_tokenizer(self._paths[0])
        self._members: list[tuple[str, PreTrainedModel]] = []  # until `attach`

    def attach(self, policy: PreTrainedModel | PeftModel) -> None:
        """
        Add the reward's adapters, frozen, to the policy, and their score heads to this reward.

        Raises:
            ConfigError: if the policy has no adapter, or the reward's was trained on another base.
        """
        from ..adapters import POLICY, adapter_layers, add_role

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
        base = policy.get_base_model()
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
            self._members.append((adapter, _classifier_on(base, score, self.tokenizer.pad_token_id)))
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


def disagreement(scores: Tensor) -> Tensor:
    """Unbiased standard deviation, shape (rows,), over what an ensemble's members say, (members, rows)."""
    return scores.std(dim=0)


def _ensemble_members(path: str | PreTrainedModel, name: str, ensemble: str, std_coef: float) -> list[str]:
    """The members' folders where `path` is an ensemble's; and what can't be said of it."""
    from ..models import ensemble_members

    members = ensemble_members(path) if isinstance(path, str) else []
    options = {"ensemble": ensemble, "std_coef": std_coef}
    if problems := ensemble_problems(f"reward.{name}", options, single=None if members else str(path)):
        raise ConfigError.join(problems)
    return members


def _classifier_on(policy: PreTrainedModel, score: Tensor, pad_token_id: int) -> PreTrainedModel:
    """A sequence classifier whose trunk is the policy's own, and whose head is `score`, (scores, width)."""
    config = copy.deepcopy(policy.config)
    config.num_labels = score.size(0)
    config.get_text_config().pad_token_id = pad_token_id
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    setattr(model, model.base_model_prefix, policy.base_model)
    head = next(module for module in model.children() if isinstance(module, nn.Linear))
    head.weight = nn.Parameter(score.float().to(policy.device), requires_grad=False)
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
    return model


__all__ = ["AdapterReward", "FiniteReward", "FunctionReward", "HttpReward", "ModelReward", "Reward"]
