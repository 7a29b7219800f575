"""Rules of the options of models. Imports no torch."""

from rlhf_trl.config.ranges import COUNT

RULES = {
    "rlhf_trl.models.scratch.word_tokenizer": {"vocab_size": COUNT, "min_frequency": COUNT, "lowercase": "bool"},
}
