"""Training of the transformer: pictures are coded once, then text and codes are trained on together."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowVQModel, SelfCorrection
from transformers_nextflow.layout import num_image_slots

from .data import sample_canvas, to_pixel_values
from .grammar import DESCRIBE_QUESTIONS, Document, ask, caption, describe_scene, sample_document
from .loop import Run, save_atomically, world
from .sizes import CANVASES, PATCH_SIZE, nextflow_config
from .world import Scene, render

CORRECTION = SelfCorrection(token_share=(0.0, 0.6), top_k=4)
VARIANTS = 2  # self-corrected encodings of each target picture
PICTURES, EDITS = 60_000, 20_000
BATCH_TOKENS = 5_500
TASKS = ("t2i", "caption", "vqa", "edit")
TASK_WEIGHTS = (0.55, 0.12, 0.05, 0.28)  # of batches
NULL_PROMPT_SHARE = 0.1
IGNORE = -100


@dataclass
class Coded:
    """Codes of one canvas's pictures: targets (n, L) and self-corrected inputs (VARIANTS, n, L), int16."""

    targets: torch.Tensor
    inputs: torch.Tensor


def extract(folder: Path, vq_model: NextFlowVQModel) -> dict[str, list]:
    """Draw the training documents and code their pictures, batch by batch of one canvas; resumes from its shards."""
    shards = []
    rank, processes = world()
    plan = [("picture", i) for i in range(PICTURES // 500)] + [("edit", i) for i in range(EDITS // 500)]
    for index, (kind, shard) in enumerate(plan):
        path = folder / "codes" / f"{kind}-{shard:03d}.pt"
        if not path.exists() and index % processes == rank:
            save_atomically(_extract_shard(vq_model, kind, shard), path)
        shards.append((kind, path))
    if processes > 1:
        torch.distributed.barrier()
    pools: dict[str, list] = {"picture": [], "edit": []}
    for kind, path in shards:
        pools[kind].append(torch.load(path, weights_only=True))
    return pools


def _extract_shard(vq_model: NextFlowVQModel, kind: str, shard: int) -> dict:
    rng = random.Random(f"extract {kind} {shard}")
    canvas = sample_canvas(rng)
    documents = [sample_document(rng, "edit" if kind == "edit" else "t2i", canvas) for _ in range(500)]
    result = {"canvas": list(canvas), "texts": [document.texts[0] for document in documents]}
    for position in range(2 if kind == "edit" else 1):
        scenes = [document.scenes[position] for document in documents]
        is_target = position == len(documents[0].scenes) - 1
        targets, inputs = [], []
        for start in range(0, len(scenes), 50):
            pixels = to_pixel_values([render(scene) for scene in scenes[start : start + 50]])
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            features = vq_model.features(pixels)
            schedule = vq_model.schedules.by_size(*canvas)
            for variant in range(VARIANTS if is_target else 0):
                keys = [f"{kind} {shard} {start + i}" for i in range(len(pixels))]
                coded = vq_model.quantizer(features, schedule, CORRECTION, seed=variant, keys=keys)
                targets.append(coded.target_codes)
                inputs.append(coded.input_codes)
            if not is_target:
                targets.append(vq_model.quantizer(features, schedule).target_codes)
        per = VARIANTS if is_target else 1
        stacked = torch.stack(targets).unflatten(0, (-1, per)).transpose(0, 1).flatten(1, 2).to(torch.int16)
        result[f"targets_{position}"] = stacked  # (variants, 500, L)
        if is_target:
            stacked = torch.stack(inputs).unflatten(0, (-1, per)).transpose(0, 1).flatten(1, 2)
            result[f"inputs_{position}"] = stacked.to(torch.int16)
        result[f"scenes_{position}"] = [scene.to_dict() for scene in scenes]
    return result


class Batches:
    """Batches of one task and one canvas: input ids, labels and codes, as the model's forward takes them."""

    def __init__(self, pools: dict[str, list], tokenizer: PreTrainedTokenizerFast, model):
        self.pools, self.tokenizer, self.model = pools, tokenizer, model
        config = model.config
        self.boi, self.eoi, self.image = config.boi_token_id, config.eoi_token_id, config.image_token_id
        encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        self.user, self.assistant = encode("<|im_start|>user\n"), encode("<|im_end|>\n<|im_start|>assistant\n")
        self.end, self.encode = encode("<|im_end|>\n"), encode
        self.scenes = {
            kind: [[Scene.from_dict({**s, "objects": s["objects"]}) for s in _plain(shard["scenes_0"])] for shard in pool]
            for kind, pool in pools.items()
        }

    def image_ids(self, schedule, last_scale: bool) -> list[int]:
        return [self.boi] + [self.image] * num_image_slots(schedule, last_scale) + [self.eoi]

    def draw(self, rng: random.Random) -> dict:
        task = rng.choices(TASKS, TASK_WEIGHTS)[0]
        kind = "edit" if task == "edit" else "picture"
        number = rng.randrange(len(self.pools[kind]))
        shard, scenes = self.pools[kind][number], self.scenes[kind][number]
        schedule = self.model.model.schedules.by_size(*shard["canvas"])
        condition, target = self.image_ids(schedule, self.model.config.condition_last_scale), self.image_ids(schedule, False)
        length = {"t2i": 24 + len(target), "edit": 24 + len(condition) + len(target)}.get(task, 40 + len(condition))
        chosen = [rng.randrange(len(scenes)) for _ in range(BATCH_TOKENS // length)]
        variant = rng.randrange(VARIANTS)
        rows, targets, inputs = [], [], []
        coarse = schedule.num_codes - schedule.lengths[-1]
        for index in chosen:
            scene = scenes[index]
            if task in ("caption", "vqa"):
                question, answer = rng.choice(DESCRIBE_QUESTIONS), caption(scene)
                if task == "vqa":
                    question, answer = ask(rng, scene)
                prompt = self.user + condition + self.encode(question) + self.assistant
                reply = self.encode(answer) + self.end
                rows.append((prompt + reply, [IGNORE] * len(prompt) + reply))
                targets.append(shard["targets_0"][variant, index])
                inputs.append(shard["targets_0"][variant, index, :coarse])
                # a condition image is read as it is: the nearest codes throughout
                continue
            text = shard["texts"][index]
            if task == "t2i" and rng.random() < 0.5:
                text = describe_scene(rng, scene).text
            words = [] if rng.random() < NULL_PROMPT_SHARE else self.encode(text)
            prompt = self.user + (condition if task == "edit" else []) + words + self.assistant
            rows.append((prompt + target + self.end, [IGNORE] * len(prompt) + target + self.end))
            if task == "edit":
                targets.append(shard["targets_0"][0, index])
                inputs.append(shard["targets_0"][0, index, :coarse])
            position = 1 if task == "edit" else 0
            targets.append(shard[f"targets_{position}"][variant, index])
            inputs.append(shard[f"inputs_{position}"][variant, index, :coarse])
        return self._collate(rows, targets, inputs, schedule.final_grid)

    def _collate(self, rows, targets, inputs, grid) -> dict:
        longest = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [IGNORE] * (longest - len(labels)) for _, labels in rows]),
            "image_codes": torch.cat(targets).long(),
            "image_input_codes": torch.cat(inputs).long(),
            "image_grid_hw": torch.tensor([grid] * len(targets)),
        }
