"""Keys of a config that nothing reads, found in the signatures of its targets and the syntax trees of our modules."""

import ast
import functools
import importlib.util
import inspect
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_object

from rlhf_trl.config.values import nodes

PACKAGE = Path(importlib.util.find_spec("rlhf_trl").origin).parent
# Checking a key, or showing it in a plan, isn't reading it
NO_READERS = ("rlhf_trl.checks", "rlhf_trl.config", "rlhf_trl.cli.dry_run", "rlhf_trl.cli.overrides")
# Nodes whose keys are names of the user's choice, or that are read as a whole and checked then
NAMES = ("callbacks", "reward", "steps", "each_round", "stage.policies", "stage.columns", "published")
# Where the options of a function with `**options` are parameters
PASSED_ON = dict.fromkeys(("rlhf_trl.data.load_files", "rlhf_trl.data.load_hub"), "rlhf_trl.data.LoadOptions")


def unread_keys(values: dict[str, Any], read: Collection[str], interpolated: Collection[str]) -> list[str]:
    """
    Return the keys of a composed config that nothing reads, and those beside a `_target_` that it doesn't take.

    Args:
        values (`dict`): the config as nested dicts, interpolations unresolved.
        read (`Collection[str]`): keys that the code reads. Of `stage.*` only those count that this stage reads.
        interpolated (`Collection[str]`): keys that are read by an interpolation.
    """
    stage = values.get("stage", {}).get("run", {}).get("_target_")
    read = {key for key in read if not key.startswith("stage.")} | set(interpolated)
    read |= reads_below("rlhf_trl.cli.main", stage) if stage else set()
    parents = {key: key.rpartition(".")[0] for key in plain_keys(values)}
    plain = [key for key, parent in parents.items() if not {key, f"{parent}.*"} & read and parent not in NAMES]
    return plain + [
        f"{path}.{key}"
        for path, node, target in _called(values)
        for key in node
        if not key.startswith("_") and key not in parameters(target)
    ]


def _called(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield path and keys of each node that becomes arguments, and the dot path of what takes them."""
    for path, node in nodes(values):
        if "_target_" in node:
            yield path, node, node["_target_"]
        if isinstance(node.get("function"), str) and "kwargs" in node:
            yield f"{path}.kwargs", node["kwargs"], node["function"]


def interpolations(values: dict[str, Any]) -> set[str]:
    """Return the keys that are read by an interpolation; `table.*` for `${table.${row}}`, which may read any row."""
    texts = [text for _, node in nodes(values) for value in node.values() for text in _texts(value)]
    tables = {f"{source}.*" for text in texts for source in re.findall(r"\$\{([\w.]+)\.\$\{", text)}
    return tables | {source for text in texts for source in re.findall(r"\$\{([\w.]+)\}", text)}


def plain_keys(values: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield the innermost keys that aren't arguments of a `_target_`; a node with one is such a key itself."""
    for key, value in values.items():
        inner = f"{path}.{key}".removeprefix(".")
        if isinstance(value, dict) and value and "_target_" not in value and path != "published":
            yield from plain_keys(value, inner)
        else:
            yield inner


@functools.cache
def parameters(target: str) -> set[str]:
    """Return the names of the arguments that a target takes."""
    names = {*inspect.signature(get_object(target)).parameters}
    if "path" in names:
        names.add("run")  # the name of an earlier run, replaced by its path
    if target.startswith("rlhf_trl.rewards."):
        names.add("when")  # of the reward around it
    return names | (parameters(PASSED_ON[target]) if target in PASSED_ON else set())


def reads_below(*dot_paths: str) -> set[str]:
    """Return the keys that the modules in dot paths, and all of ours that they import, read from a `cfg`."""
    seen: set[str] = set()
    todo = [_module(path) for path in dot_paths]
    while todo:
        module = todo.pop()
        if module not in seen and not module.startswith(NO_READERS):
            seen.add(module)
            todo += _imports(module)
    return set().union(*map(_reads, seen))


@functools.cache
def _reads(module: str) -> set[str]:
    visitor = _Reads()
    visitor.visit(ast.parse(_file(module).read_text(encoding="utf-8")))
    return visitor.found


class _Reads(ast.NodeVisitor):
    """Visitor of `cfg.stage.args.seed`, `cfg.get("critic")`, `stage = cfg.stage` and `stage[name]` in a function."""

    def __init__(self):
        self.found: set[str] = set()
        self.names = {"cfg": "", "values": "", "stage": "stage"}
        self.texts: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self.names, self.texts
        texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        self.names, self.texts = dict(self.names), texts
        self.generic_visit(node)
        self.names, self.texts = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        target, value = node.targets[0], node.value
        both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        for name, source in zip(target.elts, value.elts, strict=True) if both else [(target, value)]:
            if isinstance(name, ast.Name) and (path := self.path(source)) is not None:
                self.names[name.id] = path
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        path = self.path(node.comparators[0])
        if path is not None and isinstance(node.left, ast.Constant) and isinstance(node.ops[0], ast.In | ast.NotIn):
            self.found.add(f"{path}.{node.left.value}".removeprefix("."))
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if (path := self.path(node.value)) is not None and not isinstance(node.slice, ast.Constant):
            self.found |= {f"{path}.{name}" for name in self.texts if name.isidentifier()}
        self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        if path := self.path(node):
            self.found.add(path)
        super().generic_visit(node)

    def path(self, node: ast.AST) -> str | None:
        """Return the dotted path of what an expression reads from the config."""
        match node:
            case ast.Name():
                return self.names.get(node.id)
            case ast.Attribute(value=inner, attr=name):
                pass
            case ast.Subscript(value=inner, slice=ast.Constant(value=str(name))):
                pass
            case ast.Call(func=ast.Attribute(value=inner, attr="get"), args=[ast.Constant(value=str(name)), *_]):
                pass
            case _:
                return None
        outer = self.path(inner)
        return None if outer is None else f"{outer}.{name}".removeprefix(".")


def _texts(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _module(name: str) -> str:
    """Return the module in a dot path."""
    while not _file(name).is_file():
        name = name.rpartition(".")[0]
    return name


@functools.cache
def _imports(module: str) -> set[str]:
    found = [
        node
        for node in ast.walk(ast.parse(_file(module).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    ]
    return {
        _module(f"{node.module}.{alias.name}")
        for node in found
        if (node.module or "").split(".")[0] == "rlhf_trl"
        for alias in node.names
    }
