"""Rewards from text classifiers, such as those of sentiment or toxicity on the hub."""

import logging
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from rlhf_trl.config.ranges import check_values
from rlhf_trl.data.messages import as_text
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import did_you_mean
from rlhf_trl.models.adapters import adapter_config
from rlhf_trl.models.loading import any_config
from rlhf_trl.models.precision import weights_dtype
from rlhf_trl.models.weights import load_weights
from rlhf_trl.patches.engines import whole_weights
from rlhf_trl.rewards.base import BaseReward
from rlhf_trl.rewards.options import CLASSIFIER_REWARD

logger = logging.getLogger(__name__)

# A tokenizer without a limit has a number of about 1e30
UNLIMITED = 10**9


class ClassifierReward(BaseReward):
    """
    A reward from a text classifier: the score of one of its labels, or its only output.

    Any sequence classifier of Transformers will do, encoders such as BERT, RoBERTa and DeBERTa included. It reads
    texts, tokenized by its own tokenizer with that one's special tokens; not the policy's ids, as
    [`~rlhf_trl.rewards.ModelReward`] does.

    A text that is longer than the classifier reads is cut: of a completion the end, of prompt and completion as one
    text the start, of a pair the longer one. The share of texts that were cut is logged as
    `rewards/<name>/truncated`.

    Args:
        path (`str`): folder or hub id.
        label (`str`, *optional*): label whose score is the reward. Needed if the classifier has several.
        output (`str`, defaults to `"logit"`): `logit`, or `probability`: softmax over the labels, sigmoid for a single
            output and where several labels may hold at once (`problem_type` of the classifier's config).
        threshold (`float`, *optional*): return 1 for an output above it and else 0.
        text (`str`, defaults to `"completion"`): `completion`; `both`, prompt and completion as one text, as for the
            continuation of a text; or `pair`, both as a pair of texts.
        max_length (`int`, *optional*): tokens to read, by default as many as the classifier can.
        weight (`float`), name (`str`): see [`Reward`].
        batch_size (`int`): texts classified at a time.
        dtype (`str`, *optional*): such as `"bfloat16"`. Unset, bfloat16 where the device supports it.
        trust_remote_code (`bool`): for hub models with code of their own.

    Raises:
        ConfigError: if the model can't be loaded or is no classifier, `label` is none of its labels, it has several
            and `label` is unset, or `max_length` is more than it reads.
    """

    loads_model = True

    @whole_weights()  # each rank loads all of it, also where an engine shards the policy
    def __init__(
        self,
        path: str,
        label: str | None = None,
        output: str = "logit",
        threshold: float | None = None,
        text: str = "completion",
        max_length: int | None = None,
        weight: float = 1.0,
        name: str = "classifier",
        batch_size: int = 32,
        dtype: str | None = None,
        trust_remote_code: bool = False,
    ):
        super().__init__(name, weight)
        options = {"output": output, "text": text, "threshold": threshold, "max_length": max_length}
        options |= {"batch_size": batch_size, "dtype": dtype}
        check_values(CLASSIFIER_REWARD, options, f"reward.{name}.")
        config = classifier_config(f"reward.{name}", path, label, trust_remote_code)
        self.label = 0 if label is None else labels_of(config).index(label)
        self.tokenizer = classifier_tokenizer(path, trust_remote_code)
        self.model = load_weights(
            AutoModelForSequenceClassification,
            path,
            new_head=False,
            dtype=weights_dtype(dtype, is_trained=False),
            trust_remote_code=trust_remote_code,
        )
        if self.model.config.pad_token_id is None:  # of a decoder, which reads the score at the last other token
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.requires_grad_(False).eval()
        self.model.to(PartialState().device)  # pyright: ignore[reportArgumentType] transformers wraps `to`
        self.output, self.threshold, self.text = output, threshold, text
        self.batch_size, self.max_length = batch_size, readable_tokens(config, self.tokenizer)
        if max_length is not None and max_length > self.max_length:
            raise ConfigError(
                f"`reward.{name}.max_length` is {max_length}, and `{path}` reads {self.max_length} tokens. Set at "
                "most that, or null."
            )
        self.max_length = max_length or self.max_length
        # Of prompt and completion as one text the completion is what is rewarded
        self.tokenizer.truncation_side = "left" if text == "both" else "right"
        self._collate: Any = DataCollatorWithPadding(self.tokenizer)
        self._has_warned = False

    def column_problem(self, columns: Collection[str]) -> str | None:
        """See [`Reward.column_problem`]."""
        if "images" not in columns:
            return None
        return (
            f"The data has images, and `reward.{self.__name__}` reads text alone. Leave the column of images out, or "
            "set another reward."
        )

    def __call__(
        self, prompts: list, completions: list, log_metric: Callable[[str, float], None] | None = None, **columns: Any
    ) -> list[float]:
        """
        Return one reward per completion; see [`Reward`].

        Args:
            prompts (`list`), completions (`list`), **columns: see [`Reward`].
            log_metric (callable, *optional*): receives name and value of the share of texts that were cut.
        """
        starts = [single_text(prompt) for prompt in prompts]
        ends = [single_text(completion) for completion in completions]
        if self.text == "pair":
            rows = list(zip(starts, ends, strict=True))
        elif self.text == "both":
            parts = zip(prompts, starts, ends, strict=True)
            rows = [f"{start}{'' if isinstance(prompt, str) else chr(10)}{end}" for prompt, start, end in parts]
        else:
            rows = ends
        values = self.outputs(rows, log_metric)
        return values.tolist() if self.threshold is None else (values > self.threshold).float().tolist()

    @torch.inference_mode()
    def outputs(self, rows: list[Any], log_metric: Callable[[str, float], None] | None = None) -> Tensor:
        """Return the outputs of texts or pairs of texts, shape (rows,)."""
        given = [row if isinstance(row, tuple) else (row,) for row in rows]
        texts = [self.tokenizer(*each, truncation=True, max_length=self.max_length) for each in given]
        lengths = [len(each["input_ids"]) for each in texts]
        # Only a text that fills the limit can have been longer
        full = [each for each, length in zip(given, lengths, strict=True) if length == self.max_length]
        if cut := sum(len(self.tokenizer(*each, verbose=False)["input_ids"]) > self.max_length for each in full):
            self._report_cut(cut, len(rows))
        if log_metric is not None and rows:
            log_metric(f"rewards/{self.__name__}/truncated", cut / len(rows))
        values = torch.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda i: lengths[i])  # similar lengths need less padding
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            batch = self._collate([texts[i] for i in chunk]).to(self.model.device)
            logits = self.model(**batch).logits.float().cpu()
            values[chunk] = self._output(logits)
        return values

    def _output(self, logits: Tensor) -> Tensor:
        """Return the outputs, shape (rows,), of logits of shape (rows, labels)."""
        if self.output == "logit":
            return logits[:, self.label]
        single = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
        return (logits.sigmoid() if single else logits.softmax(dim=1))[:, self.label]

    def _report_cut(self, cut: int, count: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The reward `%s` reads %d tokens: %d of %d texts are longer, and it doesn't see all of them. Shorten "
                "the completions (`stage.args.max_completion_length`), or use a classifier that reads more.",
                *(self.__name__, self.max_length, cut, count),
            )


def classifier_config(
    key: str, path: str, label: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """
    Return the config of a classifier.

    Args:
        key (`str`): where the run's config has the reward, such as `reward.classifier`.
        path (`str`), label (`str`, *optional*), trust_remote_code (`bool`): see [`ClassifierReward`].

    Raises:
        ConfigError: see [`ClassifierReward`].
    """
    if adapter_config(path) is not None:
        raise ConfigError(
            f"`{key}.path` is `{path}`, an adapter. A reward model that is one is read by `reward=model`."
        )
    config = any_config(path, trust_remote_code)
    if "SequenceClassification" not in (config.architectures or [""])[0]:
        raise ConfigError(
            f"`{key}.path` is `{path}`, a {(config.architectures or [config.model_type])[0]}, which is no classifier. "
            "Name a model for text classification, or train a reward model (`stage=reward`) and set `reward=model`."
        )
    labels = labels_of(config)
    if label is None and len(labels) > 1:
        raise ConfigError(
            f"`{key}.label` is not set, and `{path}` has {len(labels)} labels. Name the one whose score is the "
            f"reward: {', '.join(f'`{key}.label={each}`' for each in labels[:4])}{' ...' if len(labels) > 4 else ''}."
        )
    if label is not None and label not in labels:
        raise ConfigError(f"`{key}.label` is `{label}`, which is no label of `{path}`. {did_you_mean(label, labels)}")
    return config


def labels_of(config: PreTrainedConfig) -> list[str]:
    """Return the labels of a classifier, in the order of its outputs."""
    return list(cast(dict[int, str], config.id2label).values())


def classifier_tokenizer(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """
    Return a classifier's tokenizer, which adds the special tokens of its training; one without a padding token pads
    with its end token.

    Raises:
        ConfigError: if there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"No tokenizer can be loaded from `{path}` ({error}). Save it there, beside the model."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"  # encoders count positions from the left, padding included
    return tokenizer


def readable_tokens(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens that a classifier reads, as its tokenizer says or else its config."""
    if tokenizer.model_max_length < UNLIMITED:
        return int(tokenizer.model_max_length)
    positions = getattr(config, "max_position_embeddings", None) or UNLIMITED
    # RoBERTa and its kin count positions from the one after that of padding
    return positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)


def single_text(value: str | list[dict]) -> str:
    """Return a prompt or a completion as text: of a chat with a single message its content."""
    return as_text([value[0] | {"role": "assistant"}] if not isinstance(value, str) and len(value) == 1 else value)
