"""Paths of models, earlier runs and data that don't exist or hold something else."""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rlhf_trl.config.values import at, nodes, section
from rlhf_trl.data.file_rows import resolve_paths
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import did_you_mean, nearest, suggestion
from rlhf_trl.models.options import CHAT_TEMPLATES
from rlhf_trl.rewards.options import CLASSIFIER
from rlhf_trl.runs.paths import (
    ADAPTER_FILE,
    DEMO,
    MODEL_FILES,
    baseline_problem,
    conf_dir,
    embedded_folder,
    finish_command,
    is_run_name,
    kind_of,
    named_policies,
    other_model,
    project_dir,
    read_paths,
    run_command,
)
from rlhf_trl.runs.record import CONFIG_FILE, ENSEMBLE_FILE, RUN_FILE, read_run


def model_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of the model a run starts from, of reward models, and of the policies to compare."""
    problems = []
    named = named_policies(at(values, "stage.policies") or {})
    if model := section(values, "model"):
        if not named:  # which take its place
            problems += _model("model", model, values, at(values, "stage.task_type") or "CAUSAL_LM")
        problems += _values_of_the_embedded_model(model, values)
        if (template := model.get("chat_template")) not in CHAT_TEMPLATES:
            problems += _file("model.chat_template", template)
    for name, reward in section(values, "reward").items():
        if not isinstance(reward, dict):
            continue
        if reward.get("_target_") == CLASSIFIER and reward.get("path") is not None:
            problems += _model_path(f"reward.{name}.path", str(reward["path"]), model_folder(reward, values))
        if {"run", "path"} <= reward.keys():
            problems += _model(f"reward.{name}", reward, values, "SEQ_CLS")
            if reward.get("_target_") == "rlhf_trl.rewards.AdapterReward":
                problems += _no_adapter(f"reward.{name}", "reward=model", model_folder(reward, values))
    critic = section(values, "critic")
    if any(critic.get(key) is not None for key in ("run", "path")):
        problems += _model("critic", critic, values, "SEQ_CLS")
        if at(values, "stage.args.critic") == "adapter":
            problems += _no_adapter("critic", "critic=model", model_folder(critic, values))
    judge = section(values, "judge")
    if judge.get("path") is not None:
        problems += _model("judge", {**judge, "run": None}, values, "CAUSAL_LM")
    baseline = at(values, "stage.baseline")
    if baseline is not None and (problem := baseline_problem(baseline, named)):
        problems.append(problem)
    for key, place in _named_places(values).items():
        problems += _earlier_run(key, place, values)
    return problems


def named_runs(values: dict[str, Any]) -> dict[str, str]:
    """Return the runs of the project that a config names as models, policies or candidates, by key."""
    named, nodes = named_policies(at(values, "stage.policies") or {}), section(values, "reward").items()
    places = {f"reward.{name}.run": node.get("run") for name, node in nodes if isinstance(node, dict)}
    places |= {"critic.run": at(values, "critic.run"), "model.run": None if named else at(values, "model.run")}
    found = {key: str(run) for key, run in places.items() if run is not None}
    return found | _named_places(values)


def _named_places(values: dict[str, Any]) -> dict[str, str]:
    """Return the policies, models of a soup and candidates of the stage that are runs of the project, by key."""
    places: dict[str, Any] = {
        f"stage.{group}.{name}": place
        for group in ("policies", "models")
        for name, place in named_policies(at(values, f"stage.{group}") or {}).items()
    }
    places |= {key: at(values, key) for key in ("stage.policy", "stage.candidates")}
    runs = project_dir(values)
    return {key: place for key, place in places.items() if isinstance(place, str) and is_run_name(place, runs)}


def unmade_runs(values: dict[str, Any], earlier: Collection[str]) -> list[str]:
    """Return the problems of runs that a config names, that are not there, and that none of those `earlier` makes."""
    problems = []
    for key, run in named_runs(values).items():
        if run.split("/")[0].split("@")[0] in earlier or read_run(project_dir(values) / run) is not None:
            continue
        hint = did_you_mean(run, earlier) if nearest(run, earlier) else ""
        problems.append(f"`{key}` is `{run}`, and no step before this one makes that run. {hint}".strip())
    return problems


def output_problems(values: dict[str, Any]) -> list[str]:
    """Return the problem of an output file outside the run directory that would overwrite an input, or none."""
    output = at(values, "stage.output")
    if not isinstance(output, str):
        return []
    if Path(output).is_dir():
        return [
            f"`stage.output` is the folder `{output}`. Name a file in it: `stage.output={output}/completions.jsonl`."
        ]
    target = Path(output).resolve()
    return [
        f"`stage.output` is `{output}`, which the command reads itself (`{key}`). Name another file."
        for key, path in read_paths(values)
        if target == path.resolve() or (target.exists() and target.is_relative_to(path.resolve()))
    ][:1]


def model_folder(node: dict[str, Any], values: dict[str, Any]) -> Path:
    """Return the local folder of a node with `run` and `path`, existing or not."""
    run, path = node.get("run"), str(node.get("path"))
    if run is not None:
        return project_dir(values) / str(run)
    return embedded_folder(path) or Path(path).expanduser()


def _model(key: str, node: dict[str, Any], values: dict[str, Any], task_type: str) -> list[str]:
    run, path, folder = node.get("run"), node.get("path"), model_folder(node, values)
    if run is not None:
        problems = _earlier_run(f"{key}.run", str(run), values)
    elif path is not None:
        problems = _model_path(f"{key}.path", str(path), folder)
    elif key == "model":
        return [
            "`model.path` has no value. Set `model.path=...` to a folder or a hub id, or `model.run=...` to an "
            "earlier run of this project."
        ]
    else:
        return [f"`{key}` names no model. Set `{key}.run=...` (a run of this project) or `{key}.path=...`."]
    return problems or _task_type(key, folder, task_type)


def brings_values(stage: Any) -> bool:
    """Return whether `model=demo` brings values for a stage, by its name."""
    return (conf_dir() / "model" / "_demo" / f"{stage}.yaml").is_file()


def for_embedded(key: str, place: str, what: str = "") -> str:
    """Return the problem of another model, named by a key, with `model=demo`; `what` says of what it is a run."""
    return (
        f"`{key}` is `{place}`{what}. `model=demo`, which is the default, brings values that fit the embedded model "
        "of 0.2 M parameters alone, such as learning rates and lengths. Set `model=hf` as well."
    )


def _values_of_the_embedded_model(model: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Return the problem of other models with `model=demo`, whose values fit the embedded one, or none."""
    if not str(model.get("path")).startswith(DEMO) or not brings_values(at(values, "stage.name")):
        return []
    runs = project_dir(values)
    named = {
        f"stage.policies.{name}": place for name, place in named_policies(at(values, "stage.policies") or {}).items()
    }
    if not named and model.get("run") is not None:
        named = {"model.run": str(model["run"])}
    for key, place in named.items():
        is_run = key == "model.run" or is_run_name(place, runs)
        folder = runs / place if is_run else Path(place)
        if is_run or (folder / CONFIG_FILE).is_file():
            other = other_model(folder)
        else:
            other = None if embedded_folder(place) else place
        if other is not None:
            return [for_embedded(key, place, f", a run of {other}" if other != place else "")]
    return []


def _earlier_run(key: str, run: str, values: dict[str, Any]) -> list[str]:
    folder = project_dir(values) / run
    try:
        record = read_run(folder)
    except ConfigError as error:
        return [f"`{key}` is `{run}`, whose record is damaged: {error}"]
    if record is None:
        others = [path.parent.name for path in folder.parent.glob(f"*/{RUN_FILE}")]
        hint = f" {did_you_mean(run, others)}" if nearest(run, others) else ""
        return [
            f"`{key}` is `{run}`, and there is no such run in `{folder.parent}`.{hint} Make it first: "
            f"`{run_command(run, project_dir(values))}`."
        ]
    if record.status != "done":
        return [
            f"`{key}` is `{run}`, and that run is not finished (its status is `{record.status}`). "
            f"Finish it first: `{finish_command(run, project_dir(values))}`."
        ]
    return []


def _model_path(key: str, path: str, folder: Path) -> list[str]:
    if embedded_folder(path) is not None:
        names = [f"{path.partition(':')[0]}:{p.name}" for p in folder.parent.glob("*/")]
        return [] if folder.is_dir() else [f"`{key}` is `{path}`, which isn't embedded. {did_you_mean(path, names)}"]
    if folder.is_file():
        return [f"`{key}` is the file `{path}`. Give the folder that holds the model."]
    if folder.is_dir():
        if any((folder / name).is_file() for name in (*MODEL_FILES, ENSEMBLE_FILE)):
            return []
        return [f"`{key}` is `{path}`, a folder without {' or '.join(f'`{n}`' for n in MODEL_FILES)}. Give a model's."]
    if _looks_like_hub_id(path):
        return _not_cached(key, path, "models")
    return [f"`{key}` is `{path}`, and that is neither a folder nor a hub id (`organization/name`). {_beside(folder)}"]


def _looks_like_hub_id(path: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", path)) and not Path(path.split("/")[0]).is_dir()


def _not_cached(key: str, hub_id: str, kind: str) -> list[str]:
    """Return the problem of a hub id that isn't in the cache of an offline machine, or none."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        return []
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    if (cache / f"{kind}--{hub_id.replace('/', '--')}").is_dir():
        return []
    return [
        f"`{key}` is `{hub_id}`, which is no folder here and not in the hub's cache (`{cache}`), and `HF_HUB_OFFLINE` "
        "is set. Give a folder, or unset `HF_HUB_OFFLINE` to download it."
    ]


def _beside(path: Path) -> str:
    """Return a hint at similar names beside a path that doesn't exist."""
    near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else []
    if near:
        return suggestion(str(path.parent / name) for name in near)
    return f"Seen from `{Path.cwd()}`; give a path that exists."


def _task_type(key: str, folder: Path, wanted: str) -> list[str]:
    """Return the problem of a policy in place of a reward model, or vice versa: its head would be random. Or none."""
    if (folder / ENSEMBLE_FILE).is_file() and not key.startswith("reward."):
        return [
            f"`{key}` is `{folder}`, an ensemble of reward models, which can only score. Name one of its members: "
            f"`{key}.run={folder.name}/member_0`."
        ]
    kind = kind_of(folder)
    if wanted == "CAUSAL_LM" and kind == "reward":
        return [
            f"`{key}` is `{folder}`, a reward model, which can't write text. Start from a policy: `model.run=sft`."
        ]
    if wanted == "SEQ_CLS" and kind == "policy" and key != "model":  # a reward model does start from a policy
        return [f"`{key}` is `{folder}`, a model without a score head. Train one with `stage=reward`."]
    return []


def _no_adapter(key: str, instead: str, folder: Path) -> list[str]:
    """Return the problem of a full model where an adapter on the policy's base is needed, or none."""
    if not (folder / "config.json").is_file() or (folder / ADAPTER_FILE).is_file():
        return []
    return [
        f"`{key}` is `{folder}`, a full model, and an adapter is needed to share the policy's base. Name a run that "
        f"was trained with `adapter=lora`, or set `{instead}`."
    ]


def _file(key: str, path: Any) -> list[str]:
    if not isinstance(path, str) or Path(path).expanduser().is_file():
        return []
    return [f"`{key}` is `{path}`, which is no file. {_beside(Path(path))}"]


def data_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of the files, folders and hub datasets of the data group, sources of a mixture included."""
    problems = []
    for path, node in nodes(section(values, "data"), "data"):
        for key in ("paths", "eval_paths"):
            if node.get("_target_") == "rlhf_trl.data.load_files" and node.get(key) is not None:
                problems += _files(f"{path}.{key}", node[key])
        if node.get("_target_") == "rlhf_trl.tasks.reviews.load" and node.get("path"):
            folder = Path(node["path"]).expanduser()
            problems += (
                [] if folder.is_dir() else [f"`{path}.path` is `{folder}`, which is no folder. {_beside(folder)}"]
            )
        if node.get("_target_") == "rlhf_trl.data.load_hub" and node.get("path"):
            problems += _dataset(f"{path}.path", str(node["path"]))
    return problems


def _files(key: str, paths: Any) -> list[str]:
    try:
        resolve_paths(paths, key)
    except ConfigError as error:
        return [re.sub(r"^\s*\d+\. ", "", line) for line in str(error).splitlines() if not line.endswith("problems:")]
    return []


def _dataset(key: str, path: str) -> list[str]:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return []
    if path.count("/") > 1 or path[0] in "./~" or (folder.parent != Path(".") and folder.parent.is_dir()):
        return [f"`{key}` is `{path}`, and there is no such folder. {_beside(folder)}"]
    return _not_cached(key, path, "datasets")
