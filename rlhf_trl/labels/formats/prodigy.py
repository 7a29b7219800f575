"""
Prodigy's choices, one line per answer: `options` with the two answers, a tie and two bad ones, of which `accept` names
one. `ignore` and `reject` are skips.
"""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rlhf_trl.data.rows import RowError
from rlhf_trl.labels.formats.base import OWN, Item, Parsed, Response, plain

LINES: bool = True
FORMS: tuple[str, ...] = ("pair",)
OTHERS = {"tie": "Tie", "both_bad": "Both are bad"}


def write(item: Item, number: int) -> Iterator[dict[str, Any]]:
    """Yield a line for each label of a question, or a task without an answer."""
    texts = [plain(completion) for completion in item.completions]
    options = [{"id": f"answer-{i}", "text": text} for i, text in enumerate(texts, 1)]
    options += [{"id": name, "text": text} for name, text in OTHERS.items()]
    task = {"text": plain(item.row.prompt), "options": options}
    hashes = {"_input_hash": _hash(task["text"]), "_task_hash": _hash(str(task))}
    for label in item.labels or [None]:
        line = {**task, **hashes}
        if label is not None:
            answer = item.answer(label)
            line["accept"] = (
                [f"answer-{answer + 1}" if isinstance(answer, int) else answer] if answer is not None else []
            )
            line["answer"] = "ignore" if answer is None else "accept"
            line["_annotator_id"] = line["_session_id"] = label.labeler
        yield line | {OWN: item.own([] if label is None else [label])}


def read(row: dict[str, Any]) -> Parsed:
    """Return what a line says."""
    options, prompt = row.get("options"), row.get("text") or row.get("prompt")
    if not isinstance(options, list) or not all(isinstance(each, dict) and "id" in each for each in options):
        raise RowError("options", "is missing, where a list of answers should be")
    answers = [each for each in options if each["id"] not in OTHERS]
    if len(answers) != 2:
        raise RowError("options", f"has {len(answers)} answers beside {', '.join(OTHERS)}, and a pair has 2")
    own = row.get(OWN) or {}
    parsed = Parsed(prompt=prompt, completions=[each.get("text") for each in answers], form="pair", own=own)
    if row.get("answer") is None:
        return parsed
    who = row.get("_annotator_id") or row.get("_session_id")
    made = Response(labeler=None if who is None else str(who))
    if isinstance(row.get("_timestamp"), int | float):
        made.time = datetime.fromtimestamp(row["_timestamp"], UTC).isoformat(timespec="microseconds")
    accepted = row.get("accept") or []
    places = {each["id"]: i for i, each in enumerate(answers)} | {name: name for name in OTHERS}
    if row["answer"] in ("ignore", "reject"):
        made.skipped = f"{row['answer']} in Prodigy"
    elif len(accepted) == 1 and accepted[0] in places:
        made.answer = places[accepted[0]]
    else:
        made.problem = f"accepts {accepted}, and one of {', '.join(map(str, places))} should be"
    parsed.responses.append(made)
    return parsed


def _hash(text: str) -> int:
    """Return a hash of 32 bits with a sign, as Prodigy's are."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=4).digest(), "big", signed=True)
