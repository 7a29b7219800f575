"""Tokenizers with chat templates."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny import CHAT_TEMPLATE, make_tokenizer

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml_tokenizer(merges=(), template=CHATML) -> PreTrainedTokenizerFast:
    """Bytes as tokens, ChatML, and EOS as the padding token: what SmolLM2 and Qwen have."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, *("".join(merge) for merge in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


PAD, EOS, UNK, USER, ASSISTANT, END = range(6)


def turn_tokenizer():
    """Return the tokenizer of `tests.helpers.tiny` with `<end>`, which ends an assistant's turn."""
    tokenizer = make_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = backend["model"]["vocab"]
    backend["model"]["vocab"] = {word: i + (i >= END) for word, i in vocab.items()} | {"<end>": END}
    tokenizer = make_tokenizer()
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(backend))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<end>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "<end> ")
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<assistant>", "<end>", "a"]) == [PAD, EOS, 4, END, 6]
    return tokenizer


PAD, EOS, UNK, USER, ASSISTANT, END = range(6)
