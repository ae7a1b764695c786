"""Golden checkpoints, and what they draw, read and learn: `PYTHONPATH=src:. python -m tests.golden.write`.

Two tiny models with random weights and the default mechanisms alone; an adapter and packs for the first. Beside them
stand inputs, and what the code of the day made of them; `tests/test_golden.py` asks the same of the code of today. To
write them anew changes what files mean that people have.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.data_samples import SETTINGS, documents
from tests.tiny_models import BOI, EOI, EOS, IMAGE, PAD, PATCH, Picture, batch_of, tiny_config, tiny_model
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowImageProcessor, NextFlowProcessor
from transformers_nextflow.data import ComputeBudget, CostModel, PackCollator, PackedDataset, Source, extract, pack
from transformers_nextflow.lora import lora_config

FOLDER = Path(__file__).parent
CODES = 64
# two levels of three aspect ratios; one schedule, read as in the paper without its last scale, with tied embeddings
CONFIGS = {
    "two_levels": {
        "vq": {
            "codebook_size": CODES,
            "scale_schedules": [
                [[1, 1], [2, 2], [3, 3], [4, 4]],
                [[1, 1], [1, 2], [2, 4], [3, 6]],
                [[1, 1], [2, 1], [4, 2], [6, 3]],
            ],
            "levels": {"12": 3, "16": 4},
        },
    },
    "one_level": {
        "vq": {"codebook_size": CODES, "scale_schedules": [[[1, 1], [2, 2], [3, 3]]], "levels": {"12": 3}},
        "condition_last_scale": False,
        "tie_word_embeddings": True,
    },
}
FEW_WORDS = {"sequence_bias": [[[BOI], 4.0], [[EOS], -1.0]]}
WORDS_ONLY = {"suppress_tokens": [BOI, EOI, IMAGE], "max_new_tokens": 8}
TARGETS = (0, 3, 5, 6)  # pictures of the packed documents that are drawn, not read
GRADIENTS = (
    "code_head.weight",
    "model.connector.0.weight",
    "model.code_embeddings.weight",
    "model.scale_embedding.index.weight",
    "model.scale_embedding.length.weight",
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.language_model.layers.1.mlp.down_proj.weight",
)


# What is asked


def grids_of(model) -> list[tuple[int, int]]:
    return [schedule.final_grid for schedule in model.model.schedules]


def random_codes(model, grid: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CODES, (model.model.schedules.by_grid(grid).num_codes,), generator=generator)


def pixels_of(grids: torch.Tensor) -> torch.Tensor:
    """Flat patches of smooth random pictures in [-1, 1]."""
    patches = []
    for seed, (h, w) in enumerate(grids.tolist()):
        noise = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        picture = torch.nn.functional.interpolate(noise, (h * PATCH, w * PATCH), mode="bilinear")[0]
        cells = picture.view(3, h, PATCH, w, PATCH).permute(1, 3, 2, 4, 0)
        patches.append(cells.reshape(h * w, -1))
    return torch.cat(patches)


def inputs_of(model) -> dict[str, dict[str, torch.Tensor]]:
    """By name, the tensors of the calls in [`results`]."""
    grids = grids_of(model)
    last_scale = model.config.condition_last_scale

    def picture(seed: int, is_read: bool = True) -> Picture:
        grid = grids[seed % len(grids)]
        return Picture(grid, seed, is_read and last_scale, random_codes(model, grid, seed))

    def guided(prompts: list[list], nulls: list[list]) -> dict[str, torch.Tensor]:
        negative = batch_of(model, *nulls)
        names = ("input_ids", "attention_mask")
        return batch_of(model, *prompts) | {"negative_" + name: negative[name] for name in names}

    edits = [[10, picture(1), 11], [12], [picture(2), picture(3), 13, 14]]
    nulls = [[picture(1), 20], [20, 21, 22], [picture(2), picture(3), 20]]
    to_draw = lambda rows: [[*row, BOI] for row in rows]  # noqa: E731
    chats = batch_of(model, *edits)
    pixels = {name: tensor for name, tensor in chats.items() if name != "image_codes"}
    pixels["pixel_values"] = pixels_of(chats["image_grid_hw"])
    longest = max(model.model.schedules, key=lambda schedule: schedule.num_codes)
    return {
        "prompts": guided([[10, 11, 12, 13, BOI], [14, BOI], [15, 16, 17, BOI]], [[20, BOI], [20, 21, BOI], [BOI]]),
        "edits": guided(to_draw(edits), to_draw(nulls)),
        "chats": guided(edits, nulls),
        "pixels": pixels,
        "next turn": guided([[30, 31, 32], [33], [34, 35]], [[20], [20, 21], [20]]),
        "forced": {"codes": torch.stack([random_codes(model, longest.final_grid, seed) for seed in range(3)])},
        "packed": packed(model, picture),
    }


def packed(model, picture) -> dict[str, torch.Tensor]:
    """Two rows of documents, some with condition pictures, with disturbed input codes."""
    rows = [
        [[10, 11, picture(0, False), 12, EOS], [picture(1), picture(2), 13, picture(3, False), EOS], [14, 15, EOS]],
        [[16, 17, 18, 19, EOS], [20, picture(4), 21, 22, picture(5, False), 23, picture(6, False), EOS]],
    ]
    batch = batch_of(model, *([part for document in row for part in document] for row in rows))
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    labels, documents, grids, inputs = torch.full_like(ids, -100), torch.full_like(ids, -1), [], []
    for index, row in enumerate(rows):
        column = int((mask[index] == 0).sum())
        for number, document in enumerate(row):
            for part in document:
                length = 1
                if isinstance(part, Picture):
                    schedule = model.model.schedules.by_grid(part.grid)
                    coarse = part.codes[: schedule.offsets[-1]]
                    is_target = part.seed in TARGETS
                    length = schedule.num_codes + 1 + (schedule.lengths[-1] if part.last_scale else 0)
                    if is_target:
                        labels[index, column : column + length - 1] = BOI
                    inputs.append((coarse + is_target * torch.arange(len(coarse)) // 2) % CODES)
                    grids.append(part.grid)
                else:
                    labels[index, column] = part
                documents[index, column : column + length] = number
                column += length
    return batch | {
        "input_ids": ids,
        "document_ids": documents,
        "labels": labels,
        "image_input_codes": torch.cat(inputs),
    }


# What comes of it


def draw(model, prompts: dict, grid: tuple[int, int], **controls) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes without the text rows, and the guided logits they were drawn from."""
    size = {"height": grid[0] * PATCH, "width": grid[1] * PATCH}
    options = {"generation_mode": "image", "output_logits": True, "return_dict_in_generate": True, "seed": 3}
    output = model.generate(**prompts, **options | size | controls)
    return output.sequences - model.config.text_vocab_size, torch.cat(output.logits, dim=1)


def drawings(model, inputs: dict[str, dict], grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Every way to draw pictures of one size."""
    schedule = model.model.schedules.by_grid(grid)
    ramp = torch.linspace(3.0, 1.0, len(schedule)).tolist()
    forced = inputs["forced"]["codes"][:, : schedule.num_codes]
    calls = {
        "greedy": {"guidance_scale": 1.0, "temperature": 0.0},
        "seeded": {"guidance_scale": 1.0},
        "guided": {"guidance_scale": 2.5},
        "guided per scale": {"guidance_scale": ramp, "temperature": ramp[::-1]},
        "filtered": {"guidance_scale": 1.5, "top_k": 9, "top_p": 0.7},
        "refined": {"guidance_scale": 1.5, "refine_top_k": [5, 1]},
        "forked": {"num_images_per_prompt": 2, "forced_codes": forced[:, : schedule.prefix(2).num_codes]},
        "regions": {"forced_codes": forced, "forced_mask": torch.arange(schedule.num_codes) % 3 > 0},
        "edited": {"guidance_scale": 2.0},
        "edited by images": {"guidance_scale": 2.0, "image_guidance_scale": 1.5},
    }
    found = {}
    for name, controls in calls.items():
        prompts = inputs["edits" if name.startswith("edited") else "prompts"]
        found[f"{name}/codes"], logits = draw(model, prompts, grid, **controls)
        if name in ("guided", "edited by images"):
            found[f"{name}/logits"] = logits
    ids = found["seeded/codes"] + model.config.text_vocab_size
    return found | {"seeded/pictures": model.decode_image_tokens(ids, torch.tensor([grid]))}


def turns(model, inputs: dict[str, dict]) -> dict[str, torch.Tensor]:
    """Answers of words and pictures, a second turn over the first one's cache, and words alone."""
    options = {"generation_mode": "interleaved", "max_new_tokens": 10, "max_new_images": 2, **FEW_WORDS}
    options["image_generation"] = {"guidance_scale": 2.0, "image_guidance_scale": 1.5, "top_k": 20}
    options["image_generation"]["aspect_ratio"] = "1:1"  # whatever the prompts' pictures are
    first = model.generate(**inputs["chats"], **options, do_sample=True, seed=4)
    following = model.next_turn(first, **inputs["next turn"])
    second = model.generate(**following, **options, do_sample=False, seed=5)
    found = {}
    for name, output in (("first turn", first), ("second turn", second)):
        for part in ("sequences", "attention_mask", "image_grid_hw", "image_codes", "negative_sequences"):
            found[f"{name}/{part}"] = getattr(output, part)
    return found | {
        "words/greedy": model.generate(**inputs["pixels"], **WORDS_ONLY, do_sample=False),
        "words/beams": model.generate(**inputs["pixels"], **WORDS_ONLY, num_beams=3, do_sample=False),
    }


def readings(model, inputs: dict[str, dict]) -> dict[str, torch.Tensor]:
    """Codes of pixels, and logits of both heads."""
    pixels, chats = inputs["pixels"], inputs["chats"]
    chats = {name: tensor for name, tensor in chats.items() if not name.startswith("negative")}
    with torch.no_grad():
        return {
            "encoded/codes": model.encode_images(pixels["pixel_values"], pixels["image_grid_hw"]),
            "pixels/logits": model(**pixels).logits[:, -3:],
            "chats/logits": model(**chats).logits[:, -3:],
        }


def learning(model, inputs: dict[str, dict]) -> dict[str, torch.Tensor]:
    """Loss of packed documents, of every target too, and norms of gradients."""
    model.zero_grad()
    output = model(**inputs["packed"], z_loss=1e-3, use_cache=False)
    output.loss.backward()
    norms = {f"gradient/{name}": model.get_parameter(name).grad.norm() for name in GRADIENTS}
    return norms | {"loss": output.loss.detach(), "token_losses": output.token_losses}


def results(model, inputs: dict[str, dict]) -> dict[str, torch.Tensor]:
    """Everything by name; integers are to be equal, other numbers nearly so."""
    found = turns(model, inputs) | readings(model, inputs) | learning(model, inputs)
    for grid in grids_of(model):
        size = "{}x{}".format(*grid)
        found |= {f"{size}/{name}": tensor for name, tensor in drawings(model, inputs, grid).items()}
    return found


def adapted(model, inputs: dict[str, dict], folder: Path = FOLDER / "adapter") -> torch.Tensor:
    """Logits under the golden adapter."""
    chats = {name: tensor for name, tensor in inputs["chats"].items() if not name.startswith("negative")}
    with torch.no_grad():
        return PeftModel.from_pretrained(model, folder).eval()(**chats).logits[:, -3:]


def packs_of(model, folder: Path = FOLDER / "packs") -> dict[str, torch.Tensor]:
    """What the golden packs hold, and their loss."""
    dataset = PackedDataset(folder, model, NextFlowProcessor.from_pretrained(FOLDER / "two_levels"))
    batch = PackCollator(dataset)([dataset[0], dataset[1]])
    with torch.no_grad():
        return batch | {"loss": model(**batch).loss}


# Files


def flat(inputs: dict[str, dict]) -> dict[str, torch.Tensor]:
    return {f"{name}/{part}": tensor for name, parts in inputs.items() for part, tensor in parts.items()}


def load(name: str) -> tuple[NextFlowForConditionalGeneration, dict[str, dict], dict[str, torch.Tensor]]:
    """A golden model, its inputs and its results."""
    model = NextFlowForConditionalGeneration.from_pretrained(FOLDER / name).eval()
    inputs: dict[str, dict] = {}
    for path, tensor in load_file(FOLDER / name / "inputs.safetensors").items():
        call, part = path.split("/")
        inputs.setdefault(call, {})[part] = tensor
    return model, inputs, load_file(FOLDER / name / "results.safetensors")


def processor_of(model) -> NextFlowProcessor:
    """Words of the chat template and a few more."""
    words = ["user", "assistant", "system", "a", "red", "circle", "blue", "square", "it", "the", "green", "star"]
    ids = {"<|endoftext|>": PAD, "<|im_end|>": EOS, "<|vision_start|>": BOI, "<|vision_end|>": EOI}
    ids |= {"<|image_pad|>": IMAGE, "<|im_start|>": EOS - 1, "<|unknown|>": 1}
    tokenizer = Tokenizer(models.WordLevel(ids | {word: 2 + i for i, word in enumerate(words)}, "<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(ids))
    config = model.config.vq_config
    return NextFlowProcessor(
        NextFlowImageProcessor(PATCH, scale_schedules=config.scale_schedules, levels=config.levels),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=1024
        ),
        condition_last_scale=model.config.condition_last_scale,
    )


def write_packs(model, folder: Path) -> None:
    processor_of(model).save_pretrained(FOLDER / "two_levels")
    with TemporaryDirectory() as work:
        source = f"{work}/documents.parquet"
        datasets.Dataset.from_list([document.to_row() for document in documents()]).to_parquet(source)
        extract(Source(source), FOLDER / "two_levels", f"{work}/documents", SETTINGS)
        pack([f"{work}/documents"], folder, ComputeBudget(300), CostModel("blocks", 1.0, 3e-4, 0.5))


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def main() -> None:
    for seed, (name, overrides) in enumerate(CONFIGS.items()):
        model = tiny_model(tiny_config(**overrides), seed=seed)
        model.save_pretrained(FOLDER / name)
        save(flat(inputs_of(model)), FOLDER / name / "inputs.safetensors")
        save({}, FOLDER / name / "results.safetensors")
        model, inputs, _ = load(name)
        save(results(model, inputs), FOLDER / name / "results.safetensors")
    model, inputs, _ = load("two_levels")
    model.name_or_path = "two_levels"
    torch.manual_seed(0)
    get_peft_model(model, lora_config(r=2, init_lora_weights=False)).save_pretrained(FOLDER / "adapter")
    (FOLDER / "adapter" / "README.md").unlink()
    save({"logits": adapted(load("two_levels")[0], inputs)}, FOLDER / "adapter" / "results.safetensors")
    model, *_ = load("two_levels")
    write_packs(model, FOLDER / "packs")
    save(packs_of(model), FOLDER / "packs" / "results.safetensors")


if __name__ == "__main__":
    main()
