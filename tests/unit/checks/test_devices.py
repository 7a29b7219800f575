"""Memory limits of control groups: those of a container or a Slurm job count, by both versions."""

from pathlib import Path

import pytest

from rlhf_trl.checks import devices
from rlhf_trl.checks.devices import device, group_limit

TWO = "0::/job/step\n"
ONE = "9:name=systemd:/\n4:cpu,memory:/docker/abc\n3:cpuset:/\n"
NO_LIMIT = "9223372036854771712"  # of version 1


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        (TWO, {"job/memory.max": "3000", "job/step/memory.max": "max", "memory.max": "max"}, 3000),
        (TWO, {"job/memory.max": "3000", "job/step/memory.max": "2000"}, 2000),
        (TWO, {"memory.max": "4000"}, 4000),  # as a container sees its own, under a path of the host
        (TWO, {"job/memory.max": "max"}, None),
        (ONE, {"memory/docker/abc/memory.limit_in_bytes": "5000", "cpuset/memory.limit_in_bytes": "1"}, 5000),
        (ONE, {"memory/memory.limit_in_bytes": NO_LIMIT}, int(NO_LIMIT)),
        ("", {}, None),
    ],
)
def test_the_lowest_limit_of_the_groups_counts(tmp_path, groups, files, limit):
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (tmp_path / "memory.max").write_text("7")  # above what is mounted
    assert group_limit(tmp_path / "cgroup", tmp_path / "mounted") == limit
    assert group_limit(Path("/nowhere"), tmp_path / "mounted") is None


def test_a_rank_has_its_share_of_the_limit(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(devices, "group_limit", lambda: None)
    whole = device(use_cpu=True)
    assert whole.name == "a rank's share of this machine (2 ranks)"
    monkeypatch.setattr(devices, "group_limit", lambda: 2**20)
    limited = device(use_cpu=True)
    assert limited.memory == 2**19 and "container or job" in limited.name
    monkeypatch.setattr(devices, "group_limit", lambda: int(NO_LIMIT))
    assert device(use_cpu=True) == whole
