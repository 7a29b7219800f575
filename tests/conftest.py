"""Tests run offline, on the CPU, with models of a second: the embedded world, or `tests.helpers.tiny`."""

import gc
import os
import pickle
import socket
import sys

# Read by the libraries when they are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest

from rlhf_trl.runs.paths import conf_dir

LOOPBACK = ("127.", "localhost", "::1", "0.0.0.0")


def pytest_collection_modifyitems(items):
    """Skip the tests marked `gpu` where no GPU can be seen; `make test-gpu` lets them see one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU is visible (`make test-gpu`)"))


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Make connections to other machines fail; those on this machine (two ranks, a W&B process) work."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):
            raise OSError(f"A test tried to reach {address}.")
        return connect(self, address)

    socket.socket.connect = guarded
    yield
    socket.socket.connect = connect


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk():
    """Leave files in the cache of the operating system: each training waits for the disk 20 times."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def config_files_are_parsed_once():
    """Parse each file of conf/ and of Hydra's own once: to parse them anew is a third of composing a config."""
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    Plugins.instance()  # fills the registry
    sources = [SourcesRegistry.instance().resolve(scheme) for scheme in ("file", "pkg")]
    with pytest.MonkeyPatch.context() as patched:
        for source in sources:
            patched.setattr(source, "load_config", parsed_once(source.load_config))
        yield


def parsed_once(load):
    parsed = {}

    def load_config(self, config_path):
        if self.path not in (str(conf_dir()), "hydra.conf"):
            return load(self, config_path)
        key = (self.path, self.provider, config_path)
        if key not in parsed:
            parsed[key] = pickle.dumps(load(self, config_path))
        return pickle.loads(parsed[key])  # a copy, as Hydra changes it

    return load_config


@pytest.fixture(autouse=True, scope="module")
def collect_garbage_of_this_file_only():
    """Take the libraries out of garbage collections: a trainer asks for a full one, a third of a second with them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def compose():
    """`compose(*overrides)` gives the config that `train.py` would get."""
    from hydra import compose, initialize_config_dir

    def composed(*overrides: str):
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("train", list(overrides))

    return composed


@pytest.fixture(scope="session")
def train(compose):
    """`train(runs_dir, *overrides)` runs a stage on little data and returns its run directory."""
    from hydra.utils import instantiate

    def trained(runs_dir, *overrides: str) -> str:
        few = ["data.max_samples=256", "data.max_eval_samples=32", "stage.args.max_steps=8"]
        few += ["stage.args.learning_rate=2e-3", "stage.args.save_steps=100"]
        cfg = compose(f"runs_dir={runs_dir}", "project=test", *few, *overrides)
        instantiate(cfg.stage.run)(cfg)
        return cfg.run_dir

    return trained


@pytest.fixture
def tiny_llama(tmp_path):
    """Folder of a Llama with random weights and its word-level tokenizer."""
    from tests.helpers.tiny import save_model

    return save_model(tmp_path / "llama")


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """`command(*words)` runs the command line in an empty folder: (exit status, what it printed, its errors)."""
    from rlhf_trl.cli import main as cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # so that it is as before afterwards
    monkeypatch.setattr(sys, "path", sys.path[:])
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run
