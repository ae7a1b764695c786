"""Which small faults the tests notice: `make mutants SEED=1`.

cosmic-ray plants one fault at a time in a copy of the repository: a changed operator, number or condition, a missing
decorator, a loop without its body. `[tool.mutants]` in pyproject.toml says which files take part and which tests must
notice; these must pass without a fault. The sample is of places in the code, evenly, with one of each place's faults:
of all faults most are in arithmetic, each operator by ten others. Annotations take no part.
"""

import argparse
import ast
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import tomllib
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome

ROOT = Path(__file__).parents[1]
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


def copy_repository(target: Path) -> None:
    """Files that git knows or would add, as they are in the working tree."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def command_of(tests: list[str]) -> str:
    return shlex.join([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=30, help="of faults")
    parser.add_argument("--output", type=Path, help="JSON file (default: runs/mutants/seed-SEED.json)")
    args = parser.parse_args()
    output = (args.output or ROOT / f"runs/mutants/seed-{args.seed}.json").resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    tests = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]["tests"]
    with TemporaryDirectory() as folder:
        copy_repository(Path(folder))
        os.chdir(folder)
        os.environ["PYTHONPATH"] = os.pathsep.join([f"{folder}/src", folder])
        seconds, results = {}, []
        for fault in sample(sorted(tests), args.number, args.seed):
            module = str(fault.module_path)
            command = command_of(tests[module])
            if command not in seconds:
                begun = time.perf_counter()
                outcome, text = run_tests(command, timeout=None)
                if outcome is not TestOutcome.SURVIVED:
                    sys.exit(f"the tests of {module} fail without a fault:\n{text}")
                seconds[command] = time.perf_counter() - begun
            result = mutate_and_test([fault], command, timeout=60 + 5 * seconds[command])
            if result.test_outcome is TestOutcome.INCOMPETENT:
                sys.exit(f"{fault} could not be planted:\n{result.output}")
            survived = result.test_outcome is TestOutcome.SURVIVED
            where = f"{module}:{fault.start_pos[0]} {fault.operator_name.removeprefix('core/')}"
            print("SURVIVED" if survived else "killed", where, flush=True)
            results.append({"fault": where, "survived": survived, "diff": result.diff.splitlines()[1:]})
            survivors = [each for each in results if each["survived"]]
            report = {"seed": args.seed, "faults": len(results), "killed": len(results) - len(survivors)}
            report |= {"score": report["killed"] / report["faults"], "survivors": survivors}
            report["noticed"] = [each["fault"] for each in results if not each["survived"]]
            output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['killed']} of {report['faults']} killed, see {output}")


if __name__ == "__main__":
    main()
