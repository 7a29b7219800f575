"""Files of other tools: they come back as they went, and what others wrote is read."""

import json
import re
import shlex
import uuid
from pathlib import Path

import pytest

from rlhf_trl.labels.__main__ import main, parser
from rlhf_trl.labels.candidates import Candidate, Candidates, read_candidates, write_candidates
from rlhf_trl.labels.exchange import FORMATS, Notes, export_text, import_file
from rlhf_trl.labels.store import Label, LabelStore, read

CHAT = [{"role": "user", "content": "Why?"}]


def rows() -> list[Candidates]:
    texts = ["zero", 'one, with é and "quotes"', "two\n\nlines", "three"]
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    return [
        Candidates(
            id="a",
            prompt="Which?",
            candidates=[Candidate(completion=text, policy=f"policy {i % 2}") for i, text in enumerate(texts)],
            questions=[(0, 1), (3, 2)],
        ),
        Candidates(
            id="b", prompt=CHAT, candidates=[Candidate(completion=text) for text in answers], questions=[(2, 0)]
        ),
    ]


def label(i: int, labeler: str = "ann", **given) -> Label:
    defaults = {"id": "a", "question": [0, 1], "form": "pair", "labeler": labeler, "seconds": 1.5 + i}
    made = {**defaults, "time": f"2026-11-26T10:{i:02d}:00.250000+00:00", **given}
    return Label(**{"order": made["question"][::-1], **made})


PAIRS = [
    label(0, answer=0),
    label(1, "bob", answer=1, confidence=0.75),
    label(2, question=[3, 2], answer="tie"),
    label(3, "bob", question=[2, 3], answer=0, order=None),  # asked the other way round
    label(4, answer=None, skipped="broken"),
    label(5, id="b", question=[2, 0], answer="both_bad"),
    label(6, id="b", question=[2, 0], answer=1),  # asked again
    label(7, id="b", question=[0, 3], answer=1),  # no question of the file
]
RANKINGS = [
    label(0, form="ranking", question=[0, 1, 2], answer=[3, 1, 2]),
    label(1, "bob", form="ranking", question=[0, 1, 2], answer=[2, 1, 2]),
    label(2, form="ranking", question=[3, 2], answer=[1, 1]),
    label(3, form="ranking", id="b", question=[2, 0], answer=None, skipped="?"),
]
RATINGS = [
    label(0, form="rating", answer=[4, 2]),
    label(1, "bob", form="rating", answer=[None, 5]),
    label(2, form="rating", question=[3, 2], answer=[{"honest": 4, "kind": 1}, {"honest": 2}]),
    label(3, form="rating", id="b", question=[1], answer=[3]),
    label(4, "bob", form="rating", answer=[1, 2]),  # rated again, after a rating of one alone
    label(5, "bob", form="rating", answer=[3, None]),
]
EDITS = [
    label(0, form="edit", question=[0], answer="zero,\nbut better"),
    label(1, "bob", form="edit", question=[0], answer="nought"),
    label(2, form="edit", id="b", question=[2], answer="Two lines."),
]
LABELS = {"pair": PAIRS, "ranking": RANKINGS, "rating": RATINGS, "edit": EDITS}


@pytest.mark.parametrize("tool, form", [(tool, form) for tool, one in FORMATS.items() for form in one.FORMS])
def test_labels_come_back_byte_by_byte(tmp_path, tool, form):
    given, notes = LABELS[form], Notes()
    if tool == "arena":
        given = [each for each in given if each.answer is not None]
    text, count = export_text(rows(), given, tool, form, notes)
    assert count == len(given)
    file = tmp_path / f"file.{'jsonl' if FORMATS[tool].LINES else 'json'}"
    file.write_text(text, encoding="utf-8")
    before, after = LabelStore(tmp_path / "before.jsonl"), LabelStore(tmp_path / "after.jsonl")
    before.extend(given)
    made = import_file(str(file), tool, rows(), [], notes)
    assert not made.rejected and not made.added
    after.extend(made.labels)
    assert after.path.read_bytes() == before.path.read_bytes()
    assert export_text(rows(), after.read(), tool, form, Notes())[0] == text
    # a second time there is nothing new
    assert import_file(str(file), tool, rows(), after.read(), Notes()).labels == []


@pytest.mark.parametrize("tool", ["argilla", "label_studio", "potato", "prodigy"])
def test_questions_without_labels_are_tasks(tool, tmp_path):
    text, count = export_text(rows(), [], tool, None, Notes())
    made = json.loads(text) if not FORMATS[tool].LINES else [json.loads(line) for line in text.splitlines()]
    assert count == 0 and len(made) == 3


def test_the_place_of_an_answer_in_a_file_says_nothing():
    """Questions are often the best candidate and the worst one, in this order."""
    answers = rows()[0].candidates
    many = [Candidates(id=str(i), prompt=str(i), candidates=answers, questions=[(0, 1)]) for i in range(40)]
    made = json.loads(export_text(many, [], "argilla", "pair", Notes())[0])
    assert 8 < sum(row["metadata"]["rlhf_trl"]["shown"] == [0, 1] for row in made) < 32


# ---- Files as the tools write them ----

RANKING = [
    Candidates(id="r", prompt="Which?", candidates=[Candidate(completion=c) for c in "abcd"], questions=[(0, 1, 2, 3)])
]
PAIR = [Candidates(id="p", prompt="Which?", candidates=[Candidate(completion=c) for c in "ab"], questions=[(1, 0)])]


def imported(tmp_path, tool, content, candidates=PAIR, **options):
    file = tmp_path / ("file.jsonl" if FORMATS[tool].LINES else "file.json")
    lines = [json.dumps(each) for each in content]
    file.write_text("\n".join(lines) if FORMATS[tool].LINES else f"[{','.join(lines)}]")
    notes = Notes()
    made = import_file(str(file), tool, [*candidates], options.pop("labels", []), notes, **options)
    return made, notes


def argilla(responses: dict, **more) -> dict:
    fields = {"prompt": "Which?", "response-1": "a", "response-2": "b"}
    return {"id": "1", "fields": fields, "metadata": {}, "vectors": {}, "suggestions": {}, "responses": responses,
            "status": "completed", **more}  # fmt: skip


def test_argilla_nested_and_flat(tmp_path):
    ranked = [{"value": "response-1", "rank": 2}, {"value": "response-2", "rank": 1}]
    tied = [{"value": "response-1", "rank": 1}, {"value": "response-2", "rank": 1}]
    content = [
        argilla({"preference": [{"value": "response-1", "user_id": "u1"}, {"value": "tie", "user_id": "u2"}]}),
        argilla({"preference": [{"value": ranked, "user_id": "u3"}, {"value": tied, "user_id": "u4"}]}),
        {"id": "2", "status": "completed", "prompt": "Which?", "response-1": "b", "response-2": "a",
         "preference.responses": ["response-1", None], "preference.responses.users": ["u5", "u6"],
         "preference.responses.status": ["submitted", "discarded"]},
    ]  # fmt: skip
    made, _ = imported(tmp_path, "argilla", content)
    assert {each.labeler: (each.question, each.answer, each.skipped) for each in made.labels} == {
        "u1": ([1, 0], 1, None),  # candidate 0, the second one of the question
        "u2": ([1, 0], "tie", None),
        "u3": ([1, 0], 0, None),
        "u4": ([1, 0], "tie", None),
        "u5": ([1, 0], 0, None),
        "u6": ([1, 0], None, "discarded"),
    }
    # The SDK's own rankings, best first; and an answer of nobody
    content = [argilla({"preference": [{"value": ["response-2", "response-1"], "user_id": None}]})]
    (one,) = imported(tmp_path, "argilla", content, labeler="me")[0].labels
    assert (one.answer, one.labeler) == (0, "me")
    ratings = {"rating-1": [{"value": 4, "user_id": "u"}], "rating-2": [{"value": 1, "user_id": "u"}]}
    (one,) = imported(tmp_path, "argilla", [argilla(ratings)])[0].labels
    assert (one.form, one.answer) == ("rating", [1, 4])


def test_argilla_takes_what_is_written_for_it():
    """Its SDK wants users that are UUIDs, values that aren't null, and rankings as lists of values, best first."""
    for form, labels in LABELS.items():
        for record in json.loads(export_text(rows(), labels, "argilla", form, Notes())[0]):
            for name, given in record["responses"].items():
                assert all(uuid.UUID(one["user_id"]) and one["value"] is not None for one in given)
                if name == "ranking":
                    names = sorted(f"response-{i}" for i in range(1, len(given[0]["value"]) + 1))
                    assert all(sorted(one["value"]) == names for one in given)
    made = json.loads(export_text(rows(), RANKINGS, "argilla", "ranking", Notes())[0])
    record = next(each for each in made if "response-3" in each["fields"])
    tied = record["responses"]["ranking"][1]["value"]
    assert record["metadata"]["rlhf_trl"]["labels"][1]["ranks"].count(2) == 2 and len(tied) == 3


def test_label_studio_takes_what_is_written_for_it():
    """A user is the e-mail address of one there; another name would be refused."""
    labels = [label(0, answer=0), label(1, "bob@example.org", answer=1)]
    (task, *_) = json.loads(export_text(rows(), labels, "label_studio", "pair", Notes())[0])
    assert [each.get("completed_by") for each in task["annotations"]] == [None, {"email": "bob@example.org"}]


def studio(*results, **more) -> dict:
    made = [{"from_name": name, "to_name": "x", "type": kind, "value": value} for name, kind, value in results]
    return {"id": 1, "completed_by": {"id": 3, "email": "eve@example.org"}, "created_at": "2026-11-26T10:00:00Z",
            "lead_time": 7.25, "was_cancelled": False, "result": made, **more}  # fmt: skip


def test_label_studio_pairs_rankings_ratings_and_skips(tmp_path):
    data = {"prompt": "Which?", "answer1": "a", "answer2": "b"}
    left = studio(("preference", "pairwise", {"selected": "left"}))
    made, _ = imported(tmp_path, "label_studio", [
        {"id": 1, "data": data, "annotations": [left, studio(was_cancelled=True, completed_by=9)], "predictions": []},
    ])  # fmt: skip
    first, skip = made.labels
    assert (first.answer, first.labeler, first.seconds) == (1, "eve@example.org", 7.25)
    assert first.time == "2026-11-26T10:00:00Z" and first.order == [0, 1] and first.question == [1, 0]
    assert (skip.answer, skip.labeler) == (None, "9") and "Label Studio" in skip.skipped
    items = {"prompt": "Which?", "items": [{"id": name, "title": name, "body": name} for name in "dcba"]}
    ranked = studio(("r", "ranker", {"ranker": ["a", "b", "c", "d"]}))
    buckets = studio(("r", "ranker", {"ranker": {"_": [], "1": ["d"], "2": ["a", "b"], "3": ["c"]}}), completed_by=1)
    half = studio(("r", "ranker", {"ranker": {"_": ["a"], "1": ["d", "b", "c"]}}), completed_by=2)
    made, notes = imported(
        tmp_path, "label_studio", [{"id": 1, "data": items, "annotations": [ranked, buckets, half]}], RANKING
    )
    assert [each.answer for each in made.labels] == [[1, 2, 3, 4], [2, 2, 4, 1]] and made.labels[0].question == [
        0,
        1,
        2,
        3,
    ]
    assert notes.places["answers that were not imported"] == [
        f"{tmp_path}/file.json, row 1: `2` ranks some of the answers only"
    ]


def test_potato_selections_scales_and_ranks(tmp_path):
    def line(given, user):
        return {"id": "1", "text": "Which?", "responses": ["a", "b"], "user_id": user, "label_annotations": given}

    content = [
        line({"preference": {"selection": "B"}}, "u1"),
        line({"preference": {"selection": "tie"}}, "u2"),
        line({"preference": {"scale_value": "-2"}}, "u3"),
        line({"preference": {"scale_value": "0"}}, "u4"),
    ]
    made, notes = imported(tmp_path, "potato", content)
    assert [each.answer for each in made.labels] == [0, "tie", 1, "tie"]  # of the question [1, 0]
    assert "the strength of a preference (-2), which a label can't hold" in notes.places
    ranking = line({"ranking": {"rank_order": "B,D=A,C"}}, "u") | {"responses": list("abcd")}
    half = line({"ranking": {"rank_order": "B,A"}}, "v") | {"responses": list("abcd")}
    made, notes = imported(tmp_path, "potato", [ranking, half], RANKING)
    assert [each.answer for each in made.labels] == [[2, 1, 4, 2]] and len(made.rejected) == 1


def test_potato_labels_and_text_edits(tmp_path):
    line = {"id": "1", "text": "Which?", "responses": list("abcd"), "user_id": "u"}
    named = {"ranking": {"rank_order": "Response B,Response D=Response A,Response C"}}
    (one,) = imported(tmp_path, "potato", [line | {"label_annotations": named}], RANKING)[0].labels
    assert one.answer == [2, 1, 4, 2]
    edit = {"edited": {"edit_distance_chars": 1, "edited_text": "better", "original_text": "a"}}
    line |= {"responses": ["a"], "label_annotations": edit}
    (one,) = imported(tmp_path, "potato", [line])[0].labels
    assert (one.form, one.answer) == ("edit", "better")


def test_arena_battles_of_later_releases(tmp_path):
    """Turns with other fields, contents in parts, conversations as JSON text, and other names."""
    turns = [
        [
            {"role": "user", "content": [{"type": "text", "text": "Which?"}], "num_tokens": 1},
            {"role": "assistant", "content": [{"type": "text", "text": text}], "num_tokens": 1},
        ]
        for text in "ab"
    ]
    row = {"model_a": "x", "model_b": "y", "winner": "both_bad", "judge_hash": "h"}
    for made in (turns, [json.dumps(each) for each in turns]):
        battle = row | {"conversation_a": made[0], "conversation_b": made[1]}
        found, _ = imported(tmp_path, "arena", [battle])
        assert [(each.answer, each.labeler) for each in found.labels] == [("both_bad", "h")]
        (new,) = imported(tmp_path, "arena", [battle], [], add=True)[0].rows
        assert new.candidates[0].completion == [{"role": "assistant", "content": "a"}]


def test_an_answer_that_was_taken_back_is_not_brought_back_by_an_older_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_candidates("candidates.jsonl", rows())
    store = LabelStore("labels.jsonl")
    store.extend(PAIRS[:2])
    words = "--candidates candidates.jsonl --labels labels.jsonl".split()
    main(["export", "--to", "argilla", *words, "--output", "old.json"])
    store.append(PAIRS[0].withdrawal())
    main(["import", "--from", "argilla", "old.json", *words])
    said = capsys.readouterr().out
    assert "0 labels" in said and "labels that were taken back and are not imported: 1" in said
    assert store.read() == PAIRS[1:2] and "took it back since" in Path("labels.jsonl.rejected.jsonl").read_text()
    again = label(9, answer=1)  # another answer of the same person is one
    store.append(again)
    main(["import", "--from", "argilla", "old.json", *words])
    assert store.read() == [PAIRS[1], again]


def test_an_arena_battle_with_two_bad_answers_is_no_tie(tmp_path):
    def battle(winner, judge="j", **more):
        turns = [[{"role": "user", "content": "Which?"}, {"role": "assistant", "content": text}] for text in "ab"]
        return {"question_id": "q", "model_a": "x", "model_b": "y", "winner": winner, "judge": judge, "turn": 1,
                "conversation_a": turns[0], "conversation_b": turns[1], "tstamp": 1700000000.5, **more}  # fmt: skip

    content = [
        battle("model_a", "j1"),
        battle("tie", "j2"),
        battle("tie (bothbad)", "j3"),
        battle("bothbad_vote", "j4"),
    ]
    made, _ = imported(tmp_path, "arena", content)
    assert [each.answer for each in made.labels] == [1, "tie", "both_bad", "both_bad"]
    assert made.labels[0].time == "2023-11-14T22:13:20.500000+00:00"
    # Without candidates, the file makes them
    made, _ = imported(tmp_path, "arena", content, [], add=True)
    (row,) = made.rows
    assert [each.policy for each in row.candidates] == ["x", "y"] and row.questions == [(0, 1)] and made.added == 3
    assert [each.answer for each in made.labels] == [0, "tie", "both_bad", "both_bad"]


def test_prodigy_accepts_and_ignores(tmp_path):
    def line(answer, accept=(), **more):
        options = [{"id": "x", "text": "a"}, {"id": "y", "text": "b"}, {"id": "tie", "text": "Tie"}]
        return {"text": "Which?", "options": options, "accept": list(accept), "answer": answer, "_input_hash": 1,
                "_task_hash": 2, "_session_id": "s-ann", "_annotator_id": "ann", **more}  # fmt: skip

    content = [line("accept", "y"), line("accept", ["tie"]), line("ignore"), line("accept", "xy")]
    made, notes = imported(tmp_path, "prodigy", content)
    assert [each.answer for each in made.labels] == [0, "tie", None] and made.labels[0].labeler == "ann"
    assert len(made.rejected) == 1 and "labels that contradict an earlier one of the labeler" in notes.places


def test_what_can_not_be_imported_is_named_and_kept(tmp_path):
    strange = argilla({"preference": [{"value": "response-1", "user_id": "u"}]})
    strange["fields"] = {**strange["fields"], "prompt": "Never asked"}
    other = argilla({"preference": [{"value": "response-9", "user_id": "u"}]})
    empty, broken = argilla({}, status="pending"), {"id": "4"}
    made, notes = imported(tmp_path, "argilla", [strange, other, empty, broken])
    assert not made.labels and [each["row"] for each in made.rejected] == [strange, other, broken]
    assert {
        kind: [place.split(", ")[1].split(":")[0] for place in places] for kind, places in notes.places.items()
    } == {
        "rows that were not imported": ["row 1", "row 4"],
        "answers that were not imported": ["row 2"],
        "questions without an answer": ["row 3"],
    }
    never = [Candidates(id="p", prompt="Which?", candidates=PAIR[0].candidates)]
    made, notes = imported(tmp_path, "argilla", [argilla({"preference": [{"value": "tie", "user_id": "u"}]})], never)
    assert len(made.labels) == 1 and "labels of questions that were never asked" in notes.places


def test_an_answer_that_was_changed_in_the_tool_is_a_label_of_its_own(tmp_path):
    (given,) = [each for each in PAIRS if each.labeler == "bob" and each.id == "a" and each.question == [0, 1]]
    (task,) = json.loads(export_text(rows()[:1], [given], "label_studio", "pair", Notes())[0])[:1]
    again = task["annotations"][0]
    again |= {"created_at": "2026-12-01T00:00:00Z", "result": []}
    again["result"] = [
        {"from_name": "tie", "to_name": "prompt", "type": "choices", "value": {"choices": ["both_bad"]}}
    ]
    made, notes = imported(tmp_path, "label_studio", [task], rows(), labels=[given])
    (one,) = made.labels
    assert (one.answer, one.time, one.confidence) == ("both_bad", "2026-12-01T00:00:00Z", None)
    assert "labels that contradict an earlier one of the labeler" in notes.places


# ---- The command line ----


def test_the_commands_export_import_and_compare(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_candidates("candidates.jsonl", rows())
    LabelStore("labels.jsonl").extend([*PAIRS, *EDITS])
    export = ["export", "--to", "argilla", "--candidates", "candidates.jsonl", "--labels", "labels.jsonl"]
    main([*export, "--output", "records.json"])
    said = capsys.readouterr().out
    assert "8 labels for argilla: records.json" in said and "labels of another form" in said
    with pytest.raises(SystemExit):
        main([*export, "--output", "records.json"])
    assert "--overwrite" in capsys.readouterr().err
    back = [
        "import",
        "--from",
        "argilla",
        "records.json",
        "--candidates",
        "candidates.jsonl",
        "--labels",
        "back.jsonl",
    ]
    main(back)
    assert "8 labels of 2 labelers: back.jsonl" in capsys.readouterr().out and read("back.jsonl") == PAIRS
    main(back)
    assert "0 labels" in capsys.readouterr().out and len(read("back.jsonl")) == 8
    main(["import", "--from", "argilla", "records.json", "--candidates", "new.jsonl", "--labels", "new_labels.jsonl"])
    assert len(read_candidates("new.jsonl")) == 2 and len(read("new_labels.jsonl")) == 8
    for old, new in zip(PAIRS, read("new_labels.jsonl"), strict=True):  # of the same texts, whatever their indices
        texts = [{row.id: row.candidates for row in found} for found in (rows(), read_candidates("new.jsonl"))]
        asked = [[texts[i][one.id][k].completion for k in one.question] for i, one in enumerate((old, new))]
        assert asked[0] == asked[1] and (old.answer, old.time) == (new.answer, new.time)
    capsys.readouterr()
    main(["agreement", "labels.jsonl"])
    assert "pair: Krippendorff's alpha" in capsys.readouterr().out
    main(["config", "--form", "ranking", "--answers", "3"])
    assert '<Bucket name="3"' in capsys.readouterr().out


def test_labels_that_are_imported_into_a_run_become_its_feedback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_candidates("candidates.jsonl", rows())
    LabelStore("own.jsonl").extend(PAIRS)
    main("export --to argilla --candidates candidates.jsonl --labels own.jsonl --output records.json".split())
    words = "import --from argilla records.json --candidates candidates.jsonl --labels".split()
    main([*words, "labels.jsonl"])
    assert not Path("feedback.jsonl").exists()  # the folder is no run's
    Path("run").mkdir()
    Path("run", "run.json").write_text("{}")
    main([*words, "run/labels.jsonl"])
    assert "data/feedback=pairs" in capsys.readouterr().out
    made = [json.loads(line) for line in Path("run", "feedback.jsonl").read_text().splitlines()]
    answered = [label for label in PAIRS if label.answer is not None]
    assert {row["rater"] for row in made} == {label.labeler for label in answered} and made[0]["run"] == "run"


def test_rejected_rows_are_written_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_candidates("candidates.jsonl", rows())
    Path("file.json").write_text(json.dumps([argilla({"preference": [{"value": "response-9", "user_id": "u"}]})]))
    words = ["import", "--from", "argilla", "file.json", "--candidates", "candidates.jsonl", "--labels", "l.jsonl"]
    for _ in range(2):
        main(words)
    assert len(Path("l.jsonl.rejected.jsonl").read_text().splitlines()) == 1 and not Path("l.jsonl").read_bytes()
    assert "file.json, row 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words[:2], "potato", "nothing.jsonl", *words[4:]])


def test_the_commands_of_the_page_are_understood():
    page = (Path(__file__).parents[3] / "docs" / "labeling.md").read_text(encoding="utf-8")
    commands = re.findall(r"python -m rlhf_trl\.labels ([a-z][^`\n]*)", page)
    assert {words.split()[0] for words in commands} == {"export", "import", "agreement", "config"}
    for words in commands:
        assert parser().parse_args(shlex.split(words)).run
