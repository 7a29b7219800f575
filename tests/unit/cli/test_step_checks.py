"""Checks of the steps of a pipeline before the first one runs, and the dry run of all that can be planned."""

import json
from argparse import Namespace

import pytest

from rlhf_trl.cli import pipeline
from rlhf_trl.cli.pipeline import problems
from rlhf_trl.cli.step_checks import awaited, words_of_steps

SHIPPED = ["demo", "iterated", "nightly", "hh/pythia", "safe_rlhf", "ultrafeedback/zephyr_qlora"]


@pytest.fixture
def problems_of(tmp_path, monkeypatch):
    """Return a function from the words of a command line to its problems, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: problems(Namespace(overrides=list(words), config_dirs=[], multirun=False))


def done(project, name: str, status: str = "done") -> None:
    (project / name).mkdir(parents=True)
    (project / name / "run.json").write_text(json.dumps({"stage": "sft", "status": status}))


@pytest.mark.parametrize("name", SHIPPED)
def test_what_earlier_steps_will_make_is_no_problem(problems_of, name):
    assert problems_of(f"pipeline={name}") == []


LAST = '+steps.last=["stage=generate","model.run=ppo"{}]'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [LAST.format(',"stage.max_promts=3"')],
            ["`steps.last`: `stage.max_promts=3`: there is no key", "max_prompts=3"],
        ),
        ([LAST.format(',"stage.n=many"')], ["`steps.last`: `stage.n` is 'many' and must be an integer"]),
        ([LAST.format(',"reward=modle"')], ["`steps.last`: `reward=modle`", "Did you mean `model`?"]),
        (
            [LAST.format(',"model.run=pp"')],
            ["`steps.last`: `model.run` is `pp`, and no step before this one makes that"],
        ),
        (
            ['+steps.last=["stage=grpo","model.run=sft","reward=function"]'],
            ["`steps.last`", "`reward.function.function`"],
        ),
        (['overrides=["lgger=none"]'], ["`steps.sft`: `lgger=none`: there is no key"]),  # once, for all steps
    ],
)
def test_a_typo_in_the_last_step_is_found_before_the_first_one_runs(problems_of, words, said):
    (problem,) = problems_of("pipeline=demo", *words)
    assert all(part in problem for part in said), problem


def test_a_run_of_a_later_step_is_missing(problems_of):
    steps = ["+steps.a=['stage=generate','model.run=b']", "+steps.b=['stage=sft']"]
    (problem,) = problems_of("pipeline=demo", *steps)
    assert problem.startswith("`steps.a`: `model.run` is `b`, and no step before this one makes that run.")


def test_steps_of_rounds_are_checked_by_their_round(problems_of, tmp_path):
    words = ["pipeline=iterated", "rounds=4", 'more.compare=["stage.best_of=3"]']
    project = tmp_path / "runs" / "iterated"
    for name in ("policy_0", "collect_1", "label_1", "reward_1", "policy_1", "quality_1", "policy_2"):
        done(project, name)  # what is done is as it is
    (problem,) = problems_of(*words)
    assert problem.startswith("`each_round.compare` in round 1: `stage.best_of=3`")
    for number in (1, 2):
        done(project, f"compare_{number}")
    (problem,) = problems_of(*words)
    assert problem.startswith("`each_round.compare` in round 3")


def test_a_program_of_ones_own_reads_what_it_likes(problems_of):
    assert problems_of("pipeline=demo", LAST.format(',"nodes=3"'), "program=[bash,mine.sh]") == []
    assert len(problems_of("pipeline=demo", LAST.format(',"nodes=3"'), "program=[python,train.py]")) == 1


def test_a_dry_run_plans_the_steps_that_can_be_and_says_what_the_others_wait_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands, code = [], 0
    monkeypatch.setattr(pipeline, "run", lambda command: commands.append(command) or code)
    steps = {
        "sft": ["stage=sft"],
        "other": ["stage=sft", "seed=3"],
        "reward": ["stage=reward", "model.run=sft"],
        "ppo": ["stage=ppo", "model.run=sft", "reward=model", "reward.model.run=reward"],
    }
    given = {"project": "mine", "runs_dir": "runs", "program": ["train"], "changed": "refuse", "config_dirs": []}
    pipeline.run_pipeline(steps, overrides=["debug=dry_run"], **given)
    assert [command[1] for command in commands] == ["stage=sft"] * 2 and all("debug=dry_run" in c for c in commands)
    out = capsys.readouterr().out
    assert "[3/4] reward: not planned, as it reads what `sft` will make" in out
    assert "[4/4] ppo: not planned, as it reads what `sft`, `reward` will make" in out
    assert "2 of 4 steps planned; 2 can't be before earlier ones are done, and of these the configs alone" in out
    assert not (tmp_path / "runs").exists()
    code = 2
    with pytest.raises(SystemExit) as ended:
        pipeline.run_pipeline(steps, overrides=["debug=dry_run"], **given)
    assert ended.value.code == 2 and "dry run of the step `sft` failed" in capsys.readouterr().err


def test_files_of_earlier_runs_are_awaited(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["stage=reward", "data=files", "data.paths=runs/mine/label_1/feedback.jsonl", "data/feedback=pairs"]
    (words,) = words_of_steps({"reward_1": words}, ["project=mine"], []).values()
    assert awaited(words, [], ["label_1", "label_2"]) == ["label_1"]
