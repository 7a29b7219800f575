"""Rendering of chats with the tokenizer's template."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from rlhf_trl.data.images import has_images
from rlhf_trl.data.messages import CHAT_CHECK, IMAGE_TOKENS, TEMPLATE_TOKENS, is_chat
from rlhf_trl.data.multimodal import as_read, image_tokens, processor_of, read_prompt, with_parts
from rlhf_trl.data.rows import RowError
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.terminal import say


def without_bos(tokenizer, text: str) -> str:
    """Return `text` (perhaps rendered with a chat template before) without the BOS that the tokenizer adds itself."""
    bos = tokenizer.bos_token
    if bos is None or not text.startswith(bos) or tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return text
    return text.removeprefix(bos)


def render_chat(tokenizer, messages: list[dict], tokenize: bool, **kwargs) -> Any:
    """Apply the tokenizer's chat template; raise a `ConfigError` where it has none."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the data holds chat messages, but the tokenizer of `{tokenizer.name_or_path}` has no chat template. "
            "Set `model.chat_template=FILE.jinja` (a reward model's is saved with its tokenizer), or give data "
            "whose prompts are text."
        )
    # Arrow gives every message all keys of all messages: what is null wasn't there.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    kwargs = (trained_template_kwargs(tokenizer) or {}) | kwargs
    images = kwargs.pop("images", None)
    try:
        if tokenize and (images or has_images(messages)):
            return {"input_ids": read_prompt(tokenizer, messages, images or [], **kwargs)}
        messages = with_parts(messages, images) if images else as_read(tokenizer, messages)
        return tokenizer.apply_chat_template(messages, tokenize=tokenize, return_dict=tokenize, **kwargs)
    except TemplateError as error:
        raise TemplateRefusal(str(error), messages) from error


def _kinds(content) -> list[str]:
    return [part["type"] for part in content] if isinstance(content, list) else []


class TemplateRefusal(DataError):
    """Error of a chat template for a chat, with what it `said` and how to fix it."""

    def __init__(self, said: str, messages: list[dict]):
        roles = [message["role"] for message in messages]
        self.said = f"is refused by the chat template ({said.strip()}): its turns are {', '.join(roles)}. "
        if {"system", "developer"} & set(roles):
            self.said += "Remove the system turn (`data.system_prompt`), or put its text into the user's first turn."
        else:
            self.said += "Put turns of one role in a row into one turn, or give another template."
        super().__init__(
            f"The chat that begins with {str(messages[0].get('content'))[:80]!r} {self.said} Another template is "
            "`model.chat_template=FILE.jinja`."
        )


@contextmanager
def refusals_named(tokenizer) -> Iterator[None]:
    """Name the rows of files that the tokenizer's chat template refuses, by setting [`CHAT_CHECK`]."""
    known: dict[str, str | None] = {}

    def check(messages: list[dict], row: dict) -> None:
        if has_images(messages) and processor_of(tokenizer) is None:
            raise RowError(
                None, f"has images, and the model of `{tokenizer.name_or_path}` reads text alone: set `model.path`"
            )
        # Templates look at roles, and at what else a turn has, not at words: chats of one kind are rendered once
        kwargs = template_kwargs(row)
        kind = json.dumps([[(turn["role"], *turn, _kinds(turn.get("content"))) for turn in messages], kwargs])
        if kind not in known:
            known[kind] = None
            try:
                render_chat(tokenizer, messages, tokenize=False, add_generation_prompt=False, **kwargs)
            except TemplateRefusal as refusal:
                known[kind] = refusal.said
        if (said := known[kind]) is not None:
            raise RowError(None, said)

    token = CHAT_CHECK.set(check if tokenizer.chat_template is not None else None)
    try:
        yield
    finally:
        CHAT_CHECK.reset(token)


@contextmanager
def text_as_chat(tokenizers: Sequence) -> Iterator[None]:
    """
    Let `data.to_chat: null` make chats of text, if each of the tokenizers has a chat template, and refuse chats with
    words that one of the models reads as an image.

    Args:
        tokenizers (`Sequence`): those of the models that the rows are read for; without any, text stays text.
    """
    templates = [tokenizer.chat_template is not None for tokenizer in tokenizers]
    if any(templates) and not all(templates):
        say("note: not all of the models have a chat template, so `data.to_chat: null` keeps text as it is")
    tokens = frozenset().union(*map(_template_tokens, tokenizers)) if templates and all(templates) else None
    token = TEMPLATE_TOKENS.set(tokens)
    images = IMAGE_TOKENS.set(frozenset().union(*map(image_tokens, tokenizers)))
    try:
        yield
    finally:
        TEMPLATE_TOKENS.reset(token)
        IMAGE_TOKENS.reset(images)


def _template_tokens(tokenizer) -> set[str]:
    """Return the special tokens that a chat template writes around the user's turn."""
    try:
        text = tokenizer.apply_chat_template(
            as_read(tokenizer, [{"role": "user", "content": "Hello"}]), tokenize=False, add_generation_prompt=True
        )
    except TemplateError:
        return set()
    return {token for token in tokenizer.all_special_tokens if token in text}


def template_kwargs(row: Mapping[str, Any]) -> dict:
    """Return what a row's own `tools`, `chat_template_kwargs` and `images` give to the chat template."""
    kwargs = dict(row.get("chat_template_kwargs") or {})
    if row.get("images"):
        kwargs["images"] = row["images"]
    if row.get("tools"):  # TRL takes them as JSON text too
        kwargs["tools"] = json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]
    return kwargs


def trained_template_kwargs(tokenizer) -> dict | None:
    """
    Return the arguments of the chat template with which the tokenizer's model was trained, as its
    tokenizer_config.json records them (see [`keep_template_kwargs`]); `None` if it doesn't, or if rows had several.
    """
    return tokenizer.init_kwargs.get("chat_template_kwargs")


def keep_template_kwargs(dataset, tokenizer, given: dict | None = None):
    """
    Return a `DatasetDict` of chats whose rows all say how they are rendered, and record it in the tokenizer.

    A row's own `chat_template_kwargs` go before `given` (the stage's), and these before what the tokenizer's model was
    trained with: so a policy is prompted as it was, unless the data or the stage say otherwise. What all training rows
    have is saved with the tokenizer, for those who prompt the model or ask it for a score.
    """
    from datasets import Features

    from rlhf_trl.patches.datasets import ExactJson

    if not is_chat(dataset["train"][0]):
        return dataset
    shared = (trained_template_kwargs(tokenizer) or {}) | (given or {})
    for side, rows in dataset.items() if shared else ():
        dataset[side] = rows.map(
            lambda row: {"chat_template_kwargs": shared | (row.get("chat_template_kwargs") or {})},
            features=Features({**rows.features, "chat_template_kwargs": ExactJson()}),
            desc="Completing chat_template_kwargs",
        )
    found = [{}]
    if "chat_template_kwargs" in dataset["train"].column_names:
        found = []
        for kwargs in dataset["train"]["chat_template_kwargs"]:
            if (kwargs or {}) not in found:
                found.append(kwargs or {})
    if len(found) == 1:
        tokenizer.init_kwargs["chat_template_kwargs"] = found[0]
    else:
        tokenizer.init_kwargs.pop("chat_template_kwargs", None)
    return dataset


def check_template_syntax(tokenizer, source: str) -> None:
    """
    Raise an error for a chat template that isn't valid Jinja.

    Args:
        source (`str`): where the template comes from, for the message.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with the line.
    """
    try:
        _rendered_answer(tokenizer, "Hello")
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"The chat template of `{source}` is no Jinja template: {error}, line {error.lineno}. Fix it, or give "
            "another with `model.chat_template=FILE.jinja`."
        ) from error
    except TemplateError:
        pass  # it refuses this chat; an error for those of the data is raised where they are rendered


def check_template_answers(tokenizer, source: str) -> None:
    """
    Raise an error for a chat template that doesn't write the assistant's words: all answers would be the same.

    Args:
        source (`str`): where the template comes from, for the message.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if it doesn't.
    """
    words = "Words that stand in no template"
    try:
        text = _rendered_answer(tokenizer, words)
    except TemplateError:
        return
    if words not in text:
        raise ConfigError(
            f"The chat template of `{source}` drops what the assistant says, so nothing could be learned from "
            "any answer. Give another with `model.chat_template=FILE.jinja`."
        )


def _rendered_answer(tokenizer, words: str) -> str:
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": words}]
    return tokenizer.apply_chat_template(as_read(tokenizer, chat), tokenize=False)


def template_columns(tokenizer, columns: dict[str, list], rows: int) -> dict[str, list]:
    """Return the columns of `rows` prompts with `chat_template_kwargs` as the tokenizer's policy was prompted."""
    trained = trained_template_kwargs(tokenizer)
    if not trained:
        return columns
    own = columns.get("chat_template_kwargs") or [None] * rows
    return columns | {"chat_template_kwargs": [trained | (kwargs or {}) for kwargs in own]}
