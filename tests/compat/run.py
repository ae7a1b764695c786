"""Runs tests of the public behaviour at the ends of the supported ranges: `python -m tests.compat.run`.

Each end is an environment of its own: one package at that version in front of those that are installed. The outcome
goes into `results.json`, and as a table into `docs/compatibility.md`; ends that were not run keep what is recorded.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from transformers_nextflow.utils.files import write_atomically

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
TABLE = ROOT / "docs" / "compatibility.md"
ENVIRONMENTS = ROOT / ".venv-compat"

ENDS = {
    "transformers": ("5.23.0", "5.24.0"),
    "diffusers": ("0.41.0", "0.42.1"),
    "trl": ("1.16.0",),
    "peft": ("0.21.0", "0.21.2"),
    "accelerate": ("1.14.0", "1.15.0"),
}
TESTS = {
    "transformers": ("generation", "modeling", "processing", "saved_code", "private_names", "serve"),
    "diffusers": ("private_names", "diffusers/test_nextflow_pipeline", "diffusers/test_decoders"),
    "trl": ("trl", "grpo/test_grpo_trainer"),
    "peft": ("lora",),
    "accelerate": ("plain_trainer",),
}

HEAD = """# Versions

The ends of each supported range, and what the tests of the public behaviour said there; written by `make compat`,
which sets one package at a time to the version named and leaves the others as in `constraints.txt`.

| package | version | passed | skipped | failed |
| --- | --- | --- | --- | --- |
"""


def install(package: str, version: str) -> Path:
    """A folder that holds this version, and of what it needs that alone which is installed at another version."""
    folder = ENVIRONMENTS / f"{package}-{version}"
    if not folder.exists():
        _add(folder, f"{package}=={version}")
    if needs := unmet(package, folder):
        _add(folder, *needs)
    return folder


def _add(folder: Path, *requirements: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, *requirements], check=True)


def unmet(package: str, folder: Path) -> list[str]:
    """What the package in a folder needs, and neither the folder nor the environment has."""
    here = {canonicalize_name(each.name): each for each in importlib.metadata.distributions(path=[str(folder)])}
    found = []
    for requirement in map(Requirement, here[package].requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            name = canonicalize_name(requirement.name)
            version = here[name].version if name in here else importlib.metadata.version(name)
            if not requirement.specifier.contains(version, prereleases=True):
                found.append(f"{requirement.name}{requirement.specifier}")
    return found


def run(package: str, version: str) -> dict:
    """The outcome of the package's tests: counts, and the names of what failed."""
    folder = install(package, version)
    report = folder / "report.xml"
    files = [f"tests/{name if '/' in name else f'test_{name}'}.py" for name in TESTS[package]]
    paths = os.pathsep.join([str(folder), "src", ".", os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths})
    suite = ElementTree.parse(report).find("testsuite")
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    total, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    return {
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "files": files,
        "passed": total - skipped - len(failed),
        "skipped": skipped,
        "failed": sorted(failed),
    }


def table(results: dict) -> str:
    rows = []
    for package, versions in results.items():
        for version, outcome in versions.items():
            cells = "not run | | |"
            if outcome is not None:
                cells = f"{outcome['passed']} | {outcome['skipped']} | {len(outcome['failed'])} |"
            rows.append(f"| {package} | {version} | {cells}\n")
    return HEAD + "".join(rows)


def write(results: dict) -> None:
    write_atomically(RESULTS, lambda partial: partial.write_text(json.dumps(results, indent=1) + "\n"))
    write_atomically(TABLE, lambda partial: partial.write_text(table(results)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ends", nargs="*", default=list(ENDS), help="packages, or one of their ends (default: all)")
    chosen = parser.parse_args().ends
    ends = [(name, version) for name in ENDS for version in ENDS[name] if {name, f"{name}=={version}"} & set(chosen)]
    if unknown := set(chosen) - {each for name, version in ends for each in (name, f"{name}=={version}")}:
        parser.error(f"no end of a range: {', '.join(sorted(unknown))}")
    recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = {name: {end: recorded.get(name, {}).get(end) for end in versions} for name, versions in ENDS.items()}
    for name, version in ends:
        results[name][version] = run(name, version)
        write(results)
    return any(results[name][version]["failed"] for name, version in ends)


if __name__ == "__main__":
    sys.exit(main())
