"""Locks of processes on other machines, on file systems that don't show them: their sign of life counts."""

import fcntl
import os
import socket
import threading
import time

import pytest

from rlhf_trl.errors import ConfigError
from rlhf_trl.runs import lock
from rlhf_trl.runs.directory import run_directory_problems
from rlhf_trl.runs.lock import LOCK_FILE, Owner, lock_owner, locked


@pytest.fixture
def quick(monkeypatch):
    """Let a sign of life be looked for during a tenth of a second."""
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "WATCH", 0.1)
    monkeypatch.setattr(lock, "_dead", {})


@pytest.fixture
def elsewhere(tmp_path, quick):
    """`elsewhere(alive)` leaves the file of a process on another machine, whose lock isn't seen here."""
    ended, threads = threading.Event(), []

    def start(alive: bool, job: str = ""):
        (tmp_path / LOCK_FILE).write_text(f"4711 far-away {job}".strip())
        if alive:
            threads.append(threading.Thread(target=lock._beat, args=(tmp_path / LOCK_FILE, ended)))
            threads[-1].start()
        return tmp_path

    yield start
    ended.set()
    for thread in threads:
        thread.join()


def test_a_run_on_another_machine_is_not_taken_for_dead(elsewhere):
    run_dir = elsewhere(alive=True)
    assert lock_owner(run_dir) == Owner(4711, "far-away")
    with pytest.raises(ConfigError, match="in progress, as process 4711 on far-away"), locked(run_dir):
        pass
    assert (run_dir / LOCK_FILE).read_text().startswith("4711 far-away")
    values = {"run_dir": str(run_dir), "runs_dir": str(run_dir), "project": "mine", "run_name": "mine"}
    (problem,) = run_directory_problems(values | {"resume": "auto"})
    assert "far-away" in problem and LOCK_FILE in problem


def test_one_that_was_killed_there_is_watched_once(elsewhere, capsys):
    run_dir = elsewhere(alive=False)
    for _ in range(2):
        assert lock_owner(run_dir) is None
    assert capsys.readouterr().out.count("sign of life of process 4711 on far-away") == 1
    with locked(run_dir):
        assert (run_dir / LOCK_FILE).read_text().split()[:2] == [str(os.getpid()), socket.gethostname()]


def test_a_run_that_ended_by_itself_leaves_no_name(tmp_path, quick, capsys):
    with pytest.raises(ValueError), locked(tmp_path):
        raise ValueError
    assert (tmp_path / LOCK_FILE).read_text() == "" and lock_owner(tmp_path) is None
    assert capsys.readouterr().out == ""


def test_a_lock_of_long_ago_is_not_watched(elsewhere, capsys):
    run_dir = elsewhere(alive=False)
    os.utime(run_dir / LOCK_FILE, (time.time() - 86400,) * 2)
    assert lock_owner(run_dir) is None and capsys.readouterr().out == ""


@pytest.mark.parametrize(("restarts", "free"), [("1", True), ("0", False), ("", False)])
def test_an_earlier_start_of_a_requeued_job_is_over(elsewhere, monkeypatch, restarts, free):
    run_dir = elsewhere(alive=True, job="123.0")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert (lock_owner(run_dir) is None) == free


def test_the_holder_gives_signs_of_life(tmp_path, quick):
    path = tmp_path / LOCK_FILE
    with locked(tmp_path):
        before = path.stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while path.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("alive", [True, False])
def test_a_file_system_without_locks(elsewhere, monkeypatch, alive):
    """There a process of this machine is known by its sign of life too."""
    run_dir = elsewhere(alive)
    path = run_dir / LOCK_FILE
    path.write_text(f"4711 {socket.gethostname()}")

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert lock_owner(run_dir) == (Owner(4711, socket.gethostname()) if alive else None)
