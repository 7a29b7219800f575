"""Steps of the benchmarks: runs of `train.py` as forks of one process that has imported the libraries."""

import functools
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.engines import ranks
from rlhf_trl.cli.launcher import START_OVERRIDES, shell_line, state_of
from rlhf_trl.errors import ConfigError
from rlhf_trl.labels.candidates import CANDIDATES_FILE, Candidates, read_candidates
from rlhf_trl.runs.record import read_comparison, read_metrics
from rlhf_trl.runs.results import Comparison

# What the steps import besides
MODULES = ("collect", "label", "evaluate", "evaluate_reward", "generate", "paraphrase")
LIMIT = 3600.0  # seconds of a step
PREPARED: list[bool] = []


class Steps:
    """
    The runs of a project, each done once.

    Args:
        folder (`Path`): working directory of the runs, with their logs.
        project (`str`): name of the project.
        every (`list[str]`): overrides of every step.
    """

    def __init__(self, folder: Path, project: str, every: list[str]):
        self.folder, self.project, self.every = folder.resolve(), project, every

    def path(self, name: str) -> Path:
        """Return the run directory of a step."""
        return self.folder / "runs" / self.project / name

    def run(self, name: str, *overrides: str) -> Path:
        """
        Run a step unless it is done. Its words may begin with an option, such as `--config-dir FOLDER`.

        Returns:
            `Path`: its run directory.

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: if it fails, or was done with other overrides.
        """
        path, log = self.path(name), self.folder / "logs" / f"{self.project}_{name}.log"
        flags, overrides = (overrides[:2], overrides[2:]) if overrides[0].startswith("-") else ((), overrides)
        words = [*overrides, *self.every, f"project={self.project}", f"run_name={name}"]
        state = state_of(path, words)
        if state == "changed":
            raise ConfigError(f"`{path}` was made with other overrides. Remove it, or pass another `--folder`.")
        if state == "done":
            return path
        prepare()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        print(f"{self.project}/{name}", flush=True)
        words = [*flags, *words, *START_OVERRIDES[state]]
        if code := ranks.run(functools.partial(ranks.train, words, self.folder), [{}], log, LIMIT):
            end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise ConfigError(f"`train.py {shell_line(words)}` ended with status {code}:\n{end}")
        return path

    def compute(self, name: str, function: Callable[[], Any]) -> Any:
        """Return what a function computes in a fork of this process, read from its file where that is done."""
        path, log = self.path(f"{name}.json"), self.folder / "logs" / f"{self.project}_{name}.log"
        if not path.is_file():
            prepare()
            for file in (path, log):
                file.parent.mkdir(parents=True, exist_ok=True)
            print(f"{self.project}/{name}", flush=True)
            if code := ranks.run(functools.partial(_write, function, path), [{}], log, LIMIT):
                end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise ConfigError(f"`{name}` ended with status {code}:\n{end}")
        return json.loads(path.read_text("utf-8"))

    def comparison(self, name: str) -> Comparison:
        """Return the result of a comparison of policies."""
        found = read_comparison(self.path(name))
        assert found is not None, name
        return found

    def metrics(self, name: str) -> dict[str, Any]:
        """Return what `metrics.json` says of a step at its end."""
        return (read_metrics(self.path(name)) or {}).get("eval", {})

    def candidates(self, name: str) -> list[Candidates]:
        """Return the candidates of a collection."""
        return read_candidates(self.path(name) / CANDIDATES_FILE)

    def rows(self, name: str, file: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a file of JSON lines in a run directory."""
        yield from map(json.loads, (self.path(name) / file).read_text(encoding="utf-8").splitlines())


def _write(function: Callable[[], Any], path: Path) -> None:
    torch.set_num_threads(1)
    text = json.dumps(function())
    path.write_text(text, encoding="utf-8")


def prepare() -> None:
    """Import the libraries, once."""
    if not PREPARED:
        ranks.import_modules()
        for name in MODULES:
            importlib.import_module(f"rlhf_trl.stages.{name}")
        PREPARED.append(True)
