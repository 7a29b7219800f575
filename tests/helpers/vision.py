"""Tiny models that read images, of several architectures, with their processors: made on the fly."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

WORDS = "user assistant : what colour is it ? red blue green a .".split()
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}PLACE {% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if m['role'] == 'assistant' %} <eos>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def picture(colour: str, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, COLOURS[colour])


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<eos>", "<unk>", *special.values(), *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=special,
        padding_side="left",
    )


def llava() -> tuple[ProcessorMixin, PreTrainedConfig]:
    tokenizer = make_tokenizer(image_token="<image>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE.replace("PLACE", "<image>"),
    )
    vision = CLIPVisionConfig(**TEXT, image_size=16, patch_size=8, projection_dim=16)
    text = LlamaConfig(**TEXT, **IDS, vocab_size=len(tokenizer), initializer_range=0.3)
    return processor, LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=3, image_token_index=3, vision_feature_layer=-1
    )


def gemma3() -> tuple[ProcessorMixin, PreTrainedConfig]:
    tokenizer = make_tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer,
        image_seq_length=4,
        chat_template=TEMPLATE.replace("PLACE", "<boi>"),
    )
    text = TEXT | IDS | {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3Config(
        text_config=text | {"layer_types": ["sliding_attention", "full_attention"], "initializer_range": 0.3},
        vision_config=TEXT | {"image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_id=3,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
    )
    return processor, config


def idefics3() -> tuple[ProcessorMixin, PreTrainedConfig]:
    """Return what SmolVLM is made of; its images are padded to one number per row."""
    tokenizer = make_tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance="<end>",
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    processor = Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=TEMPLATE.replace("PLACE", "<image>")
    )
    config = Idefics3Config(
        text_config=LlamaConfig(**TEXT, **IDS, vocab_size=len(tokenizer), initializer_range=0.3),
        vision_config=TEXT | {"image_size": 16, "patch_size": 4},
        scale_factor=2,
        image_token_id=3,
        pad_token_id=0,
    )
    return processor, config


def give_sounds(processor: ProcessorMixin) -> None:
    """Let a processor make an input that no library knows: `sounds`, of shape (rows, 2)."""
    makes = type(processor).__call__

    class Hearing(type(processor)):
        def __call__(self, *args, **kwargs):
            made = makes(self, *args, **kwargs)
            count = len(made["input_ids"])
            made["sounds"] = torch.arange(2.0 * count).reshape(count, 2) / 10 + len(made["input_ids"][0]) / 10
            return made

    processor.__class__ = Hearing


def give_ear(model: PreTrainedModel) -> list[int]:
    """Let the trunk of a model add `sounds` to the embeddings of its tokens; return where each pass notes its rows."""
    trunk: Any = model.base_model
    heard, forward = [], trunk.forward
    trunk.ear = torch.nn.Linear(2, model.config.get_text_config().hidden_size)

    def hearing(input_ids=None, sounds=None, pixel_values=None, inputs_embeds=None, **inputs):
        assert len(sounds) == len(input_ids)
        heard.append(len(sounds))
        return forward(inputs_embeds=trunk.get_input_embeddings()(input_ids) + trunk.ear(sounds)[:, None], **inputs)

    trunk.forward = hearing
    return heard


ARCHITECTURES: dict[str, Callable[[], tuple[ProcessorMixin, PreTrainedConfig]]] = {
    "llava": llava,
    "gemma3": gemma3,
    "idefics3": idefics3,
}


def save_vlm(path, architecture: str = "llava", seed: int = 0) -> str:
    """Write a randomly initialised model and its processor to `path`, and return it as a string."""
    processor, config = ARCHITECTURES[architecture]()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # Gemma's projector starts at zero, and would show nothing
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)
