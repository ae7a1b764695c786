"""What is imported when it is first asked for: names of this package, and packages that may be lacking."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def needing_extra(extra: str, what: str) -> Iterator[None]:
    """While this runs, errors of a package that is lacking say how `what` gets it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{what} needs a package that is not installed ({error}): pip install 'transformers-nextflow[{extra}]'"
        ) from error
