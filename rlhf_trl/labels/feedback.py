"""
Feedback from labels: rows as `data/feedback` reads them, with who gave them, when, how, and how surely.

| form | kind | columns |
|---|---|---|
| pair | pairs | prompt, completion_a, completion_b, preferred (a, b, tie, both_bad) |
| ranking | rankings | prompt, completions, ranks |
| rating | ratings | prompt, completion, ratings |
| rating of attributes | attributes | prompt, completion, and a column per attribute |
| edit | edits | prompt, original, edited |

Rows of the form that is asked (`stage.ask`) are in `feedback.jsonl`, those of another kind, such as edits beside
pairs, in `feedback.edits.jsonl` and so on.

Beside these each row has `id` (of the prompt), `rater` (the labeler), `time`, `seconds`, `confidence`, `order` (places
of the row's completions as they were shown), `policies` (who wrote them) and `run` (of `stage=label`). `rater` is what
`agreement` reads.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_trl.data.messages import as_chat
from rlhf_trl.labels.candidates import Candidates, Text, write_rows
from rlhf_trl.labels.collection import completion_key
from rlhf_trl.labels.store import Label

FEEDBACK_FILE = "feedback.jsonl"
# Kinds of feedback of each form
KINDS = {"pair": ["pairs"], "ranking": ["rankings"], "rating": ["ratings", "attributes"], "edit": ["edits"]}
PREFERRED = {0: "a", 1: "b", "tie": "tie", "both_bad": "both_bad"}
# Columns of a row that an attribute can't have the name of
TAKEN = ("prompt", "completion", "id", "rater", "time", "seconds", "confidence", "order", "policies")


def feedback_rows(
    rows: Sequence[Candidates], labels: Iterable[Label], notes: Counter[str]
) -> dict[str, list[dict[str, Any]]]:
    """
    Return the rows of each kind of feedback.

    Args:
        rows (`Sequence[Candidates]`): the candidates.
        labels (`Iterable[Label]`): labels in force, in the order in which they were given.
        notes (`Counter`): counts what was made and what was left out.
    """
    known = {row.id: row for row in rows}
    found: dict[str, list[dict[str, Any]]] = {}
    for label in _last_answers(labels, notes):
        row = known.get(label.id)
        if row is None or max(label.question) >= len(row.candidates):
            notes["labels left out: of candidates that are not in the file"] += 1
            continue
        for kind, made in _rows_of(row, label, notes):
            found.setdefault(kind, []).append(made | _provenance(row, label))
            notes[kind] += 1
    return found


def _last_answers(labels: Iterable[Label], notes: Counter[str]) -> list[Label]:
    """Return the last answer of each labeler to each question, and count skips, repeats and disagreement."""
    answers: dict[tuple, Label] = {}
    for label in labels:
        if label.skipped is not None:
            notes["skipped"] += 1
            continue
        earlier = answers.pop((label.key, label.labeler), None)
        if earlier is not None:
            same = earlier.by_candidate == label.by_candidate
            notes[f"earlier answers of a labeler, {'repeated' if same else 'replaced by another one'}"] += 1
        answers[label.key, label.labeler] = label
    by_question: dict[tuple, list[Label]] = {}
    for label in answers.values():
        by_question.setdefault(label.key, []).append(label)
    several = [each for each in by_question.values() if len(each) > 1 and each[0].form != "edit"]
    different = [each for each in several if any(one.by_candidate != each[0].by_candidate for one in each)]
    notes["questions on which labelers differ"] += len(different)
    return list(answers.values())


def _rows_of(row: Candidates, label: Label, notes: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield kind and columns of the rows of a label."""
    texts = [row.candidates[i].completion for i in label.question]
    empty = [not completion_key(text) for text in texts]
    answer: Any = label.answer
    if label.form != "rating" and any(empty):
        notes["labels left out: of a candidate without text"] += 1
    elif label.form == "pair":
        notes["ties"] += answer == "tie"
        notes["both bad"] += answer == "both_bad"
        yield "pairs", {"completion_a": texts[0], "completion_b": texts[1], "preferred": PREFERRED[answer]}
    elif label.form == "ranking":
        notes["rankings in which all tie"] += len(set(answer)) == 1
        yield "rankings", {"completions": texts, "ranks": answer}
    elif label.form == "edit":
        edited: Text = as_chat(answer, "assistant") if isinstance(texts[0], list) else answer
        if completion_key(edited) == completion_key(texts[0]):
            notes["edits left out: they change nothing"] += 1
        else:
            yield "edits", {"original": texts[0], "edited": edited}
    else:
        yield from _ratings(texts, answer, notes)


def _ratings(
    texts: Sequence[Text], answer: Sequence[Any], notes: Counter[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for text, rating in zip(texts, answer, strict=True):
        if rating is None or rating == {}:
            notes["candidates left out: not rated"] += 1
        elif not completion_key(text):
            notes["candidates left out: without text"] += 1
        elif isinstance(rating, Mapping):
            yield "attributes", {"completion": text, **rating}
        else:
            yield "ratings", {"completion": text, "ratings": rating}


def _provenance(row: Candidates, label: Label) -> dict[str, Any]:
    return {
        "id": row.id,
        "prompt": row.prompt,
        "rater": label.labeler,
        "time": label.time,
        "seconds": label.seconds,
        "confidence": label.confidence,
        "order": None if label.order is None else [label.question.index(i) for i in label.order],
        "policies": [row.candidates[i].policy for i in label.question],
    }


def write_feedback(
    run_dir: str | Path, rows: Sequence[Candidates], labels: Iterable[Label], form: str, notes: Counter[str]
) -> dict[str, Path]:
    """
    Write the feedback of a run's labels: `feedback.jsonl` for the form that is asked, whatever else is labeled beside
    it, and `feedback.edits.jsonl` and so on for other kinds. A file of an earlier call without rows now is deleted.

    Returns:
        `dict[str, Path]`: the file of each kind of feedback.
    """
    found = feedback_rows(rows, labels, notes)
    asked = max(KINDS[form], key=lambda kind: len(found.get(kind, ())))
    written = {}
    for kind, made in found.items():
        for row in made:
            row["run"] = Path(run_dir).name
        written[kind] = Path(run_dir, FEEDBACK_FILE if kind == asked else f"feedback.{kind}.jsonl")
        write_rows(written[kind], made)
    names = [FEEDBACK_FILE, *(f"feedback.{kind}.jsonl" for kinds in KINDS.values() for kind in kinds)]
    for stale in {Path(run_dir, name) for name in names} - {*written.values()}:
        stale.unlink(missing_ok=True)
    return written
