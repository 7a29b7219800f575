"""The benchmark of judges of review sentences, on made-up sentences and a tiny encoder."""

import random

import pytest
import torch
import transformers

from bench import sentiment
from rlhf_trl.rewards import ClassifierReward
from rlhf_trl.tasks.reviews.data import Reviews
from tests.helpers.tiny import make_tokenizer

GOOD, BAD = "a b c d".split(), "m n o p".split()


def sentences(count: int, seed: int) -> list[dict]:
    """Return sentences of letters, of which each is either good or bad."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        sign = 1 if i % 2 else -1
        words = draw.choices(GOOD if sign > 0 else BAD, k=2) + draw.choices("efghijkl", k=3)
        ratings = [sign * 3] * 4 + [0, -sign]
        mean = sum(ratings) / len(ratings)
        rows.append({"id": f"{seed}-{i}", "text": " ".join(words), "mean": mean, "ratings": ratings})
    return rows


@pytest.fixture
def encoder(tmp_path) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=21, pad_token_id=0, initializer_range=0.2, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def test_a_fitted_encoder_is_a_reward_that_knows_good_from_bad(encoder, tmp_path):
    sentiment.fit(encoder, sentences(320, 1), tmp_path / "judge", epochs=5, rate=1e-2)
    test = sentences(100, 2)
    judge = ClassifierReward(str(tmp_path / "judge"), output="probability", dtype="float32")
    assert judge.max_length > sentiment.TOKENS
    texts = [row["text"] for row in test]
    values = judge(texts, texts)
    assert sum((value > 0.5) == (row["mean"] > 0) for value, row in zip(values, test, strict=True)) >= 97
    # Four of five people who don't say 0 agree: a calibrated probability
    assert torch.tensor([abs(value - 0.5) for value in values]).mean().item() == pytest.approx(0.3, abs=0.05)


def test_the_table_of_judges():
    test = [{"id": str(mean), "text": "a", "mean": mean, "ratings": [1]} for mean in (3.0, 1.5, 0.0, -0.5, -2.0)]
    pairs = [{"chosen_id": "3.0", "rejected_id": "-2.0"}, {"chosen_id": "1.5", "rejected_id": "-0.5"}]
    text = sentiment.report(Reviews([], [], test, [], pairs), {"x": [0.9, 0.4, 0.9, 0.6, 0.2]})
    assert text.splitlines()[-1] == "| x | 0.50 | 0.67 | 1.00 | 0.00 | 0.50 |"
