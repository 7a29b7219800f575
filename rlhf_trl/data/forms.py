"""
What a row holds, and how it becomes the form that a stage asks for.

A *format* is what the file holds, a *form* is what a stage trains on; both are TRL's dataset types, standard (text) or
conversational (lists of messages). Everything here works on one row, a dict, and raises `RowError` where the row is
malformed.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar

from rlhf_trl.data.read import RowError, Struct

# While rows are read for a tokenizer with a chat template: `check(messages, row)`, which raises a `RowError` if the
# template refuses the chat. `rlhf_trl.data.tokens.refusals_named` sets it.
CHAT_CHECK: ContextVar[Callable[[list[dict], dict], None] | None] = ContextVar("chat_check", default=None)
# What each format needs at the least, in the order in which formats are recognized: the more telling first.
FORMATS = {
    "preference": ("chosen", "rejected"),  # `prompt` may be missing: it is then what both have in common
    "unpaired": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "prompt": ("prompt",),
    "text": ("text",),
}

# Which formats a form can be made from without inventing anything, the most direct first.
SOURCES = {
    "prompt_completion": ("prompt_completion", "messages", "preference", "unpaired", "text"),
    "preference": ("preference",),
    "unpaired": ("unpaired", "preference"),
    "comparisons": ("preference",),
    "judged": ("preference",),
    "prompt": ("preference", "prompt_completion", "prompt", "messages", "unpaired"),
}

CONVERSIONS = {
    ("preference", "prompt_completion"): "`chosen` is the completion",
    ("preference", "unpaired"): "`chosen` and `rejected` make a row each, labelled true and false",
    ("preference", "comparisons"): "two completions, `chosen` the better one",
    ("preference", "judged"): "two completions, `chosen` the better one",
    ("preference", "prompt"): "prompts alone",
    ("unpaired", "prompt_completion"): "rows labelled true alone",
    ("unpaired", "prompt"): "prompts alone",
    ("prompt_completion", "prompt"): "prompts alone",
    ("messages", "prompt_completion"): "the last assistant turn is the completion",
    ("messages", "prompt"): "what stands before the last assistant turn is the prompt",
    ("text", "prompt_completion"): "plain text, all of it trained on",
}

# The columns that have a meaning of their own. `tools` and `chat_template_kwargs` go to the chat template, `margin` to
# the reward model's loss.
CANONICAL = ("prompt", "completion", "chosen", "rejected", "label", "messages", "text")
PASSED_ON = ("tools", "chat_template_kwargs")
# The columns of all forms that may hold chats
CHATS = ("prompt", "completion", "chosen", "rejected", "messages", "completions")
# What a row of the form `judged` holds beside its prompt and columns of its own
JUDGED = ("completions", "better", "worse", "gap", "share", "ratings", "attributes")
# A chat in text: JSON, or what Python prints of a list
CHAT_AS_TEXT = re.compile(r"""\s*\[\s*\{[^{}]*["'](role|from)["']\s*:""")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def formats_in(columns) -> list[str]:
    """The formats that these columns can be read as. A label tells `unpaired` from `prompt_completion`."""
    formats = [name for name, needed in FORMATS.items() if set(needed) <= set(columns)]
    return [name for name in formats if not (name == "prompt_completion" and "unpaired" in formats)]


def choose_format(form: str, columns) -> str | None:
    """The format among `columns` that serves `form` best, or `None`."""
    formats = formats_in(columns)
    if form == "prompt":  # a label is then no feedback but a column for the reward function
        formats = ["prompt_completion" if name == "unpaired" else name for name in formats]
    return next((name for name in SOURCES[form] if name in formats), None)


def check_messages(value: list, field: str) -> list[dict]:
    """
    Messages as `{"role", "content"}` dicts (further keys are kept where they aren't null), or a `RowError`.

    The `{"from", "value"}` spelling (ShareGPT) with its roles `human` and `gpt` is understood too.
    """
    if not value:
        raise RowError(field, "is an empty list")
    messages = []
    for i, message in enumerate(value):
        at = f"{field}[{i}]"
        if not isinstance(message, dict):
            raise RowError(at, f"is {type_of(message)}, where a message with `role` and `content` should be")
        if "role" not in message and "from" in message and "value" in message:
            role = SHAREGPT_ROLES.get(message["from"], message["from"])
            message = {"role": role, "content": message["value"]}
        message = {key: without_filled(item) for key, item in message.items() if item is not None}
        if message.get("role") not in ROLES:
            found = f"`{message['role']}`, not one of" if "role" in message else "missing, it should be one of"
            raise RowError(f"{at}.role", f"is {found} {', '.join(ROLES)}")
        if "content" not in message and "tool_calls" in message:
            message["content"] = ""
        if "content" not in message:
            raise RowError(f"{at}.content", "is missing or null")
        if not isinstance(message["content"], str):
            raise RowError(f"{at}.content", f"is {type_of(message['content'])}, where text should be")
        needs_text = message["role"] in ("user", "assistant") and "tool_calls" not in message
        if needs_text and not message["content"].strip():
            raise RowError(f"{at}.content", "is empty")
        messages.append(message)
    return messages


def without_filled(value):
    """`value` without the null fields of a [`Struct`], which only stand for what other rows have."""
    if isinstance(value, list):
        return [without_filled(item) for item in value]
    if isinstance(value, dict):
        filled = isinstance(value, Struct)
        return {key: without_filled(item) for key, item in value.items() if not (filled and item is None)}
    return value


def needs_json(value) -> bool:
    """
    Whether Arrow has no type for a value: an object that isn't a plain `role` and `content` has parts that those of
    other rows haven't, and an integer may have more than 64 bits.
    """
    if isinstance(value, list):
        return any(map(needs_json, value))
    if isinstance(value, int):
        return not -(2**63) <= value < 2**63
    return isinstance(value, dict) and not (
        value.keys() == {"role", "content"} and all(isinstance(item, str) for item in value.values())
    )


def check_text_or_chat(row: dict, field: str) -> str | list[dict]:
    """The value of `field`: text that isn't blank, or checked messages; else a `RowError`."""
    if field not in row:
        raise RowError(field, "is missing")
    value = row[field]
    if value is None:
        raise RowError(field, "is null")
    if isinstance(value, str):
        if not value.strip():
            raise RowError(field, "is empty")
        return value
    if isinstance(value, list):
        return check_messages(value, field)
    raise RowError(field, f"is {type_of(value)}, where text or a list of messages should be")


def check_label(row: dict) -> bool:
    """`label` as a bool: true and false, 1 and 0, and these words as text (a CSV file has no other way)."""
    if "label" not in row:
        raise RowError("label", "is missing")
    value = row["label"]
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    if str(value).lower() not in known:
        raise RowError("label", f"is {value!r}, where true or false should be")
    return known[str(value).lower()]


def check_margin(row: dict) -> float:
    """`margin`, by how much `chosen` is better, as a finite float."""
    value = row.get("margin")
    try:
        margin = float(value)
    except (TypeError, ValueError):
        raise RowError("margin", f"is {value!r}, where a number should be") from None
    if not math.isfinite(margin):
        raise RowError("margin", f"is {margin}, where a finite number should be")
    return margin


def as_chat(text: str | list[dict], role: str) -> list[dict]:
    """Text as a turn of `role`; messages stay what they are."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def shared_prompt(chosen, rejected):
    """
    How long the beginning is that `chosen` and `rejected` share: turns of a chat, or characters up to a word's end.

    As `trl.extract_prompt`, but text is never parted within a word, and what follows is never nothing.
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


def split_last_turn(messages: list[dict], field: str) -> tuple[list[dict], list[dict]]:
    """A conversation as what stands before its last assistant turn, and that turn."""
    if messages[-1]["role"] != "assistant":
        raise RowError(field, f"ends with a turn of `{messages[-1]['role']}`, where the assistant's should be")
    return messages[:-1], messages[-1:]


def pair_up(row: dict, answers: tuple[str, ...], notes: Counter) -> dict:
    """
    Checked `prompt` and answers (`completion`, or `chosen` and `rejected`) of a row, all text or all chat.

    Where one side is text and the other chat, text becomes the user's or the assistant's turn. A prompt that is
    missing, or repeated at the beginning of the answers, is taken out of them. `notes` counts what was done.
    """
    given = {field: check_text_or_chat(row, field) for field in answers}
    prompt = check_text_or_chat(row, "prompt") if "prompt" in row else None
    if isinstance(prompt, list) or any(isinstance(value, list) for value in given.values()):
        if any(isinstance(value, str) for value in given.values()):
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
    """Whether text answers all begin with the row's prompt, which is text of more than one word."""
    prompt, answers = row.get("prompt"), [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    answers += row.get("completions") or []
    if not isinstance(prompt, str) or len(prompt.split()) < 2 or not answers:
        return False
    return all(isinstance(answer, str) and answer.startswith(prompt) for answer in answers)


def take_prompt_out(row: dict) -> dict:
    """A row of which [`repeats_prompt`] is true with the answers alone."""
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
    """Part whole conversations (or texts) into the prompt they share and the answers."""
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
    if isinstance(prompt, str) and prompt.strip() not in [turn["content"].strip() for turn in shared]:
        raise RowError("prompt", f"isn't a turn of the conversation in `{fields[0]}`")
    if isinstance(shared, str):
        notes["the prompt is the text that `chosen` and `rejected` begin with"] += 1
    else:
        notes[f"the prompt is the turns that {' and '.join(f'`{f}`' for f in fields)} begin with"] += 1
    return shared, {field: value[length:] for field, value in given.items()}


def check_turns(prompt, given: dict) -> None:
    """A `RowError` where a chat prompt doesn't end with the user's turn, or an answer isn't the assistant's."""
    if isinstance(prompt, str):
        return
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError("prompt", f"ends with a turn of `{prompt[-1]['role']}`, where the user's should be")
    for field, turns in given.items():
        for turn, name in ((turns[0], "begins"), (turns[-1], "ends")):
            if turn["role"] != "assistant":
                raise RowError(field, f"{name} with a turn of `{turn['role']}`, where the assistant's should be")


def alpaca(row: dict, notes: Counter) -> dict:
    """A row with an Alpaca `instruction` for a prompt: what it is about, `input`, comes below it."""
    notes["`instruction` is the prompt, `output` the completion; `data.columns.prompt=NAME` says otherwise"] += 1
    about = row.get("input")
    if not isinstance(about, str) or not about.strip() or not isinstance(row.get("prompt"), str):
        return row
    notes["`input` came below its `instruction`"] += 1
    return {**row, "prompt": f"{row['prompt']}\n{about}"}


def read_row(row: dict, format: str, notes: Counter) -> dict:
    """The row's checked fields in `format`, with an explicit prompt where it has one; `notes` counts changes."""
    match format:
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
        case "text":
            text = check_text_or_chat(row, "text")
            if not isinstance(text, str):
                raise RowError("text", "is a list, where text should be")
            return {"text": text}


def prompt_of(row: dict) -> str | list[dict]:
    """What a checked row of any format asks: its prompt, a conversation without its answer, plain text as it is."""
    if "messages" in row:
        turns = row["messages"]
        return turns[:-1] if turns[-1]["role"] == "assistant" else turns
    return row["prompt"] if "prompt" in row else row["text"]


def convert(row: dict, format: str, form: str, whole_messages: bool = False) -> list[dict]:
    """A row that `read_row` gave as rows of `form`: one, two (`unpaired` of a pair), none (labelled false)."""
    match format, form:
        case ("messages", "prompt_completion") if whole_messages:
            split_last_turn(row["messages"], "messages")
            return [row]
        case "messages", "prompt_completion":
            prompt, completion = split_last_turn(row["messages"], "messages")
            if not prompt:
                raise RowError("messages", "holds no turn before the assistant's")
            check_turns(prompt, {"completion": completion})
            return [{"prompt": prompt, "completion": completion}]
        case "messages", "prompt":
            prompt = prompt_of(row)
            if not prompt:
                raise RowError("messages", "holds no turn before the assistant's")
            check_turns(prompt, {})
            return [{"prompt": prompt}]
        case _, "prompt":
            return [{"prompt": row["prompt"]}]
        case "preference", "prompt_completion":
            return [{"prompt": row["prompt"], "completion": row["chosen"]}]
        case "preference", "unpaired":
            return [
                {"prompt": row["prompt"], "completion": row["chosen"], "label": True},
                {"prompt": row["prompt"], "completion": row["rejected"], "label": False},
            ]
        case "preference", "comparisons" | "judged":
            return [comparisons_of(row)]
        case "unpaired", "prompt_completion":
            return [{"prompt": row["prompt"], "completion": row["completion"]}] if row["label"] else []
    return [row]


def comparisons_of(row: dict) -> dict:
    """A row with `chosen` and `rejected` as one of the form `comparisons`: `completions`, `better` and `worse`."""
    rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected", "margin")}
    margin = {"margin": [row["margin"]]} if row.get("margin") is not None else {}
    return {**rest, "completions": [row["chosen"], row["rejected"]], "better": [0], "worse": [1], **margin}


def judged_of(row: dict) -> dict:
    """
    A row of two completions as one of the form `judged`: its `margin`, or its columns `gap` and `share`, are those of
    its one comparison.
    """
    made = {key: value for key, value in row.items() if key != "margin"}
    if "margin" in row:
        made["gap"] = row["margin"]
    for name, least, most in (("gap", -math.inf, math.inf), ("share", 0, 1)):
        value = row.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise RowError(name, f"is {value!r}, where a number should be")
            if not least <= value <= most:
                raise RowError(name, f"is {value:g}, where a share from {least} to {most} should be")
            made[name] = [float(value)]
    return made


# What belongs to each comparison of a row, and to each completion.
BY_COMPARISON = ("better", "worse", "margin", "weights", "label_smoothing")
BY_COMPLETION = ("completions", "completion_ids", "targets")


def select_completions(row: dict, keep: list[int]) -> dict:
    """A row of the form `comparisons` with these completions, in this order, and the comparisons among them."""
    place = {old: new for new, old in enumerate(keep)}
    pairs = list(zip(row.get("better") or [], row.get("worse") or [], strict=True))
    left = [m for m, (a, b) in enumerate(pairs) if a in place and b in place]
    made = dict(row)
    made |= {name: [row[name][i] for i in keep] for name in BY_COMPLETION if row.get(name) is not None}
    made |= {name: [row[name][m] for m in left] for name in BY_COMPARISON if row.get(name) is not None}
    made |= {name: [place[i] for i in made[name]] for name in ("better", "worse") if row.get(name) is not None}
    return made


def contents(rows: list[dict], form: str) -> str:
    """In words, how much rows of a form hold: prompts, completions, pairs, targets, good and bad ones."""
    counts = {"rows": len(rows), "prompts": len({json.dumps(row["prompt"]) for row in rows})}
    if form in ("comparisons", "judged"):
        counts["completions"] = sum(len(row["completions"]) for row in rows)
        counts["pairs"] = sum(len(row.get("better") or []) for row in rows)
        targets = [target for row in rows for target in row.get("targets") or []]
        counts["targets"] = sum(value is not None for target in targets for value in target.values())
    elif form == "unpaired":
        counts["good"] = sum(row["label"] for row in rows)
        counts["bad"] = len(rows) - counts["good"]
    return f"{form}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def to_chat(row: dict, notes: Counter) -> dict:
    """Text prompts as the user's turn and text answers as the assistant's."""
    if isinstance(row.get("prompt"), str):
        notes["`to_chat`: text prompts became user turns, answers assistant turns"] += 1
    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    made = {key: as_chat(value, roles[key]) if key in roles else value for key, value in row.items()}
    if "completions" in row:
        made["completions"] = [as_chat(value, "assistant") for value in row["completions"]]
    return made


def add_system_prompt(row: dict, system_prompt: str, notes: Counter) -> dict:
    """`system_prompt` before the turns of `prompt` or `messages`, unless they begin with one of their own."""
    field = "messages" if "messages" in row else "prompt"
    if row[field][0]["role"] in ("system", "developer"):
        notes["`system_prompt` not added: they have one of their own"] += 1
        return row
    notes["`system_prompt` added"] += 1
    return {**row, field: [{"role": "system", "content": system_prompt}, *row[field]]}


def check_template(row: dict) -> None:
    """A `RowError` if the chat template that rows are read for refuses one of the chats of a row, of any form."""
    check = CHAT_CHECK.get()
    if check is None or not is_chat(row):
        return
    start = row.get("prompt") or []
    answers = [row[name] for name in ("messages", "completion", "chosen", "rejected") if name in row]
    for answer in [*answers, *row.get("completions", []), []]:
        if isinstance(answer, list) and start + answer:  # a column of that name may hold anything beside prompts
            check(start + answer, row)


def read_json_chats(row: dict, notes: Counter) -> dict:
    """A row whose chats were written as JSON text, as a table of text holds them, with the chats themselves."""
    made = dict(row)
    for field in CHATS:
        text = row.get(field)
        if not isinstance(text, str) or not CHAT_AS_TEXT.match(text):
            continue
        try:
            made[field] = json.loads(text)
        except ValueError as error:
            raise RowError(
                field,
                f"is text that looks like a chat and is no JSON ({error}). Write it with `json.dumps` (Python's own "
                "notation, with single quotes, isn't JSON), or as a list",
            ) from None
        notes[f"`{field}`: chats written as JSON text were read as chats"] += 1
    return made


def is_chat(row: dict) -> bool:
    """Whether a row of any form is conversational."""
    return "messages" in row or isinstance(row.get("prompt"), list)


def kind_of(row: dict) -> str:
    """In words, what all rows of a dataset must have in common: text or chat, whole or with a prompt, a margin."""
    if "messages" in row or "text" in row:
        return "whole conversations (chat)" if "messages" in row else "plain `text`"
    return (
        f"{'chat' if is_chat(row) else 'text'} prompts{' with a margin' if {'chosen', 'margin'} <= set(row) else ''}"
    )


def type_of(value) -> str:
    names = {"dict": "an object", "list": "a list", "str": "text", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, f"a number ({value})" if isinstance(value, (int, float)) else f"{value!r}")
