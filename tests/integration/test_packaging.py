"""The package as it is built and installed, and the set-up that `make` does."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import rlhf_trl

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_tested_versions_are_within_the_ranges():
    pins = {canonical(name): Version(version) for name, version in PINS.items()}
    tested = PROJECT["dependencies"] + [
        line
        for extra in ("qlora", "wandb", "tensorboard", "serve", "sweep", "test")
        for line in PROJECT["optional-dependencies"][extra]
    ]
    for requirement in map(Requirement, tested):
        if requirement.name != PROJECT["name"]:
            assert pins[canonical(requirement.name)] in requirement.specifier, requirement


def test_the_versions_that_the_code_depends_on_are_held():
    ranges = {Requirement(line).name: str(Requirement(line).specifier) for line in PROJECT["dependencies"]}
    assert ranges["trl"] == "<1.17,>=1.16"
    assert ranges["hydra-core"] == "<1.4,>=1.3"
    assert {"test", "sweep", "vllm", "deepspeed"} <= set(PROJECT["optional-dependencies"])


def test_torch_is_pinned_without_a_build():
    """`torch==2.13.0` is met by a CPU build and by any CUDA build; with `+cpu` it would be one of them."""
    assert "+" not in "".join(PINS.values())


def test_importing_the_package_is_light_and_silences_telemetry():
    code = (
        "import os, sys, threading, rlhf_trl; heavy = {'torch', 'transformers', 'trl', 'hydra'} & set(sys.modules); "
        "print(heavy, threading.active_count(), os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_TELEMETRY"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.split("\n")[0] == "set() 1 1"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_what_the_clone_has(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert rlhf_trl.__version__ in wheel.name
    for folder in ("conf", "launch"):
        files = [path for path in (ROOT / folder).rglob("*.*") if path.suffix in (".yaml", ".py")]
        missing = {f"rlhf_trl/{path.relative_to(ROOT).as_posix()}" for path in files} - names
        assert files and not missing
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rlhf_trl").rglob("*.py")}
    assert modules <= names
    assert {"rlhf_trl/py.typed", "rlhf_trl/tasks/demo/checkpoints/base/model.safetensors"} <= names
    assert not [name for name in names if name.startswith(("tests", "runs", "train.py"))]
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    scripts = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert [line.split(" ")[0] for line in scripts.split("\n")[1:4]] == [
        "rlhf-trl",
        "rlhf-trl-pipeline",
        "rlhf-trl-sweep",
    ]


def user_folder(folder: Path) -> Path:
    """Return the folder of a user without a clone: with an option and a file of their own."""
    (folder / "my_conf" / "data").mkdir(parents=True)
    mine = "defaults:\n  - files\n  - _self_\npaths: my.jsonl\neval_size: null\nsplit_by: row\n"
    (folder / "my_conf" / "data" / "mine.yaml").write_text(mine)
    return folder


def check_installed(script: list[str], pipeline: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Assert that the script, the package's and the user's options, and the pipeline's steps work outside a clone."""

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "rlhf_trl.trainers.DPOTrainer" in run(*script, "--cfg", "job", "stage=dpo")
    assert "paths: my.jsonl" in run(*script, "--config-dir", "my_conf", "--cfg", "job", "stage=sft", "data=mine")
    assert "stage=evaluate" in run(*pipeline, "--cfg", "job")
    out = run(*pipeline, "project=p", f"program=[{sys.executable},{ROOT / 'tests/helpers/fake_train.py'}]")
    assert "[6/6] compare" in out and (folder / "runs/p/sft/run.json").exists()


def test_the_wheel_works_without_the_clone(wheel, tmp_path):
    """Unpacked, which is what pip does with it but for the scripts."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    pipeline = [sys.executable, "-c", "from rlhf_trl.cli.pipeline import main; main()"]
    check_installed([sys.executable, "-m", "rlhf_trl.cli"], pipeline, user_folder(tmp_path / "home"), environment)
    command = "from rlhf_trl.cli.launcher import launch_command, shell_line; print(shell_line(launch_command('cpu')))"
    out = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path / "home", env=environment, capture_output=True, text=True
    ).stdout
    site = tmp_path / "site/rlhf_trl/launch/accelerate/cpu.yaml"
    assert out.strip() == f"accelerate launch --config_file {site} -m rlhf_trl.cli"


@pytest.mark.slow
def test_pip_installs_the_wheel_and_a_run_of_it_trains(wheel, tmp_path):
    """In a virtual environment that sees this one's packages, so that torch isn't installed twice."""
    venv.create(tmp_path / "env", with_pip=True)
    scripts = tmp_path / "env" / "bin"
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    ours = Path(shutil.__file__).parent  # only to say which paths are the standard library's
    others = [path for path in sys.path if path.endswith("site-packages") and Path(path) != ours]
    (site / "others.pth").write_text("\n".join(others))
    subprocess.run([scripts / "pip", "install", "--no-deps", "--no-index", wheel], check=True, cwd=tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    folder = user_folder(tmp_path / "home")
    check_installed([str(scripts / "rlhf-trl")], [str(scripts / "rlhf-trl-pipeline")], folder, environment)
    rows = '{"prompt": "What color is a duck?", "completion": "A duck is yellow."}\n' * 8
    (folder / "my.jsonl").write_text(rows)
    mine = ["--config-dir", "my_conf", "stage=sft", "data=mine", "debug=smoke", "project=q"]
    subprocess.run([scripts / "rlhf-trl", *mine], cwd=folder, env=environment, check=True, timeout=600)
    assert (folder / "runs/q/smoke_sft/model.safetensors").exists()


def make(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, **options)


def test_make_does_not_repeat_a_finished_set_up(tmp_path):
    assert "pip install" in make("-n", "test", f"VENV={tmp_path}").stdout
    (tmp_path / ".ready").touch()
    plan = make("-n", "test", f"VENV={tmp_path}").stdout
    assert "pip install" not in plan and 'pytest -m "not slow and not gpu"' in plan
    os.utime(tmp_path / ".ready", (1, 1))  # older than pyproject.toml: what it asks for may have changed
    assert "pip install" in make("-n", "demo", f"VENV={tmp_path}").stdout


def test_make_names_what_to_do_about_an_old_python(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 || exit 1\n')
    old.chmod(0o755)
    done = make("venv", f"PYTHON={old}", f"VENV={tmp_path / 'env'}")
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stdout and "Python 3.9.2" in done.stdout
    assert not (tmp_path / "env").exists()


def test_make_lists_its_targets():
    listed = make().stdout
    assert all(target in listed for target in ("demo", "demo-clean", "test", "test-all", "style", "checkpoints"))
