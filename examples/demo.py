"""What the model does, in pictures: `python -m examples.demo --output demo`.

It needs the checkpoint alone: the pictures that are edited and described are its own. Each answer is the first that
its seed gives.
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.utils.files import write_atomically
from transformers_nextflow.utils.loading import DEFAULT_MODEL

from .emoji.panels import panel

PROMPT = "red heart, fluent"
INSTRUCTION = "make it blue"
QUESTION = "describe the picture"
TAGS = "think first: animal, farm, moo, noto"
SEED = 0
HEIGHT, LINES = 256, 5  # of a picture in pixels, and of the text under it


class Demo:
    """A checkpoint and the public calls for each of its answers."""

    def __init__(self, folder: Path):
        self.model = NextFlowForConditionalGeneration.from_pretrained(folder).eval()
        self.processor = NextFlowProcessor.from_pretrained(folder)

    def _inputs(self, mode: str, text: str, picture: Image.Image | None = None):
        content = [{"type": "text", "text": text}]
        if picture is not None:
            content.insert(0, {"type": "image", "image": picture})
        return self.processor.apply_chat_template([{"role": "user", "content": content}], generation_mode=mode)

    def draw(self, text: str, picture: Image.Image | None = None) -> tuple[Image.Image, torch.Tensor, list[int]]:
        """A picture for a prompt, or a changed one, with its (1, codes) codes and final grid."""
        inputs = self._inputs("image", text, picture)
        output = self.model.generate(**inputs, generation_mode="image", seed=SEED, return_dict_in_generate=True)
        pixels = self.model.decode_image_tokens(output.sequences, output.image_grid_hw)
        codes = output.sequences - self.model.config.text_vocab_size
        return self.processor.post_process_image(pixels)[0], codes, output.image_grid_hw[0].tolist()

    def describe(self, picture: Image.Image) -> str:
        inputs = self._inputs("text", QUESTION, picture)
        ids = self.model.generate(**inputs, max_new_tokens=32, do_sample=False)
        return self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()

    def reason(self, text: str) -> tuple[str, list[Image.Image]]:
        """The model's own words, and the pictures that it draws after them."""
        output = self.model.generate(
            **self._inputs("interleaved", text),
            generation_mode="interleaved",
            max_new_tokens=96,
            max_new_images=1,
            do_sample=False,
            seed=SEED,
        )
        pictures = self.model.decode_images(output.image_codes, output.image_grid_hw)
        (parts,) = self.processor.post_process_multimodal_output(
            output, generation_mode="interleaved", pictures=pictures
        )
        words = " ".join(part for part in parts if isinstance(part, str))
        return words, [part for part in parts if not isinstance(part, str)]

    def scales(self, codes: torch.Tensor, grid: list[int]) -> list[Image.Image]:
        """The picture after each scale, from coarse to fine."""
        vq_model = self.model.model.vq_model
        count = len(vq_model.schedules.by_grid(grid))
        previews = [vq_model.decode_prefix(codes, grid, scale) for scale in range(1, count + 1)]
        return self.processor.post_process_image(torch.cat(previews))


def demo(output: Path, model: Path = DEFAULT_MODEL) -> None:
    """Write `drawing.png`, `scales.png`, `edit.png`, `caption.png` and `reasoning.png` into the folder `output`."""
    shown = Demo(model)

    def save(name: str, pictures: list[Image.Image], text: str) -> None:
        path = output / f"{name}.png"
        write_atomically(path, lambda partial: panel(pictures, text, LINES, HEIGHT).save(partial, format="PNG"))
        print(f"{path}: {text}", flush=True)

    picture, codes, grid = shown.draw(PROMPT)
    save("drawing", [picture], PROMPT)
    save("scales", shown.scales(codes, grid), "the same picture after each of its scales, from coarse to fine")
    edited, _, _ = shown.draw(INSTRUCTION, picture)
    save("edit", [picture, edited], f'"{INSTRUCTION}"')
    save("caption", [edited], f'"{QUESTION}": {shown.describe(edited)}')
    thought, drawn = shown.reason(TAGS)
    save("reasoning", drawn, f'"{TAGS}": {thought}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument(
        "--model", type=Path, default=DEFAULT_MODEL, metavar="FOLDER", help="default: the repository's"
    )
    arguments = parser.parse_args()
    started = time.perf_counter()
    demo(arguments.output, arguments.model)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
