"""
Label Studio's tasks with annotations, as its JSON export has them and its import takes them.

Data `prompt`, `answer1`, ..., and for rankings `items`; results `pairwise` (left, right) or `choices` (tie, both_bad)
of a pair, `ranker` of a ranking (with buckets 1, 2, ... where answers tie), `rating` and `textarea`. A skip is
`was_cancelled`. Its users are those of the server: an annotation whose labeler is no e-mail address names none, and
becomes that of whoever imports the file there.
"""

import re
from collections.abc import Iterator
from typing import Any

from rlhf_trl.data.rows import RowError
from rlhf_trl.labels.formats.base import (
    OWN,
    Item,
    Parsed,
    Response,
    competition_ranks,
    plain,
    rating_field,
    rating_names,
    read_ratings,
    tie_groups,
)
from rlhf_trl.labels.store import Label

LINES: bool = False
FORMS: tuple[str, ...] = ("pair", "ranking", "rating", "edit")
SIDES = ("left", "right")


def write(item: Item, number: int) -> Iterator[dict[str, Any]]:
    """Yield the task of a question."""
    texts = [plain(completion) for completion in item.completions]
    data: dict[str, Any] = {"prompt": plain(item.row.prompt)}
    data |= {f"answer{i}": text for i, text in enumerate(texts, 1)}
    if item.form == "ranking":
        data["items"] = [{"id": f"answer{i}", "title": f"Answer {i}", "body": text} for i, text in enumerate(texts, 1)]
    yield {
        "id": number,
        "data": data,
        "meta": {OWN: item.own()},
        "annotations": [
            {
                "id": number * 1000 + i,
                **({"completed_by": {"email": label.labeler}} if "@" in label.labeler else {}),
                "created_at": label.time,
                "lead_time": label.seconds,
                "was_cancelled": label.answer is None,
                "result": [] if label.answer is None else _results(item, label),
            }
            for i, label in enumerate(item.labels)
        ],
        "predictions": [],
    }


def _results(item: Item, label: Label) -> list[dict[str, Any]]:
    answer = item.answer(label)
    if item.form == "pair" and isinstance(answer, int):
        return [_result("preference", "answer1,answer2", "pairwise", {"selected": SIDES[answer]})]
    if item.form == "pair":
        return [_result("tie", "prompt", "choices", {"choices": [answer]})]
    if item.form == "ranking":
        groups = [[f"answer{i + 1}" for i in group] for group in tie_groups(answer)]
        ties = len(groups) < len(answer)
        ranker = {str(i): group for i, group in enumerate(groups, 1)} if ties else [name for (name,) in groups]
        return [_result("ranking", "items", "ranker", {"ranker": ranker})]
    if item.form == "rating":
        return [
            _result(
                rating_field(i, name),
                f"answer{i + 1}",
                "rating",
                {"rating": answer[i] if name is None else answer[i][name]},
            )
            for i, name in rating_names(answer)
        ]
    return [_result("edited", "answer1", "textarea", {"text": [answer]})]


def _result(name: str, target: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"from_name": name, "to_name": target, "type": kind, "value": value}


def read(row: dict[str, Any]) -> Parsed:
    """Return what a task says."""
    data = row.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
        raise RowError("data", "holds no `prompt`")
    names = sorted((name for name in data if re.fullmatch(r"answer\d+", name)), key=lambda name: int(name[6:]))
    if names:
        completions = [data[name] for name in names]
    else:
        completions = [item.get("body") or item.get("title") for item in data.get("items") or []]
    items = [str(item.get("id")) for item in data.get("items") or []] or names
    own = (row.get("meta") or {}).get(OWN) or {}
    annotations = row.get("annotations") or []
    kinds = [result.get("type") for each in annotations for result in each.get("result") or []]
    forms = {"ranker": "ranking", "pairwise": "pair", "choices": "pair", "rating": "rating", "textarea": "edit"}
    found = next((form for kind, form in forms.items() if kind in kinds), "pair")
    parsed = Parsed(prompt=data["prompt"], completions=completions, form=own.get("form") or found, own=own)
    unnamed = iter([one.get("labeler") for one in own.get("labels") or [] if "@" not in str(one.get("labeler"))])
    for each in annotations:
        who = _who(each.get("completed_by"))
        made = Response(
            labeler=next(unnamed, None) if who is None else who,
            time=each.get("created_at"),
            seconds=each.get("lead_time"),
        )
        if each.get("was_cancelled"):
            made.skipped = "skipped in Label Studio"
        else:
            _answer(made, each.get("result") or [], parsed.form, items)
        parsed.responses.append(made)
    return parsed


def _answer(made: Response, results: list[dict[str, Any]], form: str, items: list[str]) -> None:
    """Fill in the answer of a response, or its problem."""
    values = {kind: [] for kind in ("pairwise", "choices", "ranker", "rating", "textarea")}
    for result in results:
        values.get(str(result.get("type")), []).append((result.get("from_name"), result.get("value") or {}))
    if form == "pair":
        sides = [value.get("selected") for _, value in values["pairwise"]]
        choices = [choice for _, value in values["choices"] for choice in value.get("choices") or []]
        if sides and sides[0] in SIDES and not choices:
            made.answer = SIDES.index(sides[0])
        elif len(choices) == 1 and choices[0] in ("tie", "both_bad") and not sides:
            made.answer = choices[0]
        else:
            made.problem = "has no answer" if not sides and not choices else f"answers {sides + choices}"
    elif form == "ranking":
        ranker = values["ranker"][0][1].get("ranker") if values["ranker"] else None
        groups = [[name] for name in ranker] if isinstance(ranker, list) else _buckets(ranker)
        places = [[items.index(str(name)) for name in group if str(name) in items] for group in groups]
        made.answer = competition_ranks(places, len(items))
        made.problem = None if made.answer else "ranks some of the answers only"
    elif form == "rating":
        numbers = {
            name: value.get("rating")
            for name, value in values["rating"]
            if re.fullmatch(r"rating-\d+(-.+)?", str(name)) and value.get("rating") is not None
        }
        made.answer = read_ratings(numbers, len(items))
        made.problem = None if numbers else "rates no answer"
    else:
        texts = [text for _, value in values["textarea"] for text in value.get("text") or []]
        made.answer = texts[0] if texts else None
        made.problem = None if texts else "has no text"


def _buckets(ranker: Any) -> list[list[str]]:
    """Return the buckets in the order of their numbers, without the unsorted ones."""
    if not isinstance(ranker, dict) or not all(name == "_" or name.isdecimal() for name in ranker):
        return []
    return [ranker[name] for name in sorted((name for name in ranker if name != "_"), key=int)]


def _who(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("email") or value.get("id")
    return None if value is None else str(value)


def labeling_config(form: str, count: int, attributes: list[str]) -> str:
    """Return the labeling config of a project for a form with `count` answers."""
    lines = ["<View>", '  <Text name="prompt" value="$prompt"/>']
    answers = [f'  <Text name="answer{i}" value="$answer{i}"/>' for i in range(1, count + 1)]
    if form == "pair":
        lines += [*answers, '  <Pairwise name="preference" toName="answer1,answer2"/>']
        lines += ['  <Choices name="tie" toName="prompt"><Choice value="tie"/><Choice value="both_bad"/></Choices>']
    elif form == "ranking":
        lines += ['  <List name="items" value="$items"/>', '  <Ranker name="ranking" toName="items">']
        lines += [f'    <Bucket name="{i}" title="Rank {i}"/>' for i in range(1, count + 1)] + ["  </Ranker>"]
    elif form == "rating":
        for i, answer in enumerate(answers):
            names = [rating_field(i, name) for name in attributes or [None]]
            lines += [answer, *(f'  <Rating name="{name}" toName="answer{i + 1}"/>' for name in names)]
    else:
        lines += [answers[0], '  <TextArea name="edited" toName="answer1" value="$answer1"/>']
    return "\n".join([*lines, "</View>"]) + "\n"
