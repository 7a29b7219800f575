"""Rewards from reward models and ensembles of them."""

import logging
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, cast

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trl.config.ranges import check_values
from rlhf_trl.data.chat_template import template_kwargs, trained_template_kwargs
from rlhf_trl.data.multimodal import extra_of, processor_of
from rlhf_trl.data.row_types import PASSED_ON
from rlhf_trl.data.tokenize import end_tokens, row_ids, written_row_ids
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import names_of
from rlhf_trl.models.calibration import Calibration, read_calibration
from rlhf_trl.models.fingerprints import tokenizer_fingerprint
from rlhf_trl.models.inputs import batch_inputs
from rlhf_trl.models.loading import load_reward_model
from rlhf_trl.models.roles import adapter_layers
from rlhf_trl.models.sizes import check_rows, sizes_of
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.patches.peft import active_adapter
from rlhf_trl.rewards.base import BaseReward
from rlhf_trl.rewards.options import MODEL_REWARD, ensemble_problem
from rlhf_trl.runs.paths import ensemble_members

logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """
    One reward model of an ensemble, or a single one.

    Attributes:
        adapter (`str`): adapter that is active while it scores; unused for a single model.
        model (`PreTrainedModel` or `PeftModel`): sequence classifier that it scores with.
    """

    adapter: str
    model: PreTrainedModel | PeftModel


class ModelReward(BaseReward):
    """
    A reward from a reward model or an ensemble of them.

    A reward model is a sequence classifier with one output, or one per head, full or as an adapter on its base. An
    ensemble is a folder with `ensemble.json` (see `rlhf_trl.stages.reward`) of adapters on one base, which is loaded
    once.

    The reward of an ensemble is the mean or the minimum of its members' scores, mean - std_coef * std, or
    mean - std_coef * variance (arXiv 2310.02743), both unbiased over the members. That std, averaged over the
    completions, is logged as `rewards/<name>/disagreement`.

    The model reads what its own training read. If the policy's tokenizer (see `bind`) agrees with its own, it scores
    the generated ids themselves, the end token included if and only if it was generated. If vocabulary, special
    tokens, chat template or arguments of the template differ, it scores the text built as in its own training
    (`rlhf_trl.data.row_ids`). So a completion has the score that `RewardTrainer` gives the same row.

    A file `calibration.json` beside the model is read into `calibration`, see [`Reward`].

    Args:
        path (`str` or `PreTrainedModel`): folder, hub id, or a loaded model whose config names its tokenizer.
        weight (`float`), name (`str`, defaults to `"reward_model"`): see [`Reward`].
        batch_size (`int`): completions scored at a time.
        dtype (`str`, *optional*): such as `"bfloat16"`. Unset, bfloat16 where the device supports it.
        trust_remote_code (`bool`): for hub models with code of their own.
        head_weights (`dict[str, float]`, *optional*): weight of each head that counts; the reward is the weighted sum.
            Needed for a model with several heads.
        ensemble (`str`, defaults to `"mean"`): `mean`, `min`, `mean_minus_std` or `mean_minus_var` (UWO, arXiv
            2310.02743) of the members' scores.
        std_coef (`float`, defaults to `1.0`): coefficient of the std, or of the variance, in the last two.

    Attributes:
        heads (`list[str]`): names of the model's heads.
        members (`int`): number of members of an ensemble; 1 for a single model.

    Raises:
        ConfigError: if a model with several heads has no `head_weights`, or these name a head that it doesn't have;
            for an unknown `ensemble`, or one other than `mean` of a single model.
    """

    loads_model = True

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
        super().__init__(name, weight)
        members = self._member_folders(path, ensemble)
        if isinstance(path, str):
            self.model = load_reward_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
            self.tokenizer = load_tokenizer(members[0] if members else path, trust_remote_code=trust_remote_code)
            calibration = read_calibration(path)
        else:
            calibration = None
            self.model = path
            self.tokenizer = load_tokenizer(str(path.config.name_or_path))
        # transformers reads the score at the last token that isn't the padding token
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model.requires_grad_(False).eval()
        self.model.to(PartialState().device)  # pyright: ignore[reportArgumentType] transformers wraps `to`
        self.heads = [str(head) for head in cast(dict[int, str], self.model.config.id2label).values()]
        self._set_options(path, calibration, head_weights, ensemble, std_coef, batch_size)
        self._layers = adapter_layers(self.model) if members else []
        adapters = list(self.model.peft_config) if members else ["default"]
        self._members = [Member(adapter, self.model) for adapter in adapters]

    def column_problem(self, columns: Collection[str]) -> str | None:
        """See [`Reward.column_problem`]."""
        if "images" not in columns or processor_of(self.tokenizer) is not None:
            return None
        return (
            f"The data has images, and the model of `reward.{self.__name__}` reads text alone. Train it from a "
            "vision-language model (`stage=reward model=hf`), or leave the column of images out."
        )

    def _member_folders(self, path: str | PreTrainedModel, ensemble: str) -> list[str]:
        """Return the folders of an ensemble's members, none for a single model, and check the option `ensemble`."""
        folders = ensemble_members(path) if isinstance(path, str) else []
        if problem := ensemble_problem(f"reward.{self.__name__}", ensemble, None if folders else str(path)):
            raise ConfigError(problem)
        return folders

    def _set_options(
        self,
        path: str | PreTrainedModel,
        calibration: Calibration | None,
        head_weights: dict[str, float] | None,
        ensemble: str,
        std_coef: float,
        batch_size: int,
    ) -> None:
        options = {"batch_size": batch_size, "std_coef": std_coef}
        check_values(MODEL_REWARD, options, f"reward.{self.__name__}.")
        self.batch_size = batch_size
        self.ensemble, self.std_coef = ensemble, std_coef
        self._head_weights = self._checked_weights(head_weights, path)
        self.calibration = calibration.moments(self._head_weights, self._combine) if calibration else None
        self._policy_tokenizer: PreTrainedTokenizerBase | None = None
        self._same_tokenizer = self._has_warned = False

    @property
    def members(self) -> int:
        """Number of members, see the class."""
        return len(self._members)

    def _combine(self, scores: Tensor) -> Tensor:
        """Return the rewards, shape (rows,), of the scores of an ensemble's members, (members, rows)."""
        if self.ensemble == "min":
            return scores.amin(dim=0)
        mean = scores.mean(dim=0)
        if self.ensemble == "mean":
            return mean
        spread = disagreement(scores) if self.ensemble == "mean_minus_std" else scores.var(dim=0)
        return mean - self.std_coef * spread

    def _checked_weights(self, weights: dict[str, float] | None, path: str | PreTrainedModel) -> Tensor:
        example = f"reward.{self.__name__}.head_weights={{{self.heads[0]}: 1.0}}"
        if weights is None and len(self.heads) > 1:
            raise ConfigError(
                f"The reward model `{path}` has the heads {names_of(self.heads)}, and no `head_weights` say which of "
                f"them count. Set for example `'{example}'`."
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
                f"`reward.{self.__name__}.head_weights.{head}` is {value!r} and must be a number. Set for example "
                f"`'{example}'`."
            )
        return torch.tensor([float(weights.get(head, 0.0)) for head in self.heads])

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """See [`Reward.bind`]; ids are scored as they are if the model's own tokenizer would make the same."""
        self._policy_tokenizer = tokenizer
        self._same_tokenizer = tokenizer is not None and tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(
            self.tokenizer
        )

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None] | None = None,
        with_eos: list[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        """
        Return one reward per completion; see [`Reward`].

        Args:
            prompts (`list`), completions (`list`), completion_ids (`list[list[int]]`): see [`Reward`].
            log_metric (callable, *optional*): receives name and value of an ensemble's disagreement.
            with_eos (`list[bool]`, *optional*): whether each completion ended with an end token, for scoring its text.
                By default read from the ids.
            **columns: `tools` and `chat_template_kwargs` that the policy's chat template was rendered with.
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
        """Return the ids of prompts and completions as the model reads them; `with_eos` and `columns` as in a call."""
        if with_eos is None:
            ends = None if self._policy_tokenizer is None else end_tokens(self._policy_tokenizer)
            with_eos = [ends is None or (len(ids) > 0 and ids[-1] in ends) for ids in completion_ids]
        columns = columns or {}
        given = {name: columns[name] for name in PASSED_ON if columns.get(name) is not None}
        rows = []
        for i, prompt in enumerate(prompts):
            policy_kwargs = template_kwargs({name: values[i] for name, values in given.items()})
            own = self._own_kwargs(policy_kwargs)
            if self._same_tokenizer and (own == policy_kwargs or isinstance(prompt, str)):
                # Decoding the ids and tokenizing the text again would lose EOS and could give other ids
                rows.append(written_row_ids(self.tokenizer, prompt, list(completion_ids[i]), **own))
            else:
                rows.append(row_ids(self.tokenizer, prompt, completions[i], eos=with_eos[i], **own))
        return rows

    def _own_kwargs(self, policy_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the chat template for a prompt: those of the training, and the row's tools."""
        trained = trained_template_kwargs(self.tokenizer)
        if trained is None:
            return policy_kwargs
        own = trained | {name: policy_kwargs[name] for name in ("tools", "images") if name in policy_kwargs}
        if own != policy_kwargs and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The reward `%s` reads its prompts with `chat_template_kwargs` %s, as in its own training, and the "
                "policy with %s.",
                self.__name__,
                trained,
                {key: value for key, value in policy_kwargs.items() if key not in ("tools", "images")},
            )
        return own

    def score_ids(self, rows: list[list[int]]) -> list[float]:
        """Return one score per row of ids, each a prompt and its completion."""
        return self._combine(self.member_scores(rows)).tolist()

    def member_scores(self, rows: list[list[int]]) -> Tensor:
        """Return each member's scores of rows of ids, its heads summed by `head_weights`; shape (members, rows)."""
        return self.head_scores(rows) @ self._head_weights

    def head_scores(self, rows: list[list[int]]) -> Tensor:
        """Return the scores of each head of each member of rows of ids, shape (members, rows, heads)."""
        scores = []
        for adapter, model in self._members:
            with active_adapter(self._layers, adapter):
                scores.append(self._scores(model, rows))
        return torch.stack(scores)

    @torch.inference_mode()
    def _scores(self, model: PreTrainedModel | PeftModel, rows: list[list[int]]) -> Tensor:
        """Return the scores of one model, shape (rows, heads)."""
        check_rows(sizes_of(model, f"reward.{self.__name__}"), rows, 0, "Shorten prompts and completions.")
        device, pad = model.device, self.tokenizer.pad_token_id
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # similar lengths in one batch need less padding
        scores = torch.zeros(len(rows), len(self.heads))
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            width = max(len(rows[i]) for i in chunk)
            ids = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in chunk], device=device)
            lengths = torch.tensor([len(rows[i]) for i in chunk], device=device)
            mask = (torch.arange(width, device=device) < lengths.unsqueeze(1)).long()
            more = batch_inputs(extra_of(rows[i] for i in chunk), mask)  # such as images
            scores[chunk] = model(input_ids=ids, attention_mask=mask, **more).logits.float().cpu()
        return scores


def disagreement(scores: Tensor) -> Tensor:
    """Return the unbiased standard deviation, shape (rows,), of the scores of members, shape (members, rows)."""
    return scores.std(dim=0)
