"""Which small faults the tests notice: `make mutants SEED=1`.

cosmic-ray plants one fault at a time in a copy of the repository: a changed operator, number or condition, a missing
decorator, a loop without its body. The sample is of places in the code, evenly, with one fault of each: of all faults
most are in arithmetic, each operator by ten others. Annotations take no part. A fault is to be noticed by the
quickest tests that run its lines, for `BUDGET` seconds; which these are is found once for the same code and tests.
They run in a fork of this process, which has imported the libraries for them. A run that was stopped goes on where it
was.
"""

import argparse
import ast
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cosmic_ray.commands import init
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec

from benchmarks.reached import Reached, run_all

ROOT = Path(__file__).parents[1]
BUDGET = 90.0  # seconds of tests for a fault
FIRST = 3  # files of tests that are run before the others
Span = tuple[tuple[int, int], tuple[int, int]]  # (line, column) of begin and end


def sample(modules: list[str], number: int, seed: int) -> list[MutationSpec]:
    """At most `number` faults of different places, the same ones first whatever the number."""
    with use_db(":memory:") as database:
        init(map(Path, modules), database, operator_cfgs={})
        faults = [mutation for item in database.work_items for mutation in item.mutations]
    places: dict[tuple[str, Span], list[MutationSpec]] = {}
    skipped = {module: list(annotations(Path(module).read_text())) for module in modules}
    for fault in sorted(faults, key=lambda fault: (str(fault.module_path), fault.operator_name, fault.occurrence)):
        module, (begin, end) = str(fault.module_path), (fault.start_pos, fault.end_pos)
        if not any(first <= begin and end <= last for first, last in skipped[module]):
            places.setdefault((module, (begin, end)), []).append(fault)
    chosen, rng = sorted(places), random.Random(seed)
    rng.shuffle(chosen)
    return [rng.choice(places[place]) for place in chosen[:number]]


def annotations(source: str) -> Iterator[Span]:
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            if found := getattr(node, name, None):
                yield (found.lineno, found.col_offset), (found.end_lineno, found.end_col_offset)


def copy_repository(target: Path) -> str:
    """Files that git knows or would add, as they are in the working tree; returns a hash of code and tests."""
    listed, found = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], hashlib.sha256()
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
            if name.startswith(("src/", "tests/")):
                found.update(name.encode() + (ROOT / name).read_bytes())
    return found.hexdigest()[:16]


def resumed(output: Path, **run) -> dict:
    """What the same run has written, else a report of nothing."""
    report = json.loads(output.read_text()) if output.exists() else {}
    return report if run.items() <= report.items() else run | {"survivors": [], "noticed": []}


def in_turns(tests: list[str]) -> Iterator[list[str]]:
    """The tests of the files that have most of them, then the others: to collect all takes longer than most faults."""
    files = Counter(test.partition("::")[0] for test in tests)
    first = {file for file, _ in files.most_common(FIRST)}
    for turn in (True, False):
        if chosen := [test for test in tests if (test.partition("::")[0] in first) == turn]:
            yield chosen


def are_passed(tests: list[str], output: Path) -> bool:
    """Whether a process of its own passes tests, in their order, in time; `output`: a folder for what it prints."""
    # a file names them, as there may be thousands
    (output / "chosen.txt").write_text("\n".join(tests))
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(output,))
    process.start()
    process.join(120 + 5 * BUDGET)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with all that its tests have left
    process.join()
    return process.exitcode == 0


def run_tests(output: Path) -> None:
    os.setsid()
    with open(output / "output.txt", "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os._exit(pytest.main(["-x", "-q", f"@{output / 'chosen.txt'}"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="of src/ (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=30, help="of faults")
    parser.add_argument("--output", type=Path, help="JSON file (default: runs/mutants/seed-SEED.json)")
    args = parser.parse_args()
    output = (args.output or ROOT / f"runs/mutants/seed-{args.seed}.json").resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name:
        folder = Path(name)
        found = ROOT / "runs/mutants" / copy_repository(folder)
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": f"{folder}/src{os.pathsep}{name}", "PYTHONDONTWRITEBYTECODE": ""}
        if not (found / "seconds.json").exists():
            run_all(folder, found)
        # what faults do not touch is read from bytecode; none is written from here on, as a fault may come faster than
        # the clock of files ticks
        subprocess.run([sys.executable, "-m", "pytest", "--collect-only"], check=True, stdout=subprocess.DEVNULL)
        os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
        own = ("", str(ROOT), str(ROOT / "src"))
        sys.path[:] = [f"{folder}/src", name, *(path for path in sys.path if path not in own)]
        for library in importlib.import_module("tests.fresh").IMPORTED:  # of the copy, as all that tests import
            with suppress(ImportError):  # of an extra
                importlib.import_module(library)
        reached, report = Reached(found), resumed(output, code=found.name, seed=args.seed, files=args.files)
        files = args.files or sorted(str(path) for path in Path("src").rglob("*.py"))
        for fault in sample(files, args.number, args.seed)[len(report["survivors"] + report["noticed"]) :]:
            module, line = str(fault.module_path), fault.start_pos[0]
            tests = reached.tests(fault.module_path, line, fault.end_pos[0], BUDGET)
            with use_mutation(fault.module_path, get_operator(fault.operator_name)(), fault.occurrence) as (_, code):
                survived = all(are_passed(turn, folder) for turn in in_turns(tests))
            where = f"{module}:{line} {fault.operator_name.removeprefix('core/')}"
            print("SURVIVED" if survived else "killed", where, f"({len(tests)} tests)", flush=True)
            if survived:
                report["survivors"].append({"fault": where, "tests": len(tests), "line": code.splitlines()[line - 1]})
            else:
                report["noticed"].append(where)
            report["faults"] = len(report["survivors"] + report["noticed"])
            report["killed"] = len(report["noticed"])
            report["score"] = report["killed"] / report["faults"]
            partial = output.with_suffix(".partial")
            partial.write_text(json.dumps(report, indent=1) + "\n")
            partial.replace(output)
    print(f"{report['killed']} of {report['faults']} killed, see {output}")


if __name__ == "__main__":
    main()
