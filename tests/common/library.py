"""transformers' own test files as the package `transformers_tests`.

Those at the top of its `tests` come from the source distribution of the installed version; those of generation,
exporters and pipelines, which it lacks, from the repository's tag of that version or from another checkout.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers
from PIL import Image

SOURCE_VARIABLE = "TRANSFORMERS_SOURCE"
CACHE = Path(__file__).parents[2] / ".cache"
REPOSITORY = "https://github.com/huggingface/transformers"
IN_REPOSITORY = ("exporters", "fixtures/tests_samples", "generation", "models/qwen2_5_vl", "pipelines", "utils")
HOW = f"run `make common-tests` once, which downloads transformers' tests; {SOURCE_VARIABLE} names a checkout of it"


def distribution_folder() -> Path:
    """Where the sources of the installed transformers are, or would be."""
    return CACHE / f"transformers-{transformers.__version__}"


def repository_folder() -> Path:
    """Where the repository's files are, or would be; `TRANSFORMERS_SOURCE` names a checkout, of any version."""
    return Path(os.environ.get(SOURCE_VARIABLE) or CACHE / f"transformers-v{transformers.__version__}").absolute()


def is_available() -> bool:
    """Whether the test files are there, and what they import beyond transformers' and this project's own needs."""
    folders = distribution_folder() / "tests", repository_folder() / "tests" / "generation"
    return all(map(Path.is_dir, folders)) and importlib.util.find_spec("parameterized") is not None


def download() -> None:
    """Put the files that are not there yet where they belong: pip downloads the distribution, git the repository's."""
    CACHE.mkdir(exist_ok=True)
    version = transformers.__version__
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        if not distribution_folder().is_dir():
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers"]
            subprocess.run([*pip, f"transformers=={version}", "--dest", folder], check=True)
            (archive,) = Path(folder).glob("*.tar.gz")
            with tarfile.open(archive) as files:
                members = [member for member in files.getmembers() if Path(member.name).parts[1:2] == ("tests",)]
                files.extractall(folder, members, filter="data")
            Path(folder, distribution_folder().name).rename(distribution_folder())
        if not repository_folder().is_dir():
            checkout = Path(folder) / "checkout"
            clone = ["git", "clone", "--depth", "1", "--filter=blob:none", "--sparse", "--branch", f"v{version}"]
            subprocess.run([*clone, REPOSITORY, checkout], check=True)
            folders = [f"tests/{name}" for name in IN_REPOSITORY] + ["utils"]
            subprocess.run(["git", "-C", checkout, "sparse-checkout", "set", *folders], check=True)
            checkout.rename(repository_folder())


def sources() -> dict[str, list[str]]:
    """The test files that were imported, by where they come from and its version."""
    places = {f"distribution {transformers.__version__}": distribution_folder()}
    places[f"repository {_repository_version()}"] = repository_folder()
    files = {Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    return {
        name: sorted(str(file.relative_to(folder)) for file in files if file.is_relative_to(folder / "tests"))
        for name, folder in places.items()
    }


def _repository_version() -> str:
    """The version in `setup.py` and the commit, where they are there."""
    folder = repository_folder()
    setup = folder / "setup.py"
    version = re.search(r'version="([^"]+)"', setup.read_text(encoding="utf-8")) if setup.exists() else None
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return f"{version[1] if version else 'of an unknown version'}, commit {commit or 'unknown'}"


def local_picture(url: str) -> str:
    """A picture on this machine instead of the one at `url`, which the tests would download."""
    path = Path(tempfile.gettempdir()) / f"common-tests-{Path(url).stem}.png"
    if not path.exists():
        Image.effect_noise((96, 64), 80).convert("RGB").save(path)
    return str(path)


def import_library(name: str) -> ModuleType:
    """The test file `name`, e.g. `"test_modeling_common"`."""
    if "transformers_tests" not in sys.modules:
        repository = repository_folder() / "tests"
        _package("transformers_tests", distribution_folder() / "tests", repository)
        for folder in ("exporters", "pipelines"):  # which the library's tests also name from their root
            _package(f"tests.{folder}", repository / folder)
        _package("utils", repository_folder() / "utils")
        for pictures in ("fetch_hub_objects_for_ci", "utils.fetch_hub_objects_for_ci"):
            sys.modules[pictures] = ModuleType(pictures)
            sys.modules[pictures].url_to_local_path = local_picture
        transformers.utils.direct_transformers_import = lambda path: transformers  # the installed one
    return importlib.import_module(f"transformers_tests.{name}")


def _package(name: str, *folders: Path) -> None:
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations.extend(map(str, folders))
    sys.modules[name] = importlib.util.module_from_spec(spec)
