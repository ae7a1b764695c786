"""A picture's codes kept in part, the rest drawn anew:

- `python -m examples.forks variations PICTURE PROMPT --scales 4`: its first scales, several times;
- `python -m examples.forks inpaint PICTURE PROMPT --box LEFT TOP RIGHT BOTTOM`: everything outside a box;
- `python -m examples.forks locked-edit PICTURE INSTRUCTION --scales 3`: an edit that keeps its first scales.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from transformers_nextflow import codes_of_region
from transformers_nextflow.utils.loading import load_model


def read_codes(model, processor, picture: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
    """A picture's (1, codes) codes and its final grid."""
    inputs = processor.image_processor(picture, return_tensors="pt").to(model.device)
    grid = tuple(inputs["image_grid_hw"][0].tolist())
    return model.encode_images(inputs["pixel_values"], inputs["image_grid_hw"])[None], grid


def draw(model, processor, grid: tuple[int, int], content: list[dict], **kwargs) -> list[Image.Image]:
    """Pictures of the final grid `grid` for a message."""
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(chat, generation_mode="image").to(model.device)
    height, width = model.model.schedules.image_size(model.model.schedules.by_grid(grid))
    codes = model.generate(**inputs, generation_mode="image", height=height, width=width, **kwargs)
    return processor.post_process_image(model.decode_image_tokens(codes, grid))


def variations(
    model, processor, picture: Image.Image, prompt: str, num_scales: int, count: int = 4, seed: int = 0
) -> list[Image.Image]:
    """Pictures that share the first `num_scales` scales."""
    codes, grid = read_codes(model, processor, picture)
    kept = codes[:, : model.model.schedules.by_grid(grid).prefix(num_scales).num_codes]
    content = [{"type": "text", "text": prompt}]
    return draw(model, processor, grid, content, num_images_per_prompt=count, forced_codes=kept, seed=seed)


def inpaint(
    model, processor, picture: Image.Image, prompt: str, box: tuple[int, int, int, int], seed: int = 0
) -> Image.Image:
    """The picture drawn anew inside `box` (left, top, right, bottom, in pixels of the model's picture): every code
    that touches what lies outside stays.

    Raises:
        ValueError: if the box does not lie within that picture.
    """
    codes, grid = read_codes(model, processor, picture)
    schedule = model.model.schedules.by_grid(grid)
    keep = torch.ones(model.model.schedules.image_size(schedule), dtype=torch.bool)
    left, top, right, bottom = box
    height, width = keep.shape
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"the box must lie within the model's picture of {width}x{height} pixels, got {box}")
    keep[top:bottom, left:right] = False
    content = [{"type": "text", "text": prompt}]
    mask = codes_of_region(keep, schedule)
    return draw(model, processor, grid, content, forced_codes=codes, forced_mask=mask, seed=seed)[0]


def locked_edit(
    model, processor, picture: Image.Image, instruction: str, num_scales: int, seed: int = 0
) -> Image.Image:
    """An edit whose first `num_scales` scales, the layout, are the picture's own."""
    codes, grid = read_codes(model, processor, picture)
    kept = codes[:, : model.model.schedules.by_grid(grid).prefix(num_scales).num_codes]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": instruction}]
    return draw(model, processor, grid, content, forced_codes=kept, seed=seed)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["variations", "inpaint", "locked-edit"])
    parser.add_argument("picture", metavar="PICTURE")
    parser.add_argument("text", metavar="TEXT", help="prompt or instruction")
    parser.add_argument("--scales", type=int, default=3, metavar="N", help="scales to keep (default: %(default)s)")
    parser.add_argument("--box", type=int, nargs=4, default=(0, 0, 32, 32), metavar="PIXEL", help="what to draw anew")
    parser.add_argument("--count", type=int, default=4, metavar="N", help="variations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--model", metavar="NAME", help="default: the repository's checkpoint")
    parser.add_argument("--output", type=Path, default=Path("fork.png"), metavar="PNG", help="default: %(default)s")
    args = parser.parse_args()
    given = *load_model(args.model), Image.open(args.picture), args.text
    if args.task == "variations":
        pictures = variations(*given, args.scales, args.count, args.seed)
    elif args.task == "inpaint":
        pictures = [inpaint(*given, tuple(args.box), args.seed)]
    else:
        pictures = [locked_edit(*given, args.scales, args.seed)]
    for index, picture in enumerate(pictures):
        path = args.output if len(pictures) == 1 else args.output.with_stem(f"{args.output.stem}-{index}")
        picture.save(path)
        print(path)


if __name__ == "__main__":
    main()
