"""transformers' own test files, found in its source distribution, as the package `transformers_tests`."""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import transformers
from PIL import Image

SOURCE_VARIABLE = "TRANSFORMERS_SOURCE"
CACHE = Path(__file__).parents[2] / ".cache"
HOW = "run `make common-tests` once: it downloads the source distribution of transformers, whose tests these are"

# The distribution holds the files of `tests/`, not of its folders; these names of those are imported.
STAND_INS = {
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}
# Never run: sequences are laid out by their ids' values, which an exported graph cannot follow.
EXPORT = {name: type(name, (), {}) for name in ("ExportTesterMixin", "ExportGenerateTesterMixin")}


def source_folder() -> Path:
    """Where the sources of the installed transformers are, or would be; `TRANSFORMERS_SOURCE` names another place."""
    return Path(os.environ.get(SOURCE_VARIABLE) or CACHE / f"transformers-{transformers.__version__}")


def is_available() -> bool:
    """Whether the test files are there, and what they import beyond transformers' and this project's own needs."""
    return (source_folder() / "tests").is_dir() and importlib.util.find_spec("parameterized") is not None


def local_picture(url: str) -> str:
    """A picture on this machine instead of the one at `url`, which the processors' tests would download."""
    path = Path(tempfile.gettempdir()) / f"common-tests-{Path(url).stem}.png"
    if not path.exists():
        Image.effect_noise((96, 64), 80).convert("RGB").save(path)
    return str(path)


def import_library(name: str) -> ModuleType:
    """The test file `name`, e.g. `"test_modeling_common"`."""
    if "transformers_tests" not in sys.modules:
        spec = importlib.machinery.ModuleSpec("transformers_tests", None, is_package=True)
        spec.submodule_search_locations.append(str(source_folder() / "tests"))
        sys.modules["transformers_tests"] = importlib.util.module_from_spec(spec)
        for absent, names in STAND_INS.items():
            if not (source_folder() / "tests" / f"{absent.replace('.', '/')}.py").exists():
                _stand_in(f"transformers_tests.{absent}", names)
        for root in ("transformers_tests", "tests"):
            _stand_in(f"{root}.exporters.test_export", EXPORT)
        _stand_in("fetch_hub_objects_for_ci", {"url_to_local_path": local_picture})
    return importlib.import_module(f"transformers_tests.{name}")


def _stand_in(name: str, names: dict) -> None:
    parent, _, _ = name.rpartition(".")
    if parent and parent not in sys.modules:
        sys.modules[parent] = ModuleType(parent)
        sys.modules[parent].__path__ = []
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(names)
