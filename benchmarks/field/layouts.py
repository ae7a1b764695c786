"""Pictures for the prompts of GenEval, GenEval 2 or DPG-Bench, as their own judges read them.

    python -m benchmarks.field.layouts geneval evaluation_metadata.jsonl OUT
    python -m benchmarks.field.layouts geneval2 geneval2_data.jsonl OUT
    python -m benchmarks.field.layouts dpg prompts OUT

Prompt n draws from the seed SEED + n, whatever the others are. What was stopped goes on by the same command.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.utils.files import write_atomically
from transformers_nextflow.utils.loading import load_model


def save_picture(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: picture.save(partial, format="PNG"))


def save_json(value, path: Path) -> None:
    write_atomically(path, lambda partial: partial.write_text(json.dumps(value, ensure_ascii=False) + "\n"))


def read_json_lines(path: Path) -> list[dict]:
    """Entries with a `prompt`, one a line."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(f"{path}, entry {number}: needs a prompt, got {json.dumps(entry)[:60]}")
    return entries


class GenEval:
    """`OUT/00000/metadata.jsonl`, the entry, and `OUT/00000/samples/00000.png` to `00003.png`."""

    num_pictures = 4
    read = staticmethod(read_json_lines)

    def is_written(self, folder: Path, number: int, entry: dict) -> bool:
        return (folder / f"{number:05}" / "metadata.jsonl").is_file()  # which is written last

    def write(self, folder: Path, number: int, entry: dict, pictures: Sequence[Image.Image]) -> None:
        folder = folder / f"{number:05}"
        for count, picture in enumerate(pictures):
            save_picture(picture, folder / "samples" / f"{count:05}.png")
        save_json(entry, folder / "metadata.jsonl")

    def finish(self, folder: Path, entries: Sequence[dict]) -> None:
        pass


class GenEval2:
    """`OUT/00000.png`, and `OUT/image_paths.json`, which names the picture of each prompt."""

    num_pictures = 1
    read = staticmethod(read_json_lines)

    def is_written(self, folder: Path, number: int, entry: dict) -> bool:
        return (folder / f"{number:05}.png").is_file()

    def write(self, folder: Path, number: int, entry: dict, pictures: Sequence[Image.Image]) -> None:
        save_picture(pictures[0], folder / f"{number:05}.png")

    def finish(self, folder: Path, entries: Sequence[dict]) -> None:
        paths = {entry["prompt"]: str((folder / f"{n:05}.png").resolve()) for n, entry in enumerate(entries)}
        if len(paths) < len(entries):
            raise ValueError(f"GenEval 2 knows pictures by their prompts, and {len(entries) - len(paths)} occur again")
        save_json(paths, folder / "image_paths.json")


class DPG:
    """`OUT/NAME.png` for the prompt in `NAME.txt`: four square pictures, two above two, and nothing else."""

    num_pictures = 4

    def read(self, path: Path) -> list[dict]:
        files = sorted(path.glob("*.txt"))
        return [{"name": file.stem, "prompt": file.read_text(encoding="utf-8").strip()} for file in files]

    def is_written(self, folder: Path, number: int, entry: dict) -> bool:
        return (folder / f"{entry['name']}.png").is_file()

    def write(self, folder: Path, number: int, entry: dict, pictures: Sequence[Image.Image]) -> None:
        edge, height = pictures[0].size
        if edge != height:
            raise ValueError(f"DPG-Bench cuts its sheets into squares, got pictures of {edge}x{height} pixels")
        sheet = Image.new("RGB", (2 * edge, 2 * edge))
        for count, picture in enumerate(pictures):
            sheet.paste(picture, (count % 2 * edge, count // 2 * edge))
        save_picture(sheet, folder / f"{entry['name']}.png")

    def finish(self, folder: Path, entries: Sequence[dict]) -> None:
        pass


LAYOUTS = {"geneval": GenEval, "geneval2": GenEval2, "dpg": DPG}


def write_pictures(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    layout: GenEval | GenEval2 | DPG,
    prompts: Path,
    folder: Path,
    seed: int = 0,
    **settings,
) -> None:
    """Draw whatever the folder does not hold yet.

    Args:
        prompts: the benchmark's own file, or DPG-Bench's folder.
        settings: of `generate`, e.g. `guidance_scale`.

    Raises:
        ValueError: if there are no prompts, or pictures do not fit the layout.
    """
    entries = layout.read(prompts)
    if not entries:
        raise ValueError(f"{prompts} holds no prompts")
    folder.mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(tqdm(entries, unit="prompt", disable=None)):
        if layout.is_written(folder, number, entry):
            continue
        chat = [{"role": "user", "content": entry["prompt"]}]
        inputs = processor.apply_chat_template(chat, generation_mode="image", sanitize_control_tokens=True)
        output = model.generate(
            **inputs.to(model.device),
            generation_mode="image",
            num_images_per_prompt=layout.num_pictures,
            seed=seed + number,
            return_dict_in_generate=True,
            **settings,
        )
        pixels = model.decode_image_tokens(output.sequences, output.image_grid_hw)
        layout.write(folder, number, entry, processor.post_process_image(pixels))
    layout.finish(folder, entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--model", help="folder or Hub id (default: the repository's checkpoint)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--level", help="of the pictures (default: the checkpoint's)")
    parser.add_argument("--guidance-scale", type=float, help="default: the checkpoint's")
    arguments = parser.parse_args()
    settings = {"level": arguments.level, "guidance_scale": arguments.guidance_scale}
    model, processor = load_model(arguments.model)
    layout = LAYOUTS[arguments.layout]()
    write_pictures(model, processor, layout, arguments.prompts, arguments.output, arguments.seed, **settings)


if __name__ == "__main__":
    main()
