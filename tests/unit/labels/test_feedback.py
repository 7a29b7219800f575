"""Labels as feedback: the rows of each form, what is left out, and training data from them."""

import json
from collections import Counter

import pytest

from rlhf_trl.data import Attributes, Edits, Pairs, Rankings, Ratings, load_files
from rlhf_trl.labels.candidates import Candidate, Candidates
from rlhf_trl.labels.feedback import feedback_rows, write_feedback
from rlhf_trl.labels.store import Label

ROW = Candidates(
    id="p",
    prompt="Prompt",
    candidates=[Candidate(completion=text, policy=f"policy {text}") for text in ("first", "second", "third", "")],
)


def label(**changes) -> Label:
    values = {"id": "p", "question": [2, 0], "form": "pair", "order": [0, 2], "answer": 0, "labeler": "ada"}
    return Label(**(values | {"time": "2026-11-26T12:00:00+00:00", "seconds": 2.5, "confidence": 0.9} | changes))


def made(*labels: Label) -> tuple[dict[str, list[dict]], Counter]:
    notes = Counter()
    return feedback_rows([ROW], labels, notes), +notes


def test_a_pair_has_all_that_is_known_of_its_label():
    found, notes = made(label())
    assert found == {
        "pairs": [
            {
                "completion_a": "third",
                "completion_b": "first",
                "preferred": "a",
                "id": "p",
                "prompt": "Prompt",
                "rater": "ada",
                "time": "2026-11-26T12:00:00+00:00",
                "seconds": 2.5,
                "confidence": 0.9,
                "order": [1, 0],
                "policies": ["policy third", "policy first"],
            }
        ]
    }
    assert notes == {"pairs": 1}


@pytest.mark.parametrize(
    ("changes", "kind", "columns"),
    [
        ({"answer": 1}, "pairs", {"preferred": "b"}),
        ({"answer": "tie"}, "pairs", {"preferred": "tie"}),
        ({"answer": "both_bad"}, "pairs", {"preferred": "both_bad"}),
        ({"form": "ranking", "answer": [2, 1]}, "rankings", {"completions": ["third", "first"], "ranks": [2, 1]}),
        ({"form": "rating", "answer": [4, None]}, "ratings", {"completion": "third", "ratings": 4}),
        ({"form": "rating", "answer": [{"kind": 4}, {}]}, "attributes", {"completion": "third", "kind": 4}),
        (
            {"form": "edit", "question": [1], "order": None, "answer": "better"},
            "edits",
            {"original": "second", "edited": "better"},
        ),
    ],
)
def test_each_form_becomes_its_kind_of_feedback(changes, kind, columns):
    found, _ = made(label(**changes))
    (row,) = found[kind]
    assert columns.items() <= row.items()


def test_an_edit_of_a_chat_is_a_turn():
    chat = [{"role": "user", "content": "Hi"}]
    row = Candidates(id="p", prompt=chat, candidates=[Candidate(completion=[{"role": "assistant", "content": "Yo"}])])
    edit = label(form="edit", question=[0], order=None, answer="Hello")
    found = feedback_rows([row], [edit], Counter())
    assert found["edits"][0]["edited"] == [{"role": "assistant", "content": "Hello"}]


def test_what_is_left_out_is_counted():
    found, notes = made(
        label(answer=None, skipped="unclear"),
        label(question=[0, 3], order=None),
        label(id="another"),
        label(form="edit", question=[1], order=None, answer="second "),
        label(answer=1),
        label(question=[0, 2], order=None, answer=0),  # the same answer in the other order of the question
        label(answer=0),  # and then another one
        label(labeler="bob", answer=1),
    )
    assert [(row["rater"], row["preferred"]) for row in found["pairs"]] == [("ada", "a"), ("bob", "b")]
    assert notes == {
        "skipped": 1,
        "labels left out: of a candidate without text": 1,
        "labels left out: of candidates that are not in the file": 1,
        "edits left out: they change nothing": 1,
        "earlier answers of a labeler, repeated": 1,
        "earlier answers of a labeler, replaced by another one": 1,
        "questions on which labelers differ": 1,
        "pairs": 2,
    }


def rows_of(path, feedback, dataset_type, count) -> list[dict]:
    """Return the rows that a stage trains on."""
    loaded = load_files(dataset_type, 0, paths=str(path), feedback=feedback, eval_size=None)
    assert len(loaded["train"]) == count
    return loaded["train"].to_list()


def test_written_files_are_read_as_they_are(tmp_path):
    votes = [label(), label(labeler="bob"), label(labeler="eve", answer=1)]
    notes = Counter()
    (path,) = write_feedback(tmp_path, [ROW], votes, "pair", notes).values()
    assert path.name == "feedback.jsonl" and len(path.read_text().splitlines()) == 3
    (row,) = rows_of(path, Pairs(agreement="weights", shuffle=False), "comparisons", 1)
    assert row["completions"] == ["third", "first"] and row["weights"] == [
        pytest.approx(0.8 / 3)
    ]  # all of confidence 0.9
    forms = [
        label(form="ranking", question=[0, 1, 2], order=None, answer=[1, 2, 2]),
        label(form="rating", answer=[4, 2]),
        label(form="rating", question=[1, 2], order=None, answer=[{"kind": 1}, {"kind": -1}]),
        label(form="edit", question=[1], order=None, answer="better"),
        label(answer="both_bad"),
    ]
    written = write_feedback(tmp_path, [ROW], forms, "pair", notes)
    others = {f"feedback.{kind}.jsonl" for kind in written if kind != "pairs"}
    assert {path.name for path in written.values()} == others | {"feedback.jsonl"}
    rows_of(written["rankings"], Rankings(), "comparisons", 1)
    rows_of(written["ratings"], Ratings(), "comparisons", 1)
    rows_of(written["edits"], Edits(), "preference", 1)
    rows_of(written["pairs"], Pairs(), "unpaired", 2)
    (row,) = rows_of(written["attributes"], Attributes(dimensions=["kind"]), "comparisons", 1)
    assert sorted(target["kind"] for target in row["targets"]) == [-1.0, 1.0]
    assert all("rater" in json.loads(line) for path in written.values() for line in path.read_text().splitlines())


def test_the_file_of_what_is_asked_has_one_name_whatever_is_labeled_beside_it(tmp_path):
    edit = label(form="edit", question=[1], order=None, answer="better")
    write_feedback(tmp_path, [ROW], [label()], "pair", Counter())
    written = write_feedback(tmp_path, [ROW], [label(), label(labeler="bob"), edit], "pair", Counter())
    assert {kind: path.name for kind, path in written.items()} == {
        "pairs": "feedback.jsonl",
        "edits": "feedback.edits.jsonl",
    }
    assert len(written["pairs"].read_text().splitlines()) == 2
    write_feedback(tmp_path, [ROW], [label()], "pair", Counter())  # the edit was taken back
    assert [path.name for path in tmp_path.iterdir()] == ["feedback.jsonl"]
    write_feedback(tmp_path, [ROW], [], "pair", Counter())
    assert not any(tmp_path.iterdir())
