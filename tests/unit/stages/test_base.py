"""`open_run`: the directory and the record of a run, however it ends."""

import json
import os
import signal
from pathlib import Path

import pytest

from rlhf_trl.errors import ConfigError, Interrupted, Preempted
from rlhf_trl.runs.directory import has_backup
from rlhf_trl.stages import base
from rlhf_trl.stages.base import open_run


@pytest.fixture
def config(compose, tmp_path):
    """`config(*overrides)` returns the config of a run in an empty folder."""
    return lambda *overrides: compose("stage=init", f"runs_dir={tmp_path}", *overrides)


def record(cfg) -> dict:
    return json.loads(Path(cfg.run_dir, "run.json").read_text())


def test_a_run_is_running_and_then_done(config):
    cfg = config()
    with open_run(cfg, start="random weights") as run:
        assert record(cfg)["status"] == "running" and Path(cfg.run_dir, "config.yaml").is_file()
        assert run.checkpoint is None
        run.record["reason"] = "enough"
    found = record(cfg)
    assert (found["status"], found["reason"], found["model"]) == ("done", "enough", "random weights")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (Interrupted(), "stopped", None),
        (Preempted(), "preempted", None),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt: "),
        (SystemExit(3), "failed", "SystemExit: 3"),
        (ValueError("no"), "failed", "ValueError: no"),
    ],
)
def test_an_error_is_recorded_and_raised(config, error, status, told):
    cfg = config()
    with pytest.raises(type(error)), open_run(cfg, start="random weights"):
        raise error
    assert record(cfg)["status"] == status and record(cfg).get("error") == told


@pytest.mark.parametrize("error", [ConfigError("no"), ValueError("no")])
def test_a_run_that_fails_before_its_first_step_leaves_the_earlier_one(config, error):
    with open_run(config(), start="first"):
        pass
    cfg = config("overwrite=true")
    with pytest.raises(type(error)), open_run(cfg, start="second"):
        assert has_backup(cfg.run_dir) and record(cfg)["model"] == "second"
        raise error
    assert record(cfg)["model"] == "first" and not has_backup(cfg.run_dir)


def test_a_failed_run_that_left_nothing_makes_way_for_the_same_command(config):
    cfg = config()
    for told in ("first", "second"):
        with pytest.raises(ValueError), open_run(cfg, start=told):
            Path(cfg.run_dir, "samples.jsonl").write_text(told)
            raise ValueError(told)
        assert record(cfg)["error"] == f"ValueError: {told}" and not has_backup(cfg.run_dir)
    with open_run(cfg, start="third"):
        assert not Path(cfg.run_dir, "samples.jsonl").exists()
    assert record(cfg)["status"] == "done"


def test_a_wrong_config_leaves_the_directory_free(config):
    cfg = config()
    with pytest.raises(ConfigError), open_run(cfg, start="random weights"):
        raise ConfigError("no")
    assert not Path(cfg.run_dir, "run.json").exists()


def test_a_used_directory_is_not_opened(config):
    with open_run(config(), start="first"):
        pass
    with pytest.raises(ConfigError, match="already holds a run"), open_run(config(), start="second"):
        pass
    assert record(config())["model"] == "first"


def test_all_ranks_resume_from_the_checkpoint_of_rank_0(config, monkeypatch):
    """Another node may not see the newest one yet."""
    monkeypatch.setattr(base, "broadcast_object_list", lambda objects: ["checkpoint-4"])
    with open_run(config(), start="random weights") as run:
        assert run.checkpoint == "checkpoint-4"


@pytest.fixture
def late_signal(monkeypatch):
    """`late_signal(name)` sends this process a signal at the call of a function of `rlhf_trl.stages.base`."""
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the process would have been killed"))

    def send_at(name: str, number: int = signal.SIGTERM):
        function = getattr(base, name)

        def call(*args, **kwargs):
            os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        monkeypatch.setattr(base, name, call)

    yield send_at
    signal.signal(signal.SIGTERM, before)


def test_a_second_signal_does_not_keep_the_first_from_being_recorded(config, late_signal):
    """As `timeout` sends them, and Slurm and torchrun together."""
    late_signal("ignoring_signals")
    cfg = config()
    with pytest.raises(Preempted), open_run(cfg, start="random weights"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert record(cfg)["status"] == "preempted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_result_leaves_the_run_done(config, late_signal, number):
    late_signal("finish_run", number)
    cfg = config()
    with open_run(cfg, start="random weights"):
        pass
    assert record(cfg)["status"] == "done"


def test_ctrl_c_while_an_error_is_recorded_leaves_the_record_whole(config, late_signal):
    late_signal("finish_run", signal.SIGINT)
    cfg = config()
    with pytest.raises(RuntimeError, match="no"), open_run(cfg, start="random weights"):
        raise RuntimeError("no")
    assert record(cfg)["status"] == "failed"


def test_a_rank_whose_peer_was_preempted_records_that(config, monkeypatch):
    """Outside of the steps the rank that got the signal leaves at once, and this one sees a lost connection."""
    cfg = config()
    with pytest.raises(Preempted), open_run(cfg, start="random weights"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        base._fail(cfg, base.Run(), Preempted())
        monkeypatch.setenv("RANK", "0")
        raise RuntimeError("Connection closed by peer [127.0.0.1]:12345")
    assert record(cfg)["status"] == "preempted" and "error" not in record(cfg)
    assert not Path(cfg.run_dir, base.PREEMPTED_FILE).exists()


def test_an_error_of_several_ranks_is_an_error(config, monkeypatch):
    cfg = config()
    with pytest.raises(RuntimeError), open_run(cfg, start="random weights"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        raise RuntimeError("Connection closed by peer [127.0.0.1]:12345")
    assert record(cfg)["status"] == "failed"
