"""Paths of models: the embedded checkpoints, earlier runs, local folders and the hub. Imports nothing heavy."""

import functools
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rlhf_trl.config.program import command_line, typed_config_dir, typed_overrides
from rlhf_trl.config.values import texts
from rlhf_trl.errors import PACKAGE, ConfigError
from rlhf_trl.hints import names_of
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.runs.record import (
    CONFIG_FILE,
    DRAWS_FILE,
    ENSEMBLE_FILE,
    LABELS_FILE,
    RUN_FILE,
    read_json,
    read_run,
)

DEMO = "demo:"
# Folders of `tasks/` with embedded checkpoints, by the beginning of their paths
EMBEDDED = {DEMO: "demo", "shapes:": "shapes"}
ADAPTER_FILE = "adapter_config.json"
MODEL_FILES = ("config.json", ADAPTER_FILE)
# Keys that name what is written, or nothing on the disk
NOT_READ = {"run_dir", "runs_dir", "output_dir", "logging_dir", "output", "run_name", "name", "project", "starts_from"}
# Keys that may name runs of the project, and keys that may hold globs
RUNS = {"run", "policy", "policies", "models", "sweeps", "labels", "used", "candidates"}
GLOBS = {"paths", "eval_paths", "prompts", "labels", "used", "compare", "traffic"}


def project_dir(config: Mapping[str, Any]) -> Path:
    """Return the directory of the project's runs, of a composed config or of its plain values."""
    return Path(str(config.get("runs_dir") or "runs"), str(config.get("project") or ""))


def ensemble_members(path: str) -> list[str]:
    """
    Return the folders of the reward models, all adapters, that the ensemble in the folder `path` consists of; none
    where it is no ensemble.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if its `ensemble.json` doesn't name two adapters that are there.
    """
    file = Path(path, ENSEMBLE_FILE)
    if not file.is_file():
        return []
    names = read_model_config(file).get("members")
    members = [str(file.parent / str(name)) for name in names] if isinstance(names, list) else []
    if len(members) > 1 and all(Path(member, ADAPTER_FILE).is_file() for member in members):
        return members
    raise ConfigError(
        f'`{file}` must hold `{{"members": [...]}}` with the folders of two or more adapters beside it. Fix it, or '
        "train the ensemble again."
    )


def resolve_path(path: str | None, run: str | None, project_dir: str | os.PathLike) -> str:
    """
    Return the folder or hub id that `model.path` and `model.run` mean.

    Args:
        path (`str`, *optional*):
            `demo:base`, `demo:sft` or `shapes:base`, which reads images (the embedded checkpoints), a folder, or a hub
            id.
        run (`str`, *optional*):
            Name of an earlier run of the project, which wins over `path`.
        project_dir (`str` or `os.PathLike`):
            Directory of the project's runs.

    Returns:
        `str`: an absolute folder, or the hub id as it is.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the run is missing or not finished, or if the folder is missing.
    """
    if run is not None:
        return _finished_run(run, project_dir)
    if path is None:
        raise ConfigError("No model is named. Set `path` to its folder or hub id, or `run` to an earlier run.")
    if (embedded := embedded_folder(path)) is not None:
        if not embedded.is_dir():
            there = names_of(f"{path.partition(':')[0]}:{each.name}" for each in sorted(embedded.parent.glob("*/")))
            raise ConfigError(f"There is no embedded checkpoint `{path}` ({embedded}). There are: {there}.")
        return str(embedded)
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local.resolve())
    if path.startswith(("/", "./", "../", "~")) or path.count("/") > 1:
        raise ConfigError(f"The model folder `{path}` doesn't exist. Set an existing folder or a hub id.")
    return path


def embedded_folder(path: str) -> Path | None:
    """Return the folder of an embedded checkpoint, existing or not; `None` for any other path."""
    for prefix, task in EMBEDDED.items():
        if path.startswith(prefix):
            return PACKAGE / "tasks" / task / "checkpoints" / path.removeprefix(prefix)
    return None


def find_policy(place: str, project_dir: str | os.PathLike) -> str:
    """Return the folder or hub id of a policy: a run of the project where there is one of that name, else a path."""
    return resolve_path(place, place if is_run_name(place, project_dir) else None, project_dir)


def soup_models(models: dict[str, str | None] | list[str], project_dir: str | os.PathLike) -> dict[str, str]:
    """Return the folders or hub ids of models by name, as of [`find_policy`]; of an ensemble those of its members."""
    found = {}
    for name, place in named_policies(models).items():
        path = find_policy(place, project_dir)
        members = ensemble_members(path)
        found |= {f"{name}/{Path(member).name}": member for member in members} or {name: path}
    return found


def is_run_name(place: str, project_dir: str | os.PathLike) -> bool:
    """Return whether the place of a policy means a run of the project; `./sft` is always the folder."""
    run, folder = Path(project_dir, place), Path(place)
    if place.startswith((".", "/", "~")) or ":" in place:
        return False
    if (run / RUN_FILE).is_file():
        if folder.is_dir() and folder.resolve() != run.resolve():
            _note_ambiguity(place, str(run))
        return True
    return not any(sign in place for sign in "/.~") and not folder.is_dir()


@functools.cache  # once a process
def _note_ambiguity(place: str, run: str) -> None:
    if is_main_process():
        print(f"`{place}` is the run `{run}`; the folder of that name here is `./{place}`.")


def named_policies(policies: dict[str, str | None] | list[str]) -> dict[str, str]:
    """
    Return policies by name, without those that are null; in a list they are named by their paths, `ppo` for `ppo` and
    for `runs/x/ppo`.
    """
    if isinstance(policies, dict):
        return {name: place for name, place in policies.items() if place is not None}
    short = [re.split("[/:]", str(place).rstrip("/"))[-1] for place in policies]
    unique = len(set(short)) == len(short)
    return {name if unique else str(place): str(place) for name, place in zip(short, policies, strict=True)}


def baseline_problem(baseline: str, policies: Iterable[str]) -> str | None:
    """Return what is wrong with the baseline of a comparison of `policies`, by name; `None` where nothing is."""
    names = list(policies)
    if baseline in names:
        return None
    return (
        f"`stage.baseline` is `{baseline}`, which `stage.policies` doesn't have (it has "
        f"{', '.join(names) or 'none'}). Set it to one of them, or add it: `+stage.policies.{baseline}=...`."
    )


def _finished_run(run: str, project_dir: str | os.PathLike) -> str:
    run_dir = Path(project_dir, run)
    record = read_run(run_dir)
    if record is None:
        raise ConfigError(
            f"There is no run `{run}` in `{project_dir}`. Make it first with `{run_command(run, project_dir)}`, or "
            "name another by `run=`."
        )
    if record.status != "done":
        raise ConfigError(
            f"The run `{run}` in `{project_dir}` is not finished (its status is `{record.status}`). "
            f"Finish it first with `{finish_command(run, project_dir)}`."
        )
    return str(run_dir.resolve())


def run_command(run: str, project_dir: str | os.PathLike) -> str:
    """
    Return the command that makes a run of a project, for messages: the experiment of that name beside the one that the
    command line chooses, else the stage, with what the command line says of model, adapter and data. The stage of a
    renamed run stays open.
    """
    typed, project = typed_overrides(), Path(project_dir)
    experiments = [word.partition("=")[2] for word in typed if word.startswith("experiment=")]
    siblings = [str(PurePosixPath(name).parent / run) for name in experiments]
    if siblings and config_file("experiment", siblings[-1]):
        parts, groups = [f"experiment={siblings[-1]}"], ("project", "runs_dir", "model", "data")
    else:
        parts = [f"stage={run}"] if config_file("stage", run) else ["stage=...", f"run_name={run}"]
        parts += [
            f"project={project.name}",
            *([f"runs_dir={project.parent}"] if str(project.parent) != "runs" else []),
        ]
        groups = ("model", "adapter", "data")
    typed = [word for word in typed if word != f"model.run={run}"]
    more = [word for word in typed if re.split("[=./]", word.lstrip("+"))[0] in groups]
    if "model=hf" in more and not any(word.startswith(("model.path=", "model.run=")) for word in more):
        more.append("model.path=...")
    return command_line(*parts, *more)


def is_resumable(run_dir: str | os.PathLike) -> bool:
    """
    Return whether a run has something to resume from: a checkpoint, a member of an ensemble, labels, or completions of
    a collection.
    """
    patterns = ("checkpoint-*/", f"member_*/{RUN_FILE}", LABELS_FILE, DRAWS_FILE)
    return any(any(Path(run_dir).glob(pattern)) for pattern in patterns)


def finish_command(run: str, project_dir: str | os.PathLike) -> str:
    """
    Return the command that finishes an unfinished run of a project, its own as it was typed: it resumes the run or,
    where there is no checkpoint, starts it again.
    """
    run_dir = Path(project_dir, run)
    record = read_run(run_dir)
    command = record.command if record and record.command else run_command(run, project_dir)
    resumable = is_resumable(run_dir)
    return f"{re.sub(r' (resume|overwrite)=[^ ]+', '', command)} {'resume' if resumable else 'overwrite'}=true"


def other_model(folder: str | os.PathLike) -> str | None:
    """
    Return the model that the run in a folder started from, by its `config.yaml`; `None` for the embedded model, for a
    model from scratch, and where there is no run.
    """
    file = Path(folder, CONFIG_FILE)
    config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    started = config.get("model") if isinstance(config, dict) else None
    if started is None or embedded_folder(str(started.get("path"))) is not None:
        return None
    return started.get("path") or "another model"


def config_file(group: str, option: str) -> Path | None:
    """Return the file of an option of a group, ours or in the `--config-dir` of the command line, if there is one."""
    folders = [conf_dir(), *map(Path, typed_config_dir()[1:])]
    return next((file for folder in folders if (file := folder / group / f"{option}.yaml").is_file()), None)


def read_paths(values: dict[str, Any]) -> list[tuple[str, Path]]:
    """
    Return every file and folder that a command reads, with the key that names it: text of the config that is the path
    of something that exists, runs of the project that it names, and the bases and members of adapters and ensembles.
    """
    found = [(key, path) for key, path in _named_paths(values) if os.path.exists(path)]
    for key, path in found:  # which grows
        adapter, ensemble = (read_model_config(path / name) for name in (ADAPTER_FILE, ENSEMBLE_FILE))
        more = [path / str(name) for name in ensemble.get("members") or []]
        if base := adapter.get("base_model_name_or_path"):
            more += [Path(base), path / base]
        found += [(key, each) for each in more if os.path.exists(each) and (key, each) not in found]
    return found


def _named_paths(values: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    for key, value in texts(values):
        names = re.split(r"[.\[]", key)
        if NOT_READ & {names[-1]} or names[0] == "logger" or not value:
            continue
        if RUNS & set(names):
            yield key, project_dir(values) / value
        yield key, Path(value).expanduser()
        if GLOBS & set(names):
            yield from ((key, Path(match)) for match in glob.glob(os.path.expanduser(value), recursive=True))


def read_model_config(path: Path) -> dict[str, Any]:
    """Return a model's JSON file; empty where there is none, or a damaged one, which loading the model reports."""
    try:
        content = read_json(path)
    except ConfigError:
        return {}
    return content if isinstance(content, dict) else {}


def kind_of(folder: Path) -> str | None:
    """Return what the model in a folder is, by its files: `policy`, `reward` or nothing that we know."""
    architectures = read_model_config(folder / "config.json").get("architectures") or [""]
    task = read_model_config(folder / ADAPTER_FILE).get("task_type")
    if task == "SEQ_CLS" or "SequenceClassification" in str(architectures[0]):
        return "reward"
    return "policy" if task == "CAUSAL_LM" or architectures[0] else None


def conf_dir() -> Path:
    """Return the folder of the YAML files: `rlhf_trl/conf` in a wheel, `conf/` beside `rlhf_trl` in a clone."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"
