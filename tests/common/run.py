"""Runs transformers' own common tests on NextFlow's classes: `python -m tests.common.run`.

The tests are downloaded once, see `library.py`. Their outcome is compared with `results.json`; `--record`, or the
first run, writes that file instead.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import transformers

from tests.common.library import download, is_available, sources

RESULTS = Path(__file__).with_name("results.json")
PIPELINES = Path(__file__).with_name("pipelines.json")
FILES = ("modeling.py", "processing.py", "pipelines.py")
FILES_OF_PIPELINES = ("pipelines.py", "../test_pipelines.py")
PACKAGES = ("accelerate", "peft", "torchvision")  # tests that need one skip without it


class Recorder:
    """A pytest plugin: the outcome of each test, and the reason where it was skipped."""

    def __init__(self):
        self.passed, self.failed, self.skipped = set(), set(), {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::", 1)[-1]
        if report.failed:
            self.failed.add(name)
        elif report.skipped:
            self.skipped[name] = report.longrepr[-1].removeprefix("Skipped: ")
        elif report.when == "call":
            self.passed.add(name)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)

    def results(self) -> dict:
        reasons: dict[str, list[str]] = {}
        for name, reason in sorted(self.skipped.items()):
            reasons.setdefault(reason, []).append(name)
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "sources": sources(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "packages": [name for name in PACKAGES if importlib.util.find_spec(name)],
            "passed": len(self.passed - self.failed - set(self.skipped)),
            "failed": sorted(self.failed),
            "skipped": len(self.skipped),
            "reasons": dict(sorted(reasons.items())),
        }


def run(tests: Iterable[str], *options: str) -> dict:
    """Run files of this folder, or single `"file::class::test"`s, and return their counts, failures and skips."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    recorder = Recorder()
    tests = [str(Path(__file__).parent / name) for name in tests]
    # the library's own marks are not declared here
    quiet = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
    pytest.main([*quiet, *tests, *options], plugins=[recorder])
    return recorder.results()


def differences(results: dict, record: Path) -> list[str]:
    """What is otherwise than recorded. Skips depend on device and packages and are compared only where those agree."""
    found = [f"failed: {name}" for name in results["failed"]]
    recorded = json.loads(record.read_text())
    if all(results[key] == recorded[key] for key in ("transformers", "sources", "device", "packages")):
        found += [
            f"{key}: {results[key]}, recorded {recorded[key]}"
            for key in ("passed", "skipped", "reasons")
            if results[key] != recorded[key]
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the outcome")
    parser.add_argument("--pipelines", action="store_true", help="pipelines alone, with torchvision (pipelines.json)")
    options, arguments = parser.parse_known_args()
    download()
    if not is_available():
        parser.error("the tests need the package parameterized")
    if options.pipelines and importlib.util.find_spec("torchvision") is None:
        parser.error("the pipelines need the package torchvision")
    files, record = (FILES_OF_PIPELINES, PIPELINES) if options.pipelines else (FILES, RESULTS)
    results = run(files, *arguments)
    if options.record or not record.exists():
        record.write_text(json.dumps(results, indent=1) + "\n")
        return bool(results["failed"])
    found = differences(results, record)
    print(*found, f"{results['passed']} passed, {results['skipped']} skipped", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
