"""
Whether a dot path such as `trl.DPOConfig` or `my_rewards.brevity` leads to something, without importing anything.

Modules are found as files and their names read from the syntax tree. What can't be decided so (names made at run time)
counts as present; the import itself tells later.
"""

import ast
import importlib.machinery
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from rlhf_trl.hints import did_you_mean


def problem(path: str) -> str | None:
    """Why nothing is to be found at `path` (a sentence or two), or `None` where something may be."""
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
    known = _names(module)
    if known is None or names[0] in known:
        return None
    below = {p.stem for p in module.parent.iterdir()} if module.name == "__init__.py" else set()
    dotted = ".".join([head, *rest[: len(rest) - len(names)]])
    public = {name for name in known | below if not name.startswith("_")}
    return f"`{dotted}` has no `{names[0]}`. {did_you_mean(names[0], public)}".rstrip()


def _follow(spec: importlib.machinery.ModuleSpec, rest: list[str]) -> tuple[Path | None, list[str]]:
    """The source file of the innermost module along the path (`None`: not readable as source) and the names left."""
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
    """The names a module defines at its top level; `None` where some are made at run time."""
    names: set[str] = set()
    for node in _top_level(ast.parse(module.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            if "sys.modules[__name__]" in ast.unparse(node):
                names.add("*")  # a lazy module
            names.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return None if {"*", "__getattr__"} & names else names


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module's top level, those inside `if`, `try` and `with` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            blocks = [getattr(node, field, []) for field in ("body", "orelse", "finalbody")]
            blocks += [handler.body for handler in getattr(node, "handlers", [])]
            yield from _top_level([statement for block in blocks for statement in block])
