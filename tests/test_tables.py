"""The commands of `benchmarks/tables.yaml` exist, with the options that they are given."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TABLES = yaml.safe_load((ROOT / "benchmarks" / "tables.yaml").read_text())
COMMANDS = [shlex.split(entry["command"]) for entry in TABLES if "command" in entry]
LMMS_EVAL = [words for words in COMMANDS if "lmms_eval" in words]
OTHERS = [words for words in COMMANDS if "lmms_eval" not in words]


def module_of(words: list[str]) -> list[str]:
    """The module that a command runs, and the subcommands it names."""
    if words[0] == "transformers-nextflow":
        return ["transformers_nextflow", *words[1 : 3 if words[1] == "evaluate" else 2]]
    assert words[:2] == ["python", "-m"]
    return ["lmms_eval", "eval"] if words[2] == "lmms_eval" else words[2:3]


def test_entries_say_what_they_are():
    assert all({"what", "where", "paper"} <= entry.keys() for entry in TABLES)
    assert all(entry.keys() <= {"what", "where", "paper", "command", "needs", "here"} for entry in TABLES)
    files = [entry["here"] for entry in TABLES if entry.get("here", "tests") != "tests"]
    assert files and all((ROOT / name).is_file() for name in files)
    assert len({entry["what"] for entry in TABLES}) == len(TABLES)


@pytest.mark.parametrize("words", [*OTHERS, LMMS_EVAL[0]], ids=" ".join)
def test_commands_are_there(words, monkeypatch):
    module, *subcommands = module_of(words)
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    monkeypatch.setattr(sys, "argv", [module, *subcommands, "--help"])
    monkeypatch.setenv("COLUMNS", "300")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert end.value.code in (0, None)
    options = {word for each in (LMMS_EVAL if words in LMMS_EVAL else [words]) for word in each if word[:2] == "--"}
    assert options <= set(re.findall(r"--[\w-]+", printed.getvalue()))


def test_tasks_are_those_of_lmms_eval():
    tasks = pytest.importorskip("lmms_eval.tasks", reason="lmms-eval is not installed")
    known = set(tasks.TaskManager().all_tasks)
    named = {words[words.index("--tasks") + 1] for words in LMMS_EVAL}
    assert named <= known and len(named) == len(LMMS_EVAL)
