"""Files of rows."""

import itertools
import json

from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf_trl import data


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def tiny_model(tokenizer, cls):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    if cls is LlamaForSequenceClassification:
        config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    return cls(config)


def write(path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def load(path, dataset_type="preference", **options):
    return data.load_files(dataset_type, 0, str(path), **options)


def write_letter_pairs(path) -> str:
    """Write preference rows in the letters that `make_tokenizer` knows, of 216 prompts; return the path."""
    prompts = [" ".join(letters) for letters in itertools.product("abcdef", repeat=3)]
    return write(path, [{"prompt": text, "chosen": f" {text[0]} b", "rejected": f" g {text[-1]}"} for text in prompts])
