"""Training of the transformer: pictures are coded once, then text and codes are trained on together."""

import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowVQModel, SelfCorrection
from transformers_nextflow.layout import num_image_slots
from transformers_nextflow.losses import IGNORE
from transformers_nextflow.scales import ScaleSchedule

from .data import sample_canvas, to_pixel_values
from .grammar import DESCRIBE_QUESTIONS, ask, caption, describe_scene, sample_document
from .loop import Run, save_atomically, world
from .sizes import nextflow_config
from .world import Scene, render

CORRECTION = SelfCorrection(probability=0.25, token_share=(0.0, 0.3), top_k=4)
VARIANTS = 2  # self-corrected encodings of each target picture
PICTURES, EDITS = 60_000, 24_000
BATCH_TOKENS = 4_000  # of each process
TASKS = ("t2i", "caption", "vqa", "edit")
TASK_WEIGHTS = (0.4, 0.25, 0.05, 0.3)  # of batches
NULL_PROMPT_SHARE = 0.1
STEPS, PEAK = 3_000, 1.2e-3


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


@torch.no_grad()
def _extract_shard(vq_model: NextFlowVQModel, kind: str, shard: int) -> dict:
    rng = random.Random(f"extract {kind} {shard}")
    canvas = sample_canvas(rng)
    documents = [sample_document(rng, "edit" if kind == "edit" else "t2i", canvas) for _ in range(500)]
    result = {"canvas": list(canvas), "texts": [document.texts[0] for document in documents]}
    schedule = vq_model.schedules.by_size(*canvas)
    for position in range(len(documents[0].scenes)):
        scenes = [document.scenes[position] for document in documents]
        coded: dict[str, list] = {"nearest": [], "targets": [], "inputs": []}
        for start in range(0, len(scenes), 50):
            pixels = to_pixel_values([render(scene) for scene in scenes[start : start + 50]])
            features = vq_model.features(pixels.contiguous(memory_format=torch.channels_last))
            coded["nearest"].append(vq_model.quantizer(features, schedule).target_codes)
            if position < len(documents[0].scenes) - 1:
                continue  # only read, never predicted
            keys = [f"{kind} {shard} {start + index}" for index in range(len(pixels))]
            variants = [vq_model.quantizer(features, schedule, CORRECTION, seed, keys) for seed in range(VARIANTS)]
            coded["targets"].append(torch.stack([variant.target_codes for variant in variants]))
            coded["inputs"].append(torch.stack([variant.input_codes for variant in variants]))
        for name, chunks in coded.items():
            if chunks:
                result[f"{name}_{position}"] = torch.cat(chunks, dim=-2).to(torch.int16)
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
            kind: [[Scene.from_dict(scene) for scene in shard["scenes_0"]] for shard in pool]
            for kind, pool in pools.items()
        }

    def image_ids(self, schedule: ScaleSchedule, last_scale: bool) -> list[int]:
        return [self.boi] + [self.image] * num_image_slots(schedule, last_scale) + [self.eoi]

    def draw(self, rng: random.Random) -> dict:
        task = rng.choices(TASKS, TASK_WEIGHTS)[0]
        kind = "edit" if task == "edit" else "picture"
        number = rng.randrange(len(self.pools[kind]))
        shard, scenes = self.pools[kind][number], self.scenes[kind][number]
        schedule = self.model.model.schedules.by_size(*shard["canvas"])
        condition, target = (
            self.image_ids(schedule, self.model.config.condition_last_scale),
            self.image_ids(schedule, False),
        )
        # the number of rows does not depend on whether conditions carry their last scale, so that both can be compared
        read = len(self.image_ids(schedule, True))
        length = {"t2i": 24 + len(target), "edit": 24 + read + len(target)}.get(task, 40 + read)
        chosen = [rng.randrange(len(scenes)) for _ in range(BATCH_TOKENS // length)]
        variant = rng.randrange(VARIANTS)
        rows, targets, inputs = [], [], []
        coarse = schedule.offsets[-1]  # codes of all scales but the last
        for index in chosen:
            scene = scenes[index]
            if task in ("caption", "vqa"):
                question, answer = rng.choice(DESCRIBE_QUESTIONS), caption(scene)
                if task == "vqa":
                    question, answer = ask(rng, scene)
                prompt = self.user + condition + self.encode(question) + self.assistant
                reply = self.encode(answer) + self.end
                rows.append((prompt + reply, [IGNORE] * len(prompt) + reply))
                targets.append(shard["nearest_0"][index])  # what is only read is never disturbed
                inputs.append(shard["nearest_0"][index, :coarse])
                continue
            text = shard["texts"][index]
            if task == "t2i" and rng.random() < 0.5:
                text = describe_scene(rng, scene).text
            words = [] if rng.random() < NULL_PROMPT_SHARE else self.encode(text)
            prompt = self.user + (condition if task == "edit" else []) + words + self.assistant
            rows.append((prompt + target + self.end, [IGNORE] * len(prompt) + target + self.end))
            if task == "edit":
                targets.append(shard["nearest_0"][index])
                inputs.append(shard["nearest_0"][index, :coarse])
            position = 1 if task == "edit" else 0
            targets.append(shard[f"targets_{position}"][variant, index])
            inputs.append(shard[f"inputs_{position}"][variant, index, :coarse])
        return {"task": task} | self._collate(rows, targets, inputs, schedule.final_grid)

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


def new_model(
    tokenizer: PreTrainedTokenizerFast, vq_model: NextFlowVQModel, seed: int = 4, **config
) -> NextFlowForConditionalGeneration:
    """The transformer at its start, around the trained tokenizer; code embeddings begin as its codebook."""
    torch.manual_seed(seed)
    model = NextFlowForConditionalGeneration(nextflow_config(tokenizer, vq_model.config, **config))
    model.model.vq_model.load_state_dict(vq_model.state_dict())
    model.model.code_embeddings.weight.data.copy_(vq_model.quantizer.codebook())
    return model


def trained_parts(model: NextFlowForConditionalGeneration) -> torch.nn.ModuleDict:
    """Everything but the vision tokenizer."""
    return torch.nn.ModuleDict(
        {
            "language_model": model.model.language_model,
            "code_embeddings": model.model.code_embeddings,
            "connector": model.model.connector,
            "scale_embedding": model.model.scale_embedding,
            "lm_head": model.lm_head,
            "code_head": model.code_head,
        }
    )


def train_transformer(folder: Path, tokenizer: PreTrainedTokenizerFast, vq_model: NextFlowVQModel):
    """All tasks together from the start: text-to-image, captions, questions and edits."""
    vq_model.requires_grad_(False).eval()
    pools = extract(folder, vq_model)
    return train_on_codes(folder, new_model(tokenizer, vq_model), tokenizer, pools)


def train_on_codes(
    folder: Path,
    model: NextFlowForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pools: dict[str, list],
    steps: int = STEPS,
    seed: int = 0,
) -> NextFlowForConditionalGeneration:
    """Train a new model on coded documents; `seed` names the order of the batches."""
    model.model.language_model.set_attn_implementation("eager")  # the fastest backward at these lengths on a CPU
    batches = Batches(pools, tokenizer, model)
    trained = trained_parts(model)
    for name, part in trained.items():
        if name != "code_embeddings":
            part.bfloat16()
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True)
    run = Run(folder, "transformer", trained, steps, peak=PEAK, muon="language_model.layers")

    def step_fn(step: int) -> dict[str, float]:
        batch = batches.draw(random.Random(f"transformer {seed} {step} {run.rank}"))
        task = batch.pop("task")
        output = model(**batch, use_cache=False, logits_over="none")
        norm = run.update(output.loss)
        if task != "t2i":
            return {}
        return {"loss": output.loss.item(), "norm": norm} | _scale_losses(output.token_losses, batch, model)

    run.train(step_fn)
    return model


def _scale_losses(token_losses: torch.Tensor, batch: dict, model) -> dict[str, float]:
    """Mean cross-entropy of each scale's codes."""
    layout = model.model.lay_out(batch["input_ids"], batch["image_grid_hw"], batch["attention_mask"])
    rows = range(1, model.model.schedules.max_scales + 1)
    return {f"scale_{scale}": token_losses[layout.scale_ids == scale].mean().item() for scale in rows}
