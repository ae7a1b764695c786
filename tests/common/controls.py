"""Which of transformers' own classes skip what NextFlow's skip: `python -m tests.common.controls`.

What `results.json` says is skipped, other than pipelines, is run on the nearest classes of the library
(`library_models.py`), and `controls.json` written: the skipped tests with the classes that skip them too, and why. A
class that fails a test does not skip it. What no class skips must be listed as an impossibility, which
`tests/test_common.py` asserts.
"""

import argparse
import importlib.util
import json
from pathlib import Path

from tests.common.library import download
from tests.common.run import RESULTS, run

CONTROLS = Path(__file__).with_name("controls.json")
# Without torchvision the library's processors would skip what is about it, and about video.
PACKAGES = ("accelerate", "parameterized", "peft", "torchvision")
NEAREST = {
    "NextFlowModelTest": ("Qwen2_5_VLModelTest", "JanusModelTest", "Emu3ModelTest"),
    "NextFlowVQModelTest": ("JanusVQVAETest", "Siglip2VisionModelTest"),
    "NextFlowProcessorTest": ("Qwen2_5_VLProcessorTest", "JanusProcessorTest", "Emu3ProcessorTest"),
    "NextFlowImageProcessingTest": (
        "Qwen2_5_VLImageProcessingTest",
        "JanusImageProcessingTest",
        "Emu3ImageProcessingTest",
        "Siglip2ImageProcessingTest",
    ),
}
# Tests that no class of the library skips, and why NextFlow's cannot run them.
IMPOSSIBLE = {
    "NextFlowImageProcessingTest::test_new_models_require_torchvision_backend": (
        "a rule for new models inside the library, to resize with torchvision too; here Pillow resizes every picture, "
        "and torchvision is no dependency"
    ),
}


def skipped(results: dict) -> dict[str, str]:
    """`"class::test"` of each skipped test, and its reason."""
    return {name: reason for reason, names in results["reasons"].items() for name in names}


def compare() -> dict:
    """Run what NextFlow's classes skip on the nearest of the library's."""
    counterparts = {}
    for name in sorted(skipped(json.loads(RESULTS.read_text()))):
        ours, test = name.split("::")
        if ours not in NEAREST:
            continue
        counterparts[name] = [f"{theirs}::{test}" for theirs in NEAREST[ours]]
    results = run(f"library_models.py::{name}" for names in counterparts.values() for name in names)
    reasons = skipped(results)
    groups: dict[tuple, list[str]] = {}
    for name, others in counterparts.items():
        classes = tuple((other.split("::")[0], reasons[other]) for other in others if other in reasons)
        groups.setdefault(classes, []).append(name)
    return {key: results[key] for key in ("transformers", "device", "packages")} | {
        "skipped_by": [{"classes": dict(classes), "tests": names} for classes, names in groups.items()]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        parser.error(f"the controls also need the packages {', '.join(missing)}")
    download()
    CONTROLS.write_text(json.dumps(compare(), indent=1) + "\n")


if __name__ == "__main__":
    main()
