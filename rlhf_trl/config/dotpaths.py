"""
Dot paths such as `trl.DPOConfig` or `my_rewards.brevity`: whether they exist, and the object they name.

[`problem`] looks without importing: modules are found as files and their names read from the syntax tree. Names that
are made at run time count as present; [`find`], which imports, reports them later.
"""

import ast
import contextlib
import functools
import importlib.machinery
import importlib.util
import inspect
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import hydra.utils
from hydra.errors import InstantiationException

from rlhf_trl.errors import ConfigError, user_location
from rlhf_trl.hints import did_you_mean, nearest


def problem(path: str) -> str | None:
    """Return the problem of a dot path that doesn't exist (a sentence or two), `None` where it may exist."""
    head, *rest = path.split(".")
    if not head.isidentifier() or not rest:
        return f"`{path}` is no dot path. Write it as `module.name`, without `.py` and slashes."
    try:
        spec = importlib.util.find_spec(head)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return (
            f"There is no module `{head}` for `{path}`. Install it, or start in the folder that holds `{head}.py` "
            "(or put that folder on PYTHONPATH)."
        )
    module, names = _follow(spec, rest)
    if module is None:
        return None
    if not names:
        return f"`{path}` is a module. Name the function or class in it."
    try:
        known = _names(module)
    except SyntaxError as error:
        return f"`{path}` can't be imported: {syntax_problem(error)}. Fix that line."
    except (OSError, ValueError) as error:
        return f"`{path}` can't be imported: `{module}` can't be read as UTF-8 text ({error})."
    if known is None or names[0] in known:
        return None
    below = {p.stem for p in module.parent.iterdir()} if module.name == "__init__.py" else set()
    dotted = ".".join([head, *rest[: len(rest) - len(names)]])
    public = {name for name in known | below if not name.startswith("_")}
    return f"`{dotted}` has no `{names[0]}`. {did_you_mean(names[0], public)}".rstrip()


def find(path: str) -> functools.partial:
    """
    Import the object at a dot path, as a partial without arguments, by Hydra's rules for a `_target_`: functions that
    run any code or delete files (`os.system`, `shutil.rmtree`) are refused under any name.

    Raises:
        ConfigError: if it can't be imported, isn't callable or is refused.
    """
    try:
        with contextlib.chdir(os.curdir):  # importing a module may change the working directory
            return hydra.utils.instantiate({"_target_": path, "_partial_": True})
    except SystemExit as error:
        raise ConfigError(f"`{path}` can't be imported: its module ends the program (`sys.exit()`).") from error
    except InstantiationException as error:
        if error.__cause__ is None:  # not callable, or refused
            said = " ".join(str(error).split())
            raise ConfigError(f"`{path}` can't be used: {said.rstrip('.')}. Name a function of yours.") from error
        cause = error.__cause__
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, SyntaxError):
            raise ConfigError(f"`{path}` can't be imported: {syntax_problem(cause)}. Fix that line.") from error
        where = f" ({place})" if (place := user_location(cause)) else ""
        raise ConfigError(f"`{path}` can't be imported: {type(cause).__name__}: {cause}{where}.") from error


def syntax_problem(error: SyntaxError) -> str:
    """Return file, line and reason."""
    return f"`{error.filename}`, line {error.lineno}: {error.msg}"


def signature(function: Callable) -> list[inspect.Parameter]:
    """
    Return the parameters of a callable.

    Raises:
        ConfigError: for one without a signature, such as some written in C.
    """
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The arguments of {function!r} aren't known: {error}. Name a Python function.") from error


def not_taken(function: Callable, names: Collection[str], strict: bool = False, given: Collection[str] = ()) -> dict:
    """
    Return the argument `names` that a callable doesn't take, each with a suggestion.

    Args:
        strict (`bool`): whether a callable with `**kwargs` is not to take names that look like one in its signature:
            a reward function has `**kwargs` for the data's columns, and would silently use a default.
        given (`Collection[str]`): arguments that are passed anyway, and so are no suggestion.
    """
    parameters = signature(function)
    own = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - set(given)
    unknown = [name for name in names if name not in own]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        unknown = [name for name in unknown if strict and nearest(name, own - set(names))]
    return {name: did_you_mean(name, own) or "Remove it." for name in unknown}


def _follow(spec: importlib.machinery.ModuleSpec, rest: list[str]) -> tuple[Path | None, list[str]]:
    """Return the source file of the innermost module on the path, `None` if it has no source, and the names left."""
    module = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    for i, name in enumerate(rest):
        package = next((f / name for f in folders if (f / name / "__init__.py").is_file()), None)
        source = next((f / f"{name}.py" for f in folders if (f / f"{name}.py").is_file()), None)
        if package is not None:
            module, folders = package / "__init__.py", [package]
        elif source is not None:
            return source, rest[i + 1 :]
        elif any(any(f.glob(f"{name}.*{suffix}")) for f in folders for suffix in (".so", ".pyd")):
            return None, []
        else:
            return module, rest[i:]
    return module, []


def _names(module: Path) -> set[str] | None:
    """Return the names that a module defines at its top level, `None` where some are made at run time."""
    names: set[str] = set()
    for node in _top_level(ast.parse(module.read_text(encoding="utf-8"), filename=str(module)).body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            if "sys.modules[__name__]" in ast.unparse(node):
                names.add("*")  # a lazy module
            names.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    lazy = "__getattr__" in names and "__all__" not in names  # PEP 562; with `__all__` its names are known
    return None if "*" in names or lazy else names


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module's top level, including those inside `if`, `try` and `with`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            blocks = [getattr(node, field, []) for field in ("body", "orelse", "finalbody")]
            blocks += [handler.body for handler in getattr(node, "handlers", [])]
            yield from _top_level([statement for block in blocks for statement in block])
