"""There is one world, and nothing speaks of the one before it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "conversion", "examples", "benchmarks", "docs", "tests", ".ci")
FILES = ("README.md", "Makefile", "pyproject.toml", "constraints.txt")
SUFFIXES = (".py", ".md", ".json", ".toml", ".yaml", ".txt", "")
BEFORE = "shapes"


@pytest.mark.parametrize("name", [f"examples/{BEFORE}", f"examples.{BEFORE}", f"nextflow-{BEFORE}", f"{BEFORE} world"])
def test_nothing_refers_to_the_world_before(name):
    pages = [ROOT / file for file in FILES]
    pages += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    pages = [path for path in pages if path.is_file() and "__pycache__" not in path.parts]
    assert len(pages) > 100
    assert [str(path) for path in pages if name in path.read_text(errors="ignore")] == []
