"""Runs diffusers' own pipeline, memory and LoRA tests on the decoders: `python -m tests.diffusers.common.run`.

The tests are those of a checkout of diffusers (`DIFFUSERS_SOURCE`, or cloned once into `.cache`), and run
on each family's decoder and on the stock pipeline that it extends. Nothing may fail, and what a decoder skips must be
skipped by the stock pipeline too, or be one of `IMPOSSIBLE`. `--record` writes `results.json`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from tests.common.controls import skipped
from tests.common.run import Recorder
from tests.diffusers.common.library import CACHE, REPOSITORY, is_available, source_folder, source_version

RESULTS = Path(__file__).with_name("results.json")
# Tests that the stock pipelines pass and no decoder can, by the test's name.
IMPOSSIBLE = {
    "test_save_load_optional_components": "a decoder without its conditioner decodes nothing",
}


def download() -> None:
    """Clone the repository at the installed version."""
    CACHE.mkdir(exist_ok=True)
    command = ["git", "clone", "--depth", "1", "--branch", f"v{diffusers.__version__}", REPOSITORY]
    subprocess.run([*command, str(source_folder())], check=True)


def run(*options: str) -> dict:
    """Counts, failures and skips of the decoders and of the stock pipelines, and whose tests these are."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    recorder = Recorder()
    quiet = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
    pytest.main([*quiet, str(Path(__file__).with_name("pipelines.py")), *options], plugins=[recorder])
    versions = {"diffusers": diffusers.__version__, "tests": source_version()}
    return versions | recorder.results() | {"pipelines": by_pipeline(recorder)}


def by_pipeline(recorder: Recorder) -> dict[str, dict[str, int]]:
    """Counts of each pipeline by the names of its test classes, `TestOursFlux`, `TestStockFlux`, ..."""
    counts: dict[str, dict[str, int]] = {}
    for kind in ("passed", "failed", "skipped"):
        for name in sorted(getattr(recorder, kind)):
            pipeline = re.match(r"Test(Ours|Stock)[A-Z][a-z]+", name)[0]
            counts.setdefault(pipeline, dict.fromkeys(("passed", "failed", "skipped"), 0))[kind] += 1
    return counts


def faults(results: dict) -> list[str]:
    """Failures, and skips that neither the stock pipelines nor `IMPOSSIBLE` account for."""
    reasons = skipped(results)
    unaccounted = [
        f"skipped: {name}: {reason}"
        for name, reason in reasons.items()
        if name.startswith("TestOurs")
        and name.replace("TestOurs", "TestStock") not in reasons
        and name.split("::")[-1] not in IMPOSSIBLE
    ]
    return [f"failed: {name}" for name in results["failed"]] + unaccounted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write results.json")
    options, arguments = parser.parse_known_args()
    if not is_available():
        download()
    results = run(*arguments)
    found = faults(results)
    if options.record:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(*found, f"{results['passed']} passed, {results['skipped']} skipped", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
