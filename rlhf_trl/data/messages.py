"""Text and chat messages: checks, conversions, and the system prompt."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar

from rlhf_trl.data.images import check_parts
from rlhf_trl.data.rows import RowError, Struct, type_of
from rlhf_trl.errors import DataError


def as_text(value: str | Sequence[dict]) -> str:
    """Return a prompt or a completion as text: messages as `role: content`, a single answer as its content."""
    if isinstance(value, str):
        return value
    contents = [(message["role"], _content(message.get("content"))) for message in value]
    if len(contents) == 1 and contents[0][0] == "assistant":
        return contents[0][1]
    return "\n".join(f"{role}: {content}" for role, content in contents)


def _content(content) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return " ".join(part.get("text", f"[{part['type']}]") for part in content)


# While rows are read for a tokenizer with a chat template: `check(messages, row)`, which raises a `RowError` if the
# template refuses the chat. `rlhf_trl.data.chat_template.refusals_named` sets it.
CHAT_CHECK: ContextVar[Callable[[list[dict], dict], None] | None] = ContextVar("chat_check", default=None)
# While rows are read with `data.to_chat: null` for models with a chat template: the special tokens that it writes.
# `None`: text stays text. `rlhf_trl.data.chat_template.text_as_chat` sets it.
TEMPLATE_TOKENS: ContextVar[frozenset[str] | None] = ContextVar("template_tokens", default=None)
# While rows are read for models with processors: the tokens that these read as an image. `text_as_chat` sets it too
IMAGE_TOKENS: ContextVar[frozenset[str]] = ContextVar("image_tokens", default=frozenset())
# The columns of all dataset types that may hold chats
CHATS = ("prompt", "completion", "chosen", "rejected", "messages", "completions")
# A chat in text: JSON, or what Python prints of a list
CHAT_AS_TEXT = re.compile(r"""\s*\[\s*\{[^{}]*["'](role|from)["']\s*:""")
ROLES = ("system", "developer", "user", "assistant", "tool")
TO_CHAT = "`to_chat`: text prompts became user turns, answers assistant turns"
AS_TEMPLATE = (
    "text prompts became user turns, answers assistant turns, since the model has a chat template "
    "(`data.to_chat=false` keeps text)"
)
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def check_messages(value: list, field: str) -> list[dict]:
    """
    Return messages as `{"role", "content"}` dicts, with other keys that aren't null.

    The `{"from", "value"}` spelling (ShareGPT) with its roles `human` and `gpt` is accepted too.

    Raises:
        RowError: if a message is malformed.
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
        if isinstance(message["content"], list):
            message["content"] = check_parts(message["content"], f"{at}.content", str(message["role"]))
        elif not isinstance(message["content"], str):
            raise RowError(f"{at}.content", f"is {type_of(message['content'])}, where text should be")
        needs_text = message["role"] in ("user", "assistant") and "tool_calls" not in message
        if needs_text and isinstance(message["content"], str) and not message["content"].strip():
            raise RowError(f"{at}.content", "is empty")
        messages.append(message)
    return messages


def without_filled(value):
    """Return a value without the null fields of a [`Struct`], which stand for fields that other rows have."""
    if isinstance(value, list):
        return [without_filled(item) for item in value]
    if isinstance(value, dict):
        filled = isinstance(value, Struct)
        return {key: without_filled(item) for key, item in value.items() if not (filled and item is None)}
    return value


def check_text_or_chat(row: dict, field: str) -> str | list[dict]:
    """Return the value of `field`, text that isn't blank or checked messages; raise a `RowError` for anything else."""
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


def as_chat(text: str | list[dict], role: str) -> list[dict]:
    """Return text as a turn of `role`, and messages as they are."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def split_last_turn(messages: list[dict], field: str) -> tuple[list[dict], list[dict]]:
    """Split a conversation into the turns before its last assistant turn, and that turn."""
    if messages[-1]["role"] != "assistant":
        raise RowError(field, f"ends with a turn of `{messages[-1]['role']}`, where the assistant's should be")
    return messages[:-1], messages[-1:]


def check_turns(prompt, given: dict) -> None:
    """Raise a `RowError` if a chat prompt doesn't end with the user's turn, or an answer isn't the assistant's."""
    if isinstance(prompt, str):
        return
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError("prompt", f"ends with a turn of `{prompt[-1]['role']}`, where the user's should be")
    for field, turns in given.items():
        for turn, name in ((turns[0], "begins"), (turns[-1], "ends")):
            if turn["role"] != "assistant":
                raise RowError(field, f"{name} with a turn of `{turn['role']}`, where the assistant's should be")


def to_chat(row: dict, notes: Counter, wanted: bool | None, place: str) -> dict:
    """
    Convert text prompts to the user's turn and text answers to the assistant's, if so wanted.

    Args:
        notes (`Counter`): counts the rows that are converted.
        wanted (`bool`, *optional*): `None` converts if the rows are read for models with a chat template, see
            [`~rlhf_trl.data.chat_template.text_as_chat`].
        place (`str`): file and row, for the message.

    Raises:
        DataError: if `wanted` is `None` and the text is a chat already, as the template writes it.
    """
    tokens = TEMPLATE_TOKENS.get()
    if wanted is False or (wanted is None and tokens is None):
        return row
    if isinstance(prompt := row.get("prompt"), str):
        notes[TO_CHAT if wanted else AS_TEMPLATE] += 1
        if found := sorted(token for token in tokens or () if wanted is None and token in prompt):
            raise DataError(
                f"{place}: the text in `prompt` holds `{found[0]}`, which the chat template writes, so it seems to be "
                "rendered already. Set `data.to_chat=false` to take it as it is, or `data.to_chat=true` to make it "
                "the user's turn all the same."
            )
    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    made = {key: as_chat(value, roles[key]) if key in roles else value for key, value in row.items()}
    if "completions" in row:
        made["completions"] = [as_chat(value, "assistant") for value in row["completions"]]
    return made


def add_system_prompt(row: dict, system_prompt: str, notes: Counter) -> dict:
    """Add `system_prompt` before the turns of `prompt` or `messages`, unless they begin with one of their own."""
    field = "messages" if "messages" in row else "prompt"
    if row[field][0]["role"] in ("system", "developer"):
        notes["`system_prompt` not added: they have one of their own"] += 1
        return row
    notes["`system_prompt` added"] += 1
    return {**row, field: [{"role": "system", "content": system_prompt}, *row[field]]}


def check_words(row: dict) -> None:
    """Raise a `RowError` if one of the models that rows are read for would read words of a chat as an image."""
    if not IMAGE_TOKENS.get():
        return
    chats = [(field, row.get(field)) for field in CHATS if field != "completions"]
    completions = row.get("completions")
    chats += [("completions", chat) for chat in (completions if isinstance(completions, list) else [])]
    for field, chat in chats:
        if not isinstance(chat, list) or not all(isinstance(turn, dict) for turn in chat):
            continue  # a column of that name may hold anything beside prompts
        words = "\n".join(_content(turn.get("content")) for turn in chat)
        if found := sorted(token for token in IMAGE_TOKENS.get() if token in words):
            raise RowError(
                field,
                f"holds `{found[0]}` in its text, which the model reads as an image. Remove it: images stand "
                'before the first words of the user, or where a turn has a part `{"type": "image"}`',
            )


def check_template(row: dict) -> None:
    """Raise a `RowError` if the chat template that rows are read for refuses one of the chats of a row."""
    check = CHAT_CHECK.get()
    if check is None or not is_chat(row):
        return
    start = row.get("prompt") or []
    answers = [row[name] for name in ("messages", "completion", "chosen", "rejected") if name in row]
    for answer in [*answers, *row.get("completions", []), []]:
        if isinstance(answer, list) and start + answer:  # a column of that name may hold anything beside prompts
            check(start + answer, row)


def read_json_chats(row: dict, notes: Counter) -> dict:
    """Parse chats that were written as JSON text, as a table of text holds them."""
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
    """Return whether a row, of any dataset type, is conversational."""
    return "messages" in row or isinstance(row.get("prompt"), list)
