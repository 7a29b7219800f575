"""
Argilla's records, as `records.to_json` writes them (nested) and with `flatten=True`.

Fields `prompt`, `response-1`, ...; questions `preference` (a label: response-1, response-2, tie, both_bad), `ranking`
(its values in order, best first: equal ranks are kept beside it), `rating-1` or `rating-1-ATTRIBUTE`, ..., and
`edited` (a text). Users are UUIDs.
"""

import re
import uuid
from collections.abc import Iterator
from typing import Any

from rlhf_trl.data.rows import RowError
from rlhf_trl.labels.formats.base import (
    OWN,
    Item,
    Parsed,
    Response,
    competition_ranks,
    rating_field,
    rating_names,
    read_ratings,
    tie_groups,
)

LINES: bool = False
FORMS: tuple[str, ...] = ("pair", "ranking", "rating", "edit")
QUESTIONS = {"preference": "pair", "ranking": "ranking", "edited": "edit"}


def write(item: Item, number: int) -> Iterator[dict[str, Any]]:
    """Yield the record of a question."""
    answered = [label for label in item.labels if label.answer is not None]
    responses: dict[str, list[dict[str, Any]]] = {}
    names: list[str] = []
    for label in answered:
        names += [name for name in _values(item, label) if name not in names]
    for name in names:
        given = [(label, _values(item, label).get(name)) for label in answered]
        # A response without a value is none
        responses[name] = [
            {"value": value, "user_id": _user_id(label.labeler)} for label, value in given if value is not None
        ]
    own = item.own()
    for label, kept in zip(item.labels, own["labels"], strict=True):
        if item.form == "ranking" and label.answer is not None and len({*label.answer}) < len(label.answer):
            kept["ranks"] = item.answer(label)
        if item.form == "rating" and label.answer is not None:
            rated = [name for name, value in _values(item, label).items() if value is not None]
            if len(rated) < len(names):  # another rating of the labeler would take the place of a missing one
                kept["rated"] = rated
    yield {
        "id": f"{item.row.id}-{'-'.join(map(str, item.question))}-{item.form}",
        "fields": {"prompt": item.row.prompt}
        | {f"response-{i}": completion for i, completion in enumerate(item.completions, 1)},
        "metadata": {OWN: own},
        "vectors": {},
        "suggestions": {},
        "responses": responses,
        "status": "completed" if answered else "pending",
    }


def _values(item: Item, label) -> dict[str, Any]:
    """Return the value of each question of a record."""
    answer = item.answer(label)
    if item.form == "pair":
        return {"preference": f"response-{answer + 1}" if isinstance(answer, int) else answer}
    if item.form == "ranking":
        return {"ranking": [f"response-{i + 1}" for group in tie_groups(answer) for i in group]}
    if item.form == "rating":
        return {
            rating_field(i, name): answer[i] if name is None else answer[i][name] for i, name in rating_names(answer)
        }
    return {"edited": answer}


def read(row: dict[str, Any]) -> Parsed:
    """Return what a record says."""
    row = _nested(row)
    fields = row.get("fields")
    if not isinstance(fields, dict) or "prompt" not in fields:
        raise RowError("fields", "holds no `prompt`")
    completions = [fields[name] for name in sorted(_numbered(fields), key=lambda name: int(name.rpartition("-")[2]))]
    own = (row.get("metadata") or {}).get(OWN) or {}
    responses = {name: given for name, given in (row.get("responses") or {}).items() if given}
    forms = dict.fromkeys(_form(name) for name in responses)
    if len(forms) > 1:
        raise RowError("responses", f"answers several questions: {', '.join(responses)}. Export one at a time")
    parsed = Parsed(
        prompt=fields["prompt"],
        completions=completions,
        form=own.get("form") or next(iter(forms), "pair"),
        own=own,
    )
    for one in own.get("labels") or []:  # a record's responses hold answers only
        if one.get("skipped") is not None:
            parsed.responses.append(Response(labeler=one.get("labeler"), skipped=one["skipped"]))
    kept: dict[str, list[dict[str, Any]]] = {}
    for one in own.get("labels") or []:
        if one.get("skipped") is None:
            kept.setdefault(_user_id(str(one.get("labeler"))), []).append(one)
    by_user: dict[tuple[str | None, int], dict[str, Any]] = {}
    skipped: dict[tuple[str | None, int], str] = {}
    for user, entries in kept.items():
        if any("rated" in entry for entry in entries):
            by_user |= {(user, turn): {} for turn in range(len(entries))}  # in the order of the entries
    for name, given in responses.items():
        turns: dict[str | None, int] = {}
        for one in given:
            user = None if one.get("user_id") is None else str(one["user_id"])
            turns[user] = turns.get(user, -1) + 1
            key = user, _turn(kept.get(user or "", []), name, turns[user])
            if one.get("status") == "discarded":
                skipped[key] = "discarded"
            elif one.get("status") in (None, "submitted"):
                by_user.setdefault(key, {})[name] = one.get("value")
    names = {user: str(entries[0]["labeler"]) for user, entries in kept.items()}
    for (user, _), reason in skipped.items():
        parsed.responses.append(Response(labeler=names.get(user or "", user), skipped=reason))
    for (user, turn), values in by_user.items():
        if not values:
            continue
        made = _response(names.get(user or "", user), values, parsed.form, len(completions))
        entry = (kept.get(user or "") or [])[turn : turn + 1]
        if entry and (ranks := entry[0].get("ranks")) and _in_order(ranks) == _in_order(made.answer):
            made.answer = ranks
        parsed.responses.append(made)
    return parsed


def _turn(entries: list[dict[str, Any]], name: str, number: int) -> int:
    """Return which of a labeler's entries the `number`-th value of a question belongs to: one that has a value."""
    rated = [turn for turn, entry in enumerate(entries) if name in entry.get("rated", (name,))]
    return rated[number] if number < len(rated) else len(entries) - len(rated) + number


def _user_id(labeler: str) -> str:
    """Return the id of a labeler, which is a UUID in Argilla."""
    try:
        return str(uuid.UUID(labeler))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"rlhf_trl/{labeler}"))


def _in_order(ranks: Any) -> list[int] | None:
    """Return the places of the answers, best first; of equal ones the first."""
    return [i for group in tie_groups(ranks) for i in group] if isinstance(ranks, list) else None


def _response(user: str | None, values: dict[str, Any], form: str, count: int) -> Response:
    made = Response(labeler=user)
    value = next(iter(values.values()))
    if form == "pair":
        places = {f"response-{i + 1}": i for i in range(count)}
        if isinstance(value, list):  # a ranking of two
            value = _pair_of(value)
        made.answer = places.get(value, value)
        if made.answer not in (*range(count), "tie", "both_bad"):
            made.problem = f"answers {value!r}, and the answers are {', '.join(places)}, tie and both_bad"
    elif form == "ranking":
        made.answer = _ranks(value, count)
        if made.answer is None:
            made.problem = "ranks some of the answers only"
    elif form == "rating":
        numbers = {name: number for name, number in values.items() if number is not None}
        made.answer = read_ratings(numbers, count)
        made.problem = None if numbers else "rates no answer"
    else:
        made.answer = value
    return made


def _ranks(value: Any, count: int) -> list[int] | None:
    ranks = {}
    values = value if isinstance(value, list) else []
    if all(isinstance(one, str) for one in values):  # best first, as Argilla 2 has them
        values = [{"value": one, "rank": rank} for rank, one in enumerate(values, 1)]
    for one in values:
        if isinstance(one, dict) and re.fullmatch(r"response-\d+", str(one.get("value"))) and one.get("rank"):
            ranks[int(one["value"].rpartition("-")[2]) - 1] = one["rank"]
    if ranks.keys() != set(range(count)):
        return None
    return competition_ranks(tie_groups([ranks[i] for i in range(count)]), count)


def _pair_of(value: list) -> Any:
    ranks = _ranks(value, 2)
    return value if ranks is None else "tie" if ranks[0] == ranks[1] else f"response-{ranks.index(min(ranks)) + 1}"


def _form(name: str) -> str:
    form = "rating" if re.match(r"rating-\d", name) else QUESTIONS.get(name)
    if form is None:
        raise RowError(f"responses.{name}", "is none of the questions preference, ranking, rating-N and edited")
    return form


def _numbered(fields: dict[str, Any]) -> list[str]:
    return [name for name, value in fields.items() if re.fullmatch(r"response-\d+", name) and value is not None]


def _nested(row: dict[str, Any]) -> dict[str, Any]:
    """Return a record that was written flat as a nested one."""
    if "fields" in row:
        return row
    made: dict[str, Any] = {"fields": {}, "metadata": {}, "responses": {}}
    for name, value in row.items():
        question, _, what = name.partition(".")
        if what in ("responses", "response"):
            values = value if what == "responses" else [value]
            users = row.get(f"{question}.responses.users") or [None] * len(values or ())
            states = row.get(f"{question}.responses.status") or [None] * len(values or ())
            made["responses"][question] = [
                {"value": each, "user_id": user, "status": status}
                for each, user, status in zip(values or (), users, states, strict=False)
            ]
        elif name == OWN:
            made["metadata"][OWN] = value
        elif not what:
            made["fields"][name] = value
    return made
