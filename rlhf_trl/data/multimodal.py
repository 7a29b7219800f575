"""
Chats as a processor reads them: token ids, with as many for an image as the model reads it as, and the inputs beside
them (pixels, grids, types of tokens ...), whatever the processor makes.

A model that reads more than text has a processor, which [`~rlhf_trl.models.tokenizers.load_tokenizer`] remembers with
the tokenizer.
"""

import base64
import functools
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_trl.errors import ConfigError

IDS = ("input_ids", "attention_mask")
# Of a thumbnail, in pixels
SIDE = 160


@dataclass
class ExtraInputs:
    """
    Inputs of one row beside its token ids.

    Attributes:
        by_token (`dict[str, Tensor]`): one value for each token of the prompt, shape (tokens,).
        others (`dict[str, Tensor]`): whose first dimension counts something else, such as images or patches.
    """

    by_token: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_token or self.others)


class PromptIds(list):
    """
    Token ids of a prompt with images, or of one with its completion, and the other inputs of the model.

    Args:
        ids (`Iterable[int]`): token ids.
        read (`Callable`): returns the other inputs. They can take megabytes for each image, so that rows that wait for
            their batch don't hold them.
    """

    def __init__(self, ids: Iterable[int], read: Callable[[], ExtraInputs]):
        super().__init__(ids)
        self.read = read

    @property
    def extra(self) -> ExtraInputs:
        """The other inputs, also where ids were added behind those of the prompt."""
        return self.read()

    def __add__(self, other):
        return PromptIds(super().__add__(other), self.read)

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return PromptIds(found, self.read) if isinstance(index, slice) and not index.start else found


def extra_of(rows: Iterable[list[int]]) -> list[ExtraInputs]:
    """Return the inputs of rows of ids beside them, nothing where no row has any."""
    found = [getattr(row, "extra", None) for row in rows]
    return [each or ExtraInputs() for each in found] if any(found) else []


def remember_processor(tokenizer, processor) -> None:
    """Register the processor of the tokenizer's model for [`processor_of`]."""
    tokenizer.model_processor = processor


def processor_of(tokenizer):
    """Return the processor of the tokenizer's model, `None` for one that reads text alone."""
    return getattr(tokenizer, "model_processor", None)


def image_tokens(tokenizer) -> set[str]:
    """Return the tokens that the processor and the model read as a place of an image, none of a model of text."""
    processor = processor_of(tokenizer)
    if processor is None:
        return set()
    found = (getattr(each, "image_token", None) for each in (processor, tokenizer))
    return {str(token) for token in found if token}


def tokenizer_of(processing_class):
    """Return the tokenizer of a trainer's `processing_class`: itself, or that of a processor, which then knows it."""
    from transformers import ProcessorMixin

    if not isinstance(processing_class, ProcessorMixin):
        return processing_class
    tokenizer: Any = processing_class.tokenizer  # pyright: ignore[reportAttributeAccessIssue] each has one
    remember_processor(tokenizer, processing_class)
    return tokenizer


def as_read(tokenizer, messages: list[dict]) -> list[dict]:
    """Return a chat as the tokenizer's template takes it: in parts for a processor, some of which take no text."""
    return messages if processor_of(tokenizer) is None else with_parts(messages, None)


def with_parts(messages: list[dict], images: list | None) -> list[dict]:
    """
    Return a chat whose turns consist of parts, with its images in them: the form that processors take.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there are more or fewer images than places for them.
    """
    from trl.data_utils import prepare_multimodal_messages

    try:
        return prepare_multimodal_messages(messages, images=images)
    except ValueError as error:
        raise ConfigError(f"The chat that begins with {str(messages[0])[:80]!r} can't be read: {error}") from error


def as_pil(image):
    """
    Return an image of a dataset as a PIL image, also one that isn't decoded, `{"bytes", "path"}`: turned as its
    camera says, as `datasets` decodes it for the trainers.
    """
    if not isinstance(image, dict):
        return image
    from PIL import Image, ImageOps

    with Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as opened:
        opened.load()
        return ImageOps.exif_transpose(opened)


def decoded(rows: Iterable[Sequence | None]) -> list[list]:
    """Return the images of rows as PIL images, each of them once, though many rows may have it."""
    known: dict[Any, Any] = {}

    def decode(image):
        if not isinstance(image, dict):
            return image
        key = image["path"] if image["bytes"] is None else image["bytes"]
        if key not in known:
            known[key] = as_pil(image)
        return known[key]

    return [list(map(decode, images or ())) for images in rows]


def thumbnail(image) -> str:
    """Return an image of a dataset at 160 pixels at most, as a data URI that a page can hold."""
    small = as_pil(image).convert("RGB")
    small.thumbnail((SIDE, SIDE))
    made = {}
    for kind in ("PNG", "JPEG"):  # a drawing is smaller as the one, a photograph as the other
        content = io.BytesIO()
        small.save(content, kind)
        made[kind] = base64.b64encode(content.getvalue()).decode()
    kind = min(made, key=lambda kind: len(made[kind]))
    return f"data:image/{kind.lower()};base64,{made[kind]}"


def opened(uri: str):
    """Return a [`thumbnail`] as a PIL image."""
    return as_pil({"bytes": base64.b64decode(uri.partition(",")[2]), "path": None})


def beside(uris: list[str]):
    """Return [`thumbnail`]s as one PIL image, from left to right."""
    from PIL import Image

    images = list(map(opened, uris))
    joined = Image.new("RGB", (sum(each.width for each in images), max(each.height for each in images)), "white")
    left = 0
    for each in images:
        joined.paste(each, (left, 0))
        left += each.width
    return joined


def extra_inputs(tokenizer, prompt: str | list[dict], **template_kwargs) -> ExtraInputs:
    """
    Return the inputs of a prompt beside its ids; none of a prompt without images.

    Args:
        tokenizer: the model's.
        prompt (`str` or `list[dict]`): text or chat.
        **template_kwargs: for the chat template, and `images`.
    """
    images = template_kwargs.pop("images", None)
    if not images or isinstance(prompt, str):
        return ExtraInputs()
    return read_prompt(tokenizer, prompt, images, add_generation_prompt=True, **template_kwargs).extra


def read_prompt(tokenizer, messages: list[dict], images: list, **kwargs) -> PromptIds:
    """
    Return the ids of a chat with images, with the other inputs of its model.

    Args:
        tokenizer: one with a processor.
        messages (`list[dict]`): the chat.
        images (`list`): its images, as a dataset has them.
        **kwargs: for the chat template, such as `add_generation_prompt`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the tokenizer's model reads text alone.
    """
    processor = processor_of(tokenizer)
    if processor is None:
        raise ConfigError(
            f"The data has images, and the model of the tokenizer `{tokenizer.name_or_path}` reads text alone. Set "
            "`model=hf model.path=...` to a vision-language model, or remove the column of images."
        )
    chat = _Chat(processor, messages, images, kwargs)
    return PromptIds(_read(chat)[0], lambda: _read(chat)[1])


@dataclass(frozen=True, eq=False)
class _Chat:
    """A chat with images that a processor reads."""

    processor: Any
    messages: list[dict]
    images: list
    kwargs: dict[str, Any]


@functools.lru_cache(maxsize=32)  # images of a batch, or of a prompt that is sampled from many times
def _read(chat: _Chat) -> tuple[list[int], ExtraInputs]:
    messages = with_parts(chat.messages, list(map(as_pil, chat.images)))
    try:
        made = chat.processor.apply_chat_template(
            [messages], tokenize=True, return_dict=True, return_tensors="pt", **chat.kwargs
        )
    except ValueError as error:  # such as for the token of an image among the words
        raise ConfigError(f"The processor can't read the chat: {error}") from error
    shape = made["input_ids"].shape
    extra = ExtraInputs()
    for name, value in made.items():
        if name not in IDS and tuple(value.shape) == tuple(shape):
            extra.by_token[name] = value[0]
        elif name not in IDS:
            extra.others[name] = value
    return made["input_ids"][0].tolist(), extra
