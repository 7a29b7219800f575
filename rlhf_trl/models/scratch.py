"""Small language models from scratch: a word-level tokenizer fitted to texts, and random weights (`stage=init`)."""

from collections.abc import Iterable, Iterator

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_trl.errors import DataError

# A word with its apostrophes, or a run of punctuation, each with the space before it. So decoding joins tokens as they
# are, and the tokens of a prompt don't depend on its completion.
WORD = r" ?\w+(?:'\w+)*| ?[^\w\s]+|\s+"
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")


def word_tokenizer(
    texts: Iterable[str], vocab_size: int = 8192, min_frequency: int = 2, lowercase: bool = True
) -> PreTrainedTokenizerFast:
    """
    Fit a word-level `PreTrainedTokenizerFast` to texts.

    A word and the same word after a space are two entries, as in byte-level BPE. Rarer words become `<unk>`, which has
    no text.

    Args:
        texts (`Iterable[str]`): texts to fit to.
        vocab_size (`int`): size of the vocabulary, special tokens included.
        min_frequency (`int`): rarer words are `<unk>`.
        lowercase (`bool`): whether all text becomes lower case.
    """
    pad, eos, unk = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.WordLevel(unk_token=unk))
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, unk_token=unk)


def random_model(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Return a causal language model of `config` with random weights, sized for the tokenizer."""
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        None,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def texts_of(rows: Iterable[dict]) -> Iterator[str]:
    """
    Yield prompt and completion of each row as one text.

    Raises:
        [`~rlhf_trl.errors.DataError`]: if a row holds chat messages; the tokenizer has no chat template.
    """
    for number, row in enumerate(rows, 1):
        for column in ("prompt", "completion"):
            if not isinstance(row[column], str):
                raise DataError(
                    f"row {number}: `{column}` is a chat, and a new model reads only text. Use data with text, for "
                    "example `data=reviews`, or `data.conversational=false` with the embedded data."
                )
        yield row["prompt"] + row["completion"]
