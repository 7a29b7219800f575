"""A run directory that is in use, or that can't be resumed."""

import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf_trl.checks.values import flatten, plain, read_json
from rlhf_trl.launching import is_alive

# A resumed run may differ in these from its beginning: none of them can change the weights.
FREE_KEYS = (
    "resume",
    "overwrite",
    "merge",
    "dry_run",
    "logger",
    "health",
    "runs_dir",
    "run_dir",
    "stage.args.output_dir",
    "stage.args.report_to",
    "stage.args.save_strategy",
    "stage.args.save_steps",
    "stage.args.save_total_limit",
    "stage.args.logging_steps",
    "stage.args.logging_first_step",
    "stage.args.disable_tqdm",
)


def run_directory_problems(values: dict[str, Any]) -> list[str]:
    """A directory is used when it holds `run.json`; Hydra's `.hydra` alone says nothing."""
    if not values.get("run_dir"):
        return []
    run_dir, resume, overwrite = Path(values["run_dir"]), values.get("resume"), values.get("overwrite")
    record = read_json(run_dir / "run.json")
    if resume and overwrite:
        return ["`resume=true` goes on with a run and `overwrite=true` deletes it. Type only one of them."]
    if record is None:
        return [f"`{run_dir}` holds no run, so there is nothing to resume. Leave out `resume=true`."] if resume else []
    status, pid = record.get("status"), record.get("pid")
    if status == "running" and isinstance(pid, int) and pid != os.getpid() and is_alive(pid):
        return [
            f"The run in `{run_dir}` is still under way, as process {pid}. Wait for it, stop it with `kill {pid}`, or "
            "give this one another `run_name=...`."
        ]
    if resume:
        return _resume_problems(run_dir, status, values)
    if overwrite:
        return []
    go_on = (
        "it is finished, so `resume=true` has nothing to do" if status == "done" else "go on with it: `resume=true`"
    )
    return [
        f"`{run_dir}` already holds a run (its status is `{status}`). Ways out: {go_on}; keep it and start another: "
        "`run_name=...`; delete it and start again: `overwrite=true`."
    ]


def _resume_problems(run_dir: Path, status: str, values: dict[str, Any]) -> list[str]:
    if status == "done":
        return [
            f"The run in `{run_dir}` is finished, so there is nothing to resume. Start another with `run_name=...`, "
            "or delete it and start again: `overwrite=true`."
        ]
    problems = []
    if not any(run_dir.glob("checkpoint-*/")) and not any(run_dir.glob("member_*/run.json")):
        problems.append(
            f"`{run_dir}` holds no checkpoint, so there is nothing to resume. Start again: `overwrite=true`."
        )
    return problems + resume_changes(run_dir, values)


def resume_changes(run_dir: Path, values: dict[str, Any]) -> list[str]:
    """
    The problem of a resume with another config than the run was begun with, which lists the keys that differ.

    Args:
        run_dir (`Path`): directory of the run, with the `config.yaml` that it was begun with.
        values (`dict`): the config now, see [`~rlhf_trl.checks.values.plain`].
    """
    if not (run_dir / "config.yaml").is_file():
        return []
    before, now = flatten(plain(OmegaConf.load(run_dir / "config.yaml"))[0]), flatten(values)
    changed = [
        f"`{key}` was {before.get(key, 'not set')} and is {now.get(key, 'not set')}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in FREE_KEYS)
    ]
    if not changed:
        return []
    return [
        f"The run in `{run_dir}` can't be resumed with another config: {'; '.join(changed)}. Give the values it "
        "began with, or another `run_name=...`, or `overwrite=true`."
    ]
