"""`--help`, `--version` and the completion of a shell."""

import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from rlhf_trl import __version__
from rlhf_trl.checks import find_problems
from rlhf_trl.cli import pipeline, sweep
from rlhf_trl.cli.help import EXAMPLES, STAGES, help_text
from rlhf_trl.cli.overrides import compose, parse_command_line
from rlhf_trl.runs.paths import resolve_path
from tests.helpers.configs import CONF, GROUPS

APPS = ("train", "pipeline", "sweep")


@pytest.mark.parametrize("app", APPS)
def test_help_explains_on_a_screen(app):
    text = help_text(app, [])
    assert len(text.splitlines()) < 64 and len(EXAMPLES[app]) == 5
    assert all(words in text for words, _ in EXAMPLES[app])


def test_help_has_a_sentence_for_every_stage_and_the_options_of_every_group():
    lines = help_text("train", []).splitlines()
    assert set(STAGES) == GROUPS["stage"]
    for stage in STAGES:
        assert [line for line in lines if re.match(rf"  {stage} +\S+( \S+){{3,}}", line)], stage
    text = " ".join(" ".join(lines).split())
    for group in GROUPS.keys() - {"stage", "experiment", "pipeline", "sweep", "hydra/launcher"}:
        assert f"{group} {', '.join(sorted(GROUPS[group]))}" in text
    assert "reviews/... (" in text and "_base" not in text
    assert "hydra/launcher" in help_text("sweep", []) and "hydra/launcher" not in text


def test_help_lists_a_users_own_stage_and_options(tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/cpo.yaml").write_text("# @package _global_\n# Contrastive optimization: mine.\nstage: {}\n")
    text = help_text("train", [str(tmp_path)])
    assert re.search(r"\n  cpo +Contrastive optimization\n", text)


@pytest.mark.parametrize("app", APPS)
def test_the_examples_of_help_are_commands_that_pass_the_checks(app, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RLHF_TRL_REVIEWS", str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # of another test
    (tmp_path / "my_rewards.py").write_text("def score(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    shutil.copytree(resolve_path("demo:sft", None, tmp_path), tmp_path / "Qwen/Qwen3-0.6B")
    (tmp_path / "runs/default/ppo").mkdir(parents=True)
    record = '{"stage": "ppo", "status": "done", "command": "python train.py stage=ppo"}'
    (tmp_path / "runs/default/ppo/run.json").write_text(record)
    (tmp_path / "runs/default/ppo/config.json").write_text("{}")
    find = {"pipeline": pipeline.problems, "sweep": sweep.problems}.get(app, problems_of_train)
    for words, _ in EXAMPLES[app]:
        own = ["run_name=other"] if words.startswith("stage=ppo") else []  # beside the run that another example needs
        assert find(parse_command_line([*shlex.split(words), *own])) == [], words


def problems_of_train(args: Namespace) -> list[str]:
    cfg, problems = compose(args.overrides)
    return problems + find_problems(cfg)


def run(*words: str, cwd: Path = CONF.parent, **env: str) -> str:
    command = [sys.executable, CONF.parent / "train.py", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, env=env or None).stdout


def test_without_arguments_help_is_shown_and_nothing_starts(tmp_path):
    assert run(cwd=tmp_path) == run("--help", cwd=tmp_path) and list(tmp_path.iterdir()) == []


def test_the_version_is_ours():
    assert run("--version").startswith(f"rlhf_trl {__version__} (python ")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python train.py stage=p", ["stage=paraphrase", "stage=ppo", "stage=push"]),
        ("python train.py stage=ppo stage.args.learning_r", ["stage.args.learning_rate="]),
        ("python train.py adapter=qlo", ["adapter=qlora"]),
        ("python train.py experiment=reviews/tiny/d", ["experiment=reviews/tiny/dpo"]),
    ],
)
def test_tab_completes_in_bash(line, expected):
    script = f"""
    eval "$(python train.py -sc install=bash)"
    COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_CWORD={line.count(" ")}
    hydra_bash_completion
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(["bash", "-c", script], cwd=CONF.parent, env={"PATH": path}, capture_output=True, text=True)
    assert done.stdout.split() == expected, done.stderr
