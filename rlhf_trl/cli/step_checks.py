"""Checks of all steps of a pipeline before the first one runs: a typo in the last one costs no training."""

import re
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from rlhf_trl.checks.problems import find_problems, step_problems
from rlhf_trl.cli.overrides import compose
from rlhf_trl.cli.rounds import all_steps, rounds_to_run, steps_of_a_round
from rlhf_trl.runs.paths import conf_dir
from rlhf_trl.runs.record import is_done

# Programs that read the overrides of a step as `train.py` does
OURS = ("train.py", "rlhf-trl", "rlhf_trl.cli", "rlhf_trl.cli.main")
# A round after the second has the overrides of that one, with other numbers
ROUNDS_CHECKED = 2


def place_of(project: str, runs_dir: str) -> list[str]:
    """Return the overrides that say where the runs of a pipeline are."""
    return [f"project={project}", *([] if runs_dir == "runs" else [f"runs_dir={runs_dir}"])]


def words_of_steps(
    steps: Mapping[str, list[str]], where: Sequence[str], overrides: Sequence[str]
) -> dict[str, list[str]]:
    """Return all overrides of each step: its own, where it is, its name, and those that every step gets."""
    return {
        name: [*own, *where, *([] if f"stage={name}" in own else [f"run_name={name}"]), *overrides]
        for name, own in steps.items()
    }


def problems_of_steps(cfg: DictConfig, args: Namespace) -> list[str]:
    """
    Return the problems of the configs of the steps that are not done, without those that need what earlier steps make.
    Steps of a program of the user's own are not checked.
    """
    if cfg.program and not any(Path(word).name in OURS for word in cfg.program):
        return []
    for folder in (Path.cwd(), conf_dir().parent):  # where the modules of the user's functions may be, as for a step
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    project_dir = Path(cfg.runs_dir, cfg.project)
    cfg.rounds = rounds_to_run(cfg.rounds, steps_of_a_round(cfg), project_dir)
    found: dict[str, str] = {}
    earlier: list[str] = []
    checked: dict[str, int] = {}
    steps = words_of_steps(all_steps(cfg), place_of(cfg.project, cfg.runs_dir), list(cfg.overrides))
    for name, words in steps.items():
        match = re.fullmatch(r"(.+)_(\d+)", name)
        key, number = f"steps.{name}", 0
        if match and match[1] in cfg.each_round:
            key, number = f"each_round.{match[1]}", int(match[2])
        if (cfg.overwrite or not is_done(project_dir / name)) and checked.get(key, 0) < ROUNDS_CHECKED:
            checked[key] = checked.get(key, 0) + 1
            composed, problems = compose(words, args.config_dirs)
            if composed is not None and not problems:
                problems = step_problems(composed, earlier)
            place = f"`{key}`" + (f" in round {number}" if number else "")
            for problem in problems:
                found.setdefault(problem, f"{place}: {problem}")
        earlier.append(name)
    return list(found.values())


def awaited(words: Sequence[str], config_dirs: Sequence[str], earlier: Sequence[str]) -> list[str]:
    """Return the runs, of those named `earlier`, without which a step can't be planned: it reads what they make."""
    composed, problems = compose(words, config_dirs)
    if composed is None or problems:
        return []
    missing = " ".join(find_problems(composed))
    return [name for name in earlier if re.search(rf"[`/]{re.escape(name)}[`/]", missing)]
