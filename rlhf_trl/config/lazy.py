"""Packages whose modules are imported on first use (PEP 562). Imports nothing heavy."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_attributes(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """
    Return the `__getattr__` of a package that hands on names of its modules without importing them before.

    The checks read such a package's `options` before torch is imported.

    Args:
        package (`str`): the package's `__name__`.
        modules (`Mapping[str, str]`): module, within the package, of each name.
    """

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return find
