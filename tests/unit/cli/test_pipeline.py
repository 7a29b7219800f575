"""Rounds of a pipeline: its problems, the steps that repeat, and when they end early."""

import json
import math
from argparse import Namespace
from itertools import combinations

import pytest
from omegaconf import OmegaConf

from rlhf_trl.cli import pipeline
from rlhf_trl.cli.pipeline import problems
from rlhf_trl.cli.promotion import note_promotions, promotions
from rlhf_trl.cli.rounds import all_steps, decide, flat, numbered, rounds_at_a_time, rounds_to_run
from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.record import read_promotions, write_json
from rlhf_trl.runs.results import Comparison, Estimate, PolicyDifference, PolicyResult
from tests.helpers.configs import composed


def problems_of(*words: str) -> list[str]:
    return problems(Namespace(overrides=list(words), config_dirs=[], multirun=False))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pipeline=iterated", "rounds=0"], "Set `rounds=1` or more"),
        (["pipeline=iterated", "rounds=-1"], "Set it to 0 or more"),
        (["pipeline=demo", "rounds=2"], "Name the steps of a round there"),
        (["pipeline=iterated", "each_round=3"], "must hold names of steps"),
        (["pipeline=iterated", "promotion=null"], "`promotion.step=null` turns it off"),
        (["pipeline=iterated", "early_stopping=null"], "`early_stopping` must hold"),
        (["pipeline=nightly", "promotion.rule=best"], "`promotion.rule` is 'best'. Set it to `not_worse`, `better`."),
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


@pytest.mark.parametrize("words", [["reference=previous"], ["rounds=next", "early_stopping.patience=1"]])
def test_the_loop_has_no_problem(words):
    assert problems_of("pipeline=iterated", *words) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reference=foo"], "`reference` is `foo`. Use one of `first`, `previous`."),
        (["start=frsh"], "`start` is `frsh`. Use one of `fresh`, `previous`."),
        (["align=pp"], "`align` is `pp`. Use one of `ppo`, `online_dpo`, `dpo`, `kto`, `rejection`."),
        (["mixture=old"], "`mixture` is `old`. Use one of `pooled`, `by_round`."),
        (["rounds=more"], "`rounds` is 'more' and must be an integer. Set it to 0 or more, or to `next`: the first"),
        (["early_stopping.patience=0"], "`early_stopping.patience` is 0. Set it to 1 or more."),
        (
            ["early_stopping.patience=1", "early_stopping.step=mesure"],
            "`early_stopping.step` is 'mesure', and no step of `each_round`. Set it to the one that measures: `col",
        ),
        (["early_stopping.patience=1", "early_stopping.metric=null"], "`early_stopping.metric` is null. Set it to"),
        (["keep=true", "overwrite=true"], "`keep=true` keeps changed steps and `overwrite=true` runs them again"),
    ],
)
def test_a_wrong_choice_is_one_clear_message(words, said):
    (problem,) = problems_of("pipeline=iterated", *words)
    assert problem.startswith(said)


@pytest.mark.parametrize("align", ["ppo", "online_dpo", "dpo", "kto", "rejection"])
@pytest.mark.parametrize(("mixture", "parts"), [("pooled", "labels"), ("by_round", "new")])
def test_each_aligner_has_its_steps_and_each_mixture_its_parts(align, mixture, parts):
    cfg = composed("pipeline", "pipeline=iterated", "rounds=2", f"align={align}", f"mixture={mixture}")
    steps = all_steps(cfg)
    rewards = [words for name, words in steps.items() if name.startswith("reward_")]
    assert len(rewards) == 3 and all("data.hold_out=0.25" in words for words in rewards)
    own = ["draw", "policy", "control"] if align == "rejection" else ["policy"]
    assert [name for name in steps if name.endswith("_2")] == [
        f"{name}_2" for name in ("collect", "label", "reward", "quality", *own, "compare")
    ]
    assert f"align={align}" in cfg.note and ("1 : 1 : 1 of the first data, the labels of" in cfg.note) == (
        mixture == "by_round"
    )
    sources = [word for word in steps["reward_1"] if word.startswith("+data@")]
    assert sources == ["+data@data.sources.first=demo", f"+data@data.sources.{parts}=files"]
    later = [word for word in steps["reward_2"] if "earlier" in word]
    assert bool(later) == (mixture == "by_round")
    if later:
        assert "data.sources.earlier.paths=[runs/iterated/label_1/feedback.jsonl]" in later
        assert "data.sources.new.paths=[runs/iterated/label_2/feedback.jsonl]" in steps["reward_2"]
        assert "data.weights={first: 1, earlier: 1, new: 1}" in steps["reward_2"]


@pytest.mark.parametrize("align", ["ppo", "online_dpo", "rejection"])
def test_prompts_of_a_log_are_what_policies_are_trained_and_compared_on(align):
    words = ["pipeline=iterated", "rounds=2", "prompts_of=log", f"align={align}"]
    steps, own = all_steps(composed("pipeline", *words)), "draw" if align == "rejection" else "policy"
    paths = "data.paths=[runs/iterated/collect_1/candidates.jsonl,runs/iterated/collect_2/candidates.jsonl]"
    assert all("data=files" in steps[name] and paths in steps[name] for name in (f"{own}_2", "compare_2"))
    without = all_steps(composed("pipeline", *words, "prompts_of=data"))
    assert not any("candidates.jsonl" in word for word in without[f"{own}_2"] + without["compare_2"])


def nights(tmp_path, rewards: list[dict[str, float]], measure: str = "reward", half: float = 0.25) -> None:
    """Write the comparisons of some nights: the mean of every policy, and differences within `half` of theirs."""

    def around(value: float) -> Estimate:
        return Estimate(value, value - half, value + half)

    for number, means in enumerate(rewards, 1):
        wins, policies = measure == "win_rate", {}
        for name, value in means.items():
            found = {} if value is None else {measure: around(value)}
            if name != "first" and value is not None and not wins:
                found["difference"] = around(value - means["first"])
            policies[name] = PolicyResult(path=name, completion_length=9, eos_rate=1, **found)
        between = [
            PolicyDifference(
                one=one,
                other=other,
                difference=around(0.0 if wins else means[one] - means[other]),
                wins=around(means[one] - means[other]) if wins else None,
            )
            for one, other in combinations([name for name in means if name != "first"], 2)
        ]
        folder = tmp_path / "nightly" / f"compare_{number}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"status": "done", "stage": "evaluate"}))
        write_json(
            folder / "comparison.json",
            Comparison(baseline="first", prompts=9, dropped=0, policies=policies, differences=between, samples=[]),
        )


def test_a_worse_policy_is_not_built_upon_and_its_thumbs_are_learned_from_again(tmp_path):
    nights(tmp_path, [{"first": 1.0, "policy_1": 2.0}, {"first": 1.0, "policy_1": 2.0, "policy_2": 1.5}])
    cfg = composed("pipeline", "pipeline=nightly", "rounds=3", f"runs_dir={tmp_path}")
    steps = all_steps(cfg)
    folder = f"{tmp_path}/nightly"
    assert "model.run=policy_1" in steps["collect_3"] and "model.run=policy_1" in steps["policy_3"]
    assert f"data.paths=[{folder}/collect_2/thumbs.jsonl,{folder}/collect_3/thumbs.jsonl]" in steps["policy_3"]
    assert f"data.paths=[{folder}/collect_2/thumbs.jsonl]" in steps["policy_2"]
    assert "+stage.policies.policy_1=policy_1" in steps["compare_3"]
    assert not any("policy_2" in word for word in steps["compare_3"])
    found = promotions(cfg, 3)
    assert found.current == "policy_1" and [each.is_promoted for each in found.rounds] == [True, False]
    assert found.rounds[1].difference == Estimate(-0.5, -0.75, -0.25)
    assert "`policy_2` is worse than the one before (reward 1.5, and `policy_1` 2; on" in found.rounds[1].in_words
    assert "prompts -0.5, -0.75 to -0.25), so `policy_1` stays" in found.rounds[1].in_words
    note_promotions(found, tmp_path / "nightly")
    assert read_promotions(tmp_path / "nightly") == found
    assert rounds_at_a_time(cfg) == [1, 2, 3] and rounds_at_a_time(composed("pipeline", "rounds=3")) == [3]


@pytest.mark.parametrize(("measure", "first", "scale"), [("reward", 1.0, 1.0), ("win_rate", None, 0.1)])
def test_the_paired_difference_and_its_interval_decide(tmp_path, measure, first, scale):
    cfg = composed("pipeline", "pipeline=nightly", "rounds=3")
    # Worse and better beyond chance; within chance; of one prompt, which has no interval
    for mean, half, promoted in (
        (1.5, 0.25, {"not_worse": False, "better": False}),
        (2.5, 0.25, {"not_worse": True, "better": True}),
        (1.9, 0.25, {"not_worse": True, "better": False}),
        (2.1, 0.25, {"not_worse": True, "better": False}),
        (1.5, math.nan, {"not_worse": True}),
    ):
        folder = tmp_path / f"{mean}_{half}"
        second = {"first": first, "policy_1": scale * 2, "policy_2": scale * mean}
        nights(folder, [{"first": first, "policy_1": 9.0}, second], measure, scale * half)
        cfg.runs_dir = str(folder)
        for cfg.promotion.rule, expected in promoted.items():
            found = promotions(cfg, 3)
            assert [each.is_promoted for each in found.rounds] == [True, expected]
            assert found.rounds[1].difference.mean == pytest.approx(scale * (mean - 2))
            note_promotions(found, folder / "nightly")
            assert read_promotions(folder / "nightly").rounds[1].in_words == found.rounds[1].in_words


def test_a_comparison_without_the_difference_of_both_decides_nothing(tmp_path):
    night = {"first": None, "policy_1": 0.6, "policy_2": 0.5}
    nights(tmp_path, [{"first": None, "policy_1": 0.9}, night], "win_rate")
    path = tmp_path / "nightly" / "compare_2" / "comparison.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"differences": []}))
    cfg = composed("pipeline", "pipeline=nightly", f"runs_dir={tmp_path}")
    with pytest.raises(ConfigError, match="no difference in win_rate between `policy_2` and `policy_1`"):
        promotions(cfg, 2)


def test_the_first_policy_stays_while_none_is_better_by_the_judge(tmp_path):
    nights(tmp_path, [{"first": None, "policy_1": 0.2}, {"first": None, "policy_2": 0.5}], "win_rate")
    cfg = composed("pipeline", "pipeline=nightly", "rounds=2", f"runs_dir={tmp_path}")
    assert not any("model.run" in word for word in all_steps(cfg)["policy_2"])  # it starts where round 1 did
    found = promotions(cfg, 2)
    assert found.current == "policy_2" and found.rounds[0].former_value == 0.5
    nights(tmp_path / "other", [{"first": None, "policy_1": None}])
    cfg.runs_dir = str(tmp_path / "other")
    assert promotions(cfg, 1).rounds[0].in_words == (
        "`policy_1` is the current policy; it was not compared by a reward or a judge."
    )
    cfg.promotion.measure = "reward"
    with pytest.raises(ConfigError, match="`promotion.measure=reward`, which the comparison .* didn't measure"):
        promotions(cfg, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["promotion.step=none"], "`promotion.step` is 'none', and no step of `each_round`. Set it to `collect`"),
        (["promotion.first=null"], "`promotion.first` is null"),
        (["promotion.measure=kl"], "`promotion.measure` is 'kl'. Set it to `reward`"),
        (["early_stopping.patience=1", "early_stopping.step=compare", "early_stopping.metric=x"], "are both set"),
    ],
)
def test_wrong_promotions_are_refused(words, said):
    (problem,) = problems_of("pipeline=nightly", *words)
    assert said in problem


@pytest.mark.parametrize(
    ("values", "options", "best", "stopped"),
    [
        ({0: 1.0, 1: 2.0, 2: 3.0}, (1, 0.0, True), 2, None),
        ({0: 1.0, 1: 2.0, 2: 1.5, 3: 9.0}, (1, 0.0, True), 1, 2),
        ({1: 2.0, 2: 2.0}, (1, 0.0, True), 1, 2),  # no gain
        ({0: 1.0, 1: 0.5}, (1, 0.0, True), 0, 1),  # the start was better
        ({1: 2.0, 2: 1.5, 3: 2.5, 4: 2.0, 5: 2.1}, (2, 0.0, True), 3, 5),
        ({1: 2.0, 2: 2.05}, (1, 0.1, True), 1, 2),  # less than the threshold
        ({1: 0.7, 2: 0.6, 3: 0.65}, (1, 0.0, False), 2, 3),
        ({1: math.nan, 2: 1.0}, (2, 0.0, True), 2, None),
    ],
)
def test_rounds_end_when_they_gain_no_more(values, options, best, stopped):
    found = decide(values, *options)
    assert (found.best, found.stopped) == (best, stopped)


def test_the_next_round_is_the_first_that_is_not_done(tmp_path):
    for name, status in (("label_1", "done"), ("policy_1", "done"), ("label_2", "done"), ("policy_2", "failed")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"status": status, "stage": "ppo"}))
    assert rounds_to_run("next", ["label", "policy"], tmp_path) == 2
    assert rounds_to_run("next", ["label"], tmp_path) == 3
    assert rounds_to_run(7, ["label"], tmp_path) == 7


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
                    "${first_or_later:[only],[others]}",
                ],
                "none": None,
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
        "b_1": ["x=b_0", "k=1", "l=1", "y=[]", "z=[b_0,b_1]", "+w.b_1=b_1", "only"],
        "b_2": ["x=b_1", "k=1", "l=2", "y=[b_1]", "z=[b_0,b_1,b_2]", "+w.b_1=b_1", "+w.b_2=b_2", "others"],
    }
    assert numbered("runs/p/label_*/f.jsonl", 1, 2) == ["runs/p/label_1/f.jsonl", "runs/p/label_2/f.jsonl"]
    assert flat([["a", ["b"]], "c"]) == ["a", "b", "c"] and flat("a") == "a"


@pytest.mark.parametrize(("code", "said"), [(0, "as a dry run does"), (3, "failed (exit status 3)")])
def test_a_step_that_is_not_done_ends_the_pipeline(tmp_path, monkeypatch, capsys, code, said):
    monkeypatch.setattr(pipeline, "run", lambda command: code)
    with pytest.raises(SystemExit) as ended:
        pipeline._run_step([], "sft", tmp_path)
    assert ended.value.code == (code or 1) and said in capsys.readouterr().err
