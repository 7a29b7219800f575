"""Tests run offline, on the CPU, with models of a second: the embedded world, or `tests.helpers.tiny`."""

import functools
import gc
import importlib.metadata
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
def nothing_is_awaited_or_read_again():
    """Leave files in the cache of the operating system, and read the metadata of a package once, not in each run."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        for name in ("metadata", "version"):
            patched.setattr(importlib.metadata, name, functools.cache(getattr(importlib.metadata, name)))
        yield


@pytest.fixture(autouse=True, scope="session")
def hydra_reads_each_file_once():
    """Parse each file of conf/ and of Hydra once, and merge the same files once: more than half of what it takes."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    Plugins.instance()  # fills the registry
    unchanging = {str(conf_dir()), "hydra.conf", ""}

    def file(self, config_path):
        return (self.path, self.provider, config_path) if self.path in unchanging else None

    def merged(self, defaults, repo):
        files = tuple((each.config_path, each.package, each.primary) for each in defaults)
        return files if {source.path for source in repo.get_sources()} <= unchanging else None

    with pytest.MonkeyPatch.context() as patched:
        for scheme in ("file", "pkg"):
            source = SourcesRegistry.instance().resolve(scheme)
            patched.setattr(source, "load_config", once(source.load_config, file))
        merge = ConfigLoaderImpl._compose_config_from_defaults_list
        patched.setattr(ConfigLoaderImpl, merge.__name__, once(merge, merged))
        yield


def once(function, key):
    """Return a function that does its work once for each key, where there is one, and then gives copies."""
    found = {}

    def copied(*args, **kwargs):
        name = key(*args, **kwargs)
        if name is None:
            return function(*args, **kwargs)
        if name not in found:
            found[name] = pickle.dumps(function(*args, **kwargs))
        return pickle.loads(found[name])

    return copied


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
