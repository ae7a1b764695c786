"""Which tests run which lines, by coverage with contexts: what [`benchmarks.mutants`] chooses tests by.

Loaded by pytest as a plugin, this module also notes how long each test that passes takes.
"""

import ast
import json
import os
import subprocess
import sys
from collections import defaultdict
from functools import cached_property
from pathlib import Path

import coverage

NOTED = "NEXTFLOW_TEST_SECONDS"  # environment variable, the file that seconds are written to
# processes that a test starts are followed too, also those that end at once, as ranks do; pytest says in their
# environment which test it is, see `tests/fresh.py`
SETTINGS = """[run]
source = {folder}/src
data_file = {data}
patch = subprocess, _exit
"""

_seconds: dict[str, float] = defaultdict(float)
_failed: set[str] = set()


def pytest_runtest_logreport(report):
    _seconds[report.nodeid] += report.duration
    if report.outcome != "passed":
        _failed.add(report.nodeid)


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        passed = {name: seconds for name, seconds in _seconds.items() if name not in _failed}
        Path(os.environ[NOTED]).write_text(json.dumps(passed))


def run_all(folder: Path, output: Path) -> None:
    """Run the tests of the repository in `folder` under coverage; `output` is a folder for what is found."""
    output.mkdir(parents=True, exist_ok=True)
    settings, data = output / "settings.ini", output / "lines.sqlite"
    settings.write_text(SETTINGS.format(folder=folder, data=data))
    options = ["-q", "-n", "3", "-p", "benchmarks.reached"]
    options += [f"--cov-config={settings}", "--cov", "--cov-context=test", "--cov-report="]
    noted = output / "partial.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", NOTED: str(noted)}
    # tests that fail under a tracer are not chosen, so the status is no matter
    subprocess.run([sys.executable, "-m", "pytest", *options], cwd=folder, env=environment, stdout=sys.stderr)
    noted.replace(output / "seconds.json")


class Reached:
    """What [`run_all`] found in a folder."""

    def __init__(self, output: Path):
        self.data = coverage.CoverageData(output / "lines.sqlite")
        self.data.read()
        self.seconds = json.loads((output / "seconds.json").read_text())

    @cached_property
    def files(self) -> dict[str, str]:
        """Measured files by their path in the repository."""
        return {name[name.rindex("/src/") + 1 :]: name for name in self.data.measured_files() if "/src/" in name}

    def tests(self, module: Path, first: int, last: int, budget: float) -> list[str]:
        """Tests that run one of the lines `first` to `last` of a file, or where none is seen to (Python passes over
        some `continue` and `pass`), their function, or where they run at import, any of its lines: the quickest, as
        many as take `budget` seconds."""
        if str(module) not in self.files:
            return []
        by_line = self.data.contexts_by_lineno(self.files[str(module)])
        function = _function_of(module.read_text(), first)
        for lines in (range(first, last + 1), function) if function else (by_line,):
            names = {_test_of(context) for line in lines for context in by_line.get(line, [])} & self.seconds.keys()
            if names:
                break
        chosen, spent = [], 0.0
        for name in sorted(names, key=self.seconds.get):
            spent += self.seconds[name]
            if chosen and spent > budget:
                break
            chosen.append(name)
        return chosen


def _function_of(source: str, line: int) -> range | None:
    """Lines of the body of the innermost function that a line stands in."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    bodies = [range(node.body[0].lineno, node.end_lineno + 1) for node in functions]
    return min((body for body in bodies if line in body), key=len, default=None)


def _test_of(context: str) -> str:
    """A test's id out of coverage's context: `id|phase` in the tests' own process, `id (phase)` below it."""
    return context.strip("|").rpartition("|")[0] or context.strip("|").rpartition(" (")[0]
