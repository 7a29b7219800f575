"""Records of runs that were damaged: one message that names the file and what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_trl.callbacks.loggers import summary_of
from rlhf_trl.checks.paths import model_problems
from rlhf_trl.cli.launcher import results_of, state_of
from rlhf_trl.errors import ConfigError
from rlhf_trl.report.project import project_page
from rlhf_trl.runs.paths import resolve_path
from rlhf_trl.runs.record import read_comparison, read_metrics, read_run, start_run, write_metrics
from rlhf_trl.stages.evaluate import policies_of

DAMAGED = ("", "{", "[]", "3", '{"status": "do', '{"a": "\n"}', "\x00" * 40, "[" * 100_000)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """Return the folder of a run with a record and metrics."""
    folder = tmp_path / "mine" / "sft"
    start_run(folder, "sft", "python train.py stage=sft", None)
    write_metrics(folder, [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.0}])
    return folder


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize(
    ("name", "read"), [("run.json", read_run), ("metrics.json", read_metrics), ("comparison.json", read_comparison)]
)
def test_a_damaged_file_is_named_with_what_to_do(run_dir, name, read, content):
    Path(run_dir, name).write_text(content)
    with pytest.raises(ConfigError, match=rf"`.*{name}` (can't be read|is damaged).* (D|d)elete"):
        read(run_dir)


@pytest.mark.parametrize(
    "name, look",
    [
        ("run.json", lambda run_dir: read_run(run_dir)),
        ("run.json", lambda run_dir: state_of(run_dir, [])),
        ("run.json", lambda run_dir: resolve_path(None, "sft", str(run_dir.parent))),
        ("run.json", lambda run_dir: project_page(run_dir.parent)),
        ("metrics.json", lambda run_dir: read_metrics(run_dir)),
        ("metrics.json", lambda run_dir: results_of(run_dir)),
        ("metrics.json", lambda run_dir: summary_of(str(run_dir), "eval_loss")),
        ("metrics.json", lambda run_dir: project_page(run_dir.parent)),
        ("metrics.json", lambda run_dir: policies_of({"sft": str(run_dir)}, True, [], str(run_dir.parent))),
        ("comparison.json", lambda run_dir: project_page(run_dir.parent)),
    ],
)
def test_every_reader_reports_the_damage(run_dir, name, look):
    (run_dir / name).write_text('{"history": ["a"]}')
    with pytest.raises(ConfigError, match=f"{Path(name).name}` is damaged"):
        look(run_dir)


def test_a_run_to_start_from_with_a_damaged_record(run_dir):
    (run_dir / "run.json").write_text("{")
    values = {"runs_dir": str(run_dir.parents[1]), "project": "mine", "model": {"run": "sft", "path": None}}
    (problem,) = model_problems({**values, "stage": {"task_type": "CAUSAL_LM"}})
    assert problem.startswith("`model.run` is `sft`, whose record is damaged") and "run.json" in problem


def test_reading_records_imports_nothing_heavy():
    code = (
        "import sys, rlhf_trl.runs.paths, rlhf_trl.runs.record; print({'torch', 'transformers'} & sys.modules.keys())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
