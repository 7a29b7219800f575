"""
Hydra multirun over `train.py`: one `accelerate launch train.py` a job, and a table at the end.

    python launch/sweep.py -m stage=ppo stage.args.beta=0.02,0.1
    python launch/sweep.py -m stage=dpo seed=1,2 accelerate=ddp 'launch=[--num_processes,"4"]'
    python launch/sweep.py -m sweep=pareto stage=ppo 'reward=[demo,tokens]' reward.tokens.weight=-0.2

Any Hydra launcher and sweeper fits (`hydra/launcher=joblib`, `sweep=optuna`): a job returns the run's objective, whose
direction is that of the metric unless `direction` is set. Jobs that are done are skipped, so the same command resumes
an earlier sweep.
"""

import itertools
import math
import re
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.cli import pareto
from rlhf_trl.cli.app import exit_with, run_app
from rlhf_trl.cli.devices import claimed, devices_of_job
from rlhf_trl.cli.launcher import (
    START_OVERRIDES,
    launch_command,
    machine_problems,
    results_of,
    run,
    shell_line,
    state_of,
)
from rlhf_trl.cli.overrides import compose, compose_sweeper, composed, without_sweeps
from rlhf_trl.config.command_line import config_dirs, unquote_text
from rlhf_trl.config.program import command_line
from rlhf_trl.config.values import as_dict, plain
from rlhf_trl.errors import PREEMPTED_STATUS, ConfigError, Preempted
from rlhf_trl.runs.directions import MAXIMIZE, MINIMIZE, direction_of, direction_problem
from rlhf_trl.runs.directory import name_problems
from rlhf_trl.runs.record import is_done, write_json
from rlhf_trl.runs.results import SweepJob

# Keys of the sweep itself; each run gets its own name, and is started or resumed by itself
OWN_KEYS = (
    *("sweep", "pareto", "accelerate", "launch", "program", "direction", "gpus_per_job"),
    *("run_name", "resume", "overwrite"),
)

# Keys with one value for all jobs: they name the folder of the sweep, or how its jobs start
ONE_FOR_ALL = ("project", "run_name", "runs_dir", "direction", "resume", "overwrite")


def search_direction(objective: str | None, given: str | None) -> str:
    """
    Return the direction of a search (`hydra.sweeper.direction`): as given, else by the name of the objective.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the name doesn't tell.
    """
    if (direction := given or direction_of(objective)) is None:
        raise ConfigError(direction_problem(objective))
    return direction


# When the module is imported, so that the processes of Hydra's launchers have it too
OmegaConf.register_new_resolver("rlhf_trl.direction", search_direction, replace=True)


def main() -> None:
    """Run the sweep that the command line describes."""
    resumes = "The same command resumes with the jobs that are not done."
    try:
        run_app(job, "sweep", problems, f"Stopped. {resumes}")
    except Preempted:
        exit_with(f"Preempted. {resumes}", PREEMPTED_STATUS)


def problems(args: Namespace) -> list[str]:
    """Return the problems of a sweep's command line."""
    cfg, found = compose(without_sweeps(args.overrides), args.config_dirs, "sweep")
    if cfg is None or found:
        return found
    if not args.multirun:
        return [f"A sweep is several runs. Add `-m`; for a single run use `{command_line(*args.overrides)}`."]
    if cfg.objective is None:
        return [
            f"A sweep compares its jobs by a metric, and `stage={cfg.stage.name}` measures none. Run the stage once "
            "for each value, each time with another `project=...` or `run_name=...`."
        ]
    several = [word for word in args.overrides if without_sweeps([word]) != [word] and name_of(word) in ONE_FOR_ALL]
    values = plain(cfg)[0]
    found = name_problems(values) + machine_problems(cfg.accelerate, cfg.launch) + _launcher_problems(args)
    found += pareto.problems(values)
    if cfg.direction not in (None, MINIMIZE, MAXIMIZE):
        found.append(f"`direction` is `{cfg.direction}`. Set it to `{MINIMIZE}`, `{MAXIMIZE}` or `null`.")
    elif cfg.direction is None and direction_of(cfg.objective) is None and _searches(args):
        found.append(direction_problem(cfg.objective))
    return found + [
        f"`{word}`: a sweep has one `{name_of(word)}` for all its jobs, each of which gets its own folder. Set "
        "one value."
        for word in several
    ]


def _launcher_problems(args: Namespace) -> list[str]:
    """Return the problem of a launcher that would start a job on several nodes, or none."""
    if not any(name_of(word).startswith(("hydra/launcher", "hydra.launcher")) for word in args.overrides):
        return []
    launcher = composed("sweep", without_sweeps(args.overrides), args.config_dirs, with_hydra=True).hydra.launcher
    return [
        f"`hydra.launcher.{name}` is {launcher[name]}, and a job of a sweep is one `accelerate launch`, on one node. "
        f"Set `hydra.launcher.{name}=1`; several ranks of a job are `hydra.launcher.gpus_per_node=N` and "
        "`'launch=[--num_processes,\"N\"]'`."
        for name in ("nodes", "tasks_per_node")
        if (launcher.get(name) or 1) > 1
    ]


def _searches(args: Namespace) -> bool:
    """Return whether the sweeper takes its direction from the objective: it looks for the best job."""
    sweeper = compose_sweeper(args.overrides, args.config_dirs)
    return "rlhf_trl.direction" in str(as_dict(sweeper, resolve=False).get("direction"))


def name_of(override: str) -> str:
    """Return the key of an override, `stage.args.x` of `+stage.args.x=1`."""
    return override.lstrip("+~").split("=")[0]


def job(cfg: DictConfig) -> float:
    """Run `train.py` with the overrides of one job, and return the run's objective."""
    settings = HydraConfig.get()
    number, run_dir = settings.job.num, Path(settings.runtime.output_dir)
    values, given = plain(cfg)[0], unquote_text(settings.overrides.task)
    own = pareto.overrides(values)
    left_out = {name_of(item) for item in own}
    overrides = [
        *(item for item in given if name_of(item).split(".")[0] not in OWN_KEYS and name_of(item) not in left_out),
        *own,
    ]
    program = list(cfg.program or launch_command(cfg.accelerate, cfg.launch))
    devices = devices_of_job(as_dict(settings.launcher), cfg.gpus_per_job, cfg.accelerate, cfg.launch)
    run_name = f"run_name={cfg.run_name}/{number}"
    outcome = run_job(number, program, config_dirs(), overrides, run_name, run_dir, *devices)
    outcome = replace(outcome, direction=_direction(cfg, settings.sweeper), weights=pareto.weights(values))
    write_json(run_dir.with_suffix(".json"), outcome)  # not in the run directory, which a new start clears
    if outcome.done and outcome.value is not None:
        return outcome.value
    if "BasicSweeper" in settings.sweeper._target_:
        return math.nan  # it uses no values, and an exception would end its output
    raise RuntimeError(f"Job {number} {outcome.status}: {outcome.message or 'its objective was not measured'}")


def _direction(cfg: DictConfig, sweeper: DictConfig) -> str | None:
    """Return the direction of the sweep: a search's own, else the one that is set, else that of the objective."""
    found = sweeper.get("direction") or cfg.direction or direction_of(cfg.objective)
    return found if found in (MINIMIZE, MAXIMIZE) else None


def run_job(
    number: int,
    program: list[str],
    config_dirs: list[str],
    overrides: list[str],
    run_name: str,
    run_dir: Path,
    devices: Sequence[str] = (),
    own: int = 0,
) -> SweepJob:
    """
    Run one job unless it is done already, on `own` of the GPUs that the jobs share, `devices`; 0: on all it sees.

    Returns:
        [`~rlhf_trl.runs.results.SweepJob`]: what came of it.
    """
    given = {name: value for name, _, value in (item.lstrip("+").partition("=") for item in overrides)}
    log, begun = run_dir.with_suffix(".log"), time.time()
    state = state_of(run_dir, [*overrides, run_name])
    if state != "done":
        # `changed` is refused by train.py
        command = [*program, *config_dirs, *overrides, run_name, *START_OVERRIDES.get(state, [])]
        print(shell_line(command), flush=True)
        with claimed(run_dir.parent, devices, own) as mine:
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {}
            code = run(command, log=log, environment=visible)
        if code != 0 or not is_done(run_dir):
            return SweepJob(
                number=number,
                overrides=given,
                status="failed",
                seconds=time.time() - begun,
                message=error_message(log) or f"exit status {code}",
                log=str(log),
            )
    measured = results_of(run_dir)
    return SweepJob(
        number=number,
        overrides=given,
        status="done",
        seconds=measured.seconds,
        objective=measured.objective,
        value=measured.end,
        health=measured.health,
        eval=measured.eval,
        log=str(log),
    )


def error_message(log: Path) -> str:
    """Return the error message at the end of a job's output, without the launcher's; else its last line."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if re.match(r"(Error|\w+(Error|Exception)): ", line)]
    ours = [i for i in starts if "CalledProcessError" not in lines[i] and "ChildFailedError" not in lines[i]]
    if not ours:
        return "".join(lines[-1:])
    message = lines[ours[-1] :]
    # An error with several problems is a numbered list below its first line
    return "\n".join([message[0], *itertools.takewhile(lambda line: line.startswith("  "), message[1:])])
