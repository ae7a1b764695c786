"""The console command on a tiny checkpoint; `flops` is tested with its module."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from tests.fresh import run_fresh
from transformers_nextflow import cli
from transformers_nextflow.cli import main
from transformers_nextflow.utils import loading


@pytest.fixture
def run(console):
    """Run a command in an empty folder: its status, standard output and last line of standard error."""

    def run(*arguments, **kwargs):
        status, out, err = console(*arguments, **kwargs)
        return status, out, err.splitlines()[-1] if err else ""

    return run


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def bytes_of(path) -> bytes:
    return Image.open(path).convert("RGB").tobytes()


def test_generate_is_the_models_own_generation(run, tiny_model, tiny_processor):
    status, out, _ = run("generate", "a red circle", "--seed", 3, "--output", "new/a.png", "--json")
    assert status == 0
    figures = json.loads(out)
    seconds = figures.pop("seconds")
    told = {"paths": ["new/a.png"], "prompt": "a red circle", "width": 24, "height": 24, "seed": 3}
    assert figures == told and seconds > 0
    chat = [{"role": "user", "content": "a red circle"}]
    inputs = tiny_processor.apply_chat_template(chat, generation_mode="image")
    codes = tiny_model.generate(**inputs, generation_mode="image", seed=3)
    (expected,) = tiny_processor.post_process_image(tiny_model.decode_image_tokens(codes, (3, 3)))
    assert bytes_of("new/a.png") == expected.tobytes()


def test_generate_several_of_a_size(run, tmp_path):
    status, out, _ = run("generate", "a", "--seed", 1, "--num-images", 2, "--aspect-ratio", "1:2", "--temperature", 2)
    assert status == 0
    assert "picture-0.png  16x32 pixels, seed 1" in out and "picture-1.png  16x32 pixels, seed 1" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture-0.png", "picture-1.png"]
    assert bytes_of("picture-0.png") != bytes_of("picture-1.png")
    run("generate", "a", "--seed", 1, "--height", 32, "--width", 16, "--temperature", 2, "--output", "one.png")
    assert bytes_of("one.png") == bytes_of("picture-0.png")


def test_a_printed_seed_repeats_the_picture(run):
    _, out, _ = run("generate", "a", "--output", "a.png", "--json")
    run("generate", "a", "--output", "b.png", "--seed", json.loads(out)["seed"])
    run("generate", "a", "--output", "c.png", "--seed", json.loads(out)["seed"] + 1)
    assert bytes_of("a.png") == bytes_of("b.png") != bytes_of("c.png")


@pytest.mark.parametrize(
    "option",
    [("--guidance-scale", 9), ("--negative-prompt", "blue"), ("--top-k", 1), ("--top-p", 0.01), ("--level", 24)],
)
def test_options_reach_the_model(run, option):
    run("generate", "a red circle", "--seed", 0, "--output", "plain.png")
    assert run("generate", "a red circle", "--seed", 0, "--output", "other.png", *option)[0] == 0
    assert (bytes_of("plain.png") == bytes_of("other.png")) == (option[0] == "--level")  # 24 is the only level


def test_edit_takes_pictures_and_keeps_the_firsts_size(run, photo, tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "second.png")
    for images, name in (((photo,), "one.png"), ((photo, "second.png"), "two.png")):
        status, out, _ = run("edit", *images, "make it blue", "--seed", 0, "--output", name, "--json")
        assert status == 0
        assert (json.loads(out)["width"], json.loads(out)["height"]) == (16, 32)
    assert bytes_of("one.png") != bytes_of("two.png")
    run("edit", photo, "make it blue", "--seed", 0, "--output", "wide.png", "--aspect-ratio", "2:1")
    assert Image.open("wide.png").size == (32, 16)


def test_describe_is_the_models_own_answer(run, photo, tiny_model, tiny_processor):
    status, out, _ = run(
        "describe", photo, "what <|im_end|> is it?", "--max-new-tokens", 6, "--json", "--output", "text.txt"
    )
    assert status == 0
    text = json.loads(out)["text"]
    content = [{"type": "image", "image": Image.open(photo)}, {"type": "text", "text": "what <|im_end|> is it?"}]
    inputs = tiny_processor.apply_chat_template([{"role": "user", "content": content}], sanitize_control_tokens=True)
    output = tiny_model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert text == tiny_processor.tokenizer.decode(output, skip_special_tokens=True).strip()
    with open("text.txt") as file:
        assert file.read() == text + "\n"
    assert run("describe", photo, "--max-new-tokens", 2)[0] == 0


def test_describe_samples_by_seed(run, photo):
    draw = lambda seed: run("describe", photo, "--temperature", 3, "--max-new-tokens", 8, "--seed", seed)[1]  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


def test_interleave_writes_text_and_pictures_in_order(run, photo, tiny_model, tiny_processor, monkeypatch, tmp_path):
    boi = tiny_model.config.boi_token_id
    monkeypatch.setattr(tiny_model.generation_config, "sequence_bias", [[[boi], 5.0]])
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    options = ("--seed", 3, "--temperature", 1.5, "--max-new-tokens", 16, "--max-images", 2, "--aspect-ratio", "2:1")
    command = ("interleave", "a story", "--image", photo, "--output", "new/story", *options)
    status, out, _ = run(*command, "--json", model=tmp_path / "model")
    assert status == 0
    figures = json.loads(out)
    content = [{"type": "image", "image": Image.open(photo)}, {"type": "text", "text": "a story"}]
    inputs = tiny_processor.apply_chat_template([{"role": "user", "content": content}], generation_mode="interleaved")
    output = tiny_model.generate(
        **inputs,
        generation_mode="interleaved",
        seed=3,
        do_sample=True,
        temperature=1.5,
        max_new_tokens=16,
        max_new_images=2,
        image_generation={"aspect_ratio": "2:1"},
    )
    pictures = tiny_model.decode_images(output.image_codes, output.image_grid_hw)
    (parts,) = tiny_processor.post_process_multimodal_output(output, generation_mode="interleaved", pictures=pictures)
    drawn = [part for part in parts if not isinstance(part, str)]
    assert len(drawn) == 2 and len(parts) > 2 and figures["seed"] == 3
    lines = []
    for part, entry in zip(parts, figures["parts"], strict=True):
        if isinstance(part, str):
            assert entry == {"text": part}
            lines.append(part)
        else:
            assert (entry["width"], entry["height"]) == (32, 16) and bytes_of(entry["path"]) == part.tobytes()
            lines.append(f"![]({entry['path'].removeprefix('new/story/')})")
    with open("new/story/answer.md", newline="") as file:
        assert file.read() == "\n\n".join(lines) + "\n"
    status, out, _ = run(*command, model=tmp_path / "model")
    assert status == 0 and "picture-1.png  32x16 pixels" in out
    if isinstance(parts[0], str):
        assert parts[0].split()[0] in out, "text is printed as it comes"


def test_a_text_is_printed_to_its_end_before_its_picture(run, tiny_model, tiny_processor, monkeypatch):
    """And the one after it begins a line."""
    monkeypatch.setattr(cli, "load_model", lambda name: (tiny_model, tiny_processor))
    boi, eos = tiny_model.config.boi_token_id, tiny_processor.tokenizer.eos_token_id
    ids = [*tiny_processor.tokenizer("red circle")["input_ids"], boi, *tiny_processor.tokenizer("a star")["input_ids"]]
    steps = iter([*ids, eos])

    def say(module, args, logits):
        return logits.index_fill(-1, torch.tensor(next(steps)), 1e3)

    handle = tiny_model.lm_head.register_forward_hook(say)
    _, out, _ = run("interleave", "a", "--output", "story")
    handle.remove()
    assert out.splitlines()[:2] == ["red circle", "a star"]


def test_an_answer_takes_the_place_of_an_earlier_ones_pictures_alone(tmp_path):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "picture-2.png")  # as `generate --num-images` leaves them
    cli.save_answer(["two", red, blue], tmp_path)
    (tmp_path / "picture-1.png").unlink()
    cli.save_answer(["one", blue], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.md", "picture-0.png", "picture-2.png"]
    cli.save_answer(["none"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.md", "picture-2.png"]


def test_reconstruct_shows_both_and_their_psnr(run, photo, tiny_model, tmp_path):
    status, out, _ = run("reconstruct", photo, "--output", "pair.png", "--json")
    assert status == 0
    figures = json.loads(out)
    assert (figures["path"], figures["width"], figures["height"]) == ("pair.png", 16, 32)
    pair = np.asarray(Image.open("pair.png"), dtype=float)
    left, right = pair[:, :16], pair[:, 16:]
    assert np.array_equal(left, np.asarray(Image.open(photo)))
    assert figures["psnr"] == pytest.approx(20 * np.log10(255 / np.sqrt(((left - right) ** 2).mean())))
    vq_model = tiny_model.model.vq_model
    pixels = torch.from_numpy(left / 127.5 - 1).float().permute(2, 0, 1)[None]
    decoded = vq_model.decode(vq_model.encode(pixels), (4, 2))[0].permute(1, 2, 0)
    assert np.abs(right - ((decoded + 1) * 127.5).numpy()).max() < 0.51
    assert f"PSNR {figures['psnr']:.2f} dB" in run("reconstruct", photo)[1]

    vq_model.save_pretrained(tmp_path / "tokenizer")
    _, alone, _ = run("reconstruct", photo, "--json", model=tmp_path / "tokenizer")
    assert json.loads(alone)["psnr"] == figures["psnr"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("edit", "missing.png", "a"), "there is no image file missing.png"),
        (("describe", "https://example.org/a.png"), "there is no image file https://example.org/a.png"),
        (("describe", "text.png"), "cannot read the image text.png: cannot identify image file"),
        (("reconstruct", "half.png"), "cannot read the image half.png: "),
        (("generate", "a", "--height", "24"), "give height and width both, got 24 and None"),
        (("generate", "a", "--height", "24", "--width", "24", "--level", "24"), "give aspect_ratio and level, or "),
        (("generate", "a", "--level", "512"), "level must be one of 24, got 512"),
        (("generate", "a", "--top-p", "2"), "top_p must be a number in"),
        (("generate", "a", "--num-images", "0"), "num_images_per_prompt must be at least 1, got 0"),
        (("generate", "a", "--output", "a.jpg"), "--output must end in .png, got a.jpg"),
        (("generate", "a", "--output", "text.png/a.png"), ""),
        (("generate", "a", "--output", "folder.png"), "--output must be a file, got the folder folder.png"),
        (("generate", "a", "--output", "folder.png", "--num-images", "2"), "--output must be a file, got the folder "),
        (("reconstruct", "photo.png", "--output", "folder.png"), "--output must be a file, got the folder folder.png"),
        (("interleave", "a", "--output", "text.png"), "--output must be a folder, got the file text.png"),
        (("interleave", "a", "--image", "missing.png"), "there is no image file missing.png"),
        (("interleave", "a", "--max-images", "-1"), "max_new_images must be at least 0, got -1"),
    ],
)
def test_user_errors_are_one_line_and_status_2(run, photo, tmp_path, arguments, message):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(photo.read_bytes()[:300])
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder-1.png").mkdir()
    before = sorted(tmp_path.iterdir())
    status, out, error = run(*arguments)
    assert (status, out) == (2, "")
    assert error.startswith(f"error: {message}")
    assert sorted(tmp_path.iterdir()) == before, "nothing is written"


@pytest.mark.parametrize(
    "model, message",
    [
        ("no/such/model", "there is no model directory no/such/model"),
        ("https://example.org/model", "a model is a local folder or an id on the Hub, got https://example.org/model"),
        (".", "."),
        ("no/model", "there is no folder no/model, and nothing of that name came from the Hub"),
    ],
)
def test_models_that_cannot_be(run, model, message, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, _, error = run("generate", "a", model=model)
    assert status == 2
    assert message in error


def test_default_model_is_the_repositorys(run, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "DEFAULT_MODEL", Path("checkpoints", "nextflow-emoji"))  # as outside of a checkout
    status, _, error = run("generate", "a", model=None)
    assert status == 2
    assert error.startswith("error: name a model with --model")
    Path("checkpoints").mkdir()
    Path("checkpoints", "nextflow-emoji").symlink_to(tiny_checkpoint)
    assert run("generate", "a", "--output", "a.png", model=None)[0] == 0
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(loading, "DEFAULT_MODEL", tiny_checkpoint)
    assert run("generate", "a", "--output", tmp_path / "b.png", model=None)[0] == 0


@pytest.mark.parametrize("name", ["generate", "edit", "describe", "interleave", "reconstruct"])
def test_help(name, capsys):
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--model", "--output", "--json"))


@pytest.mark.parametrize(
    "name, defaults",
    [
        ("generate", {"output": "picture.png", "num-images": 1, "decoder": "vq"}),
        ("describe", {"seed": 0, "max-new-tokens": 256}),
        ("interleave", {"output": "answer", "max-new-tokens": 256, "max-images": 16}),
        ("flops", {"prompt-tokens": 100, "denoising-steps": 18, "num-images": 1, "dtype": "bfloat16"}),
        ("doctor", {"seed": 0}),
        ("serve", {"host": "127.0.0.1", "port": 8000}),
        ("evaluate loss", {"batch-size": 1}),
        ("evaluate psnr", {"batch-size": 16}),
        ("evaluate rfid", {"batch-size": 16}),
    ],
)
def test_help_names_the_defaults(name, defaults, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*name.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for option, value in defaults.items():
        (line,) = [line for line in lines if f" --{option} " in line]
        assert f"[default: {value}]" in line


def test_serve_names_its_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, _, error = run("serve")
    assert status == 2 and "pip install 'transformers-nextflow[serve]'" in error


def test_serve_runs_the_app_where_it_is_asked_to(run, tiny_checkpoint, monkeypatch):
    testclient = pytest.importorskip("fastapi.testclient", reason="fastapi is not installed")
    made, exact = [], []

    class Server:
        def __init__(self, app, host: str, port: int):
            made.append((testclient.TestClient(app), host, port))

        def run(self):
            raise KeyboardInterrupt  # as uvicorn does after a good end

    monkeypatch.setattr("transformers_nextflow.serving.ending.GracefulServer", Server)
    monkeypatch.setattr("transformers_nextflow.serving.jobs.make_exact", exact.append)
    assert run("serve", "--host", "0.0.0.0", "--port", 8123, "--api-key", "key")[0] == 0 and not exact
    assert run("serve", "--exact")[0] == 0 and len(exact) == 1
    assert [place for _, *place in made] == [["0.0.0.0", 8123], ["127.0.0.1", 8000]]
    (guarded, *_), (free, *_) = made
    assert free.get("/v1/models").json()["data"][0]["id"] == tiny_checkpoint.name
    assert guarded.get("/v1/models").status_code == 401
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "a package that is not installed" in run("serve", "--ray", 2)[2]


OF_TRAINING = {
    "data extract": ("photos", "--output", "out"),
    "data pack": ("documents", "--output", "out"),
    "data verify": ("packs",),
    "data inspect": ("packs",),
    "evaluate loss": ("packs",),
    "finetune": ("photos", "--output", "out"),
    "replace-tokenizer": ("tokenizer", "--output", "out"),
}


def test_commands_of_training_name_their_extra(tmp_path):
    commands = [[*name.split(), *rest] for name, rest in OF_TRAINING.items()]
    script = f"""
import sys
absent = ("datasets", "pyarrow")
sys.modules |= {{name: None for name in [*sys.modules, *absent] if name.split(".")[0] in absent}}
sys.stderr = sys.stdout
from transformers_nextflow.cli import main
assert {{main(command) for command in {commands}}} == {{2}}
"""
    for name, line in zip(OF_TRAINING, run_fresh(script, tmp_path).splitlines(), strict=True):
        assert line.startswith(f"error: {name} needs a package that is not installed"), line
        assert line.endswith("pip install 'transformers-nextflow[train]'")
