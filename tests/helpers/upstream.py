"""
Private and undocumented names of the libraries that the package uses: the table, what uses them, and docs/upstream.md.

`python -m tests.helpers.upstream` writes the page. Whoever uses another private name adds a row; whoever raises the
version of a library goes through the rows that `tests/unit/test_upstream.py` names.
"""

import ast
import functools
import importlib
import inspect
import json
import pkgutil
import textwrap
from collections import defaultdict
from enum import Enum
from pathlib import Path
from types import ModuleType

import rlhf_trl

PACKAGE = Path(rlhf_trl.__file__).parent
PAGE = PACKAGE.parent / "docs" / "upstream.md"
LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "hydra", "peft", "torch", "tqdm", "transformers", "trl")
# Names in strings that are Hydra's, and methods of named tuples
NOT_UPSTREAM = {"_target_", "_partial_", "_convert_", "_self_", "_extends_", "_asdict", "_replace", "_exit"}
# Set on each class by the metaclass of `torch.autograd.Function`
NOT_UPSTREAM |= {"_backward_cls"}
# Keys of the files of Prodigy
NOT_UPSTREAM |= {"_annotator_id", "_session_id", "_timestamp"}
# Libraries and modules whose documentation imports from modules
DOCUMENTED = (
    *("torch", "tqdm", "huggingface_hub", "accelerate.utils", "hydra.core.hydra_config"),
    *("hydra.errors", "hydra.experimental", "hydra.types", "hydra.utils"),
)
ATTRIBUTE = "attribute"

HEAD = """# What rlhf_trl uses of the libraries besides their documented interfaces

Private and undocumented names of TRL, transformers, PEFT and others: what our trainers override or read, what is
imported from inner modules, and what `rlhf_trl/patches` and others reach into. A new version of a library may move any
of them: `tests/unit/test_upstream.py` compares this table with the installed versions, and fails with the list of what
moved. It also fails where the package uses a name that is not here.

This page is written by `python -m tests.helpers.upstream` from the table, tests/helpers/upstream.json.
"""

TABLE = Path(__file__).with_name("upstream.json")
# {object: {name: parameters, or `attribute`}}
UPSTREAM: dict[str, dict[str, str]] = json.loads(TABLE.read_text())


# ---- What there is upstream ----


def find(path: str) -> object:
    """Import the object at a dot path."""
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[i:], found)
    raise ModuleNotFoundError(path)


def signature(holder: object, name: str) -> str | None:
    """Return the parameters of a function or class, `attribute` for what has none, `None` where it doesn't exist."""
    if isinstance(holder, type) and name not in vars(holder) and not hasattr(holder, name):
        known = any(name in assigned(kind) for kind in holder.__mro__ if root(kind) in LIBRARIES)
        return ATTRIBUTE if known else None
    value = getattr(holder, name, None)
    if not callable(value) or (isinstance(value, type) and issubclass(value, Enum)):
        return ATTRIBUTE if hasattr(holder, name) else None
    try:
        found = inspect.signature(value)
    except ValueError:  # of a built-in type, such as an exception
        return ATTRIBUTE
    plain = [
        parameter.replace(
            annotation=inspect.Parameter.empty,
            default=... if inspect.isfunction(parameter.default) else parameter.default,
        )
        for parameter in found.parameters.values()
    ]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))


@functools.cache
def assigned(kind: type) -> frozenset[str]:
    """Return the names that a class assigns to `self`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):
        return frozenset()
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value)
    )


def root(thing: type) -> str:
    return thing.__module__.partition(".")[0]


# ---- What the package uses ----


def is_self(node: ast.expr) -> bool:
    """Return whether an expression is the object of a method itself: `self`, `cls`, or `super()`."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def called(node: ast.Call) -> str | None:
    """Return the name of the function that is called."""
    return getattr(node.func, "id", None) or getattr(node.func, "attr", None)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NOT_UPSTREAM


@functools.cache
def modules() -> list[ModuleType]:
    found = [module.name for module in pkgutil.walk_packages(rlhf_trl.__path__, "rlhf_trl.")]
    return [importlib.import_module(name) for name in found if not name.endswith("__main__")]


def used_names(kind: type) -> set[str]:
    """Return the names that a class of the package defines, or uses of `self`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    uses = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    return uses | set(vars(kind))


@functools.cache
def inherited() -> dict[tuple[str, str], set[str]]:
    """
    Return the upstream names that our subclasses override or use.

    Those are private names, and of trainers all that is overridden and all that TRL's classes define, whose attributes
    are not documented.

    Returns:
        `dict`: `{(class, name): files}`, the class the one that defines the name.
    """
    from transformers import Trainer

    found = defaultdict(set)
    for module in modules():
        for kind in vars(module).values():
            if not (isinstance(kind, type) and kind.__module__ == module.__name__):
                continue
            upstream = [base for base in kind.__mro__ if root(base) in LIBRARIES]
            for own in (base for base in kind.__mro__ if root(base) == "rlhf_trl"):
                for name in used_names(own):
                    definer = next((base for base in upstream if name in vars(base) or name in assigned(base)), None)
                    of_trainer = issubclass(kind, Trainer) and not name.startswith("__")
                    if definer is not None and (
                        is_private(name) or (of_trainer and (name in vars(own) or root(definer) == "trl"))
                    ):
                        found[public_path(definer), name].add(file_of(own))
    return dict(found)


def public_path(kind: type) -> str:
    """Return the shortest dot path of a class: that of its library's own namespace, where it has one."""
    if getattr(find(root(kind)), kind.__name__, None) is kind:
        return f"{root(kind)}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def file_of(kind: type) -> str:
    return str(Path(inspect.getsourcefile(kind)).relative_to(PACKAGE))


@functools.cache
def imported() -> dict[tuple[str, str], set[str]]:
    """Return what the package imports from modules of the libraries: `{(module, name): files}`."""
    found = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level or node.module.split(".")[0] not in LIBRARIES:
                continue
            for alias in node.names:
                if is_private(alias.name) or not is_exported(node.module, alias.name):
                    found[node.module, alias.name].add(str(path.relative_to(PACKAGE)))
    return dict(found)


def is_exported(module: str, name: str) -> bool:
    """Return whether a name can be imported from the top of its library or a documented module, or is a module."""
    if any(f"{module}.".startswith(f"{documented}.") for documented in DOCUMENTED):
        return True
    value = find(f"{module}.{name}")
    return isinstance(value, ModuleType) or getattr(find(module.partition(".")[0]), name, None) is value


@functools.cache
def reached() -> dict[str, set[str]]:
    """
    Return the private names that the package reads or sets on other objects, or names in strings: `{name: files}`.

    Names that the package defines are left to [`inherited`], unless the table has them.
    """
    found, own = defaultdict(set), set()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                if is_self(node.value):
                    own |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
                else:
                    found[node.attr].add(str(path.relative_to(PACKAGE)))
            elif isinstance(node, ast.Call) and called(node) in ("getattr", "hasattr", "setattr", "get", "pop"):
                for each in node.args:
                    if isinstance(each, ast.Constant) and isinstance(each.value, str):
                        found[each.value].add(str(path.relative_to(PACKAGE)))
    own -= {name for names in UPSTREAM.values() for name in names}
    return {name: files for name, files in found.items() if is_private(name) and name not in own}


def page() -> str:
    """Return docs/upstream.md."""
    files = defaultdict(set)
    for (holder, name), found in (inherited() | imported()).items():
        files[holder, name] |= found
    for name, found in reached().items():
        for holder in (holder for holder, names in UPSTREAM.items() if name in names):
            files[holder, name] |= found
    lines = [HEAD]
    for holder, names in UPSTREAM.items():
        lines += [f"## `{holder}`", "", "| name | signature | used in |", "|---|---|---|"]
        for name, parameters in names.items():
            lines.append(
                f"| `{name}` | `{parameters}` | {', '.join(f'`{file}`' for file in sorted(files[holder, name]))} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
