"""Rewards from reward models and their ensembles."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trl.config.ranges import MODEL_REWARD, check_values
from rlhf_trl.data.chat_template import template_kwargs, trained_template_kwargs
from rlhf_trl.data.formats import PASSED_ON
from rlhf_trl.data.tokenize import end_tokens, row_ids, written_row_ids
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import names_of
from rlhf_trl.models.calibration import read_calibration, weighted_calibration
from rlhf_trl.models.sizes import check_rows, sizes_of
from rlhf_trl.patches.peft import active_adapter
from rlhf_trl.rewards.base import Reward
from rlhf_trl.rewards.http import tokenizer_hash
from rlhf_trl.rewards.options import ensemble_problems

logger = logging.getLogger(__name__)


async def await_result(values):
    return await values


class ModelReward(Reward):
    """
    A reward model: a sequence classifier with one output, or one a head, full or as an adapter on its base; or an
    ensemble of such adapters (a folder with `ensemble.json`, see `rlhf_trl.stages.reward`), whose base is in memory
    once.

    An ensemble's reward is the mean of its members' scores, their least, or mean - std_coef * std, with the unbiased
    std over the members (arXiv 2310.02743, which takes the variance). That std, its mean over the completions, is
    logged as `rewards/<name>/disagreement`.

    A file `calibration.json` beside the model, with `mean` and `std` of its scores of reference answers, is read for
    `reward_norm=reference` (`calibration`).

    It reads what its own training read. With the policy's tokenizer (see `bind`) it scores the generated ids
    themselves, the end token included if and only if it was generated; where vocabulary, special tokens, chat template
    or the arguments of the template are others, the text built as in its own training
    (`rlhf_trl.data.row_ids`). So a completion scores what RewardTrainer gives the same row.

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

        from rlhf_trl.models.loading import load_reward_model
        from rlhf_trl.models.roles import adapter_layers
        from rlhf_trl.models.tokenizers import load_tokenizer

        super().__init__(name, weight)
        members = ensemble_paths(path, name, ensemble, std_coef)
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


def disagreement(scores: Tensor) -> Tensor:
    """Unbiased standard deviation, shape (rows,), over what an ensemble's members say, (members, rows)."""
    return scores.std(dim=0)


def ensemble_paths(path: str | PreTrainedModel, name: str, ensemble: str, std_coef: float) -> list[str]:
    """The members' folders where `path` is an ensemble's; and what can't be said of it."""
    from rlhf_trl.runs.paths import ensemble_members

    members = ensemble_members(path) if isinstance(path, str) else []
    options = {"ensemble": ensemble, "std_coef": std_coef}
    if problems := ensemble_problems(f"reward.{name}", options, single=None if members else str(path)):
        raise ConfigError.join(problems)
    return members
