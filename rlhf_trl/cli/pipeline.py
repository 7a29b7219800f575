"""
The steps of a pipeline, run one after another, each in a process of its own, and a table of the results.

    python launch/pipeline.py                         # the embedded demo
    python launch/pipeline.py pipeline=reviews/tiny   # a file of conf/pipeline
    python launch/pipeline.py project=mine            # the same steps once more, beside the first
    python launch/pipeline.py pipeline=iterated rounds=3    # steps that repeat

Finished steps are skipped, so the same command resumes an earlier pipeline, also in the middle of a round.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_trl.cli.app import exit_with, run_app
from rlhf_trl.cli.launcher import (
    START_OVERRIDES,
    launch_command,
    machine_problems,
    overrides_of,
    results_of,
    run,
    shell_line,
    state_of,
)
from rlhf_trl.cli.overrides import compose, without_sweeps
from rlhf_trl.config.command_line import config_dirs
from rlhf_trl.config.program import command_line
from rlhf_trl.config.ranges import problem_of
from rlhf_trl.config.values import as_dict, plain
from rlhf_trl.errors import PREEMPTED_STATUS, ConfigError, Preempted
from rlhf_trl.report.project import write_report
from rlhf_trl.report.text import comparison_text, duration, table
from rlhf_trl.runs.directory import name_problems
from rlhf_trl.runs.paths import kind_of, other_model
from rlhf_trl.runs.record import RUN_FILE, is_done, read_comparison, read_run
from rlhf_trl.terminal import printable

# Exit status of a run that a signal, or a labeler, stopped before its end (see `rlhf_trl.errors.Interrupted`)
STOPPED = 130


def main() -> None:
    """Compose conf/pipeline.yaml and run its steps."""
    run_app(start, "pipeline", problems, "Stopped. The same command resumes with the steps that are not done.")


def problems(args: Namespace) -> list[str]:
    """Return the problems of a pipeline's command line."""
    register_rounds()
    cfg, found = compose(without_sweeps(args.overrides), args.config_dirs, "pipeline")
    if cfg is None or found:
        return found
    if args.multirun:
        sweep = command_line("-m", app="sweep")
        return [f"A pipeline runs its steps once. Remove `-m`; for several runs of a stage: `{sweep}`."]
    values, found = plain(cfg)
    steps = values["steps"]
    if not isinstance(steps, dict):
        return [f"`steps` is {steps!r} and must hold names of steps, each with a list of overrides."]
    repeated = values["each_round"]
    if not isinstance(repeated, dict):
        return [f"`each_round` is {repeated!r} and must hold names of steps, each with a list of overrides."]
    rounds = problem_of("rounds", values["rounds"], "int [0, inf)")
    if rounds is None and bool(values["rounds"]) != bool(repeated):
        rounds = f"`rounds={values['rounds']}`, and `each_round` holds {len(repeated)} steps. " + (
            "Name the steps of a round there." if not repeated else "Set `rounds=1` or more."
        )
    if rounds is not None:
        return [*found, rounds]
    runs = {f"{name}_{number}" for name in repeated for number in range(1, values["rounds"] + 1)}
    if twice := [name for name in steps if name in runs]:
        return [
            *found,
            f"`steps.{twice[0]}` and a step of `each_round` would be one run. Give one of them another name.",
        ]
    steps |= {f"each_round.{name}": flat(own) for name, own in repeated.items()}
    lists = {"launch": values["launch"], "overrides": values["overrides"], "program": values["program"] or []}
    found = (found or name_problems(values)) + machine_problems(values["accelerate"], values["launch"])
    return found + [
        f"`{name}` is {given!r} and must be a list of overrides. Set for example `'{name}=[\"seed=1\"]'`."
        for name, given in (lists | {_key(name): flat(given) for name, given in steps.items()}).items()
        if not isinstance(given, list) or not all(isinstance(word, str) for word in given)
    ]


def _key(step: str) -> str:
    return step if step.startswith("each_round.") else f"steps.{step}"


def flat(overrides: Any) -> Any:
    """Return a list of overrides in which lists of some of them are joined; anything else as it is."""
    if not isinstance(overrides, list):
        return overrides
    return [word for given in overrides for word in (given if isinstance(given, list) else [given])]


def numbered(pattern: str, first: int, last: int) -> list[str]:
    """Return `pattern` with each number from `first` to `last` in place of its `*`."""
    return [pattern.replace("*", str(number)) for number in range(first, last + 1)]


def register_rounds() -> None:
    """
    Register `${earlier:PATTERN}` and `${so_far:PATTERN}`: what [`numbered`] makes of the rounds before this one, and
    of these and this one, as a list of a command line; and `${each:PATTERN}`, as overrides. They are from round 1 on,
    or from that of a second argument.
    """

    def listed(key: str, as_words: bool = False):
        def resolve(pattern: str, first: int = 1, *, _root_):
            found = numbered(pattern, first, _root_[key])
            return found if as_words else f"[{','.join(found)}]"

        return resolve

    for name, resolver in (
        ("earlier", listed("previous")),
        ("so_far", listed("round")),
        ("each", listed("round", as_words=True)),
    ):
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def all_steps(cfg: DictConfig) -> dict[str, list[str]]:
    """
    Return the steps of a pipeline in order, those of its rounds included.

    A step of `each_round` is the run `<name>_<round>`. `${round}` in its overrides, and in whatever these refer to, is
    the number of the round, from 1 on, and `${previous}` that of the one before.
    """
    register_rounds()
    found = {name: flat(own) for name, own in as_dict(cfg.steps).items()}
    for number in range(1, cfg.rounds + 1):
        cfg.round, cfg.previous = number, number - 1
        found |= {f"{name}_{number}": flat(own) for name, own in as_dict(cfg.each_round).items()}
    return found


def start(cfg: DictConfig) -> None:
    """Run the steps of a config."""
    if cfg.note:
        print(cfg.note, flush=True)
    try:
        run_pipeline(
            steps=all_steps(cfg),
            project=cfg.project,
            runs_dir=cfg.runs_dir,
            program=list(cfg.program or launch_command(cfg.accelerate, cfg.launch)),
            overrides=list(cfg.overrides),
            overwrite=cfg.overwrite,
            config_dirs=config_dirs(),
        )
    except ConfigError as error:  # here, because Hydra would print the overrides in front of it
        exit_with(f"Error: {error}", 2)


def run_pipeline(
    steps: dict[str, list[str]],
    project: str,
    runs_dir: str,
    program: list[str],
    overrides: list[str],
    overwrite: bool,
    config_dirs: list[str],
) -> None:
    """
    Run the steps that are not done yet, then print the results.

    Args:
        steps (`dict[str, list[str]]`):
            Name and overrides of each step, in order. A step's run directory is `<runs_dir>/<project>/<name>`.
        project (`str`), runs_dir (`str`):
            Where the runs are: in `<runs_dir>/<project>`.
        program (`list[str]`):
            Command to which the overrides are appended.
        overrides (`list[str]`):
            Overrides for every step, after its own.
        overwrite (`bool`):
            Whether to run finished steps again that were run with other overrides.
        config_dirs (`list[str]`):
            `--config-dir` and its value, or nothing.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a finished step doesn't fit these steps, or still runs.
        SystemExit: if a step failed or was stopped.
    """
    project_dir = Path(runs_dir, project)
    where = [f"project={project}", *([] if runs_dir == "runs" else [f"runs_dir={runs_dir}"])]
    wanted = {
        name: [*own, *where, *([] if f"stage={name}" in own else [f"run_name={name}"]), *overrides]
        for name, own in steps.items()
    }
    states = _states(project_dir, wanted)
    changed = [name for name, state in states.items() if state == "changed"]
    if changed and not overwrite:
        raise ConfigError(_refusal(project_dir, changed[0], wanted[changed[0]]))
    if changed:
        names = list(states)
        states.update(dict.fromkeys(names[names.index(changed[0]) :], "changed"))
    for number, (name, state) in enumerate(states.items(), 1):
        title = f"[{number}/{len(steps)}] {name}"
        if state == "done":
            print(f"{title}: done, skipped", flush=True)
            continue
        command = [*program, *config_dirs, *wanted[name], *START_OVERRIDES.get(state, ["overwrite=true"])]
        print(f"{title}: {shell_line(command)}", flush=True)
        try:
            code = run(command)
        except (KeyboardInterrupt, Preempted) as stop:
            preempted = isinstance(stop, Preempted)
            how = "Preempted" if preempted else "Stopped"
            print(f"\n{how} at the step `{name}`. The same command resumes it.", file=sys.stderr)
            sys.exit(PREEMPTED_STATUS if preempted else STOPPED)
        if code == STOPPED:  # it has said what is left, such as labels that people are to give
            print(f"\nThe step `{name}` stopped before its end. The same command resumes it.", file=sys.stderr)
            sys.exit(STOPPED)
        if code != 0 or not is_done(project_dir / name):
            status = f"failed (exit status {code})" if code else "ended without being done"
            print(
                f"\nThe step `{name}` {status}; its own message stands above. When that is fixed, the same command "
                "resumes with this step.",
                file=sys.stderr,
            )
            sys.exit(code if code > 0 else 1)
    page = project_dir / "report" / "index.html"
    if not page.exists() or page.stat().st_mtime < max(
        path.stat().st_mtime for path in project_dir.glob(f"*/{RUN_FILE}")
    ):
        write_report(project_dir)  # no evaluation has written it since
    print("\n" + result(project_dir, list(steps)))
    policies = [name for name in steps if kind_of(project_dir / name) == "policy"]
    if policies:
        real = any(other_model(project_dir / name) for name in policies)
        words = [*(["model=hf"] if real else []), f"stage.policies=[{','.join(policies)}]", *where]
        print(f"next: chat  {command_line('stage=chat', *words)}")
    if all(state == "done" for state in states.values()):
        print("\n" + _ways_out(project, project_dir))


def _states(project_dir: Path, wanted: dict[str, list[str]]) -> dict[str, str]:
    """Return the state of each step. One that was run before an earlier one was run again counts as `changed` too."""
    states, earlier = {}, ""
    for name, overrides in wanted.items():
        record = read_run(project_dir / name)
        states[name] = state_of(project_dir / name, overrides)
        if record and states[name] in ("done", "resumable") and (record.started or "") < earlier:
            states[name] = "changed"
        if record and record.status == "done":
            earlier = max(earlier, record.ended or "")
    return states


def _refusal(project_dir: Path, name: str, wanted: list[str]) -> str:
    record = read_run(project_dir / name)
    made, now = overrides_of(record.command if record else ""), sorted(wanted)
    why = f"was made with `{' '.join(made)}`, and is now `{' '.join(now)}`"
    if made == now:
        why = "was made before a step that it comes after was made again"
    return (
        f"The step `{name}` in `{project_dir / name}` {why}. Give this pipeline another `project=`, or make this step "
        "and all after it again with `overwrite=true`."
    )


def _ways_out(project: str, project_dir: Path) -> str:
    again = f"remove `{project_dir}`"
    if project == "demo" and Path("Makefile").exists():
        again = "`make demo-clean`"
    another = command_line("project=another", app="pipeline")
    return (
        f"All steps of the project `{project}` were done already, nothing was run. To run them again: {again}; to "
        f"keep them and make others beside them: `{another}`."
    )


def result(project_dir: Path, steps: list[str]) -> str:
    """Return the table of the steps and, where policies were compared, the comparisons below it."""
    rows = [_row(project_dir / name, name) for name in steps]
    parts = [table(["step", "time", "metric", "start", "end"], rows)]
    compared = [comparison for name in steps if (comparison := read_comparison(project_dir / name))]
    parts += [printable(comparison_text(comparison)) for comparison in compared]
    return "\n\n".join([*parts, f"Report: {project_dir / 'report' / 'index.html'}\nRuns: {project_dir}"])


def _row(run_dir: Path, name: str) -> list[str]:
    measured = results_of(run_dir)
    ends = ["" if value is None else f"{value:.3f}" for value in (measured.start, measured.end)]
    return [name, duration(measured.seconds), measured.objective or "", *ends]
