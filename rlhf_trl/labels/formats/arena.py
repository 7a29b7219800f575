"""
Arena battles (LMSYS, FastChat, LMArena): two conversations and who won. `tie (bothbad)`, or `both_bad`, is no tie.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rlhf_trl.data.messages import as_chat
from rlhf_trl.data.row_types import shared_prompt
from rlhf_trl.data.rows import RowError
from rlhf_trl.labels.formats.base import OWN, Item, Parsed, Response

LINES: bool = False
FORMS: tuple[str, ...] = ("pair",)
WINNERS: dict[Any, str] = {0: "model_a", 1: "model_b", "tie": "tie", "both_bad": "tie (bothbad)"}
# Of raw logs, and of later releases
VOTES = {"leftvote": 0, "rightvote": 1, "tievote": "tie", "bothbad_vote": "both_bad", "both_bad": "both_bad"}


def write(item: Item, number: int) -> Iterator[dict[str, Any]]:
    """Yield a battle for each label of a question. A battle without a winner is none, so others are left out."""
    prompt = as_chat(item.row.prompt, "user")
    policies = [item.row.candidates[i].policy or f"candidate-{i}" for i in item.shown]
    conversations = [prompt + as_chat(completion, "assistant") for completion in item.completions]
    for label in item.labels:
        if label.answer is None:
            continue
        yield {
            "question_id": f"{item.row.id}-{'-'.join(map(str, item.question))}",
            "model_a": policies[0],
            "model_b": policies[1],
            "winner": WINNERS[item.answer(label)],
            "judge": label.labeler,
            "turn": sum(turn["role"] == "user" for turn in prompt),
            "conversation_a": conversations[0],
            "conversation_b": conversations[1],
            "tstamp": None if label.time is None else _stamp(label.time),
            OWN: item.own([label]),
        }


def read(row: dict[str, Any]) -> Parsed:
    """Return what a battle says."""
    a, b = (_conversation(row.get(name)) for name in ("conversation_a", "conversation_b"))
    if not a or not b:
        raise RowError("conversation_a", "or `conversation_b` is no list of messages")
    length = shared_prompt(a, b)
    while length and a[length - 1].get("role") != "user":
        length -= 1
    own = row.get(OWN) or {}
    if not length and not own:
        raise RowError("conversation_b", "shares no prompt with `conversation_a`")
    winner = row.get("winner", row.get("type"))
    answers = {name: answer for answer, name in WINNERS.items()} | VOTES
    judge = row.get("judge", row.get("judge_hash"))
    made = Response(labeler=None if judge is None else str(judge))
    if isinstance(row.get("tstamp"), int | float):
        made.time = datetime.fromtimestamp(row["tstamp"], UTC).isoformat(timespec="microseconds")
    if winner in answers:
        made.answer = answers[winner]
    else:
        made.problem = f"has the winner {winner!r}, not one of {', '.join(WINNERS.values())}"
    return Parsed(
        prompt=a[:length],
        completions=[a[length:], b[length:]],
        form="pair",
        own=own,
        responses=[made],
        policies=[str(row.get("model_a")), str(row.get("model_b"))],
    )


def _conversation(value: Any) -> list[dict[str, Any]] | None:
    """Return the turns of a conversation with role and content alone, `None` where it is none."""
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return None
    return [{"role": turn.get("role"), "content": _text(turn.get("content"))} for turn in value]


def _text(content: Any) -> Any:
    """Return a content in parts as its text, if it is text alone."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    return content


def _stamp(time: str) -> float:
    moment = datetime.fromisoformat(time)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
