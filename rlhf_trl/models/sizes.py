"""Limits of a model's inputs, read from its config: number of positions and of embeddings."""

import functools
import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import adapter_config, base_path
from rlhf_trl.models.loading import model_config
from rlhf_trl.models.vision import auto_class
from rlhf_trl.patches.engines import whole_weights
from rlhf_trl.runs.paths import ensemble_members

logger = logging.getLogger(__name__)

POSITION_TABLE = re.compile(r"(^|[._])(wpe|pos|positions?)([._]|$)")


class Sizes(NamedTuple):
    """
    Limits of a model's inputs.

    Attributes:
        name (`str`): folder or hub id, for messages.
        positions (`int`, *optional*): tokens that the model was made for; `None` if its config names no limit.
        is_table (`bool`): whether the model has an embedding per position, and so can't read more. With rotary
            positions it can, though it was never trained on them.
        embeddings (`int`): number of ids that the model knows.
    """

    name: str
    positions: int | None
    is_table: bool
    embeddings: int


def sizes_of(model: PreTrainedModel | PeftModel, name: str | None = None) -> Sizes:
    """Return the sizes of a model, loaded or without weights (on the meta device)."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    # GPT-2's `wpe`, OPT's `embed_positions` (two more rows, for padding), the sines of GPT-J and CTRL
    tables = [
        tensor.shape[0] - positions
        for tensors in (model.named_parameters(), model.named_buffers())
        for key, tensor in tensors
        if positions is not None and tensor.dim() == 2 and POSITION_TABLE.search(key)
    ]
    return Sizes(
        name or str(model.config.name_or_path), positions, any(0 <= extra <= 2 for extra in tables), config.vocab_size
    )


@functools.cache
def empty_model(
    path: str, task_type: str = "CAUSAL_LM", trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedModel:
    """
    Return the model at `path` without weights; the base of an adapter or ensemble.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if its config can't be read, or Transformers has no such model for the task.
    """
    path = next(iter(ensemble_members(path)), path)
    if (adapter := adapter_config(path, revision)) is not None:
        path, revision = base_path(path, adapter), adapter.revision
    config = model_config(path, trust_remote_code, revision)
    try:
        with whole_weights(), torch.device("meta"):
            return auto_class(config, task_type).from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        what = {"CAUSAL_LM": "writes text from left to right", "SEQ_CLS": "scores a text"}[task_type]
        raise ConfigError(
            f"`{path}` is a model of type `{config.model_type}`, and Transformers has no model of that type that "
            f"{what}. Give another model."
        ) from error


def critic_parameters(path: str | None, policy: int, trust_remote_code: bool = False) -> int:
    """
    Return the number of parameters of a critic with a network of its own: those of its start or, as a copy of it, the
    policy's.

    Args:
        path (`str`, *optional*): folder or hub id of the reward model that the critic starts from.
        policy (`int`): parameters of the policy.
    """
    return empty_model(path, "SEQ_CLS", trust_remote_code).num_parameters() if path else policy


def tokenizer_problem(sizes: Sizes, tokenizer: PreTrainedTokenizerBase, remedy: str) -> str | None:
    """
    Return the problem of a tokenizer that is larger than the model's embedding, `None` if there is none.

    Added tokens beyond it are a problem only in rows that hold them (Gemma 3 has one for images).

    Args:
        sizes ([`Sizes`]): limits of the model.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer to check.
        remedy (`str`): sentence that says what to do about another model's tokenizer.
    """
    has = f"`{sizes.name}` has embeddings for {sizes.embeddings:,} ids"
    if tokenizer.vocab_size > sizes.embeddings:
        return f"{has}, and the tokenizer has {tokenizer.vocab_size:,} tokens: it is another model's. {remedy}"
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = getattr(tokenizer, f"{name}_id")
        if token is not None and token >= sizes.embeddings:
            return (
                f"{has}, and the tokenizer's `{name}` is {token:,}. Set a token that the model knows in "
                "tokenizer_config.json, or enlarge the embedding first (`resize_token_embeddings` of Transformers)."
            )
    return None


def check_rows(sizes: Sizes, rows: Sequence[Sequence[int]], new_tokens: int, remedy: str) -> None:
    """
    Check that rows of ids fit into a model; warn if it was never trained on as many positions.

    Args:
        sizes ([`Sizes`]): limits of the model.
        rows (`Sequence[Sequence[int]]`): token ids.
        new_tokens (`int`): number of tokens that may be generated after them.
        remedy (`str`): sentence that says what to do about a row that is too long.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a row is longer than the model's table of positions, or holds an id that
            the model has no embedding for.
    """
    longest, largest = max(map(len, rows), default=0), max((max(row, default=0) for row in rows), default=0)
    if not sizes.is_table:
        new_tokens = 0  # most completions end before, and the rows that they make are checked again
    if problem := length_problem(sizes, longest, new_tokens, remedy) or id_problem(sizes, largest):
        raise ConfigError(problem)


def length_problem(sizes: Sizes, longest: int, new_tokens: int, remedy: str) -> str | None:
    """Return the problem of a row of `longest` tokens, `None` if there is none; see [`check_rows`]."""
    if sizes.positions is None or longest + new_tokens <= sizes.positions:
        return None
    if not sizes.is_table:
        _warn_of_length(sizes, remedy)
        return None
    needs = f"{longest:,} tokens" + (f" and up to {new_tokens:,} generated ones" if new_tokens else "")
    return f"`{sizes.name}` has {sizes.positions:,} positions, and a row has {needs}. {remedy}"


def id_problem(sizes: Sizes, largest: int) -> str | None:
    """Return the problem of the largest id of some rows, `None` if there is none; see [`check_rows`]."""
    if largest < sizes.embeddings:
        return None
    return (
        f"`{sizes.name}` has embeddings for {sizes.embeddings:,} ids, and a row holds the id {largest:,}: the "
        "tokenizer is larger than the model. Use the model's own tokenizer, or enlarge the model's embedding first "
        "(`resize_token_embeddings` of Transformers)."
    )


@functools.cache
def _warn_of_length(sizes: Sizes, remedy: str) -> None:
    logger.warning(
        f"`{sizes.name}` was made for {sizes.positions:,} positions, and rows are longer: beyond them its outputs may "
        f"be random. {remedy}"
    )
