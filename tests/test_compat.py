"""What `make compat` runs are the ends of the declared ranges, and what it wrote is what is shown."""

import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.compat.run import ENDS, RESULTS, TABLE, table

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def requirements(package: str) -> list[Requirement]:
    tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 reads no TOML")
    project = tomllib.loads(PROJECT.read_text())["project"]
    extras = project["optional-dependencies"].values()
    all_of_them = map(Requirement, [*project["dependencies"], *(each for extra in extras for each in extra)])
    return [requirement for requirement in all_of_them if requirement.name == package]


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
