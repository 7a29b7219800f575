"""The share of the unknown token in the data."""

import pytest

from rlhf_trl.data.unknown import check_known, unknown_share
from rlhf_trl.errors import DataError
from tests.helpers.chat_tokenizers import chatml_tokenizer
from tests.helpers.tiny import make_tokenizer


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a zzz", "completion": "b c", "answer": "world"},  # a column for reward functions doesn't count
        {"prompt": user("a zzz"), "chosen": user("b"), "rejected": user("c")},
        {"prompt": "a zzz", "completions": ["b", "c"]},
        {"messages": user("a zzz b c")},
        {"text": "a zzz b c"},
    ],
)
def test_the_share_in_rows_of_every_type(row):
    assert unknown_share([row, row], make_tokenizer()) == 1 / 4
    assert unknown_share([row], chatml_tokenizer()) == 0.0  # bytes have no unknown token


def test_a_third_is_an_error_that_names_the_tokenizer(capsys):
    check_known([{"text": "a b c d"}], make_tokenizer(), "models/tiny", "Do something.")
    assert capsys.readouterr().out == ""
    check_known([{"text": "a b c zzz"}], make_tokenizer(), "models/tiny", "Do something.")
    assert "note: 25% of the tokens in the data are `<unk>`, unknown to the tokenizer of `models/tiny`" in (
        capsys.readouterr().out
    )
    with pytest.raises(DataError, match="33% of the tokens.*unknown to the tokenizer of `models/tiny`.*Do something."):
        check_known([{"text": "a b zzz"}], make_tokenizer(), "models/tiny", "Do something.")
