"""Rows of a trainer's batch as text, with what is trained on."""

import itertools

from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.tokenize import decode_ids, end_tokens, prompt_ids
from rlhf_trl.hints import count_of
from rlhf_trl.terminal import say


def note_rows_without_end(batch, tokenizer) -> None:
    """Print that nothing which is trained in a batch of a trainer ends a turn, if so."""
    ends = set(end_tokens(tokenizer))
    rows = [row for _, side in _sides(batch) for row in side]
    trained = [{token for token, counts in zip(ids, mask, strict=True) if counts} for ids, mask in rows]
    if not any(ends & tokens for tokens in trained):
        names = ", ".join(f"`{token}`" for token in tokenizer.convert_ids_to_tokens(list(ends))) or "none is known"
        say(
            f"note: no token that ends generation ({names}) is trained on in the first {count_of(len(rows), 'row')}, "
            "so the model doesn't learn to stop. Name the token that ends its turns "
            "(`+stage.args.eos_token=TOKEN`), give a chat template that writes the EOS after the assistant's turns "
            "(`model.chat_template=FILE.jinja`), or raise `stage.args.max_length` if it cuts all rows."
        )


def count_trained(batch) -> tuple[int, int]:
    """Return the number of tokens of a trainer's batch that are trained on (labels other than -100), and of all."""
    counted = [(sum(trained), len(ids)) for _, rows in _sides(batch) for ids, trained in rows]
    return sum(trained for trained, _ in counted), sum(tokens for _, tokens in counted)


def render_batch(tokenizer, batch) -> str:
    """
    Return the first row of a batch as text, with the tokens that are trained on between [[ and ]].

    The batch is what the trainer's collator made; of a pair both sides are shown.
    """
    shown = [f"label: {bool(batch['label'][0])}"] if "label" in batch else []
    for side, rows in _sides(batch):
        shown += [f"{side}:"] if side else []
        shown += [_marked(tokenizer, *rows[0])]
    return "\n".join(shown)


def _sides(batch) -> list[tuple[str, list[tuple[list[int], list[bool]]]]]:
    """
    Return the rows of a batch by side of a pair (else ""): ids without padding, and which of them are trained on.
    """
    if "chosen_input_ids" in batch:  # ORPO
        return [(side, _rows(batch, f"{side}_")) for side in ("chosen", "rejected")]
    rows = _rows(batch)
    if "completion_mask" in batch and "label" not in batch:  # DPO: all chosen ones, then all rejected ones
        return [("chosen", rows[: len(rows) // 2]), ("rejected", rows[len(rows) // 2 :])]
    return [("", rows)]


def _rows(batch, prefix: str = "") -> list[tuple[list[int], list[bool]]]:
    ids = batch[f"{prefix}input_ids"]
    # Rows in one line (`padding_free`) have no mask; what a reward model scores has no labels, and counts as a whole
    kept = batch[f"{prefix}attention_mask"].bool() if f"{prefix}attention_mask" in batch else ids >= 0
    if f"{prefix}labels" in batch:
        trained = batch[f"{prefix}labels"] != -100
    else:
        trained = batch["completion_mask"].bool() if "completion_mask" in batch else kept
    return [(row[real].tolist(), mask[real].tolist()) for row, mask, real in zip(ids, trained, kept, strict=True)]


def render_sample(tokenizer, row: dict) -> str:
    """Return a row without labels as text: a prompt that the policy continues, or what a reward model scores."""
    if "completion_ids" in row and "length" in row:
        return "\n".join(_describe_completion(tokenizer, row, i) for i in range(len(row["completion_ids"])))
    ids = prompt_ids(tokenizer, row["prompt"], **template_kwargs(row))
    return f"{decode_ids(tokenizer, ids)}\n({len(ids)} tokens, which the policy continues)"


def _describe_completion(tokenizer, row: dict, i: int) -> str:
    """Return completion `i` of a row of the reward stage, with its comparisons and targets."""
    beaten = sorted(b + 1 for a, b in zip(row.get("better") or [], row.get("worse") or [], strict=True) if a == i)
    known = [f"better than {', '.join(map(str, beaten))}"] if beaten else []
    targets = row["targets"][i] if row.get("targets") else {}
    known += [f"{name} {value:.3g}" for name, value in targets.items() if value is not None]
    text = decode_ids(tokenizer, row["completion_ids"][i])
    return f"completion {i + 1}{': ' if known else ''}{'; '.join(known)}\n{text}"


def _marked(tokenizer, ids: list[int], trained: list[bool]) -> str:
    """Return `ids` as text, each run of trained tokens between [[ and ]]."""
    text, start = "", 0
    for is_trained, run in itertools.groupby(trained):
        end = start + len(list(run))
        part = decode_ids(tokenizer, ids[start:end])
        text += f"[[{part}]]" if is_trained else part
        start = end
    return f"{text}\n({sum(trained)} of {len(ids)} tokens trained on)"
