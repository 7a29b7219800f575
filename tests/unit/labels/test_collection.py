"""Collection: interrupted draws, prompts and candidates that are there twice, questions, and logged traffic."""

import json
from collections import Counter

import numpy as np
import pytest

from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.labels.candidates import Candidate, prompt_id
from rlhf_trl.labels.collection import Collected, Draws, add_candidates, ask, merge_prompts, without_labeled
from rlhf_trl.labels.options import selection_problem
from rlhf_trl.labels.selection import best_worst, d_optimal, random_pairs
from rlhf_trl.labels.store import Label
from rlhf_trl.labels.traffic import read_traffic, thumb_key, used_key

COLUMNS = {"prompt": "prompt", "completion": "answer", "thumb": "meta.thumb", "rater": "meta.user", "time": None}


def test_an_interrupted_collection_keeps_whole_batches_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "draws.partial"
    draws = Draws(path, "plan")
    assert not path.exists()
    draws.add(1, [{"row": 1}])
    draws.add(0, [{"row": 0}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"batch": 2, "rows": [{"ro')
    again = Draws(path, "plan")
    assert again.rows() == [{"row": 0}, {"row": 1}]
    again.add(2, [{"row": 2}])
    assert path.read_bytes() == whole + b'{"batch": 2, "rows": [{"row": 2}]}\n'
    with pytest.raises(ConfigError, match="other prompts or policies"):
        Draws(path, "another")
    again.delete()
    assert not path.exists()


def test_a_collection_that_was_killed_in_its_first_line_starts_again(tmp_path):
    path = tmp_path / "draws.partial"
    path.write_bytes(b'{"pla')
    draws = Draws(path, "plan")
    draws.add(0, [])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"plan": "plan"}, {"batch": 0, "rows": []}]


def collected(*completions: list[str], scores=None) -> Collected:
    found = merge_prompts([{"prompt": f"p{i}"} for i in range(len(completions))])
    drawn = [
        (i, Candidate(completion=text, scores={"model": [scores[i][j]]} if scores else {}))
        for i, texts in enumerate(completions)
        for j, text in enumerate(texts)
    ]
    add_candidates(found, drawn)
    return found


def test_prompts_and_candidates_that_are_there_twice_are_counted():
    found = merge_prompts([{"prompt": "p", "topic": 1, "completion": "x"}, {"prompt": "p"}, {"prompt": "q"}])
    assert [(row.prompt, row.extra) for row in found.rows] == [("p", {"topic": 1}), ("q", {})]
    add_candidates(found, [(0, Candidate(completion=text)) for text in ("a", "b", " a\n", "a")])
    assert [each.completion for each in found.rows[0].candidates] == ["a", "b"]
    assert found.rows[0].candidates[0].extra == {"copies": 3}
    assert +found.notes == Counter(
        {
            "rows dropped: their prompt is there already": 1,
            "candidates dropped: identical to another one of their prompt": 2,
        }
    )


def label(prompt: str, **changes) -> Label:
    values = {"id": prompt_id(prompt), "question": [0, 1], "form": "pair", "answer": 0, "labeler": "ada"}
    return Label(**(values | changes))


def test_labeled_prompts_are_not_asked_again_unless_several_people_should():
    labels = [label("p0"), label("p0", question=[1, 2]), label("p1"), label("p1", labeler="bob")]
    labels += [label("p2", answer=None, skipped="unclear")]
    prompts = [{"prompt": f"p{i}"} for i in range(4)]
    once = without_labeled(merge_prompts(prompts), labels, 1)
    assert [row.prompt for row in once.rows] == ["p2", "p3"]
    assert once.notes["prompts left out: labeled already"] == 2
    assert [row.prompt for row in without_labeled(merge_prompts(prompts), labels, 2).rows] == ["p0", "p2", "p3"]


def test_the_budget_is_the_number_of_questions_and_what_cannot_be_asked_is_counted():
    found = collected(["a", "b", "c"], ["a", "a"], ["", "b"], ["a", "b"])
    ask(found, random_pairs, budget=2, per_prompt=3, size=2, seed=0, weights={})
    assert [len(row.questions) for row in found.rows] == [1, 0, 0, 1]
    assert found.notes["prompts not asked about: fewer than 2 different candidates"] == 2
    assert found.notes["candidates not asked about: empty"] == 1
    ask(found, random_pairs, budget=None, per_prompt=3, size=2, seed=0, weights={})
    assert [len(row.questions) for row in found.rows] == [3, 0, 0, 1]
    again = collected(["a", "b", "c"], ["a", "b"])
    ask(again, random_pairs, budget=3, per_prompt=2, size=2, seed=7, weights={})
    same = collected(["a", "b", "c"], ["a", "b"])
    ask(same, random_pairs, budget=3, per_prompt=2, size=2, seed=7, weights={})
    assert [row.questions for row in again.rows] == [row.questions for row in same.rows]


def test_scores_choose_and_candidates_without_one_are_not_asked_about():
    found = collected(["a", "b", "c", "d"], scores=[[0.0, 3.0, None, 1.0]])
    ask(found, best_worst, budget=None, per_prompt=1, size=2, seed=0, weights={"model": -1.0})
    assert found.rows[0].questions == [(0, 1)]  # the weight turns the order
    assert found.notes["candidates not asked about: a reward doesn't apply"] == 1


def test_a_question_may_be_a_ranking_or_a_rating():
    found = collected(["a", "b", "c", "d"], scores=[[0.0, 3.0, 2.0, 1.0]])
    ask(found, best_worst, budget=None, per_prompt=1, size=3, seed=0, weights={"model": 1.0})
    ((first, second, third),) = found.rows[0].questions
    assert (first, second) == (1, 0) and third in (2, 3)
    ask(found, best_worst, budget=3, per_prompt=2, size=1, seed=0, weights={"model": 1.0})
    assert found.rows[0].questions == [(1,), (0,), (2,)]


def test_features_reach_the_pool_of_their_own_prompt():
    found = collected(["a", "b"], ["only one"], ["c", "d"])

    def features(places):
        assert places == [(0, 0), (0, 1), (2, 0), (2, 1)]
        return np.array([[0.0], [1.0], [0.0], [9.0]])

    ask(found, d_optimal, budget=1, per_prompt=1, size=2, seed=0, weights={}, features=features)
    assert [len(row.questions) for row in found.rows] == [0, 0, 1]


def test_a_selection_says_what_it_lacks():
    thompson = {"_target_": "rlhf_trl.labels.selection.thompson"}
    assert "there is no reward" in selection_problem(thompson, rewards=False)
    assert "stage.members=4" in selection_problem(thompson, rewards=True, members=1)
    assert selection_problem(thompson, rewards=True, members=2) is None
    assert selection_problem(thompson, rewards=True) is None  # not known before the rewards are loaded
    single = {"_target_": "rlhf_trl.labels.selection.uncertainty", "measure": "bernoulli"}
    assert selection_problem(single, rewards=True, members=1) is None
    assert selection_problem({"_target_": "my.own"}, rewards=False) is None


def write_log(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_log_becomes_candidates_and_thumbs(tmp_path):
    file = write_log(
        tmp_path / "log.jsonl",
        {"prompt": "p", "answer": "a", "meta": {"thumb": "up", "user": 7}},
        {"prompt": "p", "answer": "a", "meta": {"thumb": "down", "user": 8}},
        {"prompt": "p", "answer": "b", "meta": {"thumb": None, "user": 7}},
        {"prompt": "p", "answer": "b", "meta": {"thumb": None, "user": 8}},
        {"prompt": "q", "answer": "old", "meta": {"thumb": True, "user": 9}},
    )
    traffic = read_traffic([file], COLUMNS, used={used_key("q", "old")})
    assert traffic.rows == [
        {"prompt": "p", "completion": "a", "rater": "7", "thumb": True},
        {"prompt": "p", "completion": "b", "rater": "7"},
    ]
    thumbs = [(row["completion"], row["rater"], row["thumb"]) for row in traffic.thumbs]
    assert thumbs == [("a", "7", True), ("a", "8", False), ("old", "9", True)]  # none is lost
    assert traffic.notes == {"logged rows dropped: they repeat another one": 1}
    used = {used_key("q", "old"), *map(thumb_key, traffic.thumbs)}
    again = read_traffic([file], COLUMNS, used=used)
    assert len(again.rows) == 2 and not again.thumbs
    assert again.notes == {"logged rows dropped: they repeat another one": 2, "logged rows dropped: used before": 1}
    candidate = traffic.candidate(traffic.rows[0])
    assert (candidate.policy, candidate.extra) == ("traffic", {"thumb": True})


def test_malformed_rows_of_a_log_are_named(tmp_path):
    file = write_log(
        tmp_path / "log.jsonl", {"prompt": "p", "answer": ""}, {"prompt": "p", "answer": "a", "meta": {"thumb": "meh"}}
    )
    with pytest.raises(DataError) as error:
        read_traffic([file], COLUMNS)
    assert "line 1: `answer` is empty" in str(error.value)
    assert "line 2: `meta.thumb` is 'meh', where true or false" in str(error.value)


def test_a_privacy_filter_sees_rows_first_and_its_faults_stop_the_collection(tmp_path):
    file = write_log(
        tmp_path / "log.jsonl",
        {"prompt": "I am Ada", "answer": "a", "secret": False},
        {"prompt": "q", "answer": "b", "secret": True},
    )
    columns = {"prompt": "prompt", "completion": "answer"}

    def privacy(row):
        return None if row["secret"] else row | {"prompt": row["prompt"].replace("Ada", "NAME")}

    traffic = read_traffic([file], columns, privacy)
    assert traffic.rows == [{"prompt": "I am NAME", "completion": "a"}]
    assert traffic.notes["logged rows dropped: by the privacy filter"] == 1
    with pytest.raises(ConfigError, match="raised ZeroDivisionError"):
        read_traffic([file], columns, lambda row: 1 / 0)
    with pytest.raises(ConfigError, match="returned str"):
        read_traffic([file], columns, lambda row: "text")


def test_the_same_candidates_in_another_order_are_one_question():
    found = collected(["a", "b", "c"])
    ask(found, random_pairs, budget=None, per_prompt=3, size=3, seed=0, weights={})
    assert len(found.rows[0].questions) == 1 and found.notes["questions dropped: asked already"] == 2
