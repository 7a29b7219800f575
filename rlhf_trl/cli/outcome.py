"""The first and the last lines of a run: where it goes, what came out, and what to do next. Imports nothing heavy."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_trl.config.program import command_line
from rlhf_trl.report.text import compact_number, duration
from rlhf_trl.runs.paths import ADAPTER_FILE, conf_dir, embedded_folder, kind_of, project_dir
from rlhf_trl.runs.record import read_metrics, read_run

# Set for the steps of a pipeline and the jobs of a sweep: what comes after them is already known
STEP = "RLHF_TRL_STEP"
# Names of metrics in the last line, of the objective and of what is shown beside it
OBJECTIVES = {"objective/scores": "score", "rewards/accuracies": "accuracy"}
BESIDE = {"objective/kl": "KL", "rewards/accuracies": "accuracy"}
# Keys of a command line that the next command needs as well
DATA = ("data", "reward", "combine")
MODEL = ("model", "adapter")


def first_line(cfg: DictConfig, writes: bool) -> str:
    """
    Return the line that a run begins with: `rlhf_trl ppo -> runs/default/ppo`.

    Args:
        cfg (`DictConfig`): the composed config.
        writes (`bool`): whether the stage has a run directory.
    """
    where = " (dry run)" if cfg.get("dry_run") else f" -> {cfg.run_dir}" if writes else ""
    return f"rlhf_trl {cfg.stage.name}{where}"


def last_lines(cfg: DictConfig, typed: Sequence[str], seconds: float) -> str:
    """
    Return what came out of a finished run, `ppo: score 1.5 -> 3.1, KL 1.2, 35 s, runs/default/ppo`, and the commands
    that use it; nothing for a stage that leaves no record.

    Args:
        cfg (`DictConfig`): the composed config.
        typed (`Sequence[str]`): the overrides of the command line.
        seconds (`float`): time since the first line.
    """
    record = read_run(cfg.run_dir)
    if record is None or record.status != "done" or record.stage != cfg.stage.name:
        return ""
    facts = _measured(cfg.run_dir, cfg.objective, OmegaConf.select(cfg, "combine.constraints") or {})
    if record.reason:
        facts.append(f"stopped early ({record.reason.rstrip('.')})")
    lines = [f"{cfg.stage.name}: {', '.join([*facts, duration(seconds), str(cfg.run_dir)])}"]
    following = {} if STEP in os.environ else next_commands(cfg, typed)
    width = max(map(len, following), default=0)
    for i, (name, command) in enumerate(following.items()):
        lines.append(f"{'next:' if i == 0 else '':<6}{name:<{width}}  {command}")
    return "\n".join(lines)


def _measured(run_dir: str | os.PathLike, objective: str | None, constraints: Mapping[str, Any]) -> list[str]:
    """Return the objective before and after, and at the end the KL or the accuracy, and means with their bounds."""
    metrics = read_metrics(run_dir)
    if metrics is None:
        return []
    found = []
    values = [entry[objective] for entry in metrics["history"] if entry.get(objective) is not None]
    name = str(objective).removeprefix("eval_")
    if values:
        ends = [values[0], values[-1]] if len(values) > 1 else values
        found.append(f"{OBJECTIVES.get(name, name)} {' -> '.join(map(compact_number, ends))}")
    for beside, label in BESIDE.items():
        last = metrics["eval"].get(f"eval_{beside}", metrics.get("train", {}).get(beside))
        if last is not None and beside != name:
            found.append(f"{label} {compact_number(last)}")
    for name, bound in constraints.items():
        mean = f"constraints/{name}/mean"  # of combine=lagrange
        last = metrics["eval"].get(f"eval_{mean}", metrics.get("train", {}).get(mean))
        if last is not None:
            found.append(f"{name} {compact_number(last)} ({bound})")
    return found


def next_commands(cfg: DictConfig, typed: Sequence[str]) -> dict[str, str]:
    """
    Return the commands that use what a run has made, by their stage: those of a policy or of a reward model, with the
    data and rewards that were typed. A command that would need words that nobody has typed is left to the user.
    """
    run_dir, runs = Path(cfg.run_dir), project_dir(cfg)
    if not run_dir.is_relative_to(runs):
        return {}
    run, data, model = str(run_dir.relative_to(runs)), _typed(typed, DATA), _typed(typed, MODEL)
    usual = {"project": "default", "runs_dir": "runs"}
    place = [f"{key}={cfg[key]}" for key, value in usual.items() if cfg[key] != value]
    remote = [word for word in model if word.startswith("model.trust_remote_code=")]
    whole = any(word.startswith("experiment=") for word in typed)  # which brings data and rewards of its own
    rewarded = any(word.startswith("reward") for word in data)
    several_heads = OmegaConf.select(cfg, "data.feedback.use") == "regression"  # whose weights nobody has typed
    kind = kind_of(run_dir)
    found: dict[str, list[str]] = {}
    if kind == "reward" and not whole and not several_heads:
        scored_by = ["reward=model", f"reward.model.run={run}"]
        found["evaluate_reward"] = [*scored_by, *data]
        found["ppo"] = [*scored_by, *data, *model]
    elif kind == "policy" and read_metrics(run_dir) is None:
        found["sft"] = [f"model.run={run}", *data, *_as_text(cfg)]
    elif kind == "policy":
        embedded = embedded_folder(str(OmegaConf.select(cfg, "model.path"))) is not None
        found["chat"] = [*([] if embedded else ["model=hf"]), f"model.run={run}", *remote]
        start = _start(cfg)
        if start and not whole and (rewarded or not data):
            found["evaluate"] = [*_compared(start, run), *_reported(data)]
        if (run_dir / ADAPTER_FILE).is_file() and not (run_dir / "merged").is_dir():
            found["merge"] = [f"model.run={run}", *remote]
    return {
        stage: command_line(f"stage={stage}", *words, *place, launched=stage not in ("chat", "merge"))
        for stage, words in found.items()
    }


def _as_text(cfg: DictConfig) -> list[str]:
    """Return the override that keeps the embedded data plain text, as a model from scratch was fitted to it."""
    return ["data.conversational=false"] if OmegaConf.select(cfg, "data.conversational") is False else []


def _typed(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    return [word for word in words if re.split("[./=]", word.lstrip("+~"))[0] in keys]


def _reported(words: Sequence[str]) -> list[str]:
    """Return overrides with the constraints of `combine=lagrange`, which is of training, as an evaluation's."""
    if "combine=lagrange" not in words:
        return list(words)
    key = "combine.constraints="
    constraints = [word.replace(key, "stage.constraints=", 1) for word in words if word.startswith(key)]
    return [*(word for word in words if not word.startswith("combine")), *constraints]


def _start(cfg: DictConfig) -> str | None:
    """Return the policy that a run started from, if it is one that a comparison can name."""
    model = cfg.get("model") or {}
    start = model.get("run") or model.get("path")
    return start if start and re.fullmatch(r"[\w./:~-]+", str(start)) else None


def _compared(start: str, run: str) -> list[str]:
    """Return the overrides of `stage=evaluate` that compare a run with its start, and no other policy."""
    stage = OmegaConf.load(conf_dir() / "stage" / "evaluate.yaml").stage
    named = [re.split("[/:]", place.rstrip("/"))[-1] for place in (start, run)]
    names = [
        name if re.fullmatch(r"\w+", name) else other for name, other in zip(named, ("start", "run"), strict=True)
    ]
    if names[0] == names[1]:
        names = ["start", "run"]
    wanted = dict(zip(names, (start, run), strict=True))
    words = [f"{'' if name in stage.policies else '+'}stage.policies.{name}={wanted[name]}" for name in wanted]
    kept = {f"stage.policies.{name}={place}" for name, place in stage.policies.items()}
    words = [word for word in words if word not in kept]
    words += [f"stage.policies.{name}=null" for name in stage.policies if name not in wanted]
    return words if names[0] == stage.baseline else [*words, f"stage.baseline={names[0]}"]
