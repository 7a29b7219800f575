"""Small language models from scratch."""

from hydra.utils import instantiate
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trl.models.scratch import word_tokenizer


def test_word_tokenizer_decodes_what_it_encodes():
    tokenizer = word_tokenizer(["Review: it's a film, a GOOD film!"] * 2, vocab_size=50)
    text = "review: a good film, it's a film!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # The tokens of a prompt don't depend on what follows, and joined tokens are the text
    prompt, rest = tokenizer("Review: it's")["input_ids"], tokenizer(" a good film!")["input_ids"]
    assert prompt + rest == tokenizer("Review: it's a good film!")["input_ids"]
    assert tokenizer.decode(tokenizer(" a bad film")["input_ids"], skip_special_tokens=True) == " a film"


def test_the_stage_works_with_its_own_defaults(compose, tmp_path):
    cfg = compose("stage=init", f"runs_dir={tmp_path}")
    instantiate(cfg.stage.run)(cfg)
    tokenizer = AutoTokenizer.from_pretrained(cfg.run_dir)
    assert AutoModelForCausalLM.from_pretrained(cfg.run_dir).config.vocab_size == len(tokenizer) > 100
