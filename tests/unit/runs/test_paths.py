"""Commands that messages name for runs that are missing or not finished."""

import json

import pytest

from rlhf_trl.runs.paths import finish_command, run_command

# What was typed, the run that is missing, and the command that makes it
COMMANDS = [
    ("stage=ppo project=p", "sft", "stage=sft project=p"),
    ("stage=ppo project=p", "warm", "stage=... run_name=warm project=p"),
    (
        "stage=ppo model=hf model.run=sft adapter=lora data=hub data.path=a/b stage.args.beta=1 reward=model",
        "sft",
        "stage=sft project=p model=hf adapter=lora data=hub data.path=a/b model.path=...",
    ),
    ("stage=ppo model=hf model.run=sft reward=model", "reward", "stage=reward project=p model=hf model.run=sft"),
    ("experiment=reviews/tiny/ppo data.path=my_data", "sft", "experiment=reviews/tiny/sft data.path=my_data"),
    (
        "experiment=reviews/smollm2/ppo project=p runs_dir=out model.path=m stage.args.beta=1",
        "reward",
        "experiment=reviews/smollm2/reward project=p runs_dir=out model.path=m",
    ),
    ("experiment=reviews/tiny/ppo +data@ptx_data=demo", "warm", "stage=... run_name=warm project=p"),
]


@pytest.mark.parametrize(("typed", "run", "expected"), COMMANDS)
def test_the_command_that_makes_a_run_fits_what_was_typed(monkeypatch, typed, run, expected):
    monkeypatch.setattr("sys.argv", ["train.py", *typed.split()])
    assert run_command(run, "runs/p").partition("train.py ")[2] == expected


def test_an_installed_program_is_quoted_as_such(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/rlhf-trl", "stage=ppo"])
    assert run_command("sft", "elsewhere/p").split()[-3:] == ["stage=sft", "project=p", "runs_dir=elsewhere"]
    assert run_command("sft", "runs/p").split()[0].endswith("rlhf-trl")


def test_the_command_that_finishes_a_run_is_its_own(tmp_path):
    folder = tmp_path / "p" / "sft"
    folder.mkdir(parents=True)
    record = {
        "status": "failed",
        "stage": "sft",
        "command": "accelerate launch train.py stage=sft overwrite=true seed=1",
    }
    (folder / "run.json").write_text(json.dumps(record))
    assert finish_command("sft", tmp_path / "p") == "accelerate launch train.py stage=sft seed=1 overwrite=true"
    (folder / "checkpoint-1").mkdir()
    assert finish_command("sft", tmp_path / "p") == "accelerate launch train.py stage=sft seed=1 resume=true"
