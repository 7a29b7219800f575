"""The architecture: which folder may import from which, and how large files and folders may be."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

PACKAGE = Path(importlib.util.find_spec("rlhf_trl").origin).parent
# From the lowest to the highest: each imports only from those before it
LAYERS = (
    *("errors", "hints", "config", "patches", "runs", "terminal", "data", "models", "health", "report", "rewards"),
    *("trainers", "reward_modeling", "ppo", "callbacks", "evaluation", "labels", "build", "checks", "stages", "cli"),
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> str:
    return module.removeprefix("rlhf_trl.").split(".")[0]


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path) -> list[str]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    own = [node for node in nodes if node.level or (node.module or "").split(".")[0] == "rlhf_trl"]
    return [
        f"{node.module}.{alias.name}" if is_module(f"{node.module}.{alias.name}") else node.module
        for node in own
        for alias in node.names
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_layers_below_its_own(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    found = {layer(name) for name in imports(path)} - {own, "rlhf_trl"}  # whose `__init__` has the version
    if own == "tasks":  # examples, outside the layers
        assert "tasks" not in found
    else:
        assert found <= set(LAYERS[: LAYERS.index(own)] if own in LAYERS else ()), path


def test_no_two_modules_import_each_other():
    names = {".".join(["rlhf_trl", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in MODULES}
    graph = {name.removesuffix(".__init__"): imports(path) for name, path in names.items()}

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            todo += [name for name in graph.get(todo.pop(), ()) if name not in seen and not seen.add(name)]
        return seen

    assert [name for name in graph if name in reached(name)] == []


def test_files_are_short_and_folders_hold_few_loose_ones():
    assert {path.name for path in PACKAGE.glob("*.py")} <= {*(f"{name}.py" for name in LAYERS), "__init__.py"}
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    long = [str(path.relative_to(PACKAGE)) for path in MODULES if len(path.read_text().splitlines()) > 500]
    assert long == []
    assert len((PACKAGE / "ppo" / "trainer.py").read_text().splitlines()) < 450


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.name == "__init__.py"], ids=lambda path: path.parent.name
)
def test_a_folder_says_in_one_sentence_what_it_is_and_only_hands_on_names(path):
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree)
    assert docstring and docstring.count("\n") == 0 and docstring.endswith(".")
    assert not [node for node in tree.body if isinstance(node, ast.ClassDef)]


def test_no_test_module_imports_another():
    tests = Path(__file__).parents[1]
    found = [
        f"{path.relative_to(tests)}: {node.module}"
        for path in sorted(tests.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1].startswith("test_")
    ]
    assert found == []


def test_unit_tests_mirror_the_package():
    units = Path(__file__).parent
    folders = {path.parent.relative_to(units).parts[0] for path in units.glob("*/**/test_*.py")}
    assert folders <= {path.name for path in PACKAGE.iterdir() if path.is_dir()}


def test_an_ignored_type_error_names_its_rule_and_its_reason():
    ignored = re.compile(r"#\s*(?:pyright|type): ignore(?P<rule>\[\w+\])?(?P<reason>.*)")
    without = []
    for path in MODULES:
        lines = path.read_text().splitlines()
        for above, line in zip(["", *lines], lines, strict=False):
            if found := ignored.search(line):
                reason = found["reason"].strip(" #") or above.strip().startswith("#")
                if not (found["rule"] and reason):
                    without.append(f"{path.relative_to(PACKAGE)}: {line.strip()}")
    assert not without
