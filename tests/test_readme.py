"""Every block of the README, and of the first page of the docs, runs as written."""

import functools
import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import constants

from transformers_nextflow import cli
from transformers_nextflow.cli import main

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def blocks(language: str) -> list[str]:
    return [body for name, body in BLOCKS if name == language]


START = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", blocks("python") + START)
def test_python_block_runs(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(block, "page", "exec"), {})


def test_shell_commands_run(tmp_path, monkeypatch):
    commands = [
        shlex.split(line, comments=True)
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("transformers-nextflow ")
    ]
    assert len(commands) >= 4
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "load_model", functools.cache(cli.load_model))
    for _, *arguments in commands:
        assert main(arguments) == 0, arguments
    written = {"picture.png", "edited.png", "reconstruction.png", "answer", "checkpoints"}
    assert {path.name for path in tmp_path.iterdir()} == written
    assert (tmp_path / "answer" / "answer.md").exists()


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/doctor.md", "docs/grpo.md"])
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    exec(compile(block, page, "exec"), {})
    assert [*tmp_path.rglob("report.html"), *tmp_path.rglob("adapter_model.safetensors")]


def console_lines() -> list[str]:
    """Commands of the package that are shown but need files that are not here, unlike those of bash that run."""
    lines = []
    for page in PAGES:
        kinds = "console|sh" if page in ("README.md", "docs/data.md") else "console|sh|bash"
        for block in re.findall(rf"```(?:{kinds})\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
            lines += block.replace("\\\n", " ").splitlines()
    shown = re.compile(r"^(?:accelerate launch .* -m transformers_nextflow|transformers-nextflow) (?!serve)(.*)")
    return sorted({match.group(1) for match in map(shown.match, lines) if match})


@pytest.mark.parametrize("command", console_lines())
def test_console_lines_lack_nothing_but_their_files(command, console, tmp_path, monkeypatch):
    """Every argument is understood before a file that is not there is named."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = shlex.split(command, comments=True)
    status, _, error = console(*words, model=None)
    assert status == 2
    line = error.splitlines()[-1]
    named = next((word for word in words if re.search(rf"(?<![\w-]){re.escape(word)}", line)), "-")
    assert not named.startswith("-") and "argument" not in error, error


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    text = (ROOT / page).read_text()
    targets = {target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")}
    assert not [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()]


def test_modules_that_commands_name_exist():
    folders = ROOT / "docs", ROOT / "examples", ROOT / "benchmarks"
    pages = [ROOT / "README.md", *(page for folder in folders for page in folder.rglob("*.md"))]
    for page in pages:
        for name in set(re.findall(r"-m ((?:examples|benchmarks|conversion)(?:\.\w+)+)", page.read_text())):
            assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists(), f"{page}: {name}"


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", "\n".join(blocks("bash")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_files_of_the_table_exist():
    for name in re.findall(r"`(?:src/transformers_nextflow/)?(\w+\.py)`", (ROOT / "README.md").read_text()):
        assert (ROOT / "src" / "transformers_nextflow" / name).exists(), name
