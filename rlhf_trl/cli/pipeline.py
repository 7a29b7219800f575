"""
The steps of a pipeline, run one after another, each in a process of its own, and a table of the results.

    python launch/pipeline.py                         # the embedded demo
    python launch/pipeline.py pipeline=reviews/tiny   # a file of conf/pipeline
    python launch/pipeline.py project=mine            # the same steps once more, beside the first
    python launch/pipeline.py pipeline=iterated rounds=3    # steps that repeat

    python launch/pipeline.py pipeline=nightly rounds=next  # one round more, every night

Finished steps are skipped, so the same command resumes an earlier pipeline, also in the middle of a round.
"""

import re
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

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
from rlhf_trl.cli.promotion import note_promotions, promotions
from rlhf_trl.cli.rounds import (
    EarlyStopping,
    all_steps,
    early_stopping,
    flat,
    note_rounds,
    register_rounds,
    round_problems,
    rounds_at_a_time,
    rounds_to_run,
    steps_of_a_round,
    stopping_problems,
)
from rlhf_trl.cli.step_checks import awaited, place_of, problems_of_steps, words_of_steps
from rlhf_trl.config.command_line import config_dirs
from rlhf_trl.config.program import command_line
from rlhf_trl.config.values import plain
from rlhf_trl.errors import PREEMPTED_STATUS, ConfigError, Preempted
from rlhf_trl.hints import names_of
from rlhf_trl.report.project import write_report
from rlhf_trl.report.text import comparison_text, duration, table
from rlhf_trl.runs.directory import name_problems
from rlhf_trl.runs.paths import kind_of, other_model
from rlhf_trl.runs.record import PROMOTIONS_FILE, ROUNDS_FILE, RUN_FILE, is_done, read_comparison, read_run
from rlhf_trl.runs.results import Promotions
from rlhf_trl.terminal import printable

# Overrides with which a step only plans
DRY = ("debug=dry_run", "debug=plan", "dry_run=true")
# States of a step that was made otherwise
REFUSED = ("changed", "lengthened")
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
    if wrong := round_problems(cfg):
        return wrong
    values, found = plain(cfg)
    steps = values["steps"]
    if not isinstance(steps, dict):
        return [f"`steps` is {steps!r} and must hold names of steps, each with a list of overrides."]
    repeated = values["each_round"]
    found += stopping_problems(values["early_stopping"], repeated)
    if values["keep"] and values["overwrite"]:
        found.append("`keep=true` keeps changed steps and `overwrite=true` runs them again. Set only one of them.")
    if twice := [name for name in steps if (match := re.fullmatch(r"(.+)_[1-9]\d*", name)) and match[1] in repeated]:
        return [
            *found,
            f"`steps.{twice[0]}` and a step of `each_round` would be one run. Give one of them another name.",
        ]
    steps |= {f"each_round.{name}": flat(own) for name, own in repeated.items()}
    lists = {"launch": values["launch"], "overrides": values["overrides"], "program": values["program"] or []}
    found = (found or name_problems(values)) + machine_problems(values["accelerate"], values["launch"])
    found += [
        f"`{name}` is {given!r} and must be a list of overrides. Set for example `'{name}=[\"seed=1\"]'`."
        for name, given in (lists | {_key(name): flat(given) for name, given in steps.items()}).items()
        if given is not None
        if not isinstance(given, list) or not all(isinstance(word, str) for word in given)
    ]
    return found or problems_of_steps(cfg, args)


def _key(step: str) -> str:
    return step if step.startswith("each_round.") else f"steps.{step}"


def start(cfg: DictConfig) -> None:
    """Run the steps of a config."""
    try:
        cfg.rounds = rounds_to_run(cfg.rounds, steps_of_a_round(cfg), Path(cfg.runs_dir, cfg.project))
        plans = any(word in DRY for word in cfg.overrides)  # what a round promotes isn't known
        for last in rounds_at_a_time(cfg)[: 1 if plans else None]:
            cfg.rounds = last
            steps, stopping = all_steps(cfg), early_stopping(cfg)
            if cfg.note:
                print(cfg.note, flush=True)
            run_pipeline(
                steps=steps,
                project=cfg.project,
                runs_dir=cfg.runs_dir,
                program=list(cfg.program or launch_command(cfg.accelerate, cfg.launch)),
                overrides=list(cfg.overrides),
                changed="overwrite" if cfg.overwrite else "keep" if cfg.keep else "refuse",
                config_dirs=config_dirs(),
                stopping=stopping,
                promoted=partial(promotions, cfg, last),
            )
    except ConfigError as error:  # here, because Hydra would print the overrides in front of it
        exit_with(f"Error: {error}", 2)


def run_pipeline(
    steps: dict[str, list[str]],
    project: str,
    runs_dir: str,
    program: list[str],
    overrides: list[str],
    changed: str,
    config_dirs: list[str],
    stopping: EarlyStopping | None = None,
    promoted: Callable[[], Promotions | None] = lambda: None,
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
        changed (`str`):
            What becomes of steps that were run with other overrides: `refuse` them, `keep` them as they are, or
            `overwrite` them and the steps after them.
        config_dirs (`list[str]`):
            `--config-dir` and its value, or nothing.
        stopping ([`~rlhf_trl.cli.rounds.EarlyStopping`], *optional*):
            Early stopping of the rounds.
        promoted (`Callable`):
            Returns which policies the rounds that are done promoted.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a finished step doesn't fit these steps, or still runs.
        SystemExit: if a step failed or was stopped.
    """
    project_dir = Path(runs_dir, project)
    where = place_of(project, runs_dir)
    wanted = words_of_steps(steps, where, overrides)
    states = _states(project_dir, wanted, keep=changed == "keep")
    begun = {name: number for number, name in enumerate(states)}
    first = next((name for name, state in states.items() if state in REFUSED), None)
    if first and changed == "refuse":
        raise ConfigError(_refusal(project_dir, first, wanted[first], goes_on=states[first] == "lengthened"))
    if first:
        states.update({name: "changed" for name in begun if begun[name] > begun[first]})
    if any(word in DRY for word in overrides):
        return plan_steps(wanted, states, program, config_dirs)
    rounds, ran = None, []
    for number, (name, state) in enumerate(states.items(), 1):
        title = f"[{number}/{len(steps)}] {name}"
        ran.append(name)
        if state == "done":
            print(f"{title}: done, skipped", flush=True)
        else:
            command = _command(program, config_dirs, wanted[name], state)
            print(f"{title}: {shell_line(command)}", flush=True)
            _run_step(command, name, project_dir / name)
        rounds = (stopping.after(name, project_dir) if stopping else None) or rounds
        if rounds and rounds.stopped is not None:
            break
    note_rounds(rounds, project_dir)
    note_promotions(found := promoted(), project_dir)
    for each in (rounds, found.rounds[-1] if found and found.rounds else None):
        if each:
            print("\n" + each.in_words)
    page = project_dir / "report" / "index.html"
    files = [*project_dir.glob(f"*/{RUN_FILE}"), *project_dir.glob(ROUNDS_FILE), *project_dir.glob(PROMOTIONS_FILE)]
    if not page.exists() or page.stat().st_mtime < max(path.stat().st_mtime for path in files):
        write_report(project_dir)  # no evaluation has written it since
    print("\n" + result(project_dir, ran))
    policies = [name for name in ran if kind_of(project_dir / name) == "policy"]
    if policies:
        real = any(other_model(project_dir / name) for name in policies)
        words = [*(["model=hf"] if real else []), f"stage.policies=[{','.join(policies)}]", *where]
        print(f"next: chat  {command_line('stage=chat', *words)}")
    if all(states[name] == "done" for name in ran):
        print("\n" + _ways_out(project, project_dir))


def _command(program: list[str], config_dirs: list[str], words: list[str], state: str) -> list[str]:
    return [*program, *config_dirs, *words, *START_OVERRIDES.get(state, ["overwrite=true"])]


def plan_steps(
    wanted: dict[str, list[str]], states: dict[str, str], program: list[str], config_dirs: list[str]
) -> None:
    """
    Run the dry run of each step that isn't done and reads nothing that an earlier one has yet to make, and say of the
    others what they wait for.

    Raises:
        SystemExit: if a dry run finds a problem.
    """
    GlobalHydra.instance().clear()  # the steps are composed here, and Hydra has one config at a time
    planned, waiting, earlier = 0, 0, []
    for number, (name, words) in enumerate(wanted.items(), 1):
        title = f"[{number}/{len(wanted)}] {name}"
        if states[name] == "done":
            print(f"{title}: done, skipped", flush=True)
        elif missing := awaited(words, config_dirs[1::2], earlier):
            waiting += 1
            print(f"{title}: not planned, as it reads what {names_of(missing)} will make", flush=True)
        else:
            planned += 1
            command = _command(program, config_dirs, words, states[name])
            print(f"{title}: {shell_line(command)}", flush=True)
            if code := run(command):
                print(f"\nThe dry run of the step `{name}` failed; its own message stands above.", file=sys.stderr)
                sys.exit(max(code, 1))
        earlier.append(name)
    left = f"; {waiting} can't be before earlier ones are done, and of these the configs alone were checked"
    print(f"\nDry run of the pipeline: {planned} of {len(wanted)} steps planned{left if waiting else ''}.")


def _run_step(command: list[str], name: str, run_dir: Path) -> None:
    """Run a step to its end, or end the pipeline with it."""
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
    if code == 0 and not is_done(run_dir):
        print(
            f"\nThe step `{name}` ended without being done, as a dry run does, and the next ones need what it makes. "
            "Without `debug=dry_run` the same command resumes with this step.",
            file=sys.stderr,
        )
        sys.exit(1)
    if code != 0:
        print(
            f"\nThe step `{name}` failed (exit status {code}); its own message stands above. When that is fixed, the "
            "same command resumes with this step.",
            file=sys.stderr,
        )
        sys.exit(max(code, 1))


def _states(project_dir: Path, wanted: dict[str, list[str]], keep: bool) -> dict[str, str]:
    """
    Return the state of each step. One that was run before an earlier one was run again counts as `changed` too; with
    `keep` none does.
    """
    states, earlier = {}, ""
    for name, overrides in wanted.items():
        record = read_run(project_dir / name)
        states[name] = state_of(project_dir / name, overrides)
        if record and states[name] in ("done", "resumable") and (record.started or "") < earlier:
            states[name] = "changed"
        if record and record.status == "done":
            earlier = max(earlier, record.ended or "")
        if keep and record and states[name] in REFUSED:
            states[name] = "done" if record.status == "done" else "resumable"
    return states


def _refusal(project_dir: Path, name: str, wanted: list[str], goes_on: bool) -> str:
    record = read_run(project_dir / name)
    made, now = overrides_of(record.command if record else ""), sorted(wanted)
    before, after = ([word for word in one if word not in other] for one, other in ((made, now), (now, made)))
    why = f"was made with {_words(before)}, and is now to be made with {_words(after)}"
    if made == now:
        why = "was made before a step that it comes after was made again"
    again = (
        "continue this labeling, and make all after it again" if goes_on else "make this step and all after it again"
    )
    return (
        f"The step `{name}` in `{project_dir / name}` {why}. Give this pipeline another `project=`; keep what is done "
        f"as it is, so that the change begins with what isn't: `keep=true`; or {again}: `overwrite=true`."
    )


def _words(words: list[str]) -> str:
    return f"`{' '.join(words)}`" if words else "less"


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
