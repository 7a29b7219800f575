"""The stage of soups: one model, a grid, records, reward models, and what is refused before anything is written."""

import json
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from transformers import AutoModelForCausalLM

from rlhf_trl.checks.problems import find_problems
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import model_fingerprint
from rlhf_trl.models.calibration import read_calibration
from rlhf_trl.models.lineage import starts_of
from rlhf_trl.models.options import soup_points, soup_weight_problem
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.runs.record import finish_run, read_jobs, read_run, start_run
from rlhf_trl.stages.evaluate import policies_of, sweep_runs
from tests.helpers.tiny import save_model


def test_points_of_a_grid_are_those_that_sum_to_one():
    assert soup_points("ab", None, [0, 0.5, 1]) == [{"a": 1, "b": 0}, {"a": 0.5, "b": 0.5}, {"a": 0, "b": 1}]
    assert len(soup_points("abc", None, [0, 0.25, 0.5, 0.75, 1])) == 15
    assert len(soup_points("abc", None, [0, 1 / 3, 2 / 3, 1])) == 10  # whose sums are rounded
    assert soup_points("ab", None, None) == [{"a": 0.5, "b": 0.5}]
    assert soup_points("ab", {"b": 1.5, "a": -0.5}, None) == [{"a": -0.5, "b": 1.5}]


@pytest.mark.parametrize(
    ("weights", "grid", "problem"),
    [
        ({"a": 0.5, "b": 0.5}, [0, 1], "Set one of them to null"),
        ({"a": 1.0}, None, "Give each a weight"),
        ({"a": 0.5, "b": 0.6}, None, "sum to 1.1"),
        ({"a": 0.5, "b": "x"}, None, "must give each model a number: `'stage.weights={a: 0.5, b: 0.5}'`"),
        ([0.5, 0.5], None, "must give each model a number"),
        (None, [0, 2], "from 0 to 1"),
        (None, [0.3, 0.4], "No 2 values"),
    ],
)
def test_weights_that_are_no_average_are_refused(weights, grid, problem):
    assert problem in soup_weight_problem("ab", weights, grid)


@pytest.fixture
def project(tmp_path) -> Path:
    """Make a project with two policies that runs have trained from one start."""
    base = save_model(tmp_path / "base")
    for seed, name in enumerate(("helpful", "brief"), 1):
        folder = Path(save_model(tmp_path / "test" / name, seed=seed))
        start_run(folder, "ppo", "train.py", base, {"model": model_fingerprint(base)})
        finish_run(folder, "done")
    return tmp_path


def test_a_grid_is_a_run_for_each_point_and_a_sweep_of_the_evaluation(compose, project, capsys):
    words = ["stage=soup", f"runs_dir={project}", "project=test", "stage.models=[helpful,brief]"]
    cfg = compose(*words, "stage.grid=[0,0.5,1]")
    assert find_problems(cfg) == []
    instantiate(cfg.stage.run)(cfg)
    folder = project / "test" / "soup"
    assert [job.overrides for job in read_jobs(folder / "sweep.json")][1] == {"helpful": "0.5", "brief": "0.5"}
    states = [
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (project / "test/helpful", project / "test/brief", *(folder / str(i) for i in range(3)))
    ]
    for key, tensor in states[3].items():
        torch.testing.assert_close(tensor, (states[0][key] + states[1][key]) / 2)
        assert states[2][key].equal(states[0][key]) and states[4][key].equal(states[1][key])
    names = ["soup helpful=1 brief=0", "soup helpful=0.5 brief=0.5", "soup helpful=0 brief=1"]
    assert list(sweep_runs(folder)) == names
    found = policies_of({"middle": "soup/1"}, False, ["soup"], project / "test")
    assert found["middle"].path == found[names[1]].path and found[names[1]].family == "soup"
    # A soup is a run with the same start, from which more soups and trainings begin
    assert read_run(folder / "1").model == str(project / "base") and read_run(folder / "1").stage == "soup"
    assert starts_of(str(folder / "1"))[1].path == str(project / "base")
    assert f"{folder}/1: helpful 0.5, brief 0.5" in capsys.readouterr().out
    # And what is there isn't overwritten unasked, nor other runs when asked
    assert any("overwrite=true" in problem for problem in find_problems(cfg))
    assert find_problems(compose(*words, "stage.grid=[0,1]", "overwrite=true")) == []


def test_one_soup_is_the_model_of_its_run_directory(compose, project):
    words = ["stage=soup", f"runs_dir={project}", "project=test", "stage.models={a: helpful, b: brief}"]
    cfg = compose(*words, "stage.weights={a: 0.25, b: 0.75}", "run_name=mixed")
    instantiate(cfg.stage.run)(cfg)
    states = [
        AutoModelForCausalLM.from_pretrained(project / "test" / name).state_dict()
        for name in ("helpful", "brief", "mixed")
    ]
    for key, tensor in states[2].items():
        torch.testing.assert_close(tensor, 0.25 * states[0][key] + 0.75 * states[1][key])
    record = json.loads((project / "test/mixed/run.json").read_text())
    assert record["status"] == "done" and set(record["inputs"]) == {"stage.models.a", "stage.models.b", "model"}


def test_a_soup_of_nothing_that_fits_is_refused_before_anything_is_written(compose, project):
    words = ["stage=soup", f"runs_dir={project}", "project=test"]
    problems = find_problems(compose(*words, "stage.models=[helpful,bref]"))
    assert len(problems) == 1 and "`stage.models.bref` is `bref`, and there is no such run" in problems[0]
    problems = find_problems(compose(*words, "stage.models=[helpful,brief]", "stage.grid=[0.3]"))
    assert len(problems) == 1 and "No 2 values of `stage.grid` sum to 1" in problems[0]
    start_run(other := project / "test" / "other", "ppo", "train.py", str(project / "elsewhere"))
    save_model(other, seed=5)
    finish_run(other, "done")
    from rlhf_trl.checks import check

    with pytest.raises(ConfigError, match="`helpful` and `other` don't share the weights that they were trained from"):
        check(compose(*words, "stage.models=[helpful,other]"))
    assert not (project / "test" / "soup").exists()


def test_soup_of_reward_models_is_a_calibrated_reward_model(compose, train, tmp_path):
    few = ["stage=reward", "model.run=null", "adapter=lora", "adapter.peft.r=4", "stage.args.max_steps=2"]
    runs = [train(tmp_path, *few, f"run_name=rm{i}", f"+stage.args.data_seed={i}") for i in (1, 2)]
    cfg = compose("stage=soup", f"runs_dir={tmp_path}", "project=test", "stage.models=[rm1,rm2]", "run_name=warm")
    assert find_problems(cfg) == []
    instantiate(cfg.stage.run)(cfg)
    warm, single = ModelReward(str(tmp_path / "test/warm")), ModelReward(runs[0])
    found, one = (read_calibration(path) for path in (str(tmp_path / "test/warm"), runs[0]))
    assert found.n == one.n and found.on == one.on and found.mean != one.mean
    # The calibration is that of the soup's own scores, and the record names the adapter's base
    assert warm.calibration.mean == pytest.approx(found.mean.item()) != single.calibration.mean
    record = json.loads((tmp_path / "test/warm/run.json").read_text())
    assert record["base_fingerprint"] == json.loads(Path(runs[0], "run.json").read_text())["base_fingerprint"]
    assert 0 < json.loads((tmp_path / "test/warm/metrics.json").read_text())["eval"]["eval_accuracy"] < 1
    # A soup has no held-out rows of its own: those of the next model count
    cfg = compose("stage=soup", f"runs_dir={tmp_path}", "project=test", "stage.models=[warm,rm2]", "run_name=again")
    assert find_problems(cfg) == []
    instantiate(cfg.stage.run)(cfg)
    again = read_calibration(str(tmp_path / "test/again"))
    assert again.n == one.n and again.on == one.on
