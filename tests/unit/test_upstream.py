"""
The table of private and undocumented upstream names: complete, and true of the installed versions.

Where a new version of a library moved something, the first test lists it. Look at what uses it, then change
tests/helpers/upstream.json and type `python -m tests.helpers.upstream`.
"""

import tomllib

from tests.helpers import upstream
from tests.helpers.upstream import NOT_UPSTREAM, PACKAGE, PAGE, UPSTREAM


def rows() -> set[tuple[str, str]]:
    return {(holder, name) for holder, names in UPSTREAM.items() for name in names}


def test_installed_versions_have_what_the_table_says():
    moved = []
    for holder, name in rows():
        try:
            found = upstream.signature(upstream.find(holder), name)
        except (AttributeError, ModuleNotFoundError):
            found = None
        if found != UPSTREAM[holder][name]:
            moved.append(
                f"{holder}.{name}: {UPSTREAM[holder][name]} in the table, {found or 'gone'} in what is installed"
            )
    assert not moved, "\n".join(sorted(moved))


def test_the_table_has_all_that_the_package_uses_and_nothing_else():
    inherited, reached = upstream.inherited().keys() | upstream.imported().keys(), upstream.reached()
    names = {name for _, name in rows()}
    missing = sorted(inherited - rows()) + [
        (sorted(files), name) for name, files in reached.items() if name not in names
    ]
    assert not missing, "Add to tests/helpers/upstream.json, or use a documented name."
    assert not {(holder, name) for holder, name in rows() - inherited if name not in reached}


def test_the_page_of_the_documentation_is_the_table():
    assert PAGE.read_text() == upstream.page(), "Type `python -m tests.helpers.upstream`."


def test_ruff_allows_the_private_names_of_the_table_only():
    config = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    allowed = set(config["tool"]["ruff"]["lint"]["flake8-self"]["ignore-names"]) - NOT_UPSTREAM
    assert allowed == upstream.reached().keys()


def test_a_name_that_moved_is_told():
    assert upstream.signature(upstream.find("trl.GRPOTrainer"), "_calculate_reward") is None
    assert upstream.signature(upstream.find("trl.GRPOTrainer"), "_metrics") == "attribute"
    assert upstream.signature(upstream.find("trl.trainer.utils"), "get_callable_name") == "(func)"
