"""Trainings by the console command, and what goes from one to the next: dtypes, adapters, averages, levels."""

import copy
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import enlarge_
from transformers.utils import logging

from tests.fresh import run_fresh
from tests.hub_stand_in import running
from transformers_nextflow import (
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowProcessor,
    NextFlowVQModel,
)
from transformers_nextflow.cli import main
from transformers_nextflow.data import PackedDataset, RawDocuments
from transformers_nextflow.data.shards import vision_identity
from transformers_nextflow.doctor import examination
from transformers_nextflow.stored_tokenizer import stored_tensors, vision_tokenizer_hash
from transformers_nextflow.training.loading import load_to_train
from transformers_nextflow.utils.loading import DEFAULT_MODEL, load_config, load_model, load_vq_model

peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
pytest.importorskip("trl")

QUIET = ("--report_to", "none", "--use_cpu", "--save_strategy", "no", "--logging_steps", "1", "--disable_tqdm", "True")
FILTER = Image.Resampling.BILINEAR  # another than by default
LORA = ("--use_lora", "--lora_r", "4")


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """The folder that the module's commands run in, with pictures of two kinds and their captions."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "photos").mkdir()
    lines = []
    for number in range(8):
        noise = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "photos" / f"{number}.png")
        text = "a red circle" if number % 2 else "a blue box"
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder


def run(*words) -> None:
    assert main(list(map(str, words))) == 0


def fails(capsys, *words) -> str:
    """The last line of what a command that cannot be obeyed says."""
    assert main(list(map(str, words))) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def train(name: str, *words) -> Path:
    run("train", "transformer", "--packs", "packs", "--output", name, "--max_steps", 2, *QUIET, *words)
    return Path(name)


@pytest.fixture(scope="module")
def start(here, tiny_model, tiny_processor) -> Path:
    """A checkpoint in bfloat16, as conversion writes them, and packs of it."""
    torch.manual_seed(1)
    model = enlarge_(copy.deepcopy(tiny_model)).to(torch.bfloat16)
    model.save_pretrained("start")
    processor = copy.deepcopy(tiny_processor)
    processor.image_processor.resample = FILTER
    processor.save_pretrained("start")
    run("data", "extract", "photos", "--output", "documents", "--task", "text-to-image", "--model", "start")
    run("data", "pack", "documents", "--output", "packs", "--length", 128, "--multiple-of", 2, "--model", "start")
    return here / "start"


@pytest.fixture(scope="module")
def tuned(start) -> Path:
    """Adapters on it, trained from a relative name."""
    return train("tuned", "--model", "start", "--learning_rate", "1e-2", *LORA)


@pytest.fixture(scope="module")
def further(tuned) -> Path:
    """The same adapters trained further."""
    return train("further", "--model", "tuned", "--learning_rate", "1e-3")


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_model(str(folder))[0].state_dict().items()}


def codes(model, processor) -> torch.Tensor:
    inputs = processor.apply_chat_template([{"role": "user", "content": "a red circle"}], generation_mode="image")
    return model.generate(**inputs, generation_mode="image", seed=3)


def moved(before: dict, after: dict) -> float:
    """Share of the numbers of the decoder's layers that differ."""
    names = [name for name in before if ".language_model.layers." in name and name.endswith("weight")]
    changed = sum(int((before[name].float() != after[name].float()).sum()) for name in names)
    return changed / sum(before[name].numel() for name in names)


def test_a_checkpoint_in_16_bits_is_trained_in_32_unless_asked(start, caplog):
    """At the rate of the paper's last stage."""
    before = NextFlowForConditionalGeneration.from_pretrained(start, dtype=torch.float32).state_dict()
    whole = train("whole", "--model", "start", "--learning_rate", "1e-5", "--lr_scheduler_type", "constant")
    after = NextFlowForConditionalGeneration.from_pretrained(whole)
    assert after.dtype == torch.float32 and moved(before, after.state_dict()) > 0.99
    assert "trained tensors are bfloat16" not in caplog.text
    coarse = train("coarse", "--model", "start", "--learning_rate", "1e-5", "--dtype", "bfloat16")
    assert moved(before, NextFlowForConditionalGeneration.from_pretrained(coarse).state_dict()) < 0.5
    assert "trained tensors are bfloat16" in caplog.text


def test_adapters_are_trained_on(tuned, further, start):
    assert {path.name for path in further.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    first, second = (peft.PeftModel.from_pretrained(base_model(), folder).state_dict() for folder in (tuned, further))
    adapters = [name for name in first if ".lora_B" in name]
    assert len(adapters) == 2 * 7
    for name in adapters:  # at a tenth of the rate they are still near to what they came from
        assert first[name].any() and not torch.equal(first[name], second[name])
        assert (first[name] - second[name]).norm() < 0.5 * first[name].norm(), name
    assert all(torch.equal(first[name], second[name]) for name in first if "base_layer" in name)


def test_reinforcement_goes_on_from_adapters(tuned):
    """By a reward of the folder that the command runs in, from prompts with pictures."""
    Path("prompts").mkdir()
    prompts = [{"prompt": text, "image": Image.open("photos/0.png")} for text in ("make it a box", "make it a cat")]
    datasets.Dataset.from_list(prompts).to_parquet("prompts/rows.parquet")
    reward = (
        "def redness(images, **columns):\n    return [image.resize((1, 1)).getpixel((0, 0))[0] for image in images]\n"
    )
    Path("own_rewards.py").write_text(reward)
    run(
        *("train", "grpo", "--dataset_name", "prompts", "--reward_funcs", "own_rewards.redness", "--model", "tuned"),
        *("--use_lora", "--output", "reinforced", "--max_steps", 1, "--num_generations", 4, "--learning_rate", "1e-3"),
        *("--per_device_train_batch_size", 4, "--prefix_tokens", 5, *QUIET),
    )
    assert peft.PeftConfig.from_pretrained("reinforced").r == 4
    first, second = (
        peft.PeftModel.from_pretrained(base_model(), folder).state_dict() for folder in (tuned, "reinforced")
    )
    moved = [name for name in first if not torch.equal(first[name], second[name])]
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    assert all((first[name] - second[name]).norm() < 0.5 * first[name].norm() for name in moved)


def test_prompts_are_a_file_with_a_held_out_split(start, capsys):
    """As every data set: no name of a file is one of a dataset on the Hub."""
    Path("split").mkdir()
    for split, text in (("train", "a box"), ("test", "a cat")):
        Path(f"split/{split}.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    Path("seen.py").write_text(
        "seen = set()\n\ndef zero(prompts, **columns):\n"
        "    seen.update(chat[-1]['content'][-1]['text'] for chat in prompts)\n    return [0.0] * len(prompts)\n"
    )
    options = ("--reward_funcs", "seen.zero", "--model", "start", "--output", "drawn", "--max_steps", 1)
    options += ("--num_generations", 2, "--per_device_train_batch_size", 2, "--prefix_tokens", 5, *QUIET)
    held_out = ("--eval_strategy", "steps", "--eval_steps", 1)
    run("train", "grpo", "--dataset_name", "split/train.jsonl", *options)
    seen = sys.modules["seen"].seen
    assert seen == {"a box"}
    run("train", "grpo", "--dataset_name", "split", *options, *held_out)
    assert seen == {"a box", "a cat"}
    message = "split/train.jsonl has no split test, but train"
    assert message in fails(capsys, "train", "grpo", "--dataset_name", "split/train.jsonl", *options, *held_out)
    assert "leave out --dataset_streaming" in fails(
        capsys, "train", "grpo", "--dataset_name", "split", *options, "--dataset_streaming"
    )
    for given in (("--dataset_name", "split"), ("--reward_funcs", "seen.zero")):
        assert "give --dataset_name and --reward_funcs" in fails(capsys, "train", "grpo", *given, "--output", "drawn")
    assert "got 'zero'" in fails(
        capsys, "train", "grpo", "--dataset_name", "split", *options, "--reward_funcs", "zero"
    )


def base_model():
    return NextFlowForConditionalGeneration.from_pretrained("start", dtype=torch.float32)


def test_options_of_lora_are_obeyed_or_refused(start, tuned, capsys):
    folder = train("options", "--model", "start", *LORA, "--lora_target_modules", "q_proj", "v_proj", "--use_dora")
    config = peft.PeftConfig.from_pretrained(folder)
    assert config.r == 4 and set(config.target_modules) == {"q_proj", "v_proj"} and config.use_dora
    assert set(config.modules_to_save) == {"code_head", "code_embeddings"}
    arguments = ("train", "transformer", "--packs", "packs", "--output", "refused", "--max_steps", 1, *QUIET)
    assert "lora_r need use_peft" in fails(capsys, *arguments, "--model", "start", "--lora_r", 4)
    assert "bnb_4bit_quant_type need load_in_4bit" in fails(capsys, *arguments, "--bnb_4bit_quant_type", "fp4")
    assert "leave out lora_r" in fails(capsys, *arguments, "--model", "tuned", *LORA)


def test_adapters_draw_what_the_model_draws_that_they_are_merged_into(further, start, tmp_path, monkeypatch):
    """From another folder than the one that they were trained from."""
    whole, again = base_model().eval(), base_model().eval()
    run("merge", further, "--output", tmp_path / "merged")
    folder = further.resolve()
    monkeypatch.chdir(tmp_path)
    merged, processor = load_model("merged")
    assert merged.dtype == torch.bfloat16 and merged.code_head.weight.dtype == torch.bfloat16
    assert torch.equal(codes(load_model(str(folder))[0], processor), codes(merged, processor))
    for name in ("merged", folder):
        run("generate", "a red circle", "--model", name, "--seed", 3, "--output", f"{Path(name).name}.png")
    assert Path("merged.png").read_bytes() == Path("further.png").read_bytes()
    assert "Licence" in Path("merged/README.md").read_text()
    run("merge", folder, "--output", "exact", "--dtype", "float32")
    exact, _ = load_model("exact")
    assert exact.dtype == torch.float32
    expected = codes(peft.PeftModel.from_pretrained(whole, folder).eval(), processor)
    assert torch.equal(codes(exact, processor), expected)
    assert not torch.equal(codes(again, processor), expected)


def test_adapters_are_exported_as_a_whole_model(further, start, tmp_path):
    run("export", further, "--to", tmp_path / "exported")
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "exported").eval()
    processor = NextFlowProcessor.from_pretrained(tmp_path / "exported")
    assert torch.equal(codes(model, processor), codes(*load_model(str(further))))
    assert (tmp_path / "exported" / "pipeline.py").exists()


def test_every_command_takes_adapters(further, start, tmp_path, capsys, monkeypatch):
    run("reconstruct", "photos/0.png", "--model", further, "--output", tmp_path / "again.png")
    run("describe", "photos/0.png", "--model", further, "--max-new-tokens", 2)
    run("flops", "--model", further, "--json")
    run("data", "verify", "packs", "--model", further)
    capsys.readouterr()
    monkeypatch.setattr(examination, "MEANS", ())
    assert main(["doctor", str(further), "packs", "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["findings"]


def test_the_doctors_figures_are_strict_json(start, tmp_path, capsys):
    """Of a model that gives no finite numbers: JSON knows neither NaN nor Infinity."""
    folder = shutil.copytree(start, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"].fill_(torch.inf)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["doctor", str(folder), "packs", "--json"]) == 1
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["findings"]


def test_evaluate_is_the_loss_of_all_targets(further, start, capsys):
    run("evaluate", "loss", "packs", "--model", further, "--dtype", "float32", "--json")
    losses = json.loads(capsys.readouterr().out)
    run("evaluate", "loss", "packs", "--model", further, "--dtype", "float32", "--batch-size", 2, "--json")
    together = json.loads(capsys.readouterr().out)
    assert together == pytest.approx(losses, rel=1e-5)
    assert {"loss", "loss_text", "loss_vision", "loss_scale_1"} <= losses.keys()
    run("evaluate", "loss", "packs", "--model", "start", "--dtype", "float32", "--json")
    assert json.loads(capsys.readouterr().out)["loss"] > losses["loss"]


def test_evaluate_prints_its_figures_alone(start, capsys):
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # where transformers' trainer prints what it measured
    try:
        run("evaluate", "loss", "packs", "--model", start, "--json")
    finally:
        logging.set_verbosity(verbosity)
    assert json.loads(capsys.readouterr().out)["loss"] > 0


SAVED = ("--save_strategy", "steps", "--save_steps", "1", "--learning_rate", "1e-2", "--ema_decay", "0.5")


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def is_average(average: dict, before: dict, *weights: dict) -> bool:
    """Whether what was trained is the average, by a decay of 1/2, of what it was after each step."""
    expected = {name: tensor.float() for name, tensor in before.items()}
    for after in weights:
        expected = {name: (expected[name] + after[name].float()) / 2 for name in expected}
    names = [name for name in expected if not torch.equal(before[name].float(), weights[-1][name].float())]
    return bool(names) and all(torch.allclose(average[name].float(), expected[name], atol=1e-6) for name in names)


@pytest.mark.parametrize("options", [(), LORA])
def test_the_average_is_a_model_of_its_own_kind(start, options, capsys):
    """In every checkpoint and beside the result; with adapters it is adapters."""
    folder = train(f"averaged{len(options)}", "--model", "start", *SAVED, *options)
    assert (folder / "ema" / "adapter_config.json").exists() == bool(options)
    before, first, last = (weights(name) for name in ("start", folder / "checkpoint-1", folder))
    if not options:
        assert is_average(weights(folder / "checkpoint-1" / "ema"), before, first)
        assert is_average(weights(folder / "ema"), before, first, last)
    model, processor = load_model(str(folder / "ema"))
    assert model.get_input_embeddings().weight.shape == before["model.language_model.embed_tokens.weight"].shape
    assert not torch.equal(model.code_head.weight, last["code_head.weight"])
    assert codes(model, processor).shape == codes(*load_model(str(folder))).shape


def test_the_average_of_a_tokenizer_is_a_tokenizer(start):
    def tokenizer(folder) -> dict:
        return state_of(NextFlowVQModel.from_pretrained(folder))

    arguments = ("--images_per_batch", 4, "--stage", "pixel", "--perceptual_weight", 0, "--discriminator_weight", 0)
    run(
        *("train", "tokenizer", "--model", "start", "--images", "photos", "--output", "pixel", "--max_steps", 2),
        *(*QUIET, *SAVED, *arguments),
    )
    before = load_model("start")[0].model.vq_model.state_dict()
    first, last = tokenizer("pixel/checkpoint-1"), tokenizer("pixel")
    assert is_average(tokenizer("pixel/checkpoint-1/ema"), before, first)
    assert is_average(tokenizer("pixel/ema"), before, first, last)
    assert NextFlowImageProcessor.from_pretrained("pixel/ema").resample == FILTER


def test_a_stage_is_of_its_packs_level(start, tuned, capsys):
    stage = {"name": "own", "trains": "all", "level": "24", "epochs": 1, "learning_rate": 1e-3}
    stage |= {"scale_loss_alpha": 0.9, "mixture": {"text-to-image": 1}}
    stages = [
        stage,
        stage | {"name": "head", "trains": "connector_and_head"},
        stage | {"name": "number", "level": 24, "learning_rate": "1e-3"},
    ]
    Path("own.yaml").write_text(json.dumps(stages))
    arguments = ("train", "transformer", "--packs", "packs", "--output", "staged", "--max_steps", 1, *QUIET)
    said = fails(capsys, *arguments, "--model", "start", "--stage", "pretrain-1024")
    assert "stage pretrain-1024 is of level 1024, the packs hold pictures of level 24" in said
    assert not Path("staged").exists()
    run(*arguments, "--model", "start", "--stages", "own.yaml", "--stage", "own")
    assert NextFlowForConditionalGeneration.from_pretrained("staged").config.scale_loss_alpha == 0.9
    run(*arguments, "--model", "tuned", "--stages", "own.yaml", "--stage", "own")
    said = fails(capsys, *arguments, "--model", "tuned", "--stages", "own.yaml", "--stage", "head")
    assert "it takes no adapters" in said
    run(*arguments, "--model", "start", "--stages", "own.yaml", "--stage", "number")
    said = fails(capsys, *arguments, "--model", "start", "--stages", "own.yaml")
    assert "--stages lists stages: say by --stage which of them is trained" in said


def test_raw_documents_are_pictures_with_captions_too(start, tuned):
    """By the command, by a name, and as rows of `datasets`: all are the same documents."""
    arguments = ("train", "transformer", "--documents", "photos", "--output", "raw", "--max_steps", 1, *QUIET)
    run(*arguments, "--model", "tuned")
    rows = datasets.load_dataset("imagefolder", data_dir="photos", split="train")
    by_name, by_rows = RawDocuments("photos", "start"), RawDocuments(rows, "start")
    assert len(by_name) == len(by_rows) == 8
    for one, other in zip(by_name, by_rows):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_what_is_wrong_with_adapters_is_named(tuned, tmp_path, capsys):
    def broken(change) -> str:
        config = json.loads((tuned / "adapter_config.json").read_text())
        folder = tmp_path / f"broken-{len(os.listdir(tmp_path))}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes((tuned / "adapter_model.safetensors").read_bytes())
        change(config, folder)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return fails(capsys, "generate", "a", "--model", folder, "--output", tmp_path / "a.png")

    assert "there is no model directory /nowhere" in broken(lambda c, f: c.update(base_model_name_or_path="/nowhere"))
    assert "must name the model that they are for" in broken(lambda c, f: c.update(base_model_name_or_path=None))
    assert "must name the model that they are for" in broken(lambda c, f: c.update(base_model_name_or_path=str(f)))
    assert "tensors are lacking or have no place" in broken(lambda c, f: c.update(target_modules=["q_proj"]))
    assert "cannot be loaded" in broken(lambda c, f: (f / "adapter_model.safetensors").write_bytes(b"torn"))
    assert "keep adapters in a folder of their own" in broken(lambda c, f: (f / "config.json").write_text("{}"))
    assert "holds no adapters" in fails(capsys, "merge", "start", "--output", tmp_path / "none")


@pytest.fixture(scope="module")
def apart(start) -> Path:
    """A training whose checkpoints are without the vision tokenizer."""
    return train("apart", "--model", "start", "--learning_rate", "1e-3", *SAVED[:4])


def vq_tensors(folder) -> dict[str, torch.Tensor]:
    tensors = load_file(Path(folder) / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "vq_model" in name}


def test_a_training_holds_no_vision_tokenizer_and_its_checkpoints_refer_to_it(start, apart, monkeypatch):
    before, after = vq_tensors("start"), vq_tensors(apart)
    assert before and before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name]) for name in before)
    assert not vq_tensors(apart / "checkpoint-1")
    reference = json.loads((apart / "checkpoint-1" / "config.json").read_text())["vision_tokenizer"]
    assert Path(reference["model"]) == start
    assert json.loads((apart / "config.json").read_text())["vision_tokenizer"] is None

    model, processor = load_to_train("start", vision_tokenizer=False)
    held = [*model.named_parameters(), *model.named_buffers()]
    assert not [name for name, _ in held if "vq_model" in name]
    dataset = PackedDataset("packs", model, processor)
    assert len(dataset) and dataset.manifest["identity"]["vision_tokenizer"] == reference["sha256"]
    with pytest.raises(AttributeError, match="decode is of the vision tokenizer, without which this model was loaded"):
        model.model.vq_model.decode(torch.zeros(1, 14, dtype=torch.long), (3, 3))

    def refuse(self, config):
        raise AssertionError("a vision tokenizer was made")

    monkeypatch.setattr(NextFlowVQModel, "__init__", refuse)
    for model in ("start", apart / "checkpoint-1"):
        train("without", "--model", model, *LORA)


def test_a_checkpoint_without_its_tokenizer_is_opened_by_every_command(start, apart, tmp_path, capsys, monkeypatch):
    checkpoint = (apart / "checkpoint-1").resolve()
    model, processor = load_model(str(checkpoint))
    whole = NextFlowForConditionalGeneration.from_pretrained(checkpoint, vision_tokenizer=False)
    whole.model.vq_model = NextFlowForConditionalGeneration.from_pretrained("start").model.vq_model
    assert torch.equal(codes(model, processor), codes(whole.eval(), processor))
    assert model.config.vision_tokenizer is None and not model.model.vq_model.training
    run("describe", "photos/0.png", "--model", checkpoint, "--max-new-tokens", 2)
    run("reconstruct", "photos/0.png", "--model", checkpoint, "--output", tmp_path / "again.png")
    run("evaluate", "loss", "packs", "--model", checkpoint)
    run("data", "verify", "packs", "--model", checkpoint)
    monkeypatch.setattr(examination, "MEANS", ())
    assert main(["doctor", str(checkpoint), "packs", "--json"]) in (0, 1)
    monkeypatch.chdir(tmp_path)
    run("generate", "a red circle", "--model", checkpoint, "--output", "picture.png")
    run("export", checkpoint, "--to", "exported")
    assert vq_tensors("exported").keys() == vq_tensors(start).keys()
    exported = load_model("exported")
    assert torch.equal(codes(*exported), codes(model, processor))


def test_an_export_tells_what_the_folder_says_that_refers_to_its_tokenizer(apart, further, tmp_path):
    folder = shutil.copytree(apart / "checkpoint-1", tmp_path / "told")
    (folder / "README.md").write_text("# Mine\n\nOf the sources A and B.\n")
    (folder / "scores.json").write_text('{"score": 0.5}')
    run("export", folder, "--to", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "Of the sources A and B." in card and "says nothing of them" not in card
    assert json.loads((tmp_path / "exported" / "scores.json").read_text()) == {"score": 0.5}
    adapters = shutil.copytree(further, tmp_path / "adapters")
    (adapters / "scores.json").write_text('{"score": 0.7}')
    run("export", adapters, "--to", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "scores.json").read_text()) == {"score": 0.7}
    assert "The licences of both apply" in (tmp_path / "merged" / "README.md").read_text()


def test_a_training_from_a_revision_keeps_that_revisions_tokenizer(start, tiny_model, tiny_processor, tmp_path):
    """A repository of the Hub, as a cache without a network holds it, whose tokenizer is another on `main`."""
    repository = Path(running().cache.name, "hub", "models--owner--both")
    (repository / "refs").mkdir(parents=True)
    tokenizers = {}
    for revision, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        model = copy.deepcopy(tiny_model)
        with torch.no_grad():
            model.model.vq_model.pixel_encoder.to_code.bias += len(revision)
        (repository / "refs" / revision).write_text(commit)
        for part in (model, tiny_processor):
            part.save_pretrained(repository / "snapshots" / commit)
        tokenizers[revision] = vision_identity(model.model.vq_model)
    script = """
import datasets
from huggingface_hub import constants
from peft import get_peft_model
from transformers_nextflow.data.shards import vision_identity
from transformers_nextflow.training.commands import transformer
from transformers_nextflow.training.commands.options import ModelOptions
from transformers_nextflow.training.loading import load_to_train
from transformers_nextflow.utils.export import merge
from transformers_nextflow.utils.loading import load_model

constants.HF_HUB_OFFLINE = True
model, _ = load_to_train("owner/both", vision_tokenizer=False, revision="v1")
found = [model.config.vision_tokenizer["sha256"]]
model.save_pretrained("checkpoint")
found.append(vision_identity(type(model).from_pretrained("checkpoint").model.vq_model))

options = ModelOptions("owner/both", model_revision="v1", use_peft=True)
model, _, adapters = options.load(modules_to_save=["code_head"])
get_peft_model(model, adapters).save_pretrained("adapters")
merge("adapters", "merged")
found.append(vision_identity(load_model("adapters")[0].model.vq_model))

class Told:
    def __init__(self, *args, train_dataset, **kwargs):
        print(*found, vision_identity(train_dataset.extractor.vq_model))
        raise SystemExit

transformer.NextFlowTrainer = Told
chat = [{"role": role, "content": "a"} for role in ("user", "assistant")]
datasets.Dataset.from_list([{"messages": chat}]).to_parquet("chats.parquet")
options = "--model owner/both --model_revision v1 --documents chats.parquet --output run --use_cpu --report_to none"
transformer.main(options.split())
"""
    printed = run_fresh(script, tmp_path).split()
    assert printed[-4:] == [tokenizers["v1"]] * 4 != [tokenizers["main"]] * 4
    assert "The weights of owner/both with the adapters of adapters" in (tmp_path / "merged" / "README.md").read_text()


def test_a_tokenizer_that_is_gone_or_another_is_named(start, apart, tmp_path, capsys):
    def opened(change) -> str:
        folder = tmp_path / f"moved-{len(os.listdir(tmp_path))}"
        shutil.copytree(apart / "checkpoint-1", folder)
        config = json.loads((folder / "config.json").read_text())
        change(config["vision_tokenizer"])
        (folder / "config.json").write_text(json.dumps(config))
        return fails(capsys, "generate", "a", "--model", folder, "--output", tmp_path / "a.png")

    said = opened(lambda reference: reference.update(model="/nowhere/model"))
    assert "the vision tokenizer of this checkpoint is that of /nowhere/model" in said and "config.json" in said
    said = opened(lambda reference: reference.update(sha256="0" * 64))
    assert f"was that of {start}, now another" in said


def test_pictures_are_drawn_along_a_training_without_the_tokenizer(start):
    samples = ("--sample_prompts", "a red circle", "--sample_every", "1", *SAVED[:4])
    folder = train("sampled", "--model", "start", "--learning_rate", "1e-3", *samples)
    assert (folder / "samples" / "step-2" / "00.png").exists()
    assert not vq_tensors(folder / "checkpoint-2") and vq_tensors(folder)


def test_identity_is_the_same_read_from_files_and_loaded(start):
    for name in ("start", str(DEFAULT_MODEL)):
        config = load_config(name)
        assert vision_tokenizer_hash(stored_tensors(name), config.vq_config) == vision_identity(load_vq_model(name))
