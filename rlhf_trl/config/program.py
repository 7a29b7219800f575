"""
The program as the user started it, for the commands that messages quote: `python train.py`, `rlhf-trl`, `accelerate
launch --config_file zero3.yaml train.py`. Imports nothing heavy.
"""

import functools
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Literal

import psutil

from rlhf_trl.config.command_line import unquote_text
from rlhf_trl.errors import PACKAGE, short_path

App = Literal["train", "pipeline", "sweep"]
# Script of a clone and console script of an installed package, of each app
APPS: dict[App, tuple[str, str]] = {
    "train": ("train.py", "rlhf-trl"),
    "pipeline": ("launch/pipeline.py", "rlhf-trl-pipeline"),
    "sweep": ("launch/sweep.py", "rlhf-trl-sweep"),
}
MODULE = "rlhf_trl.cli"  # `python -m rlhf_trl.cli`
# How accelerate is started where its script may not be on PATH; quiet, so that an error of ours is printed last
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
# What launchers set: accelerate the first one, even for a single rank
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "RANK")


def command_line(*overrides: str, app: App = "train", launched: bool = True) -> str:
    """
    Return a command for a message: the program in the form in which the user started this process, its `--config-dir`,
    and overrides.

    Args:
        *overrides (`str`): such as `stage=sft` and `project=mine`, unquoted.
        app (`str`): `train`, `pipeline` or `sweep`.
        launched (`bool`): `False` for a stage that one process runs, such as `chat`: without the launcher.
    """
    return shlex.join([*program(app, launched), *typed_config_dir(), *overrides])


def is_launched() -> bool:
    """Return whether a launcher started this process, which may be the only rank."""
    return any(name in os.environ for name in LAUNCHED)


def program(app: App = "train", launched: bool = True) -> list[str]:
    """Return the words that start an app, see [`command_line`]: as they were typed, where it is the same app."""
    started, (script, console_script) = _started(), APPS[app]
    if app == "train" and launched and is_launched():
        in_clone = started != MODULE and (PACKAGE.parent / script).is_file()
        return _launcher() or ["accelerate", "launch", *([_script(script)] if in_clone else ["-m", MODULE])]
    if Path(started).name == Path(script).name:
        return [_python(), started]
    if started == MODULE and app == "train" and not is_launched():
        return [_python(), "-m", MODULE]
    if started.endswith(".py") or (not started and (PACKAGE.parent / script).is_file()):
        return [_python(), _script(script)]
    return [_console_script(console_script)]


def _started() -> str:
    """
    Return the script that this process runs, as it was typed, or `MODULE`. Empty where it is none of ours, such as in
    a notebook.
    """
    path = Path(sys.argv[0]) if sys.argv else Path()
    if path.name == "__main__.py" and path.parent == PACKAGE / "cli":
        return MODULE
    ours = {Path(name).name for names in APPS.values() for name in names}
    return sys.argv[0] if path.name in ours else ""


def _script(name: str) -> str:
    return short_path(PACKAGE.parent / name)


def _python() -> str:
    """Return the interpreter as it was typed or, where a launcher or another program started it, as PATH has it."""
    if _started() and not is_launched():
        return sys.orig_argv[0]
    found = shutil.which("python")
    same = found and os.path.realpath(found) == os.path.realpath(sys.executable)
    return "python" if same else short_path(sys.executable)


def _console_script(name: str) -> str:
    """Return a console script: its name where PATH has the one of this environment, else its path."""
    own, found = Path(sys.executable).with_name(name), shutil.which(name)
    return name if (found and Path(found) == own) or not own.is_file() else short_path(own)


@functools.cache  # a launcher may end before its ranks do
def _launcher() -> list[str]:
    """Return the command line of the launcher that started this process, without our arguments; empty if unknown."""
    try:
        parent = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []
    given = sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1 :]
    words = parent[: len(parent) - len(given)]
    if len(words) < 3 or parent[len(words) :] != given:
        return []
    if words[: len(ACCELERATE)] == ACCELERATE:
        return ["accelerate", "launch", *words[len(ACCELERATE) :]]
    script = Path(words[1]).name
    if script in ("accelerate", "accelerate-launch", "torchrun"):
        return [script, *words[2:]]
    if words[1:3] in (["-m", "accelerate.commands.launch"], ["-m", "torch.distributed.run"]):
        return [short_path(words[0]), *words[1:]]
    return []


def typed_overrides() -> list[str]:
    """Return the overrides of the command line, as typed; none where this process isn't one of our programs."""
    words = unquote_text(sys.argv[1:]) if _started() else []
    return [word for word in words if word[:1] not in ("-", "~") and "=" in word]


def typed_config_dir() -> list[str]:
    """Return the `--config-dir` of the command line and its folder, as typed, or nothing."""
    words = sys.argv[1:] if _started() else []
    for i, word in enumerate(words):
        name, sign, folder = word.partition("=")
        if name in ("--config-dir", "-cd") and (sign or i + 1 < len(words)):
            return ["--config-dir", folder if sign else words[i + 1]]
    return []
