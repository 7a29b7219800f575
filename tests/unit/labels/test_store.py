"""The file of labels: synced lines, withdrawals, torn lines, several writers."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from rlhf_trl.data.rows import RowError
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.labels.store import Label, LabelStore, in_force, read, read_rows


def label(**changes) -> Label:
    given = {"id": "a1", "question": [0, 2], "form": "pair", "order": [2, 0], "answer": 1, "labeler": "ann"}
    return Label(**{**given, "time": "2026-11-26T10:00:00.000000+00:00", "seconds": 2.5, **changes})


def test_a_label_is_one_line_and_comes_back_as_it_was(tmp_path):
    store = LabelStore(tmp_path / "deep" / "labels.jsonl")
    given = [
        label(),
        label(answer="tie", confidence=0.5),
        label(answer=None, skipped="I can't judge it"),
        label(question=[0, 1, 2], order=[2, 0, 1], form="ranking", answer=[1, 2, 2]),
        label(question=[3], order=None, form="rating", answer=[4]),
        label(question=[0, 2], form="rating", answer=[{"honest": 4, "kind": 2.5}, None]),
        label(question=[1], order=[1], form="edit", answer='line\nbreak, "quote", é, \ud800'),
    ]
    for each in given:
        store.append(each)
    lines = store.path.read_bytes().split(b"\n")
    assert len(lines) == len(given) + 1 and lines[-1] == b""
    assert list(json.loads(lines[0])) == (
        "id question form order answer labeler time seconds confidence skipped".split()
    )
    assert store.read() == given


def test_each_label_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    store = LabelStore(tmp_path / "labels.jsonl")
    store.append(label())
    assert store.path.stat().st_size in synced and len(synced) == 2  # the file, and the folder that names it


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"form": "pairs"}, "form"),
        ({"question": [0]}, "question"),
        ({"question": [0, 0]}, "question"),
        ({"question": [0, True]}, "question"),
        ({"order": [0, 1]}, "order"),
        ({"answer": 2}, "answer"),
        ({"answer": True}, "answer"),
        ({"answer": None}, "answer"),
        ({"skipped": "both an answer and a reason"}, "answer"),
        ({"time": "yesterday"}, "time"),
        ({"form": "ranking", "answer": [1]}, "answer"),
        ({"form": "ranking", "answer": [1, "2"]}, "answer[1]"),
        ({"form": "rating", "answer": [None, {}]}, "answer"),
        ({"form": "rating", "answer": [{"kind": float("nan")}, 1]}, "answer[0].kind"),
        ({"form": "edit", "question": [0], "order": [0], "answer": " "}, "answer"),
        ({"labeler": ""}, "labeler"),
        ({"seconds": "2"}, "seconds"),
    ],
)
def test_a_label_that_says_nothing_is_refused(changes, field):
    with pytest.raises(RowError) as error:
        label(**changes)
    assert error.value.field == field


def test_a_withdrawn_label_stays_in_the_file_and_no_longer_counts(tmp_path):
    store = LabelStore(tmp_path / "labels.jsonl")
    first, other, again = label(), label(labeler="bob"), label(answer=0, time="2026-11-26T10:01:00+00:00")
    for each in (first, other, first.withdrawal(), again):
        store.append(each)
    assert store.read() == [other, again]
    assert len(read_rows(store.path)) == 4
    assert in_force([again.withdrawal(), again]) == [again]  # nothing to take back yet


def test_a_torn_line_is_said_and_set_aside_and_nothing_else_is_lost(tmp_path, capsys):
    store = LabelStore(tmp_path / "labels.jsonl")
    store.append(label())
    with open(store.path, "ab") as file:
        file.write(b'{"id": "a1", "quest')
    assert store.read() == [label()]
    assert "line 2 is torn" in capsys.readouterr().out
    store.append(label(answer=0))
    assert "torn" in capsys.readouterr().out
    assert store.read() == [label(), label(answer=0)]
    assert (tmp_path / "labels.jsonl.torn").read_bytes() == b'{"id": "a1", "quest\n'


def test_a_line_that_lacks_only_its_end_is_a_label(tmp_path):
    store = LabelStore(tmp_path / "labels.jsonl")
    store.append(label())
    store.path.write_bytes(store.path.read_bytes()[:-1])
    assert store.read() == [label()]
    store.append(label(answer=0))
    assert store.read() == [label(), label(answer=0)]


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "a"}', '{"id": "a", "votes": 3}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "labels.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(DataError, match="labels.jsonl`, line 1"):
        read(path)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    store = LabelStore(tmp_path / "labels.jsonl")
    store.append(label())
    before, write = store.path.read_bytes(), os.write

    def half(descriptor, data):
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:-10])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(ConfigError, match="No space left"):
            store.append(label(answer=0))
    assert store.path.read_bytes() == before


def _append(path: Path, name: str) -> None:
    store = LabelStore(path)
    for i in range(25):
        store.append(label(labeler=name, id=f"q{i}"))


def test_several_processes_write_whole_lines(tmp_path):
    path = tmp_path / "labels.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(path, name)) for name in ("ann", "bob", "eve")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted((each.labeler, each.id) for each in read(path)) == sorted(
        (name, f"q{i}") for name in ("ann", "bob", "eve") for i in range(25)
    )
