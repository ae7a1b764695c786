"""Exported checkpoints load in fresh processes, with and without the import, from a folder and from the Hub."""

import base64
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image

from diffusers_nextflow import NextFlowPipeline
from tests.fresh import run_fresh
from tests.hub_stand_in import hub_stand_in
from transformers_nextflow.cli import main
from transformers_nextflow.scales import ScheduleTable
from transformers_nextflow.utils.export import model_card

PICTURE = """
from transformers import AutoConfig, AutoImageProcessor, AutoModelForMultimodalLM, AutoProcessor
model = AutoModelForMultimodalLM.from_pretrained(NAME, **TRUST).eval()
processor = AutoProcessor.from_pretrained(NAME, **TRUST)
chat = [{"role": "user", "content": "a red circle"}]
inputs = processor.apply_chat_template(chat, generation_mode="image")
tokens = model.generate(**inputs, generation_mode="image", seed=0)
processor.post_process_image(model.decode_image_tokens(tokens, (3, 3)))[0].save(PNG)
"""


@pytest.fixture(scope="module")
def picture(tiny_model, tiny_processor) -> Image.Image:
    """What the model itself draws."""
    chat = [{"role": "user", "content": "a red circle"}]
    inputs = tiny_processor.apply_chat_template(chat, generation_mode="image")
    tokens = tiny_model.generate(**inputs, generation_mode="image", seed=0)
    return tiny_processor.post_process_image(tiny_model.decode_image_tokens(tokens, (3, 3)))[0]


def same(path: Path, picture: Image.Image) -> bool:
    return Image.open(path).tobytes() == picture.tobytes()


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "exported"
    assert main(["export", str(tiny_checkpoint), "--to", str(folder)]) == 0
    return folder


def test_trusted_without_the_import_and_untrusted_with_it_draw_the_same(exported, picture, tmp_path):
    script = f"""
import sys
NAME, PNG, TRUST = {str(exported)!r}, "trusted.png", {{"trust_remote_code": True}}
assert "transformers_nextflow" not in sys.modules
{PICTURE}
assert type(AutoImageProcessor.from_pretrained(NAME, **TRUST)).__name__ == "NextFlowImageProcessor"
model.save_pretrained("again")
"""
    run_fresh(script, tmp_path)
    assert same(tmp_path / "trusted.png", picture)
    script = f'import transformers_nextflow\nNAME, PNG, TRUST = {str(exported)!r}, "imported.png", {{}}\n{PICTURE}'
    run_fresh(script, tmp_path)
    assert same(tmp_path / "imported.png", picture)


def test_the_export_holds_what_the_hub_shows(exported, tiny_checkpoint):
    names = {path.name for path in exported.iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"processor_config.json", "chat_template.jinja", "tokenizer.json"} <= names
    weights = "model.safetensors"
    assert (exported / weights).read_bytes() == (tiny_checkpoint / weights).read_bytes()
    references = [
        *json.loads((exported / "config.json").read_text())["auto_map"].values(),
        *json.loads((exported / "processor_config.json").read_text())["auto_map"].values(),
    ]
    for reference in references:
        module, name = reference.split(".")
        assert name in (exported / f"{module}.py").read_text()
    card = (exported / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: transformers" in card
    assert yaml.safe_load(card.split("---")[1])["widget"][0]["text"]
    assert "24 x 24" in card and "Limits" in card and "Licence" in card


def test_the_handler_of_endpoints_draws_and_edits_as_the_pipeline(exported, tmp_path):
    """As the Hub's endpoints load it: a module by its path, and requests of JSON."""
    assert (exported / "requirements.txt").read_text().split() == ["transformers-nextflow[diffusers]"]
    spec = importlib.util.spec_from_file_location("handler", exported / "handler.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    handler, pipeline = module.EndpointHandler(str(exported)), NextFlowPipeline.from_pretrained(exported)
    drawn = handler({"inputs": "a star", "parameters": {"seed": 3}})
    assert drawn.tobytes() == pipeline("a star", seed=3).images[0].tobytes()
    assert handler({"inputs": "a star"}).size == drawn.size
    drawn.save(tmp_path / "star.png")
    image = base64.b64encode((tmp_path / "star.png").read_bytes()).decode()
    edited = handler({"inputs": "a moon", "parameters": {"seed": 3, "image": image}})
    assert edited.tobytes() == pipeline("a moon", image=drawn, seed=3).images[0].tobytes()
    with pytest.raises(ValueError, match="Only base64"):
        handler({"inputs": "a moon", "parameters": {"image": str(tmp_path / "star.png")}})


def test_the_cards_usage_runs(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), flags=re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert Image.open(tmp_path / "picture.png").size == (24, 24)


def test_a_readme_of_the_folder_is_kept(tiny_checkpoint, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_checkpoint.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    readme = "---\nlicense: mit\ntags: [mine]\n---\n# Mine\n\nScore: 0.5. Made of {nothing}.\n"
    (source / "README.md").write_text(readme)
    (source / "scores.json").write_text('{"score": 0.5}')
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    assert main(["export", str(source), "--to", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    head = card.split("---\n")[1]
    assert "license: mit" in head and "tags: [mine]" in head and "tags: [nextflow]" not in head
    assert "Score: 0.5. Made of {nothing}." in card
    assert (tmp_path / "out" / "scores.json").exists() and not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_a_readme_of_front_matter_alone_is_kept(tiny_checkpoint, tmp_path):
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    (source / "README.md").write_text("---\nlicense: mit\n---")
    assert main(["export", str(source), "--to", str(tmp_path / "out")]) == 0
    assert yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])["license"] == "mit"


@pytest.mark.parametrize(("count", "more"), [(2, ""), (12, ""), (13, " and 1 more"), (20, " and 8 more")])
def test_a_card_counts_parameters_and_names_a_dozen_sizes(count, more, tmp_path):
    table = ScheduleTable([[(1, 1), (1, width)] for width in range(1, count + 1)], {"level": 2}, 8)
    config = SimpleNamespace(vq_config=SimpleNamespace(schedule_table=lambda: table))
    weights = SimpleNamespace(shapes={"matrix": (1_000, 20_000), "vector": (3_456_789,)})
    (tmp_path / "README.md").write_text("# Mine\n\ntext\n\n# Scores\n")
    card = model_card(tmp_path, config, weights, "someone/model")
    sizes = ", ".join(f"8 x {8 * width}" for width in range(1, min(count, 12) + 1))
    assert f"(height x width): {sizes}{more}.\n" in card and "23.5 M parameters" in card
    assert card.endswith("\n## Mine, as its authors describe it\n\ntext\n\n# Scores\n") and "\n# model\n" in card


def test_pushing_and_loading_from_the_hub(tiny_checkpoint, picture, tmp_path):
    """Create, upload, commit, download, load: by the command, and by the methods of model and processor."""
    script = f"""
import os
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from diffusers_nextflow import NextFlowPipeline
from transformers_nextflow.cli import main
assert main(["export", {str(tiny_checkpoint)!r}, "--to", "someone/exported", "--push"]) == 0
NextFlowForConditionalGeneration.from_pretrained({str(tiny_checkpoint)!r}).push_to_hub("someone/pushed")
NextFlowProcessor.from_pretrained({str(tiny_checkpoint)!r}).push_to_hub("someone/pushed")
NAME, PNG, TRUST = "someone/pushed", "pushed.png", {{}}
{PICTURE}
"""
    with hub_stand_in() as hub:
        run_fresh(script, tmp_path, **hub.environment)
        trusted = f'NAME, PNG, TRUST = "someone/exported", "exported.png", {{"trust_remote_code": True}}\n{PICTURE}'
        run_fresh(trusted, tmp_path, **hub.environment)
    assert same(tmp_path / "pushed.png", picture) and same(tmp_path / "exported.png", picture)
    assert hub.repositories.keys() == {"someone/exported", "someone/pushed"}
    weights = (tiny_checkpoint / "model.safetensors").read_bytes()
    assert hub.repositories["someone/exported"]["model.safetensors"] == weights
    assert "POST /api/repos/create" in hub.calls
    assert "POST /api/models/someone/exported/commit/main" in hub.calls
    assert any(call.startswith("PUT /upload/") for call in hub.calls)
    assert 'from_pretrained("someone/exported"' in hub.repositories["someone/exported"]["README.md"].decode()


def test_a_link_to_an_empty_folder_stays_one(tiny_checkpoint, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk", target_is_directory=True)
    assert main(["export", str(tiny_checkpoint), "--to", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_a_volume_is_told_before_anything_is_written(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """To rename a folder to it fails, in the end."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    assert main(["export", str(tiny_checkpoint), "--to", str(tmp_path / "out")]) == 2
    assert "is the root of a file system; name a new folder in it" in capsys.readouterr().err
    assert not any((tmp_path / "out").iterdir())


def test_a_hub_that_does_not_answer_is_an_error_of_one_line(tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    assert main(["export", str(tiny_checkpoint), "--to", "someone/exported", "--push"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the Hub does not answer: ") and error.count("\n") == 1


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "model.safetensors is truncated or no safetensors file"


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    return "holds neither model.safetensors.index.json nor model.safetensors; other formats are not read"


def outside(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"weight_map": {"a": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "must name .safetensors files of its own folder, got '../model.safetensors'"


@pytest.mark.parametrize("damage", [truncated, pickled, outside])
def test_damaged_weights_are_refused(damage, tiny_checkpoint, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_checkpoint.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    message = damage(source)
    assert main(["export", str(source), "--to", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nowhere", "--to", "out"), "there is no model directory nowhere"),
        ((".", "--to", "out"), "config.json"),
        (("CHECKPOINT", "--to", "no repository", "--push"), "a repository reads \"owner/name\", got 'no repository'"),
        (("CHECKPOINT", "--to", "."), ". exists already; name a new folder"),
    ],
)
def test_user_errors(arguments, message, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")
    arguments = [str(tiny_checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]
    assert main(["export", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
