"""`docs/data.md` runs as written, on photographs, and what comes out shows them."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn
import torch
from PIL import Image

from transformers_nextflow.cli import main
from transformers_nextflow.data.shards import Shard, decodable_codes, images_of, read_manifest, sequence_spec
from transformers_nextflow.utils.loading import load_tokenizers, model_name

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), flags=re.DOTALL)


@pytest.fixture
def photos(tmp_path) -> dict[str, Image.Image]:
    """A folder of photographs with captions, PNG, JPEG and WebP mixed, and two broken files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    shipped = (Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images")
    originals = {}
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "china.jpg", "flower.jpg"):
        (path,) = (entry / name for entry in shipped if (entry / name).exists())
        stored = name.replace("coffee.png", "coffee.webp")
        if stored == name:
            (folder / stored).write_bytes(path.read_bytes())
        else:
            Image.open(path).save(folder / stored, quality=90)
        originals[stored] = Image.open(folder / stored).convert("RGB")
    (folder / "cut.png").write_bytes((folder / "chelsea.png").read_bytes()[:5000])
    (folder / "text.jpg").write_text("no picture")
    lines = [{"file_name": p.name, "text": f"a photo of {p.stem}"} for p in sorted(folder.iterdir())]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return originals


def test_the_documented_commands_turn_photographs_into_shards(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    for language, block in BLOCKS:
        if language == "bash":
            for command in block.split("&&"):
                program, *arguments = shlex.split(command)
                assert program == "transformers-nextflow"
                assert main(arguments) == 0, capsys.readouterr().err
        else:
            exec(compile(block, "data.md", "exec"), {})
    skipped = [json.loads(line) for line in Path("documents/skipped.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in skipped] == ["unreadable image"] * 2
    assert read_manifest(Path("packs"))["statistics"]["documents"] == 6

    # what was coded decodes to pictures that are recognisably the photographs
    _, processor, vq_model = load_tokenizers(model_name(None))
    manifest = read_manifest(Path("documents"))
    spec = sequence_spec(manifest["identity"])
    (entry,) = manifest["shards"]
    shard, table = Shard(Path("documents/data") / entry["file"]), vq_model.schedules
    names = sorted(path.name for path in Path("photos").iterdir() if path.suffix != ".jsonl")
    for index in range(6):
        row = shard.row(index)
        ((grid, targets, inputs),) = images_of(row, spec, manifest["variants"])
        pixels = vq_model.decode(torch.from_numpy(decodable_codes(targets, inputs)[None]), grid)
        decoded = np.asarray(processor.post_process_image(pixels)[0], dtype=float).ravel()
        likeness = {}
        for name, picture in photos.items():
            if table.nearest_to_image(picture.height, picture.width).final_grid == grid:
                (h, w), p = grid, table.patch_size
                patches = processor.image_processor(picture, level=table.level_of(grid), return_tensors="pt")
                pixels = patches["pixel_values"].view(h, w, p, p, 3).permute(0, 2, 1, 3, 4)
                likeness[name] = np.corrcoef(decoded, pixels.numpy().ravel())[0, 1]
        assert max(likeness, key=likeness.get) == names[int(row["key"])]
        assert max(likeness.values()) > 0.6, likeness  # of inputs that self-correction disturbed
    sheet = Image.open("sheet/sheet.png")
    assert sheet.size[0] > 700 and "a photo of chelsea" in Path("sheet/index.html").read_text()


def test_the_figures_of_packing_are_the_committed_ones():
    result = json.loads((ROOT / "benchmarks" / "results" / "packing.json").read_text())
    over, by_flops = result["budget_over"], result["flops_of_7b"]["budget_over"]
    rows = {
        "batch padding, dense mask": "padding",
        "batch padding, `blocks`": "padding, blocks",
        "concatenate and cut": "concatenate and cut",
        "best fit by length": "length",
    }
    docs = (ROOT / "docs" / "data.md").read_text()
    for title, name in rows.items():
        figures = over["one_rank"][name], over["composed_64_ranks"][name], by_flops[name]
        assert f"| {title} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |" in docs
    errors = result["cost_model_on_held_out_documents"]
    blocks, dense = (100 * errors[backend]["median_relative_error"] for backend in ("blocks", "dense"))
    assert f"within {blocks:.0f}% (median; dense {dense:.0f}%)" in docs
    assert result["dropped_tokens"] == 0
