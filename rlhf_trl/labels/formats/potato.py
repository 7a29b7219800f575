"""
Potato's annotations, one line per annotator and instance.

`responses` holds the answers, `label_annotations` what was said of them: `preference` (`selection` A, B or tie, or
`scale_value`, a number as text, negative for A), `ranking` (`rank_order`, such as `B,D=A,C`, by labels that end in the
letter), `rating-1`, ... and `edited` (of a text box or a text edit).
"""

import math
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

LINES: bool = True
FORMS: tuple[str, ...] = ("pair", "ranking", "rating", "edit")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def write(item: Item, number: int) -> Iterator[dict[str, Any]]:
    """Yield a line for each label of a question, or one without annotations."""
    for label in item.labels or [None]:
        yield {
            "id": f"{item.row.id}-{'-'.join(map(str, item.question))}-{item.form}",
            "text": plain(item.row.prompt),
            "responses": [plain(completion) for completion in item.completions],
            **({} if label is None else {"user_id": label.labeler, "label_annotations": _annotations(item, label)}),
            OWN: item.own([] if label is None else [label]),
        }


def _annotations(item: Item, label: Label) -> dict[str, dict[str, str]]:
    answer = item.answer(label)
    if answer is None:
        return {}
    if item.form == "pair":
        return {"preference": {"selection": LETTERS[answer] if isinstance(answer, int) else answer}}
    if item.form == "ranking":
        return {
            "ranking": {"rank_order": ",".join("=".join(LETTERS[i] for i in group) for group in tie_groups(answer))}
        }
    if item.form == "rating":
        numbers = {
            rating_field(i, name): answer[i] if name is None else answer[i][name] for i, name in rating_names(answer)
        }
        return {name: {"value": f"{number:g}"} for name, number in numbers.items()}
    return {"edited": {"text_box": answer}}


def read(row: dict[str, Any]) -> Parsed:
    """Return what a line says."""
    responses = row.get("responses")
    if not isinstance(responses, list) or not responses:
        raise RowError("responses", "is missing, where a list of answers should be")
    own, given = row.get(OWN) or {}, row.get("label_annotations") or row.get("annotations") or {}
    forms = {"preference": "pair", "ranking": "ranking", "edited": "edit"}
    found = next((forms[name] for name in given if name in forms), "rating" if given else "pair")
    parsed = Parsed(
        prompt=row.get("text") or row.get("prompt"), completions=responses, form=own.get("form") or found, own=own
    )
    skips = [one for one in own.get("labels") or [] if one.get("skipped") is not None]
    if not given and not skips:
        return parsed
    made = Response(labeler=None if row.get("user_id") is None else str(row["user_id"]))
    if not given:
        made.skipped = skips[0]["skipped"]
    else:
        _answer(made, given, parsed, len(responses))
    parsed.responses.append(made)
    return parsed


def _answer(made: Response, given: dict[str, Any], parsed: Parsed, count: int) -> None:
    """Fill in the answer of a response, or its problem."""
    if parsed.form == "pair":
        preference = given.get("preference") or {}
        selection, scale = preference.get("selection"), _number(preference.get("scale_value"))
        if selection in ("A", "B", "tie", "both_bad"):
            made.answer = LETTERS.index(selection) if len(selection) == 1 else selection
        elif scale is not None:
            made.answer = "tie" if scale == 0 else int(scale > 0)
            parsed.lost += [f"the strength of a preference ({preference['scale_value']})"] if abs(scale) > 1 else []
        else:
            made.problem = f"answers {selection!r}, and the answers are A, B, tie and both_bad"
    elif parsed.form == "ranking":
        order = str((given.get("ranking") or {}).get("rank_order") or "")
        # `A`, or a label such as `Response A`
        groups = [[_letter(label) for label in group.split("=")] for group in order.split(",")]
        made.answer = competition_ranks(groups, count)
        made.problem = None if made.answer else f"ranks `{order}` of {count} answers"
    elif parsed.form == "rating":
        found = {name: _number(next(iter(value.values()), None)) for name, value in given.items() if value}
        numbers = {
            name: number
            for name, number in found.items()
            if re.fullmatch(r"rating-\d+(-.+)?", name) and number is not None
        }
        made.answer = read_ratings(numbers, count)
        made.problem = None if numbers else "rates no answer"
    else:
        edited = given.get("edited") or {}
        made.answer = edited.get("edited_text", next(iter(edited.values()), None))
        made.problem = None if made.answer else "has no text"


def _letter(label: str) -> int:
    """Return the place of a letter, the last word of a label; -1 where there is none."""
    word = (label.split() or [""])[-1]
    return LETTERS.find(word) if len(word) == 1 else -1


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if not math.isfinite(number) else int(number) if number == int(number) else number
