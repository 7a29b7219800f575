"""Directions of sweeps: what is searched for, and what is refused; launchers of their jobs."""

import pytest

from rlhf_trl.cli import sweep
from rlhf_trl.cli.overrides import compose_sweeper, parse_command_line
from rlhf_trl.cli.sweep import problems
from rlhf_trl.errors import Preempted
from rlhf_trl.runs.directions import direction_of


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("eval_loss", "minimize"),
        ("eval_nll_loss", "minimize"),
        ("eval_mse", "minimize"),
        ("eval_model/ece", "minimize"),
        ("eval_objective/kl", "minimize"),
        ("eval_kl", "minimize"),
        ("eval_objective/scores", "maximize"),
        ("eval_reward", "maximize"),
        ("eval_objective/rlhf_reward", "maximize"),
        ("eval_rewards/accuracies", "maximize"),
        ("eval_rewards/margins", "maximize"),
        ("eval_rewards/demo/mean", "maximize"),
        ("eval_accuracy", "maximize"),
        ("eval_model/accuracy", "maximize"),
        ("eval_model/accuracy_gap_above_2", "maximize"),
        ("eval_mean_token_accuracy", "maximize"),
        ("eval_model/best_of_16_gain", "maximize"),
        ("eval_rewards/rejected", None),
        ("eval_rewards/demo/std", None),
        ("eval_logps/chosen", None),
        ("eval_entropy", None),
        ("eval_completions/mean_length", None),
        ("eval_model/length_pearson", None),
        (None, None),
    ],
)
def test_direction_of_a_metric(metric, direction):
    assert direction_of(metric) == direction


SEARCH = ["-m", "sweep=optuna", "stage.args.beta=interval(0.1,0.9)"]


@pytest.mark.parametrize(
    ("words", "direction"),
    [
        (["stage=ppo"], "maximize"),
        (["stage=dpo"], "minimize"),
        (["stage=dpo", "direction=maximize"], "maximize"),
        (["stage=ppo", "hydra.sweeper.direction=minimize"], "minimize"),
    ],
)
def test_a_search_takes_its_direction_from_the_objective(words, direction):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    args = parse_command_line([*SEARCH, *words])
    assert problems(args) == []
    assert compose_sweeper(args.overrides).direction == direction


def test_a_search_without_a_direction_is_one_error_that_asks_for_it():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["stage=dpo", "objective=eval_rewards/rejected"]
    (problem,) = problems(parse_command_line([*SEARCH, *words]))
    assert "`eval_rewards/rejected`" in problem and "`direction=maximize`" in problem
    assert problems(parse_command_line([*SEARCH, *words, "direction=minimize"])) == []
    assert problems(parse_command_line([*SEARCH, *words, "hydra.sweeper.direction=minimize"])) == []
    assert problems(parse_command_line(["-m", "seed=1,2", *words])) == []  # a grid runs all jobs
    (problem,) = problems(parse_command_line(["-m", "seed=1,2", *words, "direction=up"]))
    assert "`direction` is `up`" in problem


@pytest.mark.parametrize("name", ["nodes", "tasks_per_node"])
def test_a_job_on_several_nodes_is_refused(name):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["-m", "stage=dpo", "seed=1,2", "hydra/launcher=slurm"]
    assert problems(parse_command_line([*words, "hydra.launcher.gpus_per_node=4"])) == []
    (problem,) = problems(parse_command_line([*words, f"hydra.launcher.{name}=2"]))
    assert f"`hydra.launcher.{name}` is 2" in problem and "`hydra.launcher.gpus_per_node=N`" in problem


def test_a_preempted_sweep_says_that_the_same_command_resumes(monkeypatch, capsys):
    def preempted(*_):
        raise Preempted

    monkeypatch.setattr(sweep, "run_app", preempted)
    with pytest.raises(SystemExit) as ended:
        sweep.main()
    assert ended.value.code == 75 and capsys.readouterr().err.startswith("Preempted. The same command resumes")
