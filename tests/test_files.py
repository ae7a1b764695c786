"""Files and folders that are written whole or not at all, and what killed runs leave of them."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from transformers_nextflow.utils.files import output_folder, write_atomically


def write_file(path: Path, text: str, then=lambda: None) -> None:
    write_atomically(path, lambda partial: (partial.write_text(text), then()))


def write_folder(path: Path, text: str, then=lambda: None) -> None:
    with output_folder(path) as partial:
        (partial / "within").write_text(text)
        then()


def read(path: Path) -> str:
    return (path / "within" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_what_killed_runs_left_goes_with_the_next_one(write, tmp_path):
    path = tmp_path / "report[1].json"
    for _ in range(2):
        arguments = (path, "half", lambda: os.kill(os.getpid(), signal.SIGKILL))
        process = multiprocessing.get_context("fork").Process(target=write, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    write(path, "whole")
    assert read(path) == "whole" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_folders_above_are_made(write, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "new" / "deep" / name, name)
        assert read(tmp_path / "new" / "deep" / name) == name


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_what_another_run_still_writes_is_left_alone(write, tmp_path):
    path = tmp_path / "report"

    def meanwhile() -> None:
        write(path, "of the other")
        assert read(path) == "of the other"
        path.rename(tmp_path / "taken")

    write(path, "of this one", meanwhile)
    assert read(path) == "of this one" and sorted(tmp_path.iterdir()) == [path, tmp_path / "taken"]
