"""Files of rows."""

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
