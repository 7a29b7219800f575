"""
Hydra multirun over `train.py`: one `accelerate launch train.py` a job, and a table at the end.

    python launch/sweep.py -m stage=ppo stage.args.beta=0.02,0.1
    python launch/sweep.py -m stage=dpo seed=1,2 accelerate=ddp 'launch=[--num_processes,"4"]'

Any Hydra launcher and sweeper fits (`hydra/launcher=joblib`, `sweep=optuna`): a job returns the run's objective. Jobs
that are done are passed over, so the same command goes on where an earlier one ended.
"""

import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from rlhf_trl.errors import ConfigError
from rlhf_trl.launching import BEGIN, config_dirs, launch_command, read_metrics, read_run, run, shown, state_of
from rlhf_trl.overrides import compose
from rlhf_trl.paths import conf_dir

# What the sweep reads itself; a run gets a name and a beginning of its own
OWN_KEYS = ("sweep", "accelerate", "launch", "program", "run_name", "resume", "overwrite")


def main() -> None:
    """Runs the sweep that the command line describes."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra ends every error itself, with its own words
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="sweep")(job)()
    except ConfigError as error:
        leave(error, 2)
    except HydraException as error:
        leave("\n".join(problems()) or error, 2)
    except KeyboardInterrupt:
        leave("Stopped. The same command goes on with the jobs that are not done.", 130)


def problems() -> list[str]:
    """What is wrong with the command line's overrides, seen with the first value of each."""
    args = get_args_parser().parse_args()
    given = [word for word in args.overrides if name_of(word) not in OWN_KEYS and not word.startswith("hydra")]
    firsts = [word if any(sign in word for sign in "([{") else word.split(",")[0] for word in given]
    return compose(firsts, [args.config_dir] if args.config_dir else [])[1]


def name_of(override: str) -> str:
    """`stage.args.x` of `+stage.args.x=1`."""
    return override.lstrip("+~").split("=")[0]


def leave(message: object, status: int) -> None:
    """Says why, and exits."""
    print(message, file=sys.stderr)
    sys.exit(status)


def job(cfg: DictConfig) -> float:
    """One job of the sweep: runs `train.py` with the job's overrides and returns the run's objective."""
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        raise ConfigError("`launch/sweep.py` is for several runs. Add `-m`; for a single run use `train.py`.")
    number, run_dir = settings.job.num, Path(settings.runtime.output_dir)
    overrides = [item for item in settings.overrides.task if name_of(item) not in OWN_KEYS]
    program = list(cfg.program or launch_command(cfg.accelerate, cfg.launch))
    outcome = run_job(program, config_dirs(), overrides, f"run_name={cfg.run_name}/{number}", run_dir)
    given = dict(item.lstrip("+").partition("=")[::2] for item in overrides)
    # Beside the run directory: a run that is begun again clears its own
    run_dir.with_suffix(".json").write_text(
        json.dumps({"number": number, "overrides": given, **outcome}, indent=2), encoding="utf-8"
    )
    if outcome["status"] == "done" and outcome["value"] is not None:
        return outcome["value"]
    if "BasicSweeper" in settings.sweeper._target_:
        return math.nan  # it looks at no values, and an exception would end what it shows
    raise RuntimeError(f"Job {number} {outcome['status']}: {outcome['message'] or 'its objective was not measured'}")


def run_job(program: list[str], config_dirs: list[str], overrides: list[str], run_name: str, run_dir: Path) -> dict:
    """
    Runs one job unless it is done already.

    Returns:
        `dict`: `status` (`done` or `failed`), `seconds`, `objective` (its name), `value`, `eval` (metrics), `message`
        and `log`.
    """
    log, begun = run_dir.with_suffix(".log"), time.time()
    state = state_of(run_dir, [*overrides, run_name])
    if state != "done":
        # What was `changed` is train.py's to refuse
        command = [*program, *config_dirs, *overrides, run_name, *BEGIN.get(state, [])]
        print(shown(command), flush=True)
        code = run(command, log=log)
        if code != 0 or read_run(run_dir).get("status") != "done":
            return {
                "status": "failed",
                "seconds": time.time() - begun,
                "objective": None,
                "value": None,
                "eval": {},
                "message": what_it_said(log) or f"exit status {code}",
                "log": str(log),
            }
    measured = read_metrics(run_dir)
    return {
        "status": "done",
        "seconds": measured["seconds"],
        "objective": measured["objective"],
        "value": measured["end"],
        "eval": measured["eval"],
        "message": None,
        "log": str(log),
    }


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


if __name__ == "__main__":
    main()
