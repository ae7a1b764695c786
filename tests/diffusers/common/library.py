"""diffusers' own pytest mixins, found in a checkout of its repository, as the package `diffusers_tests`."""

import importlib
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import diffusers

SOURCE_VARIABLE = "DIFFUSERS_SOURCE"
CACHE = Path(__file__).parents[3] / ".cache"
REPOSITORY = "https://github.com/huggingface/diffusers"
HOW = "run `make diffusers-tests` once: it clones diffusers' repository, whose tests these are"


def source_folder() -> Path:
    """Where a checkout of the installed diffusers is, or would be; `DIFFUSERS_SOURCE` names another place."""
    return Path(os.environ.get(SOURCE_VARIABLE) or CACHE / f"diffusers-{diffusers.__version__}")


def is_available() -> bool:
    return (source_folder() / "tests" / "pipelines" / "testing_utils").is_dir()


def source_version() -> dict[str, str]:
    """Version and commit of the checkout, which may be another's than the installed diffusers."""
    text = (source_folder() / "src" / "diffusers" / "__init__.py").read_text()
    command = ["git", "-C", str(source_folder()), "rev-parse", "HEAD"]
    commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return {"version": re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)[1], "commit": commit}


def import_library(name: str) -> ModuleType:
    """A module of the checkout's tests, e.g. `"pipelines.testing_utils"`."""
    if "diffusers_tests" not in sys.modules:
        spec = importlib.machinery.ModuleSpec("diffusers_tests", None, is_package=True)
        spec.submodule_search_locations.append(str(source_folder() / "tests"))
        sys.modules["diffusers_tests"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"diffusers_tests.{name}")
