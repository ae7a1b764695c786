"""Runs diffusers' own pipeline, memory and LoRA tests on the decoders: `python -m tests.diffusers.common.run`.

The tests are those of a checkout of diffusers (`DIFFUSERS_SOURCE`, or cloned once into `.cache`), and run on each
family's decoder; what it skips or fails, on the stock pipeline that it extends too. Nothing may fail, and what a
decoder skips must be skipped by the stock pipeline, or be one of `IMPOSSIBLE`. `--record` writes `results.json`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from tests.common.controls import skipped
from tests.common.run import Recorder
from tests.diffusers.common.library import CACHE, REPOSITORY, is_available, source_folder, source_version
from tests.diffusers.tiny_decoders import FAMILIES

RESULTS = Path(__file__).with_name("results.json")
PIPELINES = str(Path(__file__).with_name("pipelines.py"))
# Tests that the stock pipelines pass and no decoder can, by the test's name.
IMPOSSIBLE = {
    "test_save_load_optional_components": "a decoder without its conditioner decodes nothing",
}


def download() -> None:
    """Clone the repository at the installed version."""
    CACHE.mkdir(exist_ok=True)
    command = ["git", "clone", "--depth", "1", "--branch", f"v{diffusers.__version__}", REPOSITORY]
    subprocess.run([*command, str(source_folder())], check=True)


def run(family: str, *options: str) -> dict:
    """Counts, failures and skips of a family's decoder, what of these the stock pipeline skips or fails too, and whose
    tests they are."""
    decoder = outcomes([PIPELINES, "-k", f"TestOurs{family.title()}", *options])
    others = [name.replace("TestOurs", "TestStock") for name in sorted([*decoder.failed, *decoder.skipped])]
    stock = outcomes([f"{PIPELINES}::{name}" for name in others]) if others else Recorder()
    versions = {"diffusers": diffusers.__version__, "tests": source_version()}
    stock = {"skipped": sorted(stock.skipped), "failed": sorted(stock.failed), "passed": sorted(stock.passed)}
    return versions | decoder.results() | {"stock": stock}


def outcomes(arguments: list[str]) -> Recorder:
    os.environ["HF_HUB_OFFLINE"] = "1"
    recorder = Recorder()
    quiet = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
    pytest.main([*quiet, *arguments], plugins=[recorder])
    return recorder


def faults(results: dict) -> list[str]:
    """Failures, and skips that neither the stock pipeline nor `IMPOSSIBLE` accounts for."""
    unaccounted = [
        f"skipped: {name}: {reason}"
        for name, reason in skipped(results).items()
        if name.replace("TestOurs", "TestStock") not in results["stock"]["skipped"]
        and name.split("::")[-1] not in IMPOSSIBLE
    ]
    return [f"failed: {name}" for name in results["failed"]] + unaccounted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--record", action="store_true", help="write them into results.json")
    options, arguments = parser.parse_known_args()
    if unknown := sorted(set(options.families) - set(FAMILIES)):
        parser.error(f"families are {', '.join(FAMILIES)}, got {', '.join(unknown)}")
    if not is_available():
        download()
    found = []
    for family in options.families or FAMILIES:
        results = run(family, *arguments)
        found += faults(results)
        print(*faults(results), f"{family}: {results['passed']} passed, {results['skipped']} skipped", sep="\n")
        if options.record:
            recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            recorded[family] = results
            RESULTS.write_text(
                json.dumps({name: recorded[name] for name in FAMILIES if name in recorded}, indent=1) + "\n"
            )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
