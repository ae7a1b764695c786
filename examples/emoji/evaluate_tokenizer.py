"""Scores of the vision tokenizer: `python -m examples.emoji.evaluate_tokenizer MODEL --teacher FOLDER --json`.

On names that no training saw: PSNR and SSIM of reconstructions, at both levels, and of photographs. On all pictures:
how many entries are never chosen. And whether both halves of the codebook are at work:

- names found: the semantic decoder's features of pictures held out with a name seen in other styles go through the
  teacher's last layer and head, with the mean length of the teacher's own, as distillation teaches their direction
  alone; found is a name whose text is nearest among all names of the world;
- pixels: PSNR on names never seen.

Each with the codes as they are, with the codes that one half alone would choose, and with the entries of the half that
is read shuffled.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import Siglip2Model

from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.training.metrics import psnr, ssim
from transformers_nextflow.utils.loading import load_vq_model

from .splits import NAME, PAIR
from .teacher import new_teacher, teacher_tokenizer, text_embeddings, tokenize
from .world import World, resized, to_pixel_values

BATCH = 64
SEEN_SAMPLE = 512


def encode(model: NextFlowVQModel, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.encode(batch) for batch in pixels.split(BATCH)])


def decode(model: NextFlowVQModel, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return torch.cat([model.decode(batch, grid) for batch in codes.split(BATCH)])


def fidelity(rebuilt: torch.Tensor, pixels: torch.Tensor) -> dict[str, float]:
    """Means over (B, 3, H, W) pictures in [-1, 1] of PSNR in dB and SSIM."""
    return {
        "psnr": round(float(psnr(rebuilt, pixels).mean()), 3),
        "ssim": round(float(ssim(rebuilt, pixels).mean()), 4),
    }


def photographs(edge: int) -> list[np.ndarray]:
    """Centres of photographs that scikit-image ships, which no training saw."""
    import skimage

    pictures = []
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
        image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        pictures.append(
            np.asarray(image.resize((edge, edge), Image.Resampling.BICUBIC, (left, top, left + short, top + short)))
        )
    return pictures


class HalvesAtWork:
    """Codes and entries with one half of the codebook taken away."""

    def __init__(self, model: NextFlowVQModel, seed: int = 0):
        self.model, self.weights = model, model.quantizer.weights
        self.order = torch.randperm(model.config.codebook_size, generator=torch.Generator().manual_seed(seed))

    def codes(self, pixels: torch.Tensor, semantic: float = 1.0, pixel: float = 1.0) -> torch.Tensor:
        """Codes when the lookup weighs its halves like this."""
        self.model.quantizer.weights = (semantic * self.weights[0], pixel * self.weights[1])
        codes = encode(self.model, pixels)
        self.model.quantizer.weights = self.weights
        return codes

    def shuffled(self, codes: torch.Tensor) -> torch.Tensor:
        """Other codes, each always the same for one code: what reads their entries gets shuffled ones."""
        return self.order[codes]


class NamesFound:
    """R@1 of names among all of the world, by decoded semantic features and a teacher."""

    def __init__(self, world: World, teacher: Siglip2Model, model: NextFlowVQModel):
        self.world, self.teacher, self.model = world, teacher, model
        tokenizer = teacher_tokenizer(world)
        self.names = sorted(set(world.names))
        batches = [self.names[start : start + 256] for start in range(0, len(self.names), 256)]
        self.texts_ND = torch.cat([text_embeddings(teacher, tokenize(tokenizer, batch)) for batch in batches])
        seen = to_pixel_values([world.pictures[row] for row in world.seen[:: -(-len(world.seen) // SEEN_SAMPLE)]])
        own = [model.semantic_features(batch, teacher.vision_model) for batch in seen.split(BATCH)]
        self.length = torch.cat(own).norm(dim=-1).mean()

    def _head(self, features_BLD: torch.Tensor) -> torch.Tensor:
        """The teacher from the layer that the tokenizer reads to its normalised embedding."""
        vision, layer = self.teacher.vision_model, self.model.config.semantic_feature_layer
        for block in vision.encoder.layers[len(vision.encoder.layers) + 1 + layer :]:
            features_BLD = block(features_BLD, None)
        return F.normalize(vision.head(vision.post_layernorm(features_BLD)), dim=-1)

    def embeddings(self, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, D) of length 1, of codes."""
        found = []
        for batch in codes.split(BATCH):
            directions = F.normalize(self.model.condition_features(batch, grid)[2], dim=1)
            found.append(self._head(directions.flatten(2).transpose(1, 2) * self.length))
        return torch.cat(found)

    def from_codes(self, rows: list[int], codes: torch.Tensor, grid: tuple[int, int]) -> float:
        return self._score(rows, self.embeddings(codes, grid))

    def from_pixels(self, rows: list[int], pixels: torch.Tensor) -> float:
        """The teacher's own score."""
        found = []
        for batch in pixels.split(BATCH):
            found.append(self._head(self.model.semantic_features(batch, self.teacher.vision_model)))
        return self._score(rows, torch.cat(found))

    def _score(self, rows: list[int], embeddings_BD: torch.Tensor) -> float:
        nearest = (embeddings_BD @ self.texts_ND.T).argmax(dim=1).tolist()
        right = [self.names[index] == self.world.names[row] for row, index in zip(rows, nearest)]
        return round(sum(right) / len(right), 4)


def load_teacher(world: World, folder: Path) -> Siglip2Model:
    """The teacher that `examples.emoji.train` left in its output."""
    teacher = new_teacher(teacher_tokenizer(world))
    teacher.load_state_dict(load_file(folder / "model.safetensors"))
    return teacher.eval().requires_grad_(False)


@torch.inference_mode()
def evaluate(model: NextFlowVQModel, world: World, teacher: Siglip2Model | None = None) -> dict:
    """All scores; those of names need the teacher."""
    halves, scores = HalvesAtWork(model), {}
    unseen = [row for row, part in enumerate(world.parts) if part == NAME]
    grids = {64: (8, 8), 32: (4, 4)}
    for edge, grid in grids.items():
        pixels = to_pixel_values([resized(world.pictures[row], edge) for row in unseen])
        codes = encode(model, pixels)
        scores[f"unseen names, {edge} px"] = fidelity(decode(model, codes, grid), pixels)
        if edge == 64:
            semantic_only = halves.codes(pixels, pixel=0.0)
            scores["pixels at work"] = {
                "both halves choose": scores["unseen names, 64 px"]["psnr"],
                "semantic half alone chooses": fidelity(decode(model, semantic_only, grid), pixels)["psnr"],
                "pixel entries shuffled": fidelity(decode(model, halves.shuffled(codes), grid), pixels)["psnr"],
            }
    photos = to_pixel_values(photographs(64))
    scores["photographs, 64 px"] = fidelity(decode(model, encode(model, photos), (8, 8)), photos)
    used = torch.zeros(model.config.codebook_size, dtype=torch.bool)
    for start in range(0, len(world), 512):
        pixels = to_pixel_values(list(world.pictures[start : start + 512]))
        used[encode(model, pixels).unique()] = True
    scores["entries unused"] = round(1 - float(used.float().mean()), 5)
    if teacher is not None:
        rows = [row for row, part in enumerate(world.parts) if part == PAIR]
        pixels = to_pixel_values([world.pictures[row] for row in rows])
        found, codes = NamesFound(world, teacher, model), encode(model, pixels)
        scores["names found"] = {
            "teacher": found.from_pixels(rows, pixels),
            "both halves choose": found.from_codes(rows, codes, (8, 8)),
            "pixel half alone chooses": found.from_codes(rows, halves.codes(pixels, semantic=0.0), (8, 8)),
            "semantic entries shuffled": found.from_codes(rows, halves.shuffled(codes), (8, 8)),
            "pictures": len(rows),
        }
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a vision tokenizer or of a whole model")
    parser.add_argument("--data", type=Path, default=Path("runs/emoji/data"), help="of `examples.emoji.data`")
    parser.add_argument("--teacher", type=Path, help="folder of the trained teacher")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    world = World(arguments.data)
    teacher = load_teacher(world, arguments.teacher) if arguments.teacher else None
    scores = evaluate(load_vq_model(arguments.model).eval(), world, teacher)
    print(json.dumps(scores, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
