"""`launch/pipeline.py` and `launch/sweep.py`: their mechanics with a stand-in for training, then the real thing."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf_trl.runs.record import read_comparison, read_promotions, read_quality
from rlhf_trl.tasks.demo.data import rows as demo_rows
from tests.helpers.forked_pipeline import forked

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FAKE = f"program=[{sys.executable},{ROOT / 'tests/helpers/fake_train.py'}]"
STEPS = {"sft": ["stage=sft"], "ppo": ["stage=ppo", "model.run=sft"], "again": ["stage=ppo", "seed=2"]}


def start(script: str, folder: Path, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "launch" / f"{script}.py"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True, **pipes, **options)


def launch(script: str, folder: Path, *arguments: str, timeout: float = 600) -> tuple[int, str, str]:
    process = start(script, folder, *arguments)
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def write_pipeline(folder: Path, steps: dict, **settings) -> list[str]:
    """Write a user's own pipeline in a folder of their own."""
    (folder / "conf" / "pipeline").mkdir(parents=True, exist_ok=True)
    text = "# @package _global_\n" + yaml.safe_dump({"project": "mine", "steps": steps, **settings}, sort_keys=False)
    (folder / "conf" / "pipeline" / "mine.yaml").write_text(text)
    return ["--config-dir", "conf", "pipeline=mine"]


def calls(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it didn't come"
        time.sleep(0.02)


def test_steps_run_in_order_and_are_shown(tmp_path):
    mine = write_pipeline(tmp_path, STEPS)
    code, out, err = launch("pipeline", tmp_path, *mine, FAKE, 'overrides=["logger.x=1"]')
    assert code == 0, err
    own = f"--config-dir {tmp_path / 'conf'}"
    assert calls(tmp_path) == [
        f"{own} stage=sft project=mine logger.x=1",
        f"{own} stage=ppo model.run=sft project=mine logger.x=1",
        f"{own} stage=ppo seed=2 project=mine run_name=again logger.x=1",
    ]
    assert "[1/3] sft: " in out and "stage=sft project=mine" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["step", "time", "metric", "start", "end"] in rows
    assert ["again", "0", "s", "eval_loss", "2.000", "0.500"] in rows
    assert "next: " not in out  # no step has left a model


def test_a_pipeline_ends_with_the_command_to_chat_with_its_policies(tmp_path):
    mine = write_pipeline(tmp_path, STEPS)
    kinds = {"sft": "LlamaForCausalLM", "ppo": "LlamaForSequenceClassification", "again": "LlamaForCausalLM"}
    launch("pipeline", tmp_path, *mine, FAKE)
    for name, kind in kinds.items():
        (tmp_path / "runs/mine" / name / "config.json").write_text(json.dumps({"architectures": [kind]}))
    _, out, _ = launch("pipeline", tmp_path, *mine, FAKE)
    chat = r"'stage.policies=\[sft,again\]' project=mine$"
    assert re.search(rf"^next: chat  .*train.py .*stage=chat {chat}", out, re.M)
    config = tmp_path / "runs/mine/sft/config.yaml"
    config.write_text(config.read_text() + "model: {path: organization/name}\n")
    _, out, _ = launch("pipeline", tmp_path, *mine, FAKE)
    assert re.search(rf"^next: chat  .*train.py .*stage=chat model=hf {chat}", out, re.M)


def test_what_is_done_is_not_done_again_and_the_ways_out_are_named(tmp_path):
    mine = write_pipeline(tmp_path, STEPS)
    launch("pipeline", tmp_path, *mine, FAKE)
    code, out, _ = launch("pipeline", tmp_path, *mine, FAKE)
    assert code == 0
    assert len(calls(tmp_path)) == 3
    assert "done, skipped" in out and "eval_loss" in out and "project=another" in out


def test_a_step_with_a_word_that_takes_away_is_done_at_the_second_call(tmp_path):
    mine = write_pipeline(tmp_path, {"compare": ["stage=evaluate", "~stage.policies.dpo"]})
    for said in ("[1/1] compare: ", "[1/1] compare: done, skipped"):
        code, out, err = launch("pipeline", tmp_path, *mine, FAKE)
        assert code == 0 and said in out, err
    assert len(calls(tmp_path)) == 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["stage=sft"], ["`stage=sft` is a word for a step", """'overrides=["stage=sft"]'"""]),
        (["overrides=seed"], ["`overrides` is 'seed' and must be a list of overrides"]),
        (["steps.sft=stage=sft"], ["`steps.sft` is 'stage=sft' and must be a list of overrides"]),
        (["pipeline=dmo"], ["`demo`"]),
        (["pipeline=reviews_tiny"], ["Use `pipeline=reviews/tiny`."]),
        (["pipelin=demo"], ["`pipeline=demo`"]),
        (["--config-dir", "conf", "pipeline=mine"], ["`step` in `conf/pipeline/mine.yaml`", "`steps`"]),
        (["-m"], ["Remove `-m`"]),
    ],
)
def test_the_pipeline_speaks_as_train_does(tmp_path, words, parts):
    write_pipeline(tmp_path, {}, step={"sft": ["stage=sft"]})
    code, out, err = launch("pipeline", tmp_path, *words)
    assert code == 2 and err.startswith("Error: ") and "HYDRA_FULL_ERROR" not in err and out == ""
    assert all(part in err for part in parts), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conf"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["stage=ppo", "run_name=a,b"], "`run_name=a,b`: a sweep has one `run_name` for all its jobs"),
        (["stage=evaluate", "stage.temperature=0.7,1.0"], "`stage=evaluate` measures none"),
        (["stage=ppo", "sed=1,2"], "`seed=1`"),
    ],
)
def test_what_a_sweep_can_not_do_is_reported(tmp_path, words, part):
    code, out, err = launch("sweep", tmp_path, "-m", *words)
    assert code == 2 and err.startswith("Error: ") and part in err and out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_failing_step_stops_the_pipeline_and_the_next_call_resumes_there(tmp_path):
    steps = {**STEPS, "ppo": ["stage=ppo", "+fails=true"]}
    mine = write_pipeline(tmp_path, steps)
    code, out, err = launch("pipeline", tmp_path, *mine, FAKE)
    assert code == 1
    assert "the data is missing: give it" in err and "`ppo` failed" in err
    assert "[3/3]" not in out
    (tmp_path / "mended").touch()
    code, out, err = launch("pipeline", tmp_path, *mine, FAKE)
    assert code == 0, err
    assert "sft: done, skipped" in out
    # There was no checkpoint, so what the failed step left is not worth keeping
    assert [call.split("conf ")[1] for call in calls(tmp_path)[2:]] == [
        "stage=ppo +fails=true project=mine overwrite=true",
        "stage=ppo seed=2 project=mine run_name=again",
    ]


ROUNDS = {
    "names": {"first": "sft", "previous": "ppo_${previous}"},
    "more": ["seed=${round}", "+x=${so_far:'ppo_*'}"],
    "each_round": {
        "ppo": ["stage=ppo", "${more}", "+y=${earlier:'ppo_*'}"],
        "check": ["stage=evaluate", "+fails=${fails}"],
    },
    "fails": False,
    "note": "Two rounds",
}


def test_steps_repeat_in_rounds_and_a_round_resumes_in_its_middle(tmp_path):
    mine = write_pipeline(tmp_path, {"sft": ["stage=sft"]}, **ROUNDS, rounds=2)
    code, out, err = launch("pipeline", tmp_path, *mine, FAKE)
    assert code == 1 and "`check_1` failed" in err and out.startswith("Two rounds\n")
    (tmp_path / "mended").touch()
    code, out, err = launch("pipeline", tmp_path, *mine, FAKE)
    assert code == 0, err
    assert "[2/5] ppo_1: done, skipped" in out and "[5/5] check_2: " in out
    assert [call.split("conf ")[1] for call in calls(tmp_path)] == [
        "stage=sft project=mine",
        "stage=ppo seed=1 +x=[ppo_1] +y=[] project=mine run_name=ppo_1",
        "stage=evaluate +fails=False project=mine run_name=check_1",
        "stage=evaluate +fails=False project=mine run_name=check_1 overwrite=true",
        "stage=ppo seed=2 +x=[ppo_1,ppo_2] +y=[ppo_1] project=mine run_name=ppo_2",
        "stage=evaluate +fails=False project=mine run_name=check_2",
    ]
    code, out, err = launch("pipeline", tmp_path, *mine, FAKE, "rounds=3")  # more rounds go on from there
    assert code == 0 and len(calls(tmp_path)) == 8, err


EARLY = {
    "each_round": {"ppo": ["stage=ppo", "+stage.args.beta=1e-${round}"], "check": ["stage=evaluate"]},
    "early_stopping": {
        **{"step": "ppo", "metric": "eval_loss", "patience": 1},
        **{"threshold": 0.05, "greater_is_better": False},
    },
}


def test_rounds_stop_early_and_the_decision_stays(tmp_path):
    mine = write_pipeline(tmp_path, {"sft": ["stage=sft"]}, **EARLY, rounds=4)
    said = (
        "Early stopping after round 3 of 4: `eval_loss` improves no more (1: 0.1, 2: 0.01, 3: 0.001); the best one is"
    )
    for _ in range(2):
        code, out, err = launch("pipeline", tmp_path, *mine, FAKE)
        assert code == 0 and f"{said} round 2." in out, err
        assert len(calls(tmp_path)) == 7 and "check_3" in out and "check_4" not in out  # the round is finished
    assert json.loads((tmp_path / "runs/mine/rounds.json").read_text())["stopped"] == 3
    assert said in (tmp_path / "runs/mine/report/report.md").read_text()
    code, out, err = launch("pipeline", tmp_path, *mine, FAKE, "early_stopping.patience=2")
    assert code == 0 and len(calls(tmp_path)) == 9, err
    assert "Rounds by `eval_loss` (1: 0.1, 2: 0.01, 3: 0.001, 4: 0.0001): the best one is round 2." in out


def test_changed_steps_are_kept_on_request(tmp_path):
    words = {"each_round": {"label": ["stage=label", "${by}"]}, "by": ["labeler=gold"]}
    mine = write_pipeline(tmp_path, {"sft": ["stage=sft"]}, **words, rounds=1)
    launch("pipeline", tmp_path, *mine, FAKE)
    more = [*mine, FAKE, "rounds=2", 'by=["labeler=judge"]']
    code, _, err = launch("pipeline", tmp_path, *more)
    assert code == 2 and "was made with `labeler=gold`, and is now to be made with `labeler=judge`" in err
    assert "so that the change begins with what isn't: `keep=true`" in err
    code, out, err = launch("pipeline", tmp_path, *more, "keep=true")
    assert code == 0 and "label_1: done, skipped" in out, err
    assert [call.split("stage=label ")[1] for call in calls(tmp_path)[1:]] == [
        "labeler=gold project=mine run_name=label_1",
        "labeler=judge project=mine run_name=label_2",
    ]


@pytest.mark.slow
def test_a_labeling_of_which_more_answers_are_asked_goes_on(tmp_path):
    steps = {"label": ["stage=label", "+left=true", "stage.budget=4"], "ppo": ["stage=ppo"]}
    launch("pipeline", tmp_path, *write_pipeline(tmp_path, steps), FAKE)
    (tmp_path / "mended").touch()
    launch("pipeline", tmp_path, *write_pipeline(tmp_path, steps), FAKE)
    steps["label"][-1] = "stage.budget=8"
    code, _, err = launch("pipeline", tmp_path, *write_pipeline(tmp_path, steps), FAKE)
    assert code == 2 and "with `stage.budget=4`, and is now to be made with `stage.budget=8`" in err
    assert "continue this labeling, and make all after it again: `overwrite=true`" in err
    code, _, err = launch("pipeline", tmp_path, *write_pipeline(tmp_path, steps), FAKE, "overwrite=true")
    assert code == 0, err
    assert [call.split("project=mine ")[-1] for call in calls(tmp_path)[-2:]] == [
        "resume=true",
        "overwrite=true",
    ]


@pytest.mark.slow
def test_a_step_that_stopped_for_people_is_resumed_by_the_same_command(tmp_path):
    mine = write_pipeline(tmp_path, {"label": ["stage=label", "+left=true"]})
    code, _, err = launch("pipeline", tmp_path, *mine, FAKE)
    assert code == 130 and "The step `label` stopped before its end. The same command resumes it." in err
    (tmp_path / "mended").touch()
    code, _, err = launch("pipeline", tmp_path, *mine, FAKE)
    assert code == 0, err
    assert calls(tmp_path)[-1].endswith("resume=true")


def test_a_finished_step_is_never_silently_made_anew(tmp_path):
    launch("pipeline", tmp_path, *write_pipeline(tmp_path, STEPS), FAKE)
    steps = {**STEPS, "ppo": ["stage=ppo", "model.run=sft", "seed=7"]}
    mine = write_pipeline(tmp_path, steps)
    code, _, err = launch("pipeline", tmp_path, *mine, FAKE)
    assert code == 2
    assert "`ppo`" in err and "seed=7" in err and "project=" in err and "overwrite=true" in err
    assert "Traceback" not in err
    assert len(calls(tmp_path)) == 3
    code, _, err = launch("pipeline", tmp_path, *mine, FAKE, "overwrite=true")
    assert code == 0, err
    assert [call.split()[-1] for call in calls(tmp_path)[3:]] == ["overwrite=true"] * 2  # ppo, and what comes after it


def test_a_step_made_before_an_earlier_one_was_made_again_is_not_done(tmp_path):
    mine = write_pipeline(tmp_path, STEPS)
    launch("pipeline", tmp_path, *mine, FAKE)
    program = FAKE.removeprefix("program=[").removesuffix("]").split(",")
    again = [*program, "stage=sft", "project=mine", "overwrite=true"]
    subprocess.run(again, cwd=tmp_path, env=ENVIRONMENT, check=True)
    code, _, err = launch("pipeline", tmp_path, *mine, FAKE)
    assert code == 2 and "was made before a step that it comes after" in err


@pytest.mark.parametrize(
    ("number", "status", "how"),
    [(signal.SIGINT, 130, "Stopped"), pytest.param(signal.SIGTERM, 75, "Preempted", marks=pytest.mark.slow)],
)
def test_interrupt_saves_and_the_next_call_resumes(tmp_path, number, status, how):
    mine = write_pipeline(tmp_path, {**STEPS, "ppo": ["stage=ppo", "+waits=true"]})
    process = start("pipeline", tmp_path, *mine, FAKE, start_new_session=True)
    wait_for(lambda: len(calls(tmp_path)) == 2)
    time.sleep(0.2)
    os.killpg(process.pid, number)  # what a terminal does, or a scheduler
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"{how} at the step `ppo`" in err and "Traceback" not in err
    assert json.loads((tmp_path / "runs/mine/ppo/run.json").read_text())["status"] == "stopped"
    code, _, err = launch("pipeline", tmp_path, *mine, FAKE)
    assert code == 0, err
    assert calls(tmp_path)[2].endswith("resume=true")


def test_a_step_that_still_runs_is_left_alone(tmp_path):
    mine = write_pipeline(tmp_path, {"sft": ["stage=sft", "+waits=true"]})
    process = start("pipeline", tmp_path, *mine, FAKE, start_new_session=True)
    wait_for(lambda: (tmp_path / "runs/mine/sft/run.json").exists())
    time.sleep(0.2)
    code, _, err = launch("pipeline", tmp_path, *mine, FAKE)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert code == 2 and "still in progress" in err
    assert len(calls(tmp_path)) == 1


@pytest.mark.parametrize("app", ["pipeline", "sweep"])
@pytest.mark.parametrize("word", ["project=..", "project=", "runs_dir="])
def test_names_are_one_path_below(tmp_path, app, word):
    (tmp_path / "runs").mkdir()
    words = ["-m", "stage=dpo", "seed=1,2"] if app == "sweep" else []
    code, _, err = launch(app, tmp_path, *words, FAKE, word)
    assert code == 2 and f"`{word.split('=')[0]}` is " in err and not (tmp_path / "calls.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and not list((tmp_path / "runs").iterdir())


def sweep(folder: Path, *arguments: str) -> tuple[int, str, str]:
    return launch("sweep", folder, "-m", "project=mine", FAKE, *arguments)


def test_sweep_runs_each_job_in_a_directory_of_its_own_and_ends_with_a_table(tmp_path):
    code, out, err = sweep(tmp_path, "stage=ppo", "stage.args.beta=0.02,0.1")
    assert code == 0, err
    assert calls(tmp_path) == [
        "project=mine stage=ppo stage.args.beta=0.02 run_name=ppo_sweep/0",
        "project=mine stage=ppo stage.args.beta=0.1 run_name=ppo_sweep/1",
    ]
    rows = [line.split() for line in out.splitlines()]
    assert ["job", "stage.args.beta", "time", "eval_loss"] in rows
    assert ["0", "0.02", "0", "s", "0.02"] in rows and ["1", "0.1", "0", "s", "0.1"] in rows
    jobs = json.loads((tmp_path / "runs/mine/ppo_sweep/sweep.json").read_text())
    assert [job["value"] for job in jobs] == [0.02, 0.1]
    assert [job["overrides"]["stage.args.beta"] for job in jobs] == ["0.02", "0.1"]


def test_a_sweep_over_a_simplex_of_weights_ends_with_the_front(tmp_path):
    words = ["sweep=pareto", "stage=ppo", "reward=[demo,tokens]", "reward.tokens.weight=-4", "pareto.grid=[0,0.5,1]"]
    code, out, err = sweep(tmp_path, *words)
    assert code == 0, err
    common = "project=mine stage=ppo reward=[demo,tokens]"
    weights = [("1", "0"), ("0.5", "-2"), ("0", "-4")]
    assert calls(tmp_path) == [
        f"{common} reward.gold.weight={gold} reward.tokens.weight={tokens} run_name=ppo_sweep/{number}"
        for number, (gold, tokens) in enumerate(weights)
    ]
    # Of a reward of negative weight less is better: 1 and 0, .707 and -1.41, 0 and -2 over the reference point 0, 0
    assert "3 of 3 settings are non-dominated by gold and tokens. Chosen: gold=0.5, tokens=-2" in out
    page = (tmp_path / "runs/mine/ppo_sweep/report/report.md").read_text()
    assert "Hypervolume over the reference point gold 0, tokens 0." in page and "Policies by their rewards." in page


def test_a_failed_job_is_reported_and_does_not_hide_the_others(tmp_path):
    code, out, _ = sweep(tmp_path, "stage=ppo,sft,dpo", "run_name=all", "+fails=true")
    assert code == 1
    assert out.count("the data is missing: give it") >= 3
    (tmp_path / "mended").touch()
    code, out, err = sweep(tmp_path, "stage=ppo,sft,dpo", "run_name=all", "+fails=true")
    assert code == 0, err
    assert calls(tmp_path)[-1].endswith("run_name=all/2 overwrite=true")


@pytest.mark.slow
def test_jobs_side_by_side_get_gpus_of_their_own(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.setitem(ENVIRONMENT, "CUDA_VISIBLE_DEVICES", "2,GPU-8f2a")
    code, _, err = sweep(tmp_path, "stage=ppo", "seed=1,2,3,4", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert code == 0, err
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs/mine/ppo_sweep").glob("*/run.json")]
    assert len(records) == 4 and {each["devices"] for each in records} <= {"2", "GPU-8f2a"}


@pytest.mark.slow
def test_a_job_of_submitit_is_queued_again_and_resumes(tmp_path):
    """Its executor of this machine sends what Slurm would: USR2 before the time limit, here to one job of two."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["-m", "project=mine", FAKE, "stage=ppo", "stage.args.beta=0.02,0.1", "+waits=true"]
    process = start("sweep", tmp_path, *words, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10")
    jobs = [tmp_path / "runs/mine/ppo_sweep" / number for number in "01"]
    wait_for(lambda: all((job / "run.json").exists() for job in jobs), seconds=300)
    time.sleep(0.5)
    for job in jobs:  # the parent of the run, which is the process that submitit has started
        pid = json.loads((job / "run.json").read_text())["pid"]
        psutil.Process(pid).parent().send_signal(signal.SIGUSR2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert [call.split()[-1] for call in calls(tmp_path)[2:]] == ["resume=true"] * 2
    assert [each["status"] for each in json.loads((jobs[0].parent / "sweep.json").read_text())] == ["done"] * 2


def test_a_mixed_sweep_shows_what_worked_and_what_did_not(tmp_path):
    (tmp_path / "runs/mine/ppo_sweep/0").mkdir(parents=True)
    foreign = {"stage": "sft", "status": "done", "command": "accelerate launch train.py stage=sft", "pid": 1}
    (tmp_path / "runs/mine/ppo_sweep/0/run.json").write_text(json.dumps(foreign))
    code, out, _ = sweep(tmp_path, "stage=ppo", "stage.args.beta=0.02,0.1")
    assert code == 1
    rows = [line.split() for line in out.splitlines()]
    assert ["0", "0.02", "failed"] in rows and ["1", "0.1", "0", "s", "0.1"] in rows
    assert "Job 0 failed: runs/mine/ppo_sweep/0 is in use" in out


def test_a_finished_job_is_not_run_again(tmp_path):
    sweep(tmp_path, "stage=ppo", "stage.args.beta=0.02,0.1")
    code, out, _ = sweep(tmp_path, "stage=ppo", "stage.args.beta=0.02,0.1")
    assert code == 0
    assert len(calls(tmp_path)) == 2
    assert ["1", "0.1", "0", "s", "0.1"] in [line.split() for line in out.splitlines()]


def test_sweep_takes_another_launcher_and_another_sweeper(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    code, out, err = sweep(tmp_path, "hydra/launcher=joblib", "stage=ppo", "stage.args.beta=0.02,0.1", "run_name=j")
    assert code == 0 and "eval_loss" in out, err
    search = ["sweep=optuna", "hydra.sweeper.n_trials=3", "stage.args.beta=interval(0.1,0.9)", "run_name=o"]
    code, out, err = sweep(tmp_path, "stage=ppo", *search)
    assert code == 0, err
    found = json.loads((tmp_path / "runs/mine/o/sweep.json").read_text())
    best = yaml.safe_load((tmp_path / "runs/mine/o/optimization_results.yaml").read_text())
    assert len(found) == 3 and {job["direction"] for job in found} == {"maximize"}
    assert best["best_value"] == pytest.approx(max(job["value"] for job in found))  # of ppo: scores


def test_sweep_checks_names_as_train_does_and_wants_its_flag(tmp_path):
    code, _, err = sweep(tmp_path, "stage=ppo", "stage.args.bta=0.02,0.1")
    assert code != 0 and "bta" in err
    code, _, err = launch("sweep", tmp_path, "stage=ppo", FAKE)
    assert code == 2 and "`-m`" in err
    assert not calls(tmp_path)


# ---- The real thing ----

SMALL = ["data.max_samples=64", "data.max_eval_samples=16", "stage.args.eval_on_start=false"]
SHRUNKEN = {
    "sft": ["stage=sft", "stage.args.max_steps=4", "stage.args.save_steps=2", *SMALL],
    "reward": ["stage=reward", "model.run=sft", "stage.args.max_steps=2", *SMALL],
    "ppo": [
        *("stage=ppo", "model.run=sft", "reward=model", "stage.args.max_steps=16"),
        *("stage.args.per_device_train_batch_size=16", *SMALL),
    ],
    "dpo": ["stage=dpo", "model.run=sft", "stage.args.max_steps=2", *SMALL],
    "compare": ["stage=evaluate", "stage.show=false", "data.max_eval_samples=16", "stage.max_completion_length=32"],
}
SHORTEST = {
    **{name: SHRUNKEN[name] for name in ("sft", "dpo")},
    "compare": [*SHRUNKEN["compare"], "~stage.policies.ppo"],
}
# Imported by every Python process of the pipeline, before anything else
NO_NETWORK = """
import socket

def connect(self, address, original=socket.socket.connect):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        open({calls!r}, "a").write(f"{{address}}\\n")
        raise OSError("no network in this test")
    return original(self, address)

socket.socket.connect = connect
"""


@pytest.mark.parametrize(
    "steps", [SHORTEST, pytest.param(SHRUNKEN, marks=pytest.mark.slow)], ids=["sft and dpo", "all stages"]
)
def test_a_shrunken_pipeline_end_to_end_in_silence(tmp_path, monkeypatch, steps):
    """Every step through `accelerate launch` on the embedded world, a few steps each; nothing phones home."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK.format(calls=str(tmp_path / "network.txt")))
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{tmp_path / 'site'}:{ROOT}")
    mine = write_pipeline(tmp_path, steps, accelerate="cpu")
    code, out, err = launch("pipeline", tmp_path, *mine)
    assert code == 0, err[-3000:]
    assert not (tmp_path / "network.txt").exists(), (tmp_path / "network.txt").read_text()
    project = tmp_path / "runs" / "mine"
    for name in steps:
        assert json.loads((project / name / "run.json").read_text())["status"] == "done"
    comparison = json.loads((project / "compare" / "comparison.json").read_text())
    policies = [name for name in ("sft", "ppo", "dpo") if name in steps]
    assert list(comparison["policies"]) == policies
    assert comparison["prompts"] == 16
    assert "<svg" in (project / "report" / "index.html").read_text()
    rows = [line.split() for line in out.splitlines()]
    table = rows[rows.index(["step", "time", "metric", "start", "end"]) + 2 :]
    assert [row[0] for row in table[: len(steps)]] == list(steps)
    assert all(f"{name} (" in out for name in policies)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run the whole demo, as `make demo` does, interrupted once by SIGKILL."""
    folder = tmp_path_factory.mktemp("demo")
    process = start("pipeline", folder, start_new_session=True)
    record = folder / "runs/demo/reward/run.json"
    wait_for(lambda: record.exists() or process.poll() is not None, seconds=900)
    kill_tree(process.pid)
    process.communicate()
    assert json.loads(record.read_text())["status"] == "running"
    code, out, err = launch("pipeline", folder, timeout=1800)
    assert code == 0, err[-3000:]
    assert "[1/6] sft: done, skipped" in out
    return folder / "runs/demo", out


def kill_tree(pid: int) -> None:
    for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        process.kill()


def evaluations(run_dir: Path, metric: str) -> list[float]:
    history = json.loads((run_dir / "metrics.json").read_text())["history"]
    return [entry[metric] for entry in history if metric in entry]


@pytest.mark.slow
def test_the_demo_shows_learning_at_every_stage(demo):
    project, out = demo
    losses = evaluations(project / "sft", "eval_loss")
    assert losses[-1] < losses[0]
    accuracies = evaluations(project / "reward", "eval_accuracy")
    held_out = 256  # pairs of the embedded world's eval split
    half = 1.96 * math.sqrt(accuracies[-1] * (1 - accuracies[-1]) / held_out)
    assert accuracies[-1] > accuracies[0]
    assert accuracies[-1] - half > 0.5
    comparison = json.loads((project / "compare" / "comparison.json").read_text())
    for name in ("ppo", "dpo"):
        entry = comparison["policies"][name]
        assert entry["difference"]["low"] > 0, name
        assert math.isfinite(entry["kl"]["mean"]) and entry["kl"]["mean"] > 0
    assert "KL to sft" in out and "eval_accuracy" in out


@pytest.mark.slow
def test_the_demos_report_has_no_hole_and_its_ppo_no_sign(demo):
    project, out = demo
    page = (project / "report" / "report.md").read_text()
    assert "Health: the monitor saw no sign of trouble." in page and "not measured" not in page
    quality = read_quality(project / "quality")
    assert quality is not None
    assert quality.rewards["gold"].accuracy.mean > quality.rewards["model"].accuracy.low > 0.5
    assert "health: ok, none of" in out and "health note" not in out and "health warn" not in out


@pytest.mark.slow
def test_the_demos_ppo_is_not_below_the_best_of_n_of_its_reward_model(demo):
    """PPO of three seeds, from the demo's SFT policy and reward model: gold reward, and the curve's at the same KL."""
    project, _ = demo
    folder, seeds = project.parent.parent, {"ppo": 42, "ppo_1": 1, "ppo_2": 2}
    shutil.copytree(project, project.with_name("seeds"))
    steps = yaml.safe_load((ROOT / "conf/pipeline/demo.yaml").read_text())["steps"]
    others = [name for name in seeds if name != "ppo"]
    commands = [[*steps["ppo"], f"run_name={name}", f"seed={seeds[name]}"] for name in others]
    policies = [f"+stage.policies.{name}={name}" for name in others]
    commands += [[*steps["compare"], *policies, "~stage.policies.dpo", "run_name=compare", "overwrite=true"]]
    for words in commands:
        command = [sys.executable, str(ROOT / "train.py"), "project=seeds", *words]
        done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
    comparison = read_comparison(project.with_name("seeds") / "compare")
    assert comparison is not None
    curve = next(curve for curve in comparison.curves if curve.by == "model")
    kls, rewards = zip(*((point.kl, point.reward.mean) for point in curve.points), strict=True)
    for name in seeds:
        result = comparison.policies[name]
        assert kls[0] < result.kl.mean < kls[-1]
        assert result.reward.mean >= np.interp(result.kl.mean, kls, rewards), name


# The loop of conf/pipeline/iterated.yaml, small, each step without a launcher
DIRECT = f"program=[{sys.executable},{ROOT / 'train.py'}]"
TINY_LOOP = [
    *("pipeline=iterated", "rounds=2", "prompts=32", "labels=32", "episodes=128", DIRECT),
    'steps.policy_0=["stage=sft","stage.args.max_steps=20","data.max_eval_samples=32"]',
    'steps.reward_0=["stage=reward","model.run=policy_0","data=mix","+data@data.sources.first=demo",'
    '"data.sources.first.max_samples=64","data.hold_out=0.25","data.max_eval_samples=32","stage.args.max_steps=6"]',
    'more.policy=["data.max_eval_samples=32"]',
    'more.compare=["data.max_eval_samples=32","stage.references=false"]',
]


# The collection of each round once more, which nothing interrupts, and its labels
UNINTERRUPTED = [
    '+each_round.whole=["${each_round.collect}"]',
    '+each_round.told=["stage=label","stage.candidates=whole_${round}","${labeled_by}"]',
]


@pytest.mark.slow
def test_two_rounds_of_the_loop_interrupted_in_the_middle(tmp_path):
    words = [*TINY_LOOP, 'more.collect=["stage.batch_size=8"]']  # 16 batches, to be interrupted between two
    process = start("pipeline", tmp_path, *words)
    project = tmp_path / "runs" / "iterated"
    found = [project / "collect_1" / name for name in ("draws.partial", "candidates.jsonl")]
    try:
        wait_for(lambda: any(path.exists() for path in found) or process.poll() is not None, 600)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
    forked(tmp_path, *words, *UNINTERRUPTED)
    code, out, err = launch("pipeline", tmp_path, *words)
    assert code == 0, err[-3000:]
    assert "reference=first: each round's policy starts at policy_0" in out and "nothing was run" in out
    check_loop(project)
    for number in (1, 2):  # the questions and answers are those of a run without an interruption
        resumed, whole = (project / f"{name}_{number}" / "candidates.jsonl" for name in ("collect", "whole"))
        assert resumed.read_text() == whole.read_text()
        assert answers(project / f"label_{number}") == answers(project / f"told_{number}")


def answers(run_dir: Path) -> list[dict]:
    """Return the labels of a run without their times."""
    rows = [json.loads(line) for line in (run_dir / "labels.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("time", "seconds")} for row in rows]


@pytest.mark.slow
def test_two_rounds_of_online_dpo(tmp_path):
    forked(tmp_path, *TINY_LOOP, "align=online_dpo", 'more.policy=["data.max_samples=64","data.max_eval_samples=32"]')
    check_aligned(tmp_path / "runs" / "iterated", "online_dpo")


@pytest.mark.slow
def test_two_rounds_of_kto_on_the_log_of_a_service(tmp_path):
    words = [*TINY_LOOP, "align=kto", "prompts_of=log", "reference=previous", "min_thumbs=2"]
    words += ['more.policy=["data.max_eval_samples=32","stage.args.max_steps=3"]']  # the first step has rate 0
    for number in (1, 2):
        logged(tmp_path / "log.jsonl", range(100 * number, 100 * number + 64))
        forked(tmp_path, *words, f"rounds={number}")
    project = tmp_path / "runs" / "iterated"
    check_aligned(project, "kto")
    prompts = [
        {
            json.loads(line)["prompt"]
            for line in (project / f"collect_{n}" / "candidates.jsonl").read_text().splitlines()
        }
        for n in (1, 2)
    ]
    compared = {sample.prompt.removeprefix("user: ") for sample in read_comparison(project / "compare_2").samples}
    assert compared and compared <= prompts[0] | prompts[1]


def check_aligned(project: Path, stage: str) -> None:
    """Check that the policies of two rounds differ from each other and from the first one."""
    assert json.loads((project / "policy_2" / "run.json").read_text())["stage"] == stage
    weights = [load_file(project / f"policy_{n}" / "model.safetensors") for n in range(3)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert any(not torch.equal(weights[one][name], weights[other][name]) for name in weights[0])
    assert set(read_comparison(project / "compare_2").policies) == {"policy_0", "policy_1", "policy_2"}


def check_loop(project: Path) -> None:
    """Check the runs of two rounds: who was asked what, what was held out, and the section of the report."""
    names = [f"{name}_{n}" for n in (1, 2) for name in ("collect", "label", "reward", "quality", "policy", "compare")]
    for name in names:
        assert json.loads((project / name / "run.json").read_text())["status"] == "done", name
    asked = [
        {json.loads(line)["id"] for line in (project / f"label_{n}" / "labels.jsonl").read_text().splitlines()}
        for n in (1, 2)
    ]
    assert asked[0] and asked[1] and not asked[0] & asked[1]
    policies = [
        {
            each["policy"]
            for line in (project / f"collect_{n}" / "candidates.jsonl").read_text().splitlines()
            for each in json.loads(line)["candidates"]
        }
        for n in (1, 2)
    ]
    assert policies == [{"policy_0"}, {"policy_1"}]
    assert set(read_comparison(project / "compare_2").policies) == {"policy_0", "policy_1", "policy_2"}
    assert set(read_quality(project / "quality_2").rewards) == {"before", "model"}
    report = (project / "report" / "report.md").read_text()
    assert "What each round gained." in report


def logged(path: Path, seeds: range) -> None:
    """Append answers of the embedded world and users' thumbs to the log of a service."""
    with path.open("a") as log:
        for row in demo_rows("thumbs", seeds.start, False, len(seeds)):
            log.write(json.dumps({name: row[name] for name in ("prompt", "completion", "thumb", "rater")}) + "\n")


@pytest.mark.slow
def test_two_nights_learn_nothing_twice(tmp_path):
    """`pipeline=nightly` on a log that grows, a night without anything new, and one with too little."""
    words = ["pipeline=nightly", 'training=["stage.args.max_steps=2"]', DIRECT]
    words += ['compared_by=["reward=demo","data.max_eval_samples=32"]']
    thumbs = tmp_path / "runs/nightly"
    for night in (1, 2):
        logged(tmp_path / "log.jsonl", range(night, night + 32))
        forked(tmp_path, *words, f"rounds={night}")
        code, out, err = launch("pipeline", tmp_path, *words, f"rounds={night}")
        assert code == 0 and f"Round {night} learns from what log.jsonl has" in out, err[-3000:]
        assert "nothing was run" in out
    learned = [
        [
            json.dumps([json.loads(line)[name] for name in ("prompt", "completion", "thumb")])
            for line in (thumbs / f"collect_{night}" / "thumbs.jsonl").read_text().splitlines()
        ]
        for night in (1, 2)
    ]
    assert learned[0] and learned[1] and not {*learned[0]} & {*learned[1]}
    promotions = read_promotions(thumbs)
    built_upon = {"policy_1"} if promotions.rounds[0].is_promoted else set()
    assert set(read_comparison(thumbs / "compare_2").policies) == {"first", "policy_2"} | built_upon
    assert [each.round for each in promotions.rounds] == [1, 2] and promotions.rounds[1].in_words in out
    report = (thumbs / "report" / "report.md").read_text()
    assert "What each round gained." in report and f"`{promotions.current}`" in report
    code, out, err = launch("pipeline", tmp_path, *words)
    assert code == 2 and "`stage.traffic` holds nothing new" in err and not (thumbs / "policy_3").exists()
    logged(tmp_path / "log.jsonl", range(100, 104))
    code, out, err = launch("pipeline", tmp_path, *words)
    assert code == 2 and "Nothing was used" in err and not (thumbs / "collect_3" / "candidates.jsonl").exists()


@pytest.mark.slow
def test_the_finished_demo_is_shown_again(demo):
    project, out = demo
    code, again, _ = launch("pipeline", project.parent.parent)
    assert code == 0
    assert "nothing was run" in again and "project=another" in again
    assert out[out.index("step   ") :].strip() in again


@pytest.mark.slow
def test_a_killed_step_resumes_from_its_last_complete_checkpoint(tmp_path):
    """SIGKILL to the pipeline and all below it, at a moment after the first checkpoint that nobody chose."""
    steps = {"sft": ["stage=sft", "stage.args.max_steps=40", "stage.args.save_steps=2", *SMALL]}
    mine = write_pipeline(tmp_path, steps, accelerate="cpu")
    process = start("pipeline", tmp_path, *mine, start_new_session=True)
    run_dir = tmp_path / "runs/mine/sft"
    wait_for(lambda: any(run_dir.glob("checkpoint-*/")) or process.poll() is not None, seconds=300)
    kill_tree(process.pid)
    process.communicate()
    # What a kill in the middle of a write leaves: a checkpoint that isn't in its place yet
    (run_dir / ".unfinished" / "checkpoint-39").mkdir(parents=True, exist_ok=True)
    code, out, err = launch("pipeline", tmp_path, *mine)
    assert code == 0, err[-3000:]
    assert "resume=true" in out and "Resuming from" in out
    record = json.loads((run_dir / "run.json").read_text())
    assert record["status"] == "done"
    steps = [entry["step"] for entry in json.loads((run_dir / "metrics.json").read_text())["history"]]
    assert max(steps) == 40


@pytest.mark.slow
def test_a_sweep_of_real_runs(tmp_path):
    """Two jobs through `accelerate launch`, one of which train.py refuses."""
    overrides = ["stage=sft", "project=mine", "accelerate=cpu", *SMALL, "stage.args.max_steps=2"]
    code, out, _ = launch("sweep", tmp_path, "-m", *overrides, "stage.args.learning_rate=1e-3,-1")
    assert code == 1
    jobs = json.loads((tmp_path / "runs/mine/sft_sweep/sweep.json").read_text())
    assert [job["status"] for job in jobs] == ["done", "failed"]
    assert jobs[0]["objective"] == "eval_loss" and math.isfinite(jobs[0]["value"])
    assert "learning" in jobs[1]["message"] and "CalledProcessError" not in jobs[1]["message"]
    assert "Job 1 failed" in out
