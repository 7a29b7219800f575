"""Tokenizer of the embedded world: one token per word of the language."""

import re
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_trl.tasks.demo import facts
from rlhf_trl.tasks.demo.world import prompts

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>")
# <bos><|user|>What color is a bear?<|assistant|>A bear is brown.<eos>: after the generation prompt come completion and
# <eos> alone, so that training and generation see the same ids
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|user|>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- raise_exception('The embedded chat template has the roles user and assistant only.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""


def vocabulary() -> list[str]:
    """Return all words and punctuation marks of the language, special tokens first, the rest sorted."""
    texts = ["Question: Answer: . , ? !", *facts.RUDE, *facts.FILLER, *facts.DODGES]
    for prompt, topic in prompts().items():
        texts += [prompt, topic.curt, *topic.good, *(" ".join(bad) for bad in topic.bad)]
    texts += ["Comment:", facts.PRAISE, facts.SHRUG, *facts.COMMENTS.values()]
    # Steps also occur without "First," and "Then,"
    texts += [step[0].upper() + step[1:] for pair in facts.TASKS.values() for step in pair]
    return [*SPECIAL, *words_in(texts)]


def words_in(texts: Iterable[str]) -> list[str]:
    """Return all words and punctuation marks of some texts, sorted."""
    return sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer with its chat template. It adds `<bos>` to text and decodes no space before punctuation."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=False)] + [decoders.Replace(f" {mark}", mark) for mark in ".,?!:"]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
