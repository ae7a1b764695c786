"""What is written for GenEval, GenEval 2 and DPG-Bench, read back as their judges read it."""

import json
import re

import pytest
from PIL import Image, ImageChops

from benchmarks.field.layouts import DPG, GenEval, GenEval2, write_pictures

PROMPTS = [f"{count} red circles" for count in range(12)]


@pytest.fixture
def draw(tiny_model, tiny_processor):
    return lambda layout, prompts, folder, **settings: write_pictures(
        tiny_model, tiny_processor, layout(), prompts, folder, **settings
    )


def entries_file(folder, prompts=PROMPTS):
    path = folder / "entries.jsonl"
    path.write_text("".join(json.dumps({"tag": "counting", "prompt": prompt}) + "\n" for prompt in prompts))
    return path


def drawings(model, processor, prompt: str, count: int, seed: int) -> list[Image.Image]:
    """What the model draws for a prompt."""
    inputs = processor.apply_chat_template([{"role": "user", "content": prompt}], generation_mode="image")
    ids = model.generate(**inputs, generation_mode="image", seed=seed, num_images_per_prompt=count)
    return processor.post_process_image(model.decode_image_tokens(ids, (3, 3)))


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and ImageChops.difference(a, b).getbbox() is None


def test_geneval(draw, tmp_path, tiny_model, tiny_processor):
    draw(GenEval, entries_file(tmp_path), tmp_path / "out", seed=5)
    read = {}
    for folder in (tmp_path / "out").iterdir():
        assert folder.is_dir() and folder.name.isdigit()
        entry = json.loads((folder / "metadata.jsonl").read_text())
        pictures = sorted(path for path in (folder / "samples").iterdir() if re.match(r"\d+\.png", path.name))
        read[int(folder.name)] = entry["tag"], entry["prompt"], list(map(Image.open, pictures))
    assert [read[number][:2] for number in range(len(PROMPTS))] == [("counting", prompt) for prompt in PROMPTS]
    for number in (0, 5, 11):
        expected = drawings(tiny_model, tiny_processor, PROMPTS[number], 4, 5 + number)
        assert len(read[number][2]) == 4 and all(map(same, read[number][2], expected))


def test_geneval_2(draw, tmp_path, tiny_model, tiny_processor):
    draw(GenEval2, entries_file(tmp_path), tmp_path / "out")
    paths = json.loads((tmp_path / "out" / "image_paths.json").read_text())
    assert list(paths) == PROMPTS and len(set(paths.values())) == len(PROMPTS)
    (expected,) = drawings(tiny_model, tiny_processor, PROMPTS[7], 1, 7)
    assert same(Image.open(paths[PROMPTS[7]]), expected)


def test_dpg(draw, tmp_path, tiny_model, tiny_processor):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for number, prompt in enumerate(PROMPTS):
        (prompts / f"item{number:03}.txt").write_text(prompt + "\n")
    draw(DPG, prompts, tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name.split(".")[0] for file in files] == [f"item{number:03}" for number in range(len(PROMPTS))]
    sheet, edge = Image.open(files[3]), 24
    corners = [(0, 0), (edge, 0), (0, edge), (edge, edge)]
    cut = [sheet.crop((left, top, left + edge, top + edge)) for left, top in corners]
    assert sheet.size == (2 * edge, 2 * edge)
    assert all(map(same, cut, drawings(tiny_model, tiny_processor, PROMPTS[3], 4, 3)))


@pytest.mark.parametrize("layout", [GenEval, GenEval2])
def test_what_was_stopped_goes_on(draw, tmp_path, layout):
    draw(layout, entries_file(tmp_path, PROMPTS[:2]), tmp_path / "out")
    draw(layout, entries_file(tmp_path, PROMPTS[:4]), tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    draw(layout, entries_file(tmp_path, PROMPTS[:4]), tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    files = lambda name: {  # noqa: E731
        path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.png")
    }
    assert files("out") == files("whole") and len(files("out")) == 4 * layout.num_pictures


@pytest.mark.parametrize(
    "layout, lines, settings, message",
    [
        (GenEval, "", {}, "holds no prompts"),
        (GenEval, '{"prompt": "a"}\n{"tag": "b"}\n', {}, r'entry 1: needs a prompt, got {"tag": "b"}'),
        (GenEval2, '{"prompt": "a"}\n{"prompt": "a"}\n', {}, "1 occur again"),
    ],
)
def test_entries_that_do_not_fit_are_refused(draw, tmp_path, layout, lines, settings, message):
    path = tmp_path / "entries.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(layout, path, tmp_path / "out", **settings)


def test_sheets_are_of_squares(draw, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="got pictures of 32x16 pixels"):
        draw(DPG, tmp_path, tmp_path / "out", aspect_ratio="2:1")
