"""Fingerprints of weights and tokenizers."""

import functools
import hashlib
import json
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase


def weights_fingerprint(folder: str) -> str | None:
    """
    Return a hash of the weight files in a folder, `None` without any.

    It covers name, size and 64 blocks of each file, so that it takes no time for large models.
    """
    digest = hashlib.sha256()
    files = sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")])
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for block in range(64):
                file.seek(block * size // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16] if files else None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Return a hash of a tokenizer's vocabulary, special tokens and chat template.

    Two tokenizers with the same hash make the same ids of the same text or chat.
    """
    bos, eos = cast(str | None, tokenizer.bos_token), cast(str | None, tokenizer.eos_token)
    return _tokenizer_hash(tokenizer, len(tokenizer), bos, eos, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=64)  # sent with every request to a reward server
def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase, size: int, *others: str | None) -> str:
    content = sorted(tokenizer.get_vocab().items()), others
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
