"""Candidates: their file, and what is refused in it."""

import json

import pytest

from rlhf_trl.errors import DataError
from rlhf_trl.labels.candidates import Candidate, Candidates, prompt_id, read_candidates, write_candidates


def test_a_file_of_candidates_round_trips_with_fields_it_does_not_know(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    rows = [
        Candidates(
            id=prompt_id("Hi"),
            prompt="Hi",
            candidates=[
                Candidate(
                    completion="Hello.",
                    policy="ppo",
                    sampling={"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8},
                    seed=3,
                    scores={"model": [0.25, None]},
                    extra={"tokens": 2},
                ),
                Candidate(completion=""),
            ],
            questions=[(1, 0)],
            extra={"topic": "greeting"},
        ),
        Candidates(
            id=prompt_id(chat),
            prompt=chat,
            candidates=[Candidate(completion=[{"role": "assistant", "content": "Hello."}])],
        ),
    ]
    path = tmp_path / "candidates.jsonl"
    write_candidates(path, rows)
    assert read_candidates(path) == rows
    first = path.read_bytes()
    write_candidates(path, read_candidates(path))
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["candidates.jsonl"]


def test_an_id_is_of_the_prompt_alone_and_of_the_right_one():
    assert prompt_id("Hi") == prompt_id("Hi") != prompt_id("Hi ")
    assert prompt_id([{"role": "user", "content": "Hi"}]) == prompt_id([{"content": "Hi", "role": "user"}])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": ""}, "`prompt` is empty"),
        ({"candidates": []}, "`candidates` is not a list of candidates"),
        ({"candidates": [{"completion": 3}]}, "`candidates[0].completion` is a number (3)"),
        ({"candidates": [{"completion": "a", "scores": {"model": ["x"]}}]}, "`candidates[0].scores` must hold"),
        ({"candidates": [{"completion": "a", "seed": 1.5}]}, "`candidates[0].seed` is a number (1.5)"),
        ({"questions": [[0, 2]]}, "`questions[0]` is [0, 2], and the candidates are 0 to 1"),
        ({"questions": [[1, 1]]}, "asks about a candidate twice"),
        ({"questions": [[True, 1]]}, "where a list of indices"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_row(tmp_path, changes, says):
    good = {"prompt": "Hi", "candidates": [{"completion": "a"}, {"completion": "b"}], "questions": [[0, 1]]}
    path = tmp_path / "candidates.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"prompt": "Ho"} | changes) + "\n")
    with pytest.raises(DataError) as error:
        read_candidates(path)
    assert says in str(error.value) and "line 2" in str(error.value)


def test_a_prompt_twice_is_refused_and_so_is_no_file(tmp_path):
    path = tmp_path / "candidates.jsonl"
    with pytest.raises(DataError, match="There is no file of candidates"):
        read_candidates(path)
    row = json.dumps({"prompt": "Hi", "candidates": [{"completion": "a"}]})
    path.write_text(f"{row}\n{row}\n")
    with pytest.raises(DataError, match="as in .*line 1: a prompt has one row"):
        read_candidates(path)
