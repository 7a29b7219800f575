"""Language models as labelers, behind an endpoint on loopback."""

import json
import re

import pytest

from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.judges import HTTPJudge, ModelJudge, Reply, RewardJudge
from rlhf_trl.labels.candidates import Candidate, Candidates
from rlhf_trl.labels.judging import JudgeLabeler, RevisionLabeler, RubricLabeler, checked_principles, fill
from rlhf_trl.labels.replies import Asker, ReplyCache, read_number
from rlhf_trl.labels.store import LabelStore
from tests.helpers.architectures import save_architecture
from tests.helpers.judge_servers import judge_server

TEMPLATE = "{prompt}|{a}|{b}"
PRINCIPLES = {"kind": {"weight": 3, "text": "Be kind."}, "short": {"text": "Be short."}}
RUBRIC = {"principles": PRINCIPLES, "scale": [1, 5], "template": "{principle}|{prompt}|{answer}|{low}-{high}"}


def rows(*texts: list[str]) -> list[Candidates]:
    return [
        Candidates(
            id=f"p{i}",
            prompt=f"prompt {i}",
            candidates=[Candidate(completion=text) for text in each],
            questions=[tuple(range(len(each)))],
        )
        for i, each in enumerate(texts)
    ]


def labels(labeler, given, folder, form="pair"):
    store = LabelStore(folder / "labels.jsonl")
    assert labeler(given, store, form)
    return store.read()


def judge(url: str, template: str = TEMPLATE, **options) -> HTTPJudge:
    return HTTPJudge(url, "tiny", template, **options)


def prefers_good(question: str) -> str:
    """Prefer the text with "good", and without one the text shown first."""
    _, a, b = question.split("|")
    return json.dumps({"verdict": "B" if "good" in b and "good" not in a else "A"})


def test_both_orders_decide_and_show_the_position_bias(tmp_path):
    with judge_server(prefers_good) as (url, requests):
        labeler = JudgeLabeler(judge(url), str(tmp_path / "replies.jsonl"))
        found = labels(labeler, rows(["bad", "good"], ["good", "bad"], ["x", "y"]), tmp_path)
    assert [(label.answer, label.confidence) for label in found] == [(1, 1.0), (0, 1.0), ("tie", 0.5)]
    assert {label.labeler for label in found} == {"judge tiny"}
    assert labeler.measures["eval_judge/position_bias"] == pytest.approx(4 / 6)
    assert labeler.measures["eval_judge/order_agreement"] == pytest.approx(2 / 3)
    assert len(requests) == 6 and requests[0]["response_format"]["json_schema"]["strict"] is True


def test_verdicts_that_differ_by_the_order_may_be_skipped(tmp_path):
    with judge_server(prefers_good) as (url, _):
        labeler = JudgeLabeler(judge(url), str(tmp_path / "replies.jsonl"), inconsistent="skip")
        (label,) = labels(labeler, rows(["x", "y"]), tmp_path)
    assert label.skipped == "the judge's verdicts differ by the order"


LONG = "the question is longer than the judge's context"


def test_a_question_that_is_too_long_for_a_server_is_left_unlabeled(tmp_path):
    """And is no reason to ask the others without a schema."""
    said = "This model's maximum context length is 64 tokens. However, you requested 99."
    texts = rows(["x", "good"], ["long", "good"])

    def status(body):
        return 400 if "long" in body["messages"][0]["content"] else 200

    with judge_server(prefers_good, status, said) as (url, requests):
        labeler = JudgeLabeler(judge(url), str(tmp_path / "replies.jsonl"))
        found = labels(labeler, texts, tmp_path)
    assert [(label.answer, label.skipped) for label in found] == [(1, None), (None, LONG)]
    assert all("response_format" in body for body in requests) and labeler.measures["eval_judge/too_long"] == 2
    again = JudgeLabeler(judge("http://127.0.0.1:1/v1"), str(tmp_path / "replies.jsonl"))  # all is cached
    assert [label.answer for label in labels(again, texts, tmp_path)] == [1, None]


def test_a_question_that_is_too_long_for_a_model_is_left_unlabeled(tmp_path):
    path = save_architecture(tmp_path / "gpt2", "gpt2")  # 64 learned positions
    labeler = JudgeLabeler(ModelJudge(path, TEMPLATE, max_new_tokens=4), str(tmp_path / "replies.jsonl"))
    found = labels(labeler, rows(["a", "b"], ["a " * 80, "b"], ["c", "d"]), tmp_path)
    assert [label.skipped == LONG for label in found] == [False, True, False]
    assert labeler.measures["eval_judge/too_long"] == 2  # in both orders


def test_thoughts_refusals_cut_and_unreadable_replies_are_counted_and_left_unlabeled(tmp_path):
    said = {
        "prompt 0": "<think>A is fine, but B...</think>\n\nB",
        "prompt 1": "I'm sorry, but I can't compare these.",
        "prompt 2": {"message": {"content": "<think>Let me see"}, "finish_reason": "length"},
        "prompt 3": "Both have their merits.",
        "prompt 4": {"message": {"content": None, "refusal": "No."}, "finish_reason": "stop"},
        "prompt 5": "So A is worse.</think>B",
    }
    with judge_server(lambda question: said[question.split("|")[0]]) as (url, _):
        labeler = JudgeLabeler(judge(url), str(tmp_path / "replies.jsonl"))
        found = labels(labeler, rows(*[["x", "y"]] * 6), tmp_path)
    assert [label.answer for label in found] == ["tie", None, None, None, None, "tie"]
    assert [label.skipped for label in found[1:5]] == [
        "the judge refused",
        "the judge's reply was cut at its limit of tokens",
        "the judge's reply can't be read",
        "the judge refused",
    ]
    counts = {"replies": 12, "with_thoughts": 6, "refused": 4, "cut": 2, "unreadable": 2}
    assert {name: labeler.measures[f"eval_judge/{name}"] for name in counts} == counts


def test_an_interrupted_labeling_asks_nothing_twice_and_measures_all(tmp_path):
    given = rows(*[["bad", "good"]] * 4)

    def broken(body):
        return 400 if "prompt 3" in body["messages"][0]["content"] else 200

    cache = str(tmp_path / "replies.jsonl")
    with judge_server(prefers_good, broken) as (url, requests):
        with pytest.raises(ConfigError, match="refused with status 400"):
            labels(JudgeLabeler(judge(url, concurrency=1), cache, schema=False), given, tmp_path)
        first = [body["messages"][0]["content"] for body in requests]
    assert not LabelStore(tmp_path / "labels.jsonl").read()  # labels are saved by the batch, replies one by one
    with open(cache, "ab") as file:
        file.write(b'{"key": "torn')
    with judge_server(prefers_good) as (url, requests):
        labeler = JudgeLabeler(judge(url), cache, schema=False)
        assert [label.answer for label in labels(labeler, given, tmp_path)] == [1] * 4
        again = [body["messages"][0]["content"] for body in requests]
        assert sorted(again) == ["prompt 3|bad|good", "prompt 3|good|bad"] and "prompt 0|bad|good" in first
        more = JudgeLabeler(judge(url), cache, schema=False)
        assert len(labels(more, given, tmp_path)) == 4 and len(requests) == 2
        assert more.measures["eval_judge/order_agreement"] == 1.0
        labels(JudgeLabeler(judge(url, "{prompt}|{b}|{a}"), cache, schema=False, name="other"), given[:1], tmp_path)
        labels(JudgeLabeler(judge(url, max_tokens=9), cache, schema=False, name="third"), given[:1], tmp_path)
    # Another template fills in other texts here, of which those of the other order are known
    assert len(requests) == 4


def test_a_server_without_schemas_is_asked_without(tmp_path):
    with judge_server(lambda question: "A", lambda body: 400 if "response_format" in body else 200) as (url, requests):
        labels(JudgeLabeler(judge(url, concurrency=1), str(tmp_path / "r.jsonl")), rows(["x", "y"]), tmp_path)
    assert ["response_format" in body for body in requests] == [True, False, False]


def test_several_samples_show_how_consistent_the_judge_is(tmp_path):
    numbers = iter(range(100))

    def fickle(question):
        return "A" if next(numbers) < 6 else "B"  # the third sample says the opposite in both orders

    with judge_server(fickle) as (url, requests):
        cache = str(tmp_path / "replies.jsonl")
        labeler = JudgeLabeler(judge(url, concurrency=1), cache, samples=4, temperature=1.0)
        (label,) = labels(labeler, rows(["x", "y"]), tmp_path)
    assert len({(body["seed"], body["messages"][0]["content"]) for body in requests}) == len(requests) == 8
    assert labeler.measures["eval_judge/self_consistency"] == pytest.approx(3 / 4)
    assert (label.answer, label.confidence) == ("tie", 0.5)
    with pytest.raises(ConfigError, match="asks for equal replies"):
        JudgeLabeler(judge("http://127.0.0.1"), cache, samples=2)


def test_a_rubric_scores_each_principle(tmp_path):
    scores = {
        ("Be kind.", "x"): "5",
        ("Be short.", "x"): '{"score": 1}',
        ("Be kind.", "y"): "Score: 2",
        ("Be short.", "y"): "9",
    }

    def scored(question):
        principle, _, answer, scale = question.split("|")
        assert scale == "1-5"
        return scores[principle, answer]

    with judge_server(scored) as (url, _):
        labeler = RubricLabeler(judge(url), cache=str(tmp_path / "replies.jsonl"), **RUBRIC)
        (label,) = labels(labeler, rows(["x", "y"]), tmp_path, "rating")
        assert label.answer == [{"kind": 5.0, "short": 1.0}, {"kind": 2.0}]  # 9 is off the scale
        assert labeler.measures["eval_judge/unreadable"] == 1
        (_, pair) = labels(labeler, rows(["x", "y"]), tmp_path, "pair")
        assert pair.answer == 0  # by the principle that both have a score of
        scores["Be short.", "y"] = "5"
        weighted = RubricLabeler(judge(url), cache=str(tmp_path / "again.jsonl"), **RUBRIC, tie_margin=1.3, name="b")
        *_, pair = labels(weighted, rows(["x", "y"]), tmp_path, "pair")
    assert pair.answer == "tie"  # (3 * 5 + 1) / 4 = 4 and (3 * 2 + 5) / 4 = 2.75


def test_a_critique_leads_to_a_revision(tmp_path):
    def writes(question):
        if question.startswith("critique"):
            return "It is rude." if "rude" in question else "Nothing is wrong."
        assert "It is rude." in question or "Nothing is wrong." in question
        return "<think>hm</think>I'm sorry, but no." if "It is rude." in question else "fine"

    with judge_server(writes) as (url, requests):
        labeler = RevisionLabeler(
            judge(url),
            principles={"kind": PRINCIPLES["kind"]},
            critique="critique|{principle}|{prompt}|{answer}",
            revision="revision|{critique}|{principle}|{prompt}|{answer}",
            cache=str(tmp_path / "replies.jsonl"),
            max_tokens=99,
        )
        found = labels(labeler, rows(["rude {prompt}"], ["fine"]), tmp_path, "edit")
    assert [(label.answer, label.skipped) for label in found] == [
        ("I'm sorry, but no.", None),
        (None, "the revision is the original"),
    ]
    assert {body["max_tokens"] for body in requests} == {99} and len(requests) == 4


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4", 4),
        ('```json\n{"score": 2}\n```', 2),
        ("Score: 3.5", 3.5),
        ("4/5", None),
        ("7", None),
        ("-3", None),
        ('{"score": true}', None),
        ("good", None),
        ('{"score": 3', 3),
    ],
)
def test_a_number_is_read_and_not_guessed(text, number):
    assert read_number(text, "score", 1, 5) == number


def test_options_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="Set `judge=http"):
        Asker(RewardJudge(), ReplyCache(tmp_path / "r.jsonl"))
    for wrong, says in (
        ({}, "is empty"),
        ({"a": {}}, "has no `text`"),
        ({"a": {"text": "b", "weight": 0}}, "above 0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(says)):
            checked_principles(wrong)
    assert fill("{a}{b}{c}", a="{b}", b=1) == "{b}1{c}"
    assert Reply("x") == Reply("x", False, False)
