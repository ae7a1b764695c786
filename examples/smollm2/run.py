"""A real language model that learns to draw: `python -m examples.smollm2.run --output runs/smollm2`.

SmolLM2-135M-Instruct is converted around the emoji checkpoint's vision tokenizer and trained to draw emoji, LoRA on
its layers. Parts that are done are skipped and the training continues when the same command is given again.

`steps-N` in the output gets `smollm2.json`: three questions with the answers of the source, of the converted and of
the trained model, the judge's scores of drawings of seen and of held-out pairs, and all that was logged of the losses;
`smollm2.png`, the first held-out prompts, drawing beside truth; and `trained`, a NextFlow like any other.

Where there is a GPU the same command trains on it, for instance a larger text model for longer; this was never run:

    python -m examples.smollm2.run --text Qwen2.5-0.5B-Instruct --steps 20000 --prompts 1000 --output runs/qwen2.5
"""

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.harness import machine, report, save
from examples.emoji.artist import Artist
from examples.emoji.panels import stacked
from examples.emoji.scoring import Exam, figures, single_pictures
from examples.emoji.sheet import prompts
from examples.emoji.splits import PAIR, SEEN
from examples.emoji.stages import bfloat16_is_fast
from examples.emoji.tasks import Tasks
from examples.emoji.world import World
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.conversion.language_model import convert
from transformers_nextflow.utils.files import write_atomically
from transformers_nextflow.utils.loading import DEFAULT_MODEL

from .questions import answers
from .source import fetch, load
from .training import PICTURES, code_documents, merge, train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def talk(text: Path, converted: Path, trained: Path, max_new_tokens: int) -> list[dict]:
    """Answers of the source, and before and after the training."""
    models = {"source": load(text)}
    rows = models["source"].config.vocab_size
    for name, folder in (("converted", converted), ("trained", trained)):
        models[name] = NextFlowForConditionalGeneration.from_pretrained(folder).eval()
    return answers(models, rows, NextFlowProcessor.from_pretrained(converted), max_new_tokens)


def scores(exam: Exam) -> dict:
    """Of drawings of seen and of held-out pairs, beside the vision tokenizer's own and the baselines."""
    items = {part: exam.items("text-to-image", "", (part,)) for part in (SEEN, PAIR)}
    return {part: figures(single_pictures(exam, each, exam.artist.draw(each))) for part, each in items.items()}


def curve(log: Path) -> list[dict]:
    """All that was logged, a step once though a stopped run logged it twice."""
    rows = {row["step"]: row for row in map(json.loads, log.read_text().splitlines())}
    return [rows[step] for step in sorted(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="text model, a folder or a GGUF file (default: SmolLM2, by pip)")
    parser.add_argument("--vq", type=Path, default=DEFAULT_MODEL, help="vision tokenizer, or a whole NextFlow")
    parser.add_argument("--data", type=Path, default=Path("runs/emoji/data"), help="of `examples.emoji.data`")
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=400, help=f"of {PICTURES} pictures (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=200, help="to score, of each kind (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    arguments = parser.parse_args()
    for name in ("steps", "prompts", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    text = arguments.text or fetch(arguments.output)
    converted, run = arguments.output / "converted", arguments.output / f"steps-{arguments.steps}"
    if not converted.exists():
        convert(text, arguments.vq, converted)
    packs = code_documents(run / "data", converted, arguments.data, arguments.steps)
    train(run / "adapter", converted, packs, arguments.steps)
    trained = run / "trained"
    if not trained.exists():
        merge(run / "adapter", converted, trained)

    result = {"settings": {"steps": arguments.steps, "pictures of a step": PICTURES, "prompts": arguments.prompts}}
    result["machine"] = machine(DEVICE)
    result["questions"] = talk(text, converted, trained, arguments.max_new_tokens)
    started = time.perf_counter()
    dtype = torch.bfloat16 if bfloat16_is_fast() else torch.float32
    model = NextFlowForConditionalGeneration.from_pretrained(trained, dtype=dtype).to(DEVICE).eval()
    artist = Artist(model, NextFlowProcessor.from_pretrained(trained), World(arguments.data))
    exam = Exam(artist, Tasks.of(artist.world), prompts=arguments.prompts)
    result["drawings"] = scores(exam)
    sheet = stacked(prompts(artist, exam.tasks))
    write_atomically(run / "smollm2.png", lambda partial: sheet.save(partial, format="PNG", optimize=True))
    result["seconds of drawing"] = round(time.perf_counter() - started, 1)
    result["curve"] = curve(run / "log.jsonl")
    save(result, run / "smollm2.json")
    report(result, as_json=True)


if __name__ == "__main__":
    main()
