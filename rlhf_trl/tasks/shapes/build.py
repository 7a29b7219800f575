"""
Build of the checkpoint of the world of shapes: `python -m rlhf_trl.tasks.shapes.build`.

It is pretrained on pictures with true descriptions, on questions with their answers as plain text, on answers that
are called true or false, and on chats, as today's base models are. Of the answers in chats half are right: it knows
more than it says, as RL shows.
"""

import io
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from rlhf_trl.tasks.demo.tokenizer import words_in
from rlhf_trl.tasks.fitting import fit
from rlhf_trl.tasks.shapes.world import (
    CELL,
    SIDE,
    VERDICTS,
    Question,
    all_texts,
    describe,
    draw_question,
    draw_shapes,
    paint,
)

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SEED = 42
# Standard deviation of the first weights: with that of large models the attention of so narrow a one stays even
SPREAD = 0.1
# Mean color of the pictures' background, of 1: what has no shape in it is near 0 for the model
BACKGROUND = 0.96
# Factor on the first embeddings of places in the vision tower: CLIP's are small beside those of colored patches
PLACES_SCALE = 10.0
# Share of the answers in chats that are right
RIGHT_CHATS = 0.5
IMAGE, END = "<image>", "<eos>"
# Questions on a picture in a document of them
QUESTIONS = 6
# Optimizer steps, and the share of the questions whose answer is given and judged: first it learns to look at the
# picture, then to compare an answer with it
PHASES = ((8000, 0.0), (3200, 0.5))
SPECIAL = ("<pad>", "<bos>", END, "<unk>", IMAGE, "<|user|>", "<|assistant|>")
# <bos><|user|><image>Where is the red circle?<|assistant|>Top left.<eos>
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|user|>' }}
        {%- if message.content is string %}{{- message.content }}
        {%- else %}
            {%- for part in message.content %}
                {%- if part.type == 'image' %}{{- '<image>' }}{%- else %}{{- part.text }}{%- endif %}
            {%- endfor %}
        {%- endif %}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- if message.content is string %}{{- message.content }}
        {%- else %}{%- for part in message.content %}{{- part.text }}{%- endfor %}
        {%- endif %}
        {{- eos_token }}
    {%- else %}
        {{- raise_exception('The chat template of the shapes has the roles user and assistant only.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""


def build_processor() -> LlavaProcessor:
    """Return the processor: a token per word, and four per image, one for each place of it."""
    vocabulary = [*SPECIAL, *words_in(all_texts())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=False)] + [decoders.Replace(f" {mark}", mark) for mark in ".?:"]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE, "user_token": "<|user|>", "assistant_token": "<|assistant|>"},
        model_max_length=256,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    images = CLIPImageProcessorPil(
        do_resize=True, size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[BACKGROUND] * 3,
        image_std=[0.5] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        images,
        fast,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(tokenizer: Any) -> LlavaForConditionalGeneration:
    """Return a LLaVA of about 0.2 M parameters with random weights."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=CELL,
        projection_dim=64,
        initializer_range=SPREAD,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        # To gather a question, to look at the picture, and to compare what was found there with an answer
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
        initializer_range=SPREAD,
    )
    place = tokenizer.convert_tokens_to_ids(IMAGE)
    config: Any = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=place,
        image_seq_length=(SIDE // CELL) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        dtype="float32",
    )
    config.image_token_id = place
    model = LlavaForConditionalGeneration(config)
    embeddings: Any = model.model.vision_tower.embeddings
    with torch.no_grad():
        embeddings.position_embedding.weight.mul_(PLACES_SCALE)
    return model


class Document(NamedTuple):
    """
    A text on a picture.

    Attributes:
        picture (`bytes`): a PNG.
        parts (`tuple[str, ...]`): text without loss and with it, in turn. The first part holds the picture's place.
    """

    picture: bytes
    parts: tuple[str, ...]


def pretraining_documents(count: int, rng: random.Random, judged: float = 0.0) -> list[Document]:
    """
    Return pictures with a true description, with questions and their answers, or in a chat.

    Args:
        count (`int`): number of documents.
        rng (`random.Random`): draws them.
        judged (`float`): share of the questions whose answer, right or wrong, is given and called true or false.
    """
    made = []
    for _ in range(count):
        shapes, kind = draw_shapes(rng), rng.choices(("description", "questions", "chat"), (6, 11, 3))[0]
        if kind == "description":
            parts = (IMAGE, f"{describe(shapes)}{END}")
        elif kind == "questions":
            parts = [part for _ in range(QUESTIONS) for part in _asked(draw_question(shapes, rng), judged, rng)]
            parts = (f"{IMAGE}{parts[0]}", *parts[1:], "", END)
        else:
            question = draw_question(shapes, rng)
            answer = question.answer if rng.random() < RIGHT_CHATS else rng.choice(question.others)
            parts = (f"<|user|>{IMAGE}{question.text}<|assistant|>", f"{answer}{END}")
        made.append(Document(paint(shapes, rng), tuple(parts)))
    return made


def _asked(question: Question, judged: float, rng: random.Random) -> tuple[str, str]:
    """Return a question with its answer, or with an answer and a verdict on it: what is given, and what is learned."""
    if rng.random() >= judged:
        return f"Question: {question.text} Answer:", question.answer
    right = rng.random() < 0.5
    answer = question.answer if right else rng.choice(question.others)
    return f"Question: {question.text} Answer: {answer}", VERDICTS[right]


def as_rows(processor: LlavaProcessor, documents: list[Document]) -> list[dict[str, Any]]:
    """Return ids, labels and pixels of documents."""
    tokenizer: Any = processor.tokenizer
    images: Any = processor.image_processor
    patches = IMAGE * (SIDE // CELL) ** 2
    texts = [part.replace(IMAGE, patches) for document in documents for part in document.parts]
    parts = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    pictures = [Image.open(io.BytesIO(document.picture)) for document in documents]
    rows = []
    for document, pixels in zip(documents, images(pictures, return_tensors="pt")["pixel_values"], strict=True):
        ids, labels = [tokenizer.bos_token_id], [-100]
        for i, found in zip(range(len(document.parts)), parts, strict=False):
            ids += found
            labels += found if i % 2 else [-100] * len(found)
        rows.append({"ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixels": pixels})
    return rows


def batch_loss(model: LlavaForConditionalGeneration, rows: list[dict[str, Any]]) -> Any:
    """Return the mean cross-entropy over the tokens with loss."""
    ids, labels = (
        pad_sequence([row[name] for row in rows], True, value) for name, value in (("ids", 0), ("labels", -100))
    )
    pixels = torch.stack([row["pixels"] for row in rows])
    return model(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=pixels, labels=labels).loss


def build(folder: Path, phases: Sequence[tuple[int, float]] = PHASES) -> None:
    """Write `folder/base`, a model with its processor (some ten minutes on one thread)."""
    # With one thread, floats are always added in the same order
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    processor = build_processor()
    model = new_model(processor.tokenizer)
    for steps, judged in phases:
        rows = as_rows(processor, pretraining_documents(12_000, rng, judged))
        fit(model, batch_loss, rows, steps, 32, 2e-3, rng)
    # Half of the bytes: all checkpoints are shipped in the wheel
    model.bfloat16().save_pretrained(folder / "base")
    cast(Any, processor).save_pretrained(folder / "base")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKPOINTS)
