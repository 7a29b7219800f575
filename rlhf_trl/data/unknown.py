"""Share of the rows' tokens that a tokenizer doesn't know."""

from collections.abc import Iterable, Iterator
from typing import Any

from rlhf_trl.data.messages import CHATS
from rlhf_trl.errors import DataError
from rlhf_trl.terminal import say

# Rows that are looked at: the first ones
ROWS = 256
# Shares of the tokens from which on there is a note, and an error
NOTED, REFUSED = 0.01, 1 / 3


def unknown_share(rows: Iterable[dict[str, Any]], tokenizer) -> float:
    """Return the share of the unknown token in the texts of rows of any dataset type, without their chat template."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return 0.0
    texts = [text for row in rows for text in _texts([row[name] for name in (*CHATS, "text") if name in row])]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return sum(row.count(unknown) for row in ids) / max(1, sum(map(len, ids)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(value.get("content"))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def check_known(dataset, tokenizer, name: str, remedy: str) -> None:
    """
    Raise an error if a third of the data's tokens or more are unknown, and print a smaller share as a note.

    Args:
        dataset (`Dataset` or `list[dict]`): rows, of which the first are looked at.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of a model that reads them.
        name (`str`): folder or hub id of the tokenizer, for the message.
        remedy (`str`): sentence that says what to set.

    Raises:
        [`~rlhf_trl.errors.DataError`]: if a third of the tokens or more are unknown.
    """
    share = unknown_share((dataset[i] for i in range(min(ROWS, len(dataset)))), tokenizer)
    if share < NOTED:
        return
    said = f"{share:.0%} of the tokens in the data are `{tokenizer.unk_token}`, unknown to the tokenizer of `{name}`"
    if share < REFUSED:
        return say(f"note: {said}")
    raise DataError(f"{said}: it was made for other texts, and the model can't read these. {remedy}")
