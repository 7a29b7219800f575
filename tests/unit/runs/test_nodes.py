"""Agreement of nodes: their problems become one list, and a folder that they don't share is one of them."""

import pytest

from rlhf_trl.errors import ConfigError
from rlhf_trl.runs import nodes
from rlhf_trl.runs.lock import LOCK_FILE
from rlhf_trl.runs.nodes import check_shared, joined_problems, problems_of_all_nodes


def reports(*given: tuple[list[str], str | None]) -> dict:
    return {
        i: {"host": f"gpu{i}", "problems": problems, "run_dir": "/home/me/runs/mine/ppo", "record": record}
        for i, (problems, record) in enumerate(given)
    }


def test_what_is_wrong_on_all_nodes_is_said_once_and_what_is_not_with_the_node():
    found = joined_problems(reports((["No data."], "a"), (["No data.", "No vllm."], "a")), nodes=2)
    assert found == ["No data.", "On gpu1 (machine_rank 1): No vllm."]
    assert joined_problems(reports(([], "a"), ([], "a")), nodes=2) == []


def test_run_directories_that_differ_are_the_only_problem():
    (problem,) = joined_problems(reports(([], "a"), (["It holds no run."], None)), nodes=2)
    assert problem.startswith(
        "The nodes don't share the run directory: `/home/me/runs/mine/ppo` on gpu0 (machine_rank 0)"
    )
    assert "gpu1 (machine_rank 1)" in problem and "`runs_dir=...`" in problem


def test_a_node_that_does_not_start_is_named(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[0-2]")
    there = reports(([], None), ([], None))
    (problem,) = joined_problems(there, nodes=3)
    assert problem.startswith(
        "machine_rank 2, one of gpu[0-2], did not start within 300 s; gpu0 (machine_rank 0), gpu1"
    )


def test_a_launch_on_one_node_needs_no_agreement(monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert problems_of_all_nodes(["No data."], "config") == ["No data."]
    check_shared("nowhere")


@pytest.fixture
def second_node(monkeypatch, tmp_path):
    """`second_node(text)` is a rank on a second node, where rank 0 has written a text into its lock."""
    monkeypatch.setattr(nodes, "SECONDS_FOR_FILES", 0.0)
    for name, value in {"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def start(text: str):
        monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda objects: [text, *objects[1:]])
        monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [("gpu0 (machine_rank 0)", True), *own])
        return tmp_path

    return start


def test_a_rank_that_sees_another_folder_is_named_on_all(second_node):
    run_dir = second_node("1 gpu0")
    with pytest.raises(ConfigError, match=r"don't share .* on gpu0 \(machine_rank 0\) is another one than on .* 1\)"):
        check_shared(run_dir)
    (run_dir / LOCK_FILE).write_text("9 gpu1")
    with pytest.raises(ConfigError, match="don't share"):
        check_shared(run_dir)
    (run_dir / LOCK_FILE).write_text("1 gpu0")
    check_shared(run_dir)
