"""What `make compat` runs are the ends of the declared ranges, and what it wrote is what is shown."""

import json
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import house
from tests.compat.run import ENDS, RESULTS, TABLE, table

ROOT = Path(__file__).parents[1]
CLIENTS = {"ray", "lmms-eval"}  # which are there where they are asked for


def declared(*left_out: str) -> dict[str, list[Requirement]]:
    """Requirements of the package and of its extras, by their names, `""` the package's own."""
    tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {name: [*map(Requirement, group)] for name, group in groups.items() if name not in left_out}


def requirements(package: str) -> list[Requirement]:
    return [requirement for group in declared().values() for requirement in group if requirement.name == package]


def imported() -> set[str]:
    """Distributions of what the packages import."""
    modules = house.imports()
    names = {name.partition(".")[0] for names in modules.values() for name in names}
    names -= {module.partition(".")[0] for module in modules} | set(sys.stdlib_module_names)
    found = packages_distributions()
    return {canonicalize_name(found.get(name, [name])[0]) for name in names}


def test_what_is_imported_is_declared():
    """Or comes with what is declared, whatever is asked of that; and the extra of trainings has nothing else."""
    groups = declared("test", "docs", "emoji")
    names = {canonicalize_name(requirement.name) for group in groups.values() for requirement in group}
    brought = set()
    for name in names:
        try:
            further = map(Requirement, requires(name) or [])
        except PackageNotFoundError:  # of an extra
            continue
        brought |= {canonicalize_name(each.name) for each in further if not each.marker or each.marker.evaluate()}
    assert imported() - names - brought - CLIENTS == set()
    assert {canonicalize_name(requirement.name) for requirement in groups["train"]} - imported() == set()


@pytest.mark.parametrize("package", ENDS)
def test_the_ends_are_those_of_the_ranges(package):
    low, high = ENDS[package][0], ENDS[package][-1]
    assert (found := requirements(package))
    for requirement in found:
        assert f">={low.removesuffix('.0')}" in str(requirement.specifier).split(",")
        assert requirement.specifier.contains(low) and requirement.specifier.contains(high)


def test_the_table_is_of_the_results():
    results = json.loads(RESULTS.read_text())
    assert {package: tuple(versions) for package, versions in results.items()} == ENDS
    assert TABLE.read_text() == table(results)


def test_nothing_failed_where_it_was_run():
    outcomes = [outcome for versions in json.loads(RESULTS.read_text()).values() for outcome in versions.values()]
    assert not any(outcome["failed"] for outcome in outcomes if outcome is not None)
