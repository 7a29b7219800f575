"""
Hydra multirun over `train.py`: one `accelerate launch train.py` a job, and a table at the end.

    python launch/sweep.py -m stage=ppo stage.args.beta=0.02,0.1
    python launch/sweep.py -m stage=dpo seed=1,2 accelerate=ddp 'launch=[--num_processes,"4"]'

Any Hydra launcher and sweeper fits (`hydra/launcher=joblib`, `sweep=optuna`): a job returns the run's objective. Jobs
that are done are passed over, so the same command goes on where an earlier one ended.
"""

import itertools
import math
import re
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rlhf_trl.cli.app import run_app
from rlhf_trl.cli.launcher import BEGIN, launch_command, results_of, run, shown, state_of
from rlhf_trl.cli.overrides import without_sweeps
from rlhf_trl.config.command_line import as_typed, config_dirs
from rlhf_trl.config.values import plain
from rlhf_trl.runs.conflicts import name_problems
from rlhf_trl.runs.record import is_done, write_json
from rlhf_trl.runs.results import SweepJob

# What the sweep reads itself; a run gets a name and a beginning of its own
OWN_KEYS = ("sweep", "accelerate", "launch", "program", "run_name", "resume", "overwrite")


# Of these all jobs have the same one: it is the folder that holds them, or how they begin
ONE_FOR_ALL = ("project", "run_name", "runs_dir", "resume", "overwrite")


def main() -> None:
    """Runs the sweep that the command line describes."""
    run_app(job, "sweep", problems, "Stopped. The same command goes on with the jobs that are not done.")


def problems(words: list[str], multirun: bool, cfg: DictConfig) -> list[str]:
    """What a sweep can't do."""
    if not multirun:
        return ["`launch/sweep.py` is for several runs. Add `-m`; for a single run use `train.py`."]
    if cfg.objective is None:
        return [
            f"A sweep compares its jobs by a metric, and `stage={cfg.stage.name}` measures none. Start the stage once "
            "for each value, each time with another `project=...` or `run_name=...`."
        ]
    several = [word for word in words if without_sweeps([word]) != [word] and name_of(word) in ONE_FOR_ALL]
    return name_problems(plain(cfg)[0]) + [
        f"`{word}`: a sweep has one `{name_of(word)}` for all its jobs, each of which gets a folder of its own. Give "
        "one value."
        for word in several
    ]


def name_of(override: str) -> str:
    """`stage.args.x` of `+stage.args.x=1`."""
    return override.lstrip("+~").split("=")[0]


def job(cfg: DictConfig) -> float:
    """One job of the sweep: runs `train.py` with the job's overrides and returns the run's objective."""
    settings = HydraConfig.get()
    number, run_dir = settings.job.num, Path(settings.runtime.output_dir)
    overrides = [item for item in as_typed(settings.overrides.task) if name_of(item) not in OWN_KEYS]
    program = list(cfg.program or launch_command(cfg.accelerate, cfg.launch))
    outcome = run_job(number, program, config_dirs(), overrides, f"run_name={cfg.run_name}/{number}", run_dir)
    write_json(run_dir.with_suffix(".json"), outcome)  # not in the run directory, which a new start clears
    if outcome.done and outcome.value is not None:
        return outcome.value
    if "BasicSweeper" in settings.sweeper._target_:
        return math.nan  # it looks at no values, and an exception would end what it shows
    raise RuntimeError(f"Job {number} {outcome.status}: {outcome.message or 'its objective was not measured'}")


def run_job(
    number: int, program: list[str], config_dirs: list[str], overrides: list[str], run_name: str, run_dir: Path
) -> SweepJob:
    """
    Run one job unless it is done already.

    Returns:
        [`~rlhf_trl.runs.results.SweepJob`]: what came of it.
    """
    given = {name: value for name, _, value in (item.lstrip("+").partition("=") for item in overrides)}
    log, begun = run_dir.with_suffix(".log"), time.time()
    state = state_of(run_dir, [*overrides, run_name])
    if state != "done":
        # What was `changed` is train.py's to refuse
        command = [*program, *config_dirs, *overrides, run_name, *BEGIN.get(state, [])]
        print(shown(command), flush=True)
        code = run(command, log=log)
        if code != 0 or not is_done(run_dir):
            return SweepJob(
                number=number,
                overrides=given,
                status="failed",
                seconds=time.time() - begun,
                message=what_it_said(log) or f"exit status {code}",
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
        eval=measured.eval,
        log=str(log),
    )


def what_it_said(log: Path) -> str:
    """The message at the end of a job's output, without the launcher's words after it; else its last line."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if re.match(r"(Error|\w+(Error|Exception)): ", line)]
    ours = [i for i in starts if "CalledProcessError" not in lines[i] and "ChildFailedError" not in lines[i]]
    if not ours:
        return "".join(lines[-1:])
    message = lines[ours[-1] :]
    # An error with several problems is a numbered list below its first line
    return "\n".join([message[0], *itertools.takewhile(lambda line: line.startswith("  "), message[1:])])
