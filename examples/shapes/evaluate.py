"""Score a shapes checkpoint on held-out combinations: `python -m examples.shapes.evaluate --json`.

Every share comes with its 95% interval; pictures of one prompt count as one cluster. The judge, the tokenizer's
reconstructions (the ceiling of every generated picture) and the copy-the-source baseline are measured beside it.
"""

import argparse
import dataclasses
import json
import math
import platform
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from tqdm import tqdm

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor

from .data import HELD_OUT_PHOTOS, photo_crop, to_pixel_values
from .grammar import (
    CATEGORIES,
    DESCRIBE_QUESTIONS,
    EDITS,
    Edit,
    Request,
    caption_matches,
    held_out_edits,
    held_out_prompts,
)
from .judge import judge_edit, judge_request
from .sizes import CANVASES
from .world import CELL, COLOURS, KINDS, Scene, cell, render

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "nextflow-shapes"
BATCH = 25


def interval(values: list[list[float]]) -> dict:
    """Mean over clusters with a 95% interval: normal over the clusters' means, Wilson's where all agree."""
    means = np.array([np.mean(cluster) for cluster in values])
    n, mean = len(means), float(means.mean())
    half = 1.96 * float(means.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    low, high = mean - half, mean + half
    if half == 0:
        centre, spread = (mean + 1.92 / n) / (1 + 3.84 / n), 1.96 * math.sqrt(0.96 / n**2) / (1 + 3.84 / n)
        low, high = centre - spread, centre + spread
    return {"score": round(mean, 4), "low": round(max(low, 0.0), 4), "high": round(min(high, 1.0), 4), "n": n}


class Evaluator:
    """A checkpoint, asked through its processor and `generate` as a user would."""

    def __init__(self, model: NextFlowForConditionalGeneration, processor: NextFlowProcessor, seed: int, **sampling):
        self.model, self.processor, self.seed, self.sampling = model, processor, seed, sampling

    def pictures(self, texts: list[str], images: list | None = None, copies: int = 1) -> list[list[np.ndarray]]:
        """Pictures for each text (and image): `copies` each, uint8 (H, W, 3). The n-th text samples from seed + n."""
        result = []
        step = max(BATCH // copies, 1)
        for start in tqdm(range(0, len(texts), step), desc="pictures", leave=False):
            chunk = range(start, min(start + step, len(texts)))
            chats = [_chat(texts[i], images and images[i]) for i in chunk]
            inputs = self.processor.apply_chat_template(chats, generation_mode="image")
            output = self.model.generate(
                **inputs,
                generation_mode="image",
                seed=[self.seed + i for i in chunk],
                num_images_per_prompt=copies,
                return_dict_in_generate=True,
                **self.sampling,
            )
            pixels = self.model.decode_image_tokens(output.sequences, output.image_grid_hw)
            drawn = [np.asarray(image) for image in self.processor.post_process_image(pixels)]
            result += [drawn[i : i + copies] for i in range(0, len(drawn), copies)]
        return result

    def answers(self, questions: list[str], images: list[Image.Image]) -> list[str]:
        """Greedy answers to questions about pictures."""
        result = []
        for start in tqdm(range(0, len(questions), BATCH), desc="answers", leave=False):
            at = slice(start, start + BATCH)
            chats = [_chat(question, image) for question, image in zip(questions[at], images[at])]
            inputs = self.processor.apply_chat_template(chats)
            ids = self.model.generate(**inputs, max_new_tokens=48, do_sample=False)
            replies = ids[:, inputs["input_ids"].shape[1] :]
            result += [text.strip() for text in self.processor.batch_decode(replies, skip_special_tokens=True)]
        return result

    def reconstructions(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) pictures -> what the tokenizer makes of them, and their codes."""
        vq_model = self.model.model.vq_model
        codes = vq_model.encode(pixels)
        return vq_model.decode(codes, vq_model.schedules.by_size(*pixels.shape[-2:]).final_grid), codes


def _chat(text: str, image: Image.Image | None) -> list[dict]:
    content = [{"type": "text", "text": text}]
    if image is not None:
        content.insert(0, {"type": "image", "image": image})
    return [{"role": "user", "content": content}]


def text_to_image(evaluator: Evaluator, prompts: int, copies: int, split: str) -> dict:
    """Share of pictures that show exactly what the prompt asks, by category and over all."""
    rows, everything = {}, []
    for category in CATEGORIES:
        requests = held_out_prompts(category, prompts, evaluator.seed, split)
        drawn = evaluator.pictures([request.text for request in requests], copies=copies)
        values = [[judge_request(p, request) for p in group] for group, request in zip(drawn, requests)]
        rows[category] = interval(values)
        everything += values
    return {"overall": interval(everything)} | rows


def captions(evaluator: Evaluator, scenes: list[Scene]) -> dict:
    """Share of captions that are true of the scene and name every object."""
    questions = [DESCRIBE_QUESTIONS[i % len(DESCRIBE_QUESTIONS)] for i in range(len(scenes))]
    answers = evaluator.answers(questions, [Image.fromarray(render(scene)) for scene in scenes])
    return interval([[caption_matches(answer, scene)] for answer, scene in zip(answers, scenes)])


def untouched(edit: Edit) -> np.ndarray:
    """(H, W) bool: what the instruction leaves as it is. An added object may stand in any free cell, so of an addition
    the cells that the source's objects stand in."""
    if edit.added is None:
        return (render(edit.source) == render(edit.target)).all(axis=-1)
    taken = np.zeros((edit.source.height // CELL, edit.source.width // CELL), dtype=bool)
    for item in edit.source.objects:
        taken[cell(item)] = True
    return taken.repeat(CELL, axis=0).repeat(CELL, axis=1)


def draw_edits(evaluator: Evaluator, per_operation: int, split: str) -> dict[str, list[tuple[Edit, np.ndarray]]]:
    """Held-out edits of each operation with what the model makes of them."""
    drawn = {}
    for operation in EDITS:
        tasks = held_out_edits(operation, per_operation, evaluator.seed, split)
        sources = [Image.fromarray(render(task.source)) for task in tasks]
        groups = evaluator.pictures([task.text for task in tasks], sources)
        drawn[operation] = [(task, picture) for task, (picture,) in zip(tasks, groups)]
    return drawn


def edits(drawn: dict[str, list[tuple[Edit, np.ndarray]]]) -> dict:
    """Share of edits done with everything else unchanged; beside it the source handed back, which never counts."""
    rows = {operation: [[judge_edit(picture, task)] for task, picture in pairs] for operation, pairs in drawn.items()}
    copied = [[judge_edit(render(task.source), task)] for pairs in drawn.values() for task, _ in pairs]
    scores = {operation: interval(values) for operation, values in rows.items()}
    return {"overall": interval(sum(rows.values(), [])), "copy_the_source": interval(copied)} | scores


def untouched_error(evaluator: Evaluator, drawn: dict[str, list[tuple[Edit, np.ndarray]]]) -> dict:
    """Mean squared error, against the source, of what the instructions leave as it is, pictures being in [-1, 1]: of
    the edits that are done, of all edits, and of the tokenizer's reconstructions of true results."""
    pairs = sum(drawn.values(), [])
    rebuilt, _ = evaluator.reconstructions(to_pixel_values([render(task.target) for task, _ in pairs]))
    rebuilt = [np.asarray(picture) for picture in evaluator.processor.post_process_image(rebuilt)]
    errors = {"done": [], "all": [], "reconstruction": []}
    for (task, picture), own in zip(pairs, rebuilt):
        kept = untouched(task)
        source = render(task.source)[kept].astype(float)
        error, own_error = (np.square((each[kept] - source) / 127.5).mean() for each in (picture, own))
        errors["all"].append(error)
        errors["reconstruction"].append(own_error)
        if judge_edit(picture, task):
            errors["done"].append(error)
    return {name: float(f"{np.mean(values):.4g}") if values else None for name, values in errors.items()}


def tokenizer(evaluator: Evaluator, requests: list[Request], scenes: list[Scene]) -> dict:
    """The judge on reconstructions of pictures that satisfy the prompts; PSNR, SSIM, and codebook usage by scale."""
    pixels = to_pixel_values([render(scene) for scene in scenes])
    rebuilt, codes = evaluator.reconstructions(pixels)
    pictures = [np.asarray(picture) for picture in evaluator.processor.post_process_image(rebuilt)]
    schedule = evaluator.model.model.schedules.by_size(*pixels.shape[-2:])
    photos = photo_pixels(64)
    rebuilt_photos, _ = evaluator.reconstructions(photos)
    return {
        "ceiling": interval([[judge_request(p, request)] for p, request in zip(pictures, requests)]),
        "shapes": fidelity(rebuilt, pixels),
        "photographs": fidelity(rebuilt_photos, photos),
        "codes_used": [len(codes[:, schedule.slice(scale)].unique()) for scale in range(len(schedule))],
        "codebook_size": evaluator.model.config.vq_config.codebook_size,
        "pictures": len(scenes),
    }


def photo_pixels(count: int) -> torch.Tensor:
    """Crops of photographs that no training saw."""
    rng = random.Random("held-out photographs")
    return to_pixel_values([photo_crop(rng, HELD_OUT_PHOTOS, *CANVASES[0]) for _ in range(count)])


def fidelity(rebuilt: torch.Tensor, pixels: torch.Tensor) -> dict:
    """Mean PSNR (dB) and SSIM of pictures in [-1, 1]."""
    error = (rebuilt - pixels).square().flatten(1).mean(1)
    ssim = [
        structural_similarity(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy(), channel_axis=2, data_range=2.0)
        for a, b in zip(rebuilt, pixels)
    ]
    return {"psnr": round(float((10 * torch.log10(4 / error)).mean()), 3), "ssim": round(float(np.mean(ssim)), 4)}


def judge_itself(requests: list[Request], scenes: list[Scene]) -> dict:
    """The judge on pictures the world draws, and on pictures with one planted error."""
    rng = random.Random("planted errors")
    right = [[judge_request(render(scene), request)] for request, scene in zip(requests, scenes)]
    wrong = [[not judge_request(render(plant_error(rng, scene)), request)] for request, scene in zip(requests, scenes)]
    return {"accepts_true_pictures": interval(right), "rejects_one_error": interval(wrong)}


def plant_error(rng: random.Random, scene: Scene) -> Scene:
    """The scene with one object of another kind or colour, or one object missing."""
    index = rng.randrange(len(scene.objects))
    item, error = scene.objects[index], rng.choice(("kind", "colour", "missing"))
    objects = list(scene.objects)
    if error == "missing":
        del objects[index]
    else:
        names = [name for name in (KINDS if error == "kind" else COLOURS) if name != getattr(item, error)]
        objects[index] = dataclasses.replace(item, **{error: rng.choice(names)})
    return dataclasses.replace(scene, objects=tuple(objects))


def seconds_per_picture(evaluator: Evaluator, repeats: int = 5) -> float:
    """Median seconds from a prompt to one picture of 64 x 64 pixels, guidance and decoding included."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        evaluator.pictures(["a red circle"])
        times.append(time.perf_counter() - started)
    return round(float(np.median(times[1:])), 3)


def evaluate(evaluator: Evaluator, prompts: int, copies: int, split: str) -> dict:
    """Every figure of the model card."""
    requests = [r for category in CATEGORIES for r in held_out_prompts(category, prompts, evaluator.seed, split)]
    rng = random.Random(f"scenes {evaluator.seed} {split}")
    scenes = [request.reference_scene(rng) for request in requests]
    drawn = draw_edits(evaluator, prompts, split)
    return {
        "text_to_image": text_to_image(evaluator, prompts, copies, split),
        "caption_scene_match": captions(evaluator, scenes),
        "edit": edits(drawn) | {"untouched_error": untouched_error(evaluator, drawn)},
        "tokenizer": tokenizer(evaluator, requests, scenes),
        "judge": judge_itself(requests, scenes),
        "seconds_per_picture": seconds_per_picture(evaluator),
        "settings": {
            "seed": evaluator.seed,
            "split": split,
            "prompts_per_category": prompts,
            "pictures_per_prompt": copies,
            "sampling": evaluator.model.config.image_generation | evaluator.sampling,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    parser.add_argument("--prompts", type=int, default=50, help="prompts for each category, edits for each operation")
    parser.add_argument("--pictures", type=int, default=4, help="pictures for each prompt")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="dev is for choosing settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance-scale", type=float, help="instead of the checkpoint's own default")
    parser.add_argument("--temperature", type=float, help="instead of the checkpoint's own default")
    parser.add_argument("--top-k", type=int, help="instead of the checkpoint's own default")
    parser.add_argument("--top-p", type=float, help="instead of the checkpoint's own default")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    model = NextFlowForConditionalGeneration.from_pretrained(arguments.model).eval()
    processor = NextFlowProcessor.from_pretrained(arguments.model)
    given = {name: getattr(arguments, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    sampling = {name: value for name, value in given.items() if value is not None}
    evaluator = Evaluator(model, processor, arguments.seed, **sampling)
    scores = evaluate(evaluator, arguments.prompts, arguments.pictures, arguments.split)
    if arguments.json:
        print(json.dumps(scores, indent=2))
    else:
        for name, value in scores.items():
            print(f"{name}: {json.dumps(value)}")


if __name__ == "__main__":
    main()
