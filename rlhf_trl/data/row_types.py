"""
Row types of files: recognition, and checks of single rows.

A row may hold text or lists of messages (TRL's standard and conversational format). All functions work on one row, a
dict, and raise a `RowError` if it is malformed.
"""

import math
from collections import Counter
from typing import Any

from rlhf_trl.data.messages import as_chat, as_text, check_text_or_chat, check_turns, is_chat, split_last_turn
from rlhf_trl.data.rows import RowError

# What each row type needs at the least, in the order in which they are recognized: the more telling first.
ROW_TYPES = {
    "preference": ("chosen", "rejected"),  # `prompt` may be missing: it is then what both have in common
    "unpaired": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "prompt": ("prompt",),
    "text": ("text",),
}

# The columns that have a meaning of their own. `tools` and `chat_template_kwargs` go to the chat template, `images` to
# the processor, `margin` to the reward model's loss.
CANONICAL = ("prompt", "completion", "chosen", "rejected", "label", "messages", "text")
PASSED_ON = ("tools", "chat_template_kwargs", "images")


def row_types_in(columns) -> list[str]:
    """
    Return the row types that these columns can be read as. A label distinguishes `unpaired` from `prompt_completion`.
    """
    row_types = [name for name, needed in ROW_TYPES.items() if set(needed) <= set(columns)]
    return [name for name in row_types if not (name == "prompt_completion" and "unpaired" in row_types)]


def check_label(row: dict) -> bool:
    """Return `label` as a bool: true and false, 1 and 0, and these as text (a CSV file has no other way)."""
    if "label" not in row:
        raise RowError("label", "is missing")
    value = row["label"]
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    if str(value).lower() not in known:
        raise RowError("label", f"is {value!r}, where true or false should be")
    return known[str(value).lower()]


def check_margin(row: dict) -> float:
    """Return `margin`, by how much `chosen` is better, as a finite float; of two numbers the first less the second."""
    value: Any = row.get("margin")
    try:
        pair: Any = value if isinstance(value, list) and len(value) == 2 else (value, 0.0)
        margin = float(pair[0]) - float(pair[1])
    except (TypeError, ValueError):
        raise RowError("margin", f"is {value!r}, where a number should be") from None
    if not math.isfinite(margin):
        raise RowError("margin", f"is {margin}, where a finite number should be")
    return margin


def shared_prompt(chosen, rejected):
    """
    Return the length of the beginning that `chosen` and `rejected` share: turns of a chat, or characters of text.

    As `trl.extract_prompt`, but text is never split within a word, and neither answer becomes empty.
    """
    length = 0
    for a, b in zip(chosen[:-1], rejected[:-1], strict=False):
        if a != b:
            break
        length += 1
    if isinstance(chosen, str):
        while length and chosen[length - 1].isalnum() and (chosen[length] + rejected[length]).isalnum():
            length -= 1
        length -= chosen[:length].endswith(" ")  # the space belongs to the word after it, as tokenizers see it
    return length


def pair_up(row: dict, answers: tuple[str, ...], notes: Counter) -> dict:
    """
    Return the checked `prompt` and answers (`completion`, or `chosen` and `rejected`) of a row, all text or all chat.

    If one side is text and the other chat, text becomes the user's or the assistant's turn. A prompt that is missing,
    or repeated at the beginning of the answers, is removed from them. `notes` counts what was done.
    """
    given = {field: check_text_or_chat(row, field) for field in answers}
    prompt = check_text_or_chat(row, "prompt") if "prompt" in row else None
    has_chat = isinstance(prompt, list) or any(isinstance(value, list) for value in given.values())
    if has_chat and any(isinstance(value, str) for value in given.values()):
        notes["text answers became assistant turns"] += 1
        given = {field: as_chat(value, "assistant") for field, value in given.items()}
    if prompt is None or _hold_whole_conversations(given):
        prompt, given = _take_prompt_out(prompt, given, notes)
    elif isinstance(prompt, str) and isinstance(given[answers[0]], list):
        notes["text prompts became user turns"] += 1
        prompt = as_chat(prompt, "user")
    check_turns(prompt, given)
    if len(answers) == 2 and given["chosen"] == given["rejected"]:
        raise RowError("rejected", "is the same as `chosen`")
    return {"prompt": prompt, **given}


def repeats_prompt(row: dict) -> bool:
    """Return whether all answers are text that begins with the row's prompt, which is text of more than one word."""
    prompt, answers = row.get("prompt"), [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    answers += row.get("completions") or []
    if not isinstance(prompt, str) or len(prompt.split()) < 2 or not answers:
        return False
    return all(isinstance(answer, str) and answer.startswith(prompt) for answer in answers)


def take_prompt_out(row: dict) -> dict:
    """Return a row whose answers begin with the prompt, without the prompt in them."""
    made = dict(row)
    for name in ("completion", "chosen", "rejected"):
        if name in row:
            made[name] = row[name][len(row["prompt"]) :]
            if not made[name].strip():
                raise RowError(name, "is nothing but the prompt")
    return made


def _hold_whole_conversations(given: dict) -> bool:
    return all(isinstance(value, list) and value[0]["role"] != "assistant" for value in given.values())


def _take_prompt_out(prompt, given: dict, notes: Counter) -> tuple:
    """Split whole conversations (or texts) into the prompt that they share and the answers."""
    fields = list(given)
    if isinstance(prompt, list) and all(value[: len(prompt)] == prompt for value in given.values()):
        length = min(len(prompt), *(len(value) - 1 for value in given.values()))
    elif fields == ["completion"]:
        length = len(split_last_turn(given["completion"], "completion")[0])
    elif given["chosen"] == given["rejected"]:
        raise RowError("rejected", "is the same as `chosen`")
    else:
        length = shared_prompt(given["chosen"], given["rejected"])
    shared = given[fields[0]][:length]
    if not shared or (isinstance(shared, str) and not shared.strip()):
        raise RowError(fields[-1], "shares no prompt with `chosen`, and there is no `prompt`")
    if isinstance(prompt, list) and shared != prompt:
        raise RowError("prompt", f"isn't what `{fields[0]}`, a whole conversation, begins with")
    turns = [] if isinstance(shared, str) else [as_text([turn | {"role": "assistant"}]).strip() for turn in shared]
    if isinstance(prompt, str) and prompt.strip() not in turns:
        raise RowError("prompt", f"isn't a turn of the conversation in `{fields[0]}`")
    if isinstance(shared, str):
        notes["the prompt is the text that `chosen` and `rejected` begin with"] += 1
    else:
        notes[f"the prompt is the turns that {' and '.join(f'`{f}`' for f in fields)} begin with"] += 1
    return shared, {field: value[length:] for field, value in given.items()}


def alpaca(row: dict, notes: Counter) -> dict:
    """Return a row with an Alpaca `instruction` for a prompt, and its `input` below it."""
    notes["`instruction` is the prompt, `output` the completion; `data.columns.prompt=NAME` says otherwise"] += 1
    about = row.get("input")
    if not isinstance(about, str) or not about.strip() or not isinstance(row.get("prompt"), str):
        return row
    notes["`input` came below its `instruction`"] += 1
    return {**row, "prompt": f"{row['prompt']}\n{about}"}


def read_row(row: dict, row_type: str, notes: Counter) -> dict:
    """Return the row's checked fields as `row_type`, with an explicit prompt if it has one; `notes` counts changes."""
    match row_type:
        case "preference":
            margin = {"margin": check_margin(row)} if "margin" in row else {}
            return {**pair_up(row, ("chosen", "rejected"), notes), **margin}
        case "unpaired":
            return {**pair_up(row, ("completion",), notes), "label": check_label(row)}
        case "prompt_completion":
            return pair_up(row, ("completion",), notes)
        case "messages":
            messages = check_text_or_chat(row, "messages")
            if isinstance(messages, str):
                raise RowError("messages", "is text, where a list of messages should be")
            return {"messages": messages}
        case "prompt":
            prompt = check_text_or_chat(row, "prompt")
            check_turns(prompt, {})
            return {"prompt": prompt}
        case _:  # text
            text = check_text_or_chat(row, "text")
            if not isinstance(text, str):
                raise RowError("text", "is a list, where text should be")
            return {"text": text}


def prompt_of(row: dict) -> str | list[dict]:
    """Return the prompt of a checked row of any type: a conversation without its answer, plain text as it is."""
    if "messages" in row:
        turns = row["messages"]
        return turns[:-1] if turns[-1]["role"] == "assistant" else turns
    return row["prompt"] if "prompt" in row else row["text"]


def kind_of(row: dict) -> str:
    """Return what all rows of a dataset must have in common: text or chat, whole or with a prompt, a margin."""
    if "messages" in row or "text" in row:
        return "whole conversations (chat)" if "messages" in row else "plain `text`"
    return (
        f"{'chat' if is_chat(row) else 'text'} prompts{' with a margin' if {'chosen', 'margin'} <= set(row) else ''}"
    )
