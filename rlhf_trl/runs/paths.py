"""Where a model is: the embedded checkpoints, earlier runs, local folders and the hub. Imports nothing heavy."""

import functools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from rlhf_trl.errors import PACKAGE, ConfigError
from rlhf_trl.runs.record import RUN_FILE, read_run

# In the folder of an ensemble of reward models
ENSEMBLE_FILE = "ensemble.json"


def ensemble_members(path: str) -> list[str]:
    """
    Folders of the reward models, all adapters, that the ensemble in the folder `path` consists of; none where it is
    no ensemble.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if its `ensemble.json` doesn't name two adapters that are there.
    """
    file = Path(path, ENSEMBLE_FILE)
    if not file.is_file():
        return []
    try:
        members = [str(file.parent / name) for name in json.loads(file.read_text(encoding="utf-8"))["members"]]
    except (ValueError, TypeError, KeyError):
        members = []
    if len(members) > 1 and all(Path(member, "adapter_config.json").is_file() for member in members):
        return members
    raise ConfigError(
        f'`{file}` must hold `{{"members": [...]}}` with the folders of two or more adapters beside it. Mend it, or '
        "train the ensemble again."
    )


DEMO = "demo:"


def resolve_path(path: str | None, run: str | None, project_dir: str) -> str:
    """
    The folder or hub id that `model.path` and `model.run` mean.

    Args:
        path (`str`, *optional*):
            `demo:base` or `demo:sft` (the embedded checkpoints), a folder, or a hub id.
        run (`str`, *optional*):
            Name of an earlier run of the project, which wins over `path`.
        project_dir (`str`):
            Folder with the project's runs.

    Returns:
        `str`: an absolute folder, or the hub id as it is.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the run is missing or not finished, or if the folder is missing.
    """
    if run is not None:
        return _finished_run(run, project_dir)
    if path is None:
        raise ConfigError("No model is named. Give its folder or hub id as `path`, or an earlier run as `run`.")
    if path.startswith(DEMO):
        embedded = PACKAGE / "tasks" / "demo" / "checkpoints" / path.removeprefix(DEMO)
        if not embedded.is_dir():
            raise ConfigError(f"There is no embedded checkpoint `{path}` ({embedded}). Use `demo:base` or `demo:sft`.")
        return str(embedded)
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local.resolve())
    if path.startswith(("/", "./", "../", "~")) or path.count("/") > 1:
        raise ConfigError(f"The model folder `{path}` doesn't exist. Give an existing folder or a hub id.")
    return path


def find_policy(place: str, project_dir: str) -> str:
    """The folder or hub id of a policy: a run of the project where there is one of that name, else a path."""
    return resolve_path(place, place if is_run_name(place, project_dir) else None, project_dir)


def is_run_name(place: str, project_dir: str) -> bool:
    """Whether the place of a policy means a run of the project; `./sft` is always the folder."""
    run, folder = Path(project_dir, place), Path(place)
    if place.startswith((".", "/", "~")) or ":" in place:
        return False
    if (run / RUN_FILE).is_file():
        if folder.is_dir() and folder.resolve() != run.resolve():
            _say_which(place, str(run))
        return True
    return not any(sign in place for sign in "/.~") and not folder.is_dir()


@functools.cache  # once a process
def _say_which(place: str, run: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"`{place}` is the run `{run}`; the folder of that name here is `./{place}`.")


def named_policies(policies: dict[str, str] | list[str]) -> dict[str, str]:
    """Name and place of policies; of a mere list the names are the places' own, `ppo` of `ppo` and of `runs/x/ppo`."""
    if isinstance(policies, dict):
        return policies
    short = [re.split("[/:]", str(place).rstrip("/"))[-1] for place in policies]
    unique = len(set(short)) == len(short)
    return {name if unique else str(place): str(place) for name, place in zip(short, policies, strict=True)}


def baseline_problem(baseline: str, policies: Iterable[str]) -> str | None:
    """What is wrong with the baseline of a comparison of `policies`, by name; `None` where nothing is."""
    names = list(policies)
    if baseline in names:
        return None
    return (
        f"`stage.baseline` is `{baseline}`, which `stage.policies` doesn't have (it has "
        f"{', '.join(names) or 'none'}). Set it to one of them, or add it: `+stage.policies.{baseline}=...`."
    )


def _finished_run(run: str, project_dir: str) -> str:
    run_dir = Path(project_dir, run)
    record, command = read_run(run_dir), run_command(run, project_dir)
    if record is None:
        raise ConfigError(
            f"There is no run `{run}` in `{project_dir}`. Make it first with `{command}`, or name another by `run=`."
        )
    if record.status != "done":
        raise ConfigError(
            f"The run `{run}` in `{project_dir}` is not finished (its status is `{record.status}`). "
            f"Finish it first with `{command} resume=true`."
        )
    return str(run_dir.resolve())


def run_command(run: str, project_dir: str) -> str:
    """The command that makes a run of a project, for messages; with a name of its own its stage stays open."""
    stages = {path.name.removesuffix(".yaml") for path in (conf_dir() / "stage").glob("*.yaml")}
    parts = [f"stage={run}" if run in stages else f"stage=... run_name={run}", f"project={Path(project_dir).name}"]
    if str(Path(project_dir).parent) != "runs":
        parts.append(f"runs_dir={Path(project_dir).parent}")
    return " ".join(["accelerate launch train.py", *parts])


def conf_dir() -> Path:
    """The folder of the YAML files: `rlhf_trl/conf` where a wheel was installed, `conf/` beside it in a clone."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"
