"""How many tokens a model takes and which ones, from its config alone: its positions and its embeddings."""

import functools
import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import adapter_config, base_path
from rlhf_trl.models.loading import AUTO_CLASSES, model_config
from rlhf_trl.runs.paths import ensemble_members

logger = logging.getLogger(__name__)

POSITION_TABLE = re.compile(r"(^|[._])(wpe|pos|positions?)([._]|$)")


class Sizes(NamedTuple):
    """
    What limits the tokens of a model.

    Attributes:
        name (`str`): folder or hub id, for messages.
        positions (`int`, *optional*): how many tokens the model was made for; `None` where its config names no limit.
        is_table (`bool`): whether it has a row of weights for each position, and so none for the next one. Rotary
            positions go on, though the model never saw them.
        embeddings (`int`): how many ids the model knows.
    """

    name: str
    positions: int | None
    is_table: bool
    embeddings: int


def sizes_of(model: PreTrainedModel, name: str | None = None) -> Sizes:
    """Return the sizes of a model, loaded or without weights (on the meta device)."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    # GPT-2's `wpe`, OPT's `embed_positions` (with two rows for padding), the sines of GPT-J and CTRL ...
    tables = [
        tensor.shape[0] - positions
        for tensors in (model.named_parameters(), model.named_buffers())
        for key, tensor in tensors
        if positions is not None and tensor.dim() == 2 and POSITION_TABLE.search(key)
    ]
    return Sizes(name or str(model.name_or_path), positions, any(0 <= more <= 2 for more in tables), config.vocab_size)


@functools.cache
def empty_model(
    path: str, task_type: str = "CAUSAL_LM", trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedModel:
    """
    Return the model at `path` (of an adapter: its base; of an ensemble: its members') without weights.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if its config can't be read, or its kind of model can't do this.
    """
    path = next(iter(ensemble_members(path)), path)
    if (adapter := adapter_config(path, revision)) is not None:
        path, revision = base_path(path, adapter), adapter.revision
    config = model_config(path, trust_remote_code, revision)
    try:
        with torch.device("meta"):
            return AUTO_CLASSES[task_type].from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        what = {"CAUSAL_LM": "writes text from left to right", "SEQ_CLS": "scores a text"}[task_type]
        raise ConfigError(
            f"`{path}` is a model of type `{config.model_type}`, and Transformers has no model of that type that "
            f"{what}. Give another model."
        ) from error


def tokenizer_problem(sizes: Sizes, tokenizer: PreTrainedTokenizerBase, remedy: str) -> str | None:
    """
    Return what is wrong with a tokenizer that is larger than the model's embedding, `None` where nothing is.

    Added tokens over it are no problem by themselves (Gemma 3 has one for images): rows that hold them are.
    """
    has = f"`{sizes.name}` has embeddings for {sizes.embeddings:,} ids"
    if tokenizer.vocab_size > sizes.embeddings:
        return f"{has}, and the tokenizer has {tokenizer.vocab_size:,} tokens: it is another model's. {remedy}"
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = getattr(tokenizer, f"{name}_id")
        if token is not None and token >= sizes.embeddings:
            return (
                f"{has}, and the tokenizer's `{name}` is {token:,}. Write a token that the model knows into "
                "tokenizer_config.json, or enlarge the embedding first (`resize_token_embeddings` of Transformers)."
            )
    return None


def check_rows(sizes: Sizes, rows: Sequence[Sequence[int]], more: int, remedy: str) -> None:
    """
    Stop at token rows that don't fit into a model; warn where it was never trained on as many positions.

    Args:
        sizes ([`Sizes`]): of the model.
        rows (`Sequence[Sequence[int]]`): token ids.
        more (`int`): how many tokens may be generated after them.
        remedy (`str`): what to do about a row that is too long.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a row is longer than the model's table of positions, or holds an id that
            the model has no embedding for.
    """
    longest, largest = max(map(len, rows), default=0), max((max(row, default=0) for row in rows), default=0)
    if not sizes.is_table:
        more = 0  # most completions end before; the rows that they make are looked at again
    if problem := length_problem(sizes, longest, more, remedy) or id_problem(sizes, largest):
        raise ConfigError(problem)


def length_problem(sizes: Sizes, longest: int, more: int, remedy: str) -> str | None:
    """Return what is wrong with rows of so many tokens, as [`check_rows`] says it; `None` where nothing is."""
    if sizes.positions is None or longest + more <= sizes.positions:
        return None
    if not sizes.is_table:
        _warn_of_length(sizes, remedy)
        return None
    needs = f"{longest:,} tokens" + (f" and up to {more:,} generated ones" if more else "")
    return f"`{sizes.name}` has {sizes.positions:,} positions, and a row has {needs}. {remedy}"


def id_problem(sizes: Sizes, largest: int) -> str | None:
    """Return what is wrong with an id, as [`check_rows`] says it; `None` where nothing is."""
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
        f"`{sizes.name}` was made for {sizes.positions:,} positions, and rows are longer: beyond them it may read and "
        f"write at random. {remedy}"
    )
