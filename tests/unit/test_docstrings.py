"""The register of the docstrings; what ruff's D rules don't know."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["rlhf_trl", "tests", "bench"])
def test_no_docstring_begins_with_what_how_or_of(folder):
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [
        f"{file.relative_to(ROOT)}: {text.splitlines()[0]}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, documented) and (text := ast.get_docstring(node)) and re.match(r"(What|How|Of)\b", text)
    ]
    assert not found, "\n".join(found)
