"""Names of a package that are imported when they are first asked for."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, module_of: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        package: its `__name__`.
        module_of: module of each public name.
    """

    def getattribute(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package} has no attribute {name}")
        return getattr(import_module(f".{module_of[name]}", package), name)

    return getattribute
