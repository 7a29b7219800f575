"""Rounds of a pipeline: its problems, and the steps that repeat."""

from argparse import Namespace

import pytest
from omegaconf import OmegaConf

from rlhf_trl.cli.pipeline import all_steps, flat, numbered, problems


def problems_of(*words: str) -> list[str]:
    return problems(Namespace(overrides=list(words), config_dirs=[], multirun=False))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pipeline=iterated", "rounds=0"], "Set `rounds=1` or more"),
        (["pipeline=iterated", "rounds=-1"], "Set it to 0 or more"),
        (["pipeline=demo", "rounds=2"], "Name the steps of a round there"),
        (["pipeline=iterated", "each_round=3"], "must hold names of steps"),
        (
            ["pipeline=iterated", '+steps.label_2=["stage=label"]'],
            "`steps.label_2` and a step of `each_round` would be one",
        ),
        (["pipeline=iterated", "each_round.label=3"], "`each_round.label` is 3 and must be a list of overrides"),
    ],
)
def test_rounds_without_steps_and_steps_without_rounds_are_refused(words, says):
    (problem,) = problems_of(*words)
    assert says in problem


def test_the_loop_has_no_problem_and_names_the_reference():
    assert problems_of("pipeline=iterated", "rounds=2", "reference=previous") == []


def test_a_round_knows_its_number_and_the_runs_before_it():
    cfg = OmegaConf.create(
        {
            "steps": {"a": ["x=1"]},
            "rounds": 2,
            "each_round": {
                "b": [
                    "x=${start.${reference}}",
                    "${more}",
                    "y=${earlier:'b_*'}",
                    "z=${so_far:'b_*',0}",
                    "${each:'+w.b_*=b_*'}",
                ]
            },
            "more": ["k=1", "l=${round}"],
            "start": {"first": "a", "previous": "b_${previous}"},
            "reference": "previous",
            "round": 0,
            "previous": 0,
        }
    )
    assert all_steps(cfg) == {
        "a": ["x=1"],
        "b_1": ["x=b_0", "k=1", "l=1", "y=[]", "z=[b_0,b_1]", "+w.b_1=b_1"],
        "b_2": ["x=b_1", "k=1", "l=2", "y=[b_1]", "z=[b_0,b_1,b_2]", "+w.b_1=b_1", "+w.b_2=b_2"],
    }
    assert numbered("runs/p/label_*/f.jsonl", 1, 2) == ["runs/p/label_1/f.jsonl", "runs/p/label_2/f.jsonl"]
    assert flat([["a", "b"], "c"]) == ["a", "b", "c"] and flat("a") == "a"
