"""GPUs of a sweep's jobs: as many as a job has processes, and none in two jobs at a time."""

import threading
import time

import pytest

from rlhf_trl.cli.devices import claimed, devices_of_job, visible_devices
from rlhf_trl.cli.launcher import launch_setting, machine_problems
from rlhf_trl.errors import ConfigError

JOBLIB = {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "n_jobs": 2}
BASIC = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
SLURM = {"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"}


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-8f2a,3")


@pytest.mark.parametrize(
    ("launcher", "given", "accelerate", "options", "own"),
    [
        (BASIC, None, None, [], 0),  # one after another: all
        (SLURM, None, None, [], 0),  # Slurm's to give
        (BASIC, 2, None, [], 2),
        (JOBLIB, None, None, [], 2),
        (JOBLIB | {"n_jobs": -1}, None, None, [], 1),
        (JOBLIB | {"n_jobs": 8}, None, None, [], 1),
        (JOBLIB, None, "single_gpu", [], 1),
        (JOBLIB, None, "ddp", [], 2),
        (JOBLIB, None, "ddp", ["--num_processes", "4"], 4),
        (JOBLIB, None, "ddp", ["--num-processes=1"], 1),
        (JOBLIB, 3, "ddp", [], 3),
        (JOBLIB, None, "cpu", [], 0),
    ],
)
def test_number_of_gpus_of_a_job(launcher, given, accelerate, options, own):
    devices, number = devices_of_job(launcher, given, accelerate, options)
    assert number == own and devices in ([], ["0", "1", "GPU-8f2a", "3"]) and bool(devices) == bool(own)


@pytest.mark.parametrize(
    ("given", "options", "part"),
    [(5, [], "`gpus_per_job` is 5"), (None, ["--num_processes", "8"], "A job has 8 processes")],
)
def test_a_job_that_needs_more_than_there_are_is_refused(given, options, part):
    with pytest.raises(ConfigError, match=part) as error:
        devices_of_job(JOBLIB, given, None, options)
    assert "shows 4 GPUs (0, 1, GPU-8f2a, 3)" in str(error.value)


def test_without_gpus_nothing_is_claimed(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_devices() == [] and devices_of_job(JOBLIB, None, "ddp", []) == ([], 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert visible_devices() == ["0", "1", "2"]


@pytest.mark.parametrize("own", [1, 2])
def test_jobs_side_by_side_have_no_gpu_in_common(tmp_path, monkeypatch, own):
    """Seven jobs in threads on four GPUs; a file lock holds between threads as between processes."""
    monkeypatch.setattr("rlhf_trl.cli.devices.SECONDS_BETWEEN_LOOKS", 0.005)
    busy, seen, at_a_time, guard = set(), [], [], threading.Lock()

    def job():
        with claimed(tmp_path, visible_devices(), own) as mine:
            with guard:
                assert not busy & set(mine)
                busy.update(mine)
                seen.append(mine)
                at_a_time.append(len(busy))
            time.sleep(0.02)
            with guard:
                busy.difference_update(mine)

    threads = [threading.Thread(target=job) for _ in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(mine) for mine in seen] == [own] * 7 and max(at_a_time) == 4


def test_settings_of_a_launch_come_from_its_options_or_its_file(tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text("num_machines: 2\nnum_processes: 16\n")
    assert launch_setting(str(file), [], "num_machines") == 2
    assert launch_setting(str(file), ["--num_machines", "1"], "num_machines") == 1
    assert launch_setting("ddp", ["--quiet", "--num-processes=4"], "num_processes") == 4
    assert launch_setting(None, [], "num_machines") is None


def test_a_file_for_several_machines_is_refused(tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text("num_machines: 2\n")
    (problem,) = machine_problems(str(file), [])
    assert problem.startswith(f"`accelerate={file}` is for 2 machines") and "multi_node.sbatch" in problem
    (problem,) = machine_problems(None, ["--num_machines", "3"])
    assert problem.startswith("`launch` is for 3 machines")
    assert machine_problems("ddp", []) == machine_problems(None, []) == []
