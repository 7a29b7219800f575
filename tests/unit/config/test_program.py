"""The program as the user started it."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_trl.config.program import LAUNCHED, command_line, program
from rlhf_trl.errors import PACKAGE

CLONE = PACKAGE.parent
# Stands for the launchers of `accelerate` and `torchrun`: it starts the rest of its command line, as they do
LAUNCHER = """
import os, subprocess, sys
words = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else sys.argv[1:]
start = next(i for i, word in enumerate(words) if word.endswith("train.py") or word == "-m")
command = [sys.executable, "-u", *words[start:]]
sys.exit(subprocess.run(command, env={**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}).returncode)
"""
RANK = (
    "from rlhf_trl.config.program import *\nprint(command_line('stage=chat'))\nprint(command_line(launched=False))\n"
)


@pytest.fixture
def started(monkeypatch):
    """`started("python", "train.py", "stage=ppo")` is how this process was started."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(CLONE)

    def start(*words: str, arguments: int = 0, script: str | None = None) -> None:
        count = len(words) - arguments
        monkeypatch.setattr(sys, "orig_argv", list(words))
        monkeypatch.setattr(sys, "argv", [script or words[count - 1], *words[count:]])

    return start


@pytest.mark.parametrize(
    ("words", "script", "train", "sweep"),
    [
        (["python", "train.py"], None, "python train.py", "python launch/sweep.py"),
        ([".venv/bin/python", "./train.py"], None, ".venv/bin/python ./train.py", ".venv/bin/python launch/sweep.py"),
        (["python3", "launch/sweep.py"], None, "python3 train.py", "python3 launch/sweep.py"),
        (["python", "launch/pipeline.py"], None, "python train.py", "python launch/sweep.py"),
        (
            ["python", "-m", "rlhf_trl.cli"],
            str(PACKAGE / "cli/__main__.py"),
            "python -m rlhf_trl.cli",
            "rlhf-trl-sweep",
        ),
        (["python", "/there/bin/rlhf-trl"], None, "rlhf-trl", "rlhf-trl-sweep"),
        (["python", "/there/bin/rlhf-trl-pipeline"], None, "rlhf-trl", "rlhf-trl-sweep"),
    ],
)
def test_a_command_is_quoted_in_the_form_it_was_typed(started, monkeypatch, words, script, train, sweep):
    monkeypatch.setattr(sys, "executable", str(Path(words[1]).parent / "python"))
    started(*words, script=script)
    assert command_line("stage=sft", "stage.x=[1, 2]") == f"{train} stage=sft 'stage.x=[1, 2]'"
    assert command_line("-m", app="sweep") == f"{sweep} -m"


def test_a_console_script_outside_of_path_is_quoted_with_its_path(started, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/rlhf-trl").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    monkeypatch.chdir(tmp_path)
    started("python", "bin/rlhf-trl")
    monkeypatch.chdir(tmp_path)
    assert program() == ["bin/rlhf-trl"]


def test_another_program_quotes_what_works_from_its_folder(started, tmp_path, monkeypatch):
    started("python", "-m", "pytest")
    assert program() == ["python", "train.py"] or program()[1:] == ["train.py"]
    monkeypatch.chdir(tmp_path)
    assert program()[1:] == [str(CLONE / "train.py")]


def test_the_config_folder_is_part_of_a_command(started):
    started("python", "train.py", "--config-dir", "my conf", "stage=ppo", arguments=3)
    assert command_line("stage=sft") == "python train.py --config-dir 'my conf' stage=sft"
    started("python", "train.py", "--config-dir=mine", arguments=1)
    assert command_line() == "python train.py --config-dir mine"


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("accelerate", ["launch", "--num_processes", "2"], "accelerate launch --num_processes 2 train.py"),
        ("torchrun", ["--nproc-per-node", "2"], "torchrun --nproc-per-node 2 train.py"),
        ("mine", [], "accelerate launch {clone}/train.py"),  # a launcher we don't know
    ],
)
def test_a_rank_quotes_the_command_of_its_launcher(tmp_path, name, options, shown):
    (tmp_path / name).write_text(LAUNCHER)
    (tmp_path / "train.py").write_text(RANK)
    command = [sys.executable, name, *options, "train.py", "stage=ppo", "project=my project"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == f"{shown.format(clone=CLONE)} stage=chat"
    assert out[1].endswith("train.py") and "launch" not in out[1]
