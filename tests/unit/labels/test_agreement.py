"""Agreement of labelers, against published figures."""

import math
from itertools import combinations

import pytest

from rlhf_trl.labels.agreement import agreement, cohen_kappa, krippendorff_alpha, match, quality, values_of
from rlhf_trl.labels.store import Label

# Krippendorff 2011, table C: four observers, twelve units
OBSERVERS = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
UNITS = [
    [int(value) for value in column if value != "."]
    for column in zip(*(line.split() for line in OBSERVERS.strip().splitlines()), strict=True)
]


@pytest.mark.parametrize(
    "level, alpha",
    [
        ("nominal", 0.743421052631579),
        ("ordinal", 0.8153875037548814),
        ("interval", 0.8491071428571428),
        ("ratio", 0.7974027747116121),
    ],
)
def test_alpha_is_that_of_the_published_table(level, alpha):
    assert krippendorff_alpha(UNITS, level) == pytest.approx(alpha, rel=1e-15)


def test_alpha_of_words_and_of_nothing():
    # Krippendorff 2011, table A: two observers, binary
    pairs = list(zip("0100000000", "1110010010", strict=True))
    assert krippendorff_alpha(pairs) == pytest.approx(0.095, abs=5e-4)
    assert krippendorff_alpha([("a", "a"), ("b", "b")]) == 1
    assert math.isnan(krippendorff_alpha([("a",), ("b",)])) and math.isnan(krippendorff_alpha([("a", "a")]))


def test_kappa_of_known_tables():
    # 20 yes of both, 15 no of both, 5 and 10 of one only: kappa .4
    first, second = "y" * 25 + "n" * 25, "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    # Cohen 1960, table 1: kappa .492 (in proportions of 200)
    table = [[88, 14, 18], [10, 40, 10], [2, 6, 12]]
    first = [i for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]
    second = [j for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]
    assert cohen_kappa(first, second) == pytest.approx(0.492, abs=5e-4)
    assert math.isnan(cohen_kappa("yy", "yy")) and math.isnan(cohen_kappa([], []))


def pair(labeler, question, answer, i="p", **more) -> Label:
    return Label(id=i, question=question, form="pair", order=question, answer=answer, labeler=labeler, **more)


def test_the_same_pair_asked_the_other_way_round_is_the_same_unit():
    assert values_of(pair("ann", [4, 2], 0)) == values_of(pair("bob", [2, 4], 1)) == {("p", (2, 4), "pair"): 1}
    labels = [pair("ann", [4, 2], 0), pair("bob", [2, 4], 1), pair("ann", [0, 1], "tie"), pair("bob", [0, 1], 1)]
    found = agreement(labels, "pair")
    assert found.units == 2 and found.pairs["ann", "bob"][:2] == (2, 0.5)
    assert found.alpha == krippendorff_alpha([(1, 1), ("tie", 1)])


def test_answers_by_chance_have_no_agreement_whatever_candidates_the_pairs_are_of():
    # Each two answers equally often, about pairs of four candidates
    answers = [(a, b) for a in (0, 1) for b in (0, 1)]
    labels = [
        pair(name, [first, second], given, i=f"{first}{second}{number}")
        for first, second in combinations(range(4), 2)
        for number, both in enumerate(answers * 10)
        for name, given in zip(("ann", "bob"), both, strict=True)
    ]
    found = agreement(labels, "pair")
    assert found.pairs["ann", "bob"] == (240, 0.5, 0) and found.alpha == pytest.approx(0, abs=0.01)


def test_rankings_and_ratings_agree_by_candidate():
    ranking = {"id": "p", "question": [0, 1, 2], "form": "ranking"}
    a, b = Label(**ranking, answer=[1, 1, 3], labeler="a"), Label(**ranking, answer=[1, 1, 2], labeler="b")
    assert match(a, b) == 1 and values_of(a) == values_of(b)
    assert match(a, Label(**ranking, answer=[1, 2, 3], labeler="b")) == pytest.approx(2 / 3)
    rating = {"id": "p", "question": [0, 1], "form": "rating"}
    a = Label(**rating, answer=[{"kind": 4, "true": 2}, None], labeler="a")
    b = Label(**rating, answer=[{"kind": 4, "true": 3}, {"kind": 1}], labeler="b")
    assert match(a, b) == 0.5 and agreement([a, b], "rating").units == 2


def test_quality_of_a_labeler():
    known = pair("expert", [0, 1], 1)
    labels = [
        pair("ann", [0, 1], 1, seconds=2.0),
        pair("ann", [0, 1], 0, seconds=4.0),  # asked again: the other answer
        pair("ann", [2, 3], 0, seconds=9.0),
        Label(id="p", question=[4, 5], form="pair", labeler="ann", skipped="neither is a text"),
        pair("bob", [1, 0], 1),
    ]
    found = quality(labels, {known.key: known})
    ann, bob = found["ann"], found["bob"]
    assert (ann.labels, ann.skipped, ann.gold, ann.accuracy, ann.repeats, ann.consistency) == (3, 1, 1, 1.0, 1, 0.0)
    assert ann.first_shown == pytest.approx(2 / 3) and ann.seconds == 4
    assert bob.accuracy == 0 and math.isnan(bob.consistency) and math.isnan(bob.seconds)
