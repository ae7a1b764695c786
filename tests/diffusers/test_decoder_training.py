"""Training of decoders: the loss, what it changes, the batches, and resuming."""

import copy
import dataclasses
import json
import pickle
import re
import shutil
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers", reason="the diffusion decoder needs diffusers")
pytest.importorskip("accelerate")

import datasets
from accelerate.state import AcceleratorState
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxTransformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Subset
from transformers import TrainerState

from diffusers_nextflow import NextFlowConditioner, NextFlowDecoderPipeline, NextFlowFluxDecoderPipeline
from diffusers_nextflow.denoising import DecoderLoss, encode_captions, encode_pixels
from diffusers_nextflow.training import (
    DecoderTrainingArguments,
    NextFlowDecoderTrainer,
    Numbered,
    decoder_class,
    draw_seed,
    load_decoder,
)
from diffusers_nextflow.training_command import STAGES, DecoderOptions, make_batches
from diffusers_nextflow.training_data import (
    Picture,
    PictureBatches,
    condition_of,
    shard_pictures,
    source_pictures,
)
from tests.data.data_samples import documents
from tests.diffusers.tiny_decoders import (
    FAMILIES,
    WIDE,
    decoder,
    random_codes,
    stock_components,
    stock_pipeline,
    tiny_vq_model,
)
from tests.diffusers.tiny_trainings import Batches, arguments, picture, run_with_everything, train
from tests.fresh import run
from tests.hub_stand_in import hub_stand_in
from tests.pretended_devices import DEVICES, PretendedDevices
from transformers_nextflow import NextFlowConfig, NextFlowImageProcessor, NextFlowProcessor
from transformers_nextflow.data import (
    ComputeBudget,
    CostModel,
    Document,
    DocumentReader,
    ExtractionSettings,
    Message,
    Source,
    extract,
    pack,
)
from transformers_nextflow.data.documents import Skipped
from transformers_nextflow.quantizer import SelfCorrection
from transformers_nextflow.training import EMACallback
from transformers_nextflow.utils.loading import load_vq_model

every_family = pytest.mark.parametrize("family", FAMILIES)
CAPTIONS = ["a cat", "dog"]
TWO_LEVELS = Path(__file__).parents[1] / "golden" / "two_levels"  # of 12 and 16 pixels


@pytest.fixture(autouse=True)
def precision_of_its_own():
    """accelerate keeps a process's first choice."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The loss


@pytest.mark.parametrize(
    ("family", "scheduler"), [("xl", EDMEulerScheduler()), ("flux", FlowMatchHeunDiscreteScheduler())]
)
def test_schedulers_of_another_noise_are_refused(family, scheduler):
    pipe = decoder(family)
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=f"the noise of DDPM and its like.*got {type(scheduler).__name__}"):
        DecoderLoss(pipe)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("unet", "epsilon"), ("unet", "v_prediction"), ("xl", "epsilon"), ("flux", None), ("qwenimage", None)],
)
@torch.no_grad()
def test_loss_is_the_familys_own_written_by_hand(family, kind):
    pipe = decoder(family, trained=True)
    if kind is not None:
        pipe.scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    pipe.conditioner.register_to_config(upscale=2)  # 64 x 128 pixels
    pixels = torch.rand(2, 3, 64, 128, generator=seeded()) * 2 - 1
    features = torch.cat(tiny_vq_model().condition_features(random_codes(2), WIDE), dim=1)
    latents = encode_pixels(pipe, pixels, seeded(1))
    loss = DecoderLoss(pipe)(latents, features, CAPTIONS, seeded(2))

    if family == "qwenimage":
        encoded = pipe.vae.encode(pixels[:, :, None]).latent_dist.sample(seeded(1))[:, :, 0]
        clean = (encoded - 0.1) / 0.9
    else:
        encoded = pipe.vae.encode(pixels).latent_dist.sample(seeded(1))
        clean = (encoded - 0.1) * 0.4 if family == "flux" else encoded * 0.18215
    height, width = clean.shape[-2:]
    if kind is None:  # a token is 2 x 2 latents, channels first
        clean = F.pixel_unshuffle(clean, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(latents, clean, rtol=0, atol=1e-6)

    draws = seeded(2)
    noise = torch.randn(clean.shape, generator=draws)
    steps = torch.randint(1000, (2,), generator=draws)
    cells = (height if kind else height // 2) // WIDE[0]
    condition = pipe.conditioner(features, cells)
    if kind is None:
        sigmas = 1 - steps[:, None, None] / 1000
        noisy, target = (1 - sigmas) * clean + sigmas * noise, noise - clean
        joined = torch.cat([noisy, condition], dim=-1)
        ids = torch.zeros(height // 2, width // 2, 3)
        ids[..., 1], ids[..., 2] = torch.arange(height // 2)[:, None], torch.arange(width // 2)
        if family == "flux":
            embeds, pooled, text_ids = pipe.encode_prompt(CAPTIONS, None)
            extra = {"pooled_projections": pooled, "txt_ids": text_ids, "img_ids": ids.view(-1, 3)}
        else:
            embeds, mask = pipe.encode_prompt(CAPTIONS)
            extra = {"encoder_hidden_states_mask": mask, "img_shapes": [[(1, height // 2, width // 2)]] * 2}
        predicted = pipe.transformer(joined, encoder_hidden_states=embeds, timestep=sigmas.flatten(), **extra).sample
    else:
        betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2
        signal = (1 - betas).cumprod(0)[steps].view(2, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        target = noise if kind == "epsilon" else signal.sqrt() * noise - (1 - signal).sqrt() * clean
        joined, extra = torch.cat([noisy, condition], dim=1), {}
        if family == "xl":
            embeds, _, pooled, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
            sizes = torch.tensor([[64, 128, 0, 0, 64, 128]] * 2)
            extra = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        else:
            embeds, _ = pipe.encode_prompt(CAPTIONS, "cpu", 1, False)
        predicted = pipe.unet(joined, steps, embeds, **extra).sample
    torch.testing.assert_close(loss, (predicted - target).square().mean(), rtol=1e-5, atol=0)


def test_other_predictions():
    pipe = decoder("unet")
    for kind in ("sample", "flow"):
        loss_of = DecoderLoss(pipe)
        loss_of.scheduler = DDPMScheduler(prediction_type=kind)
        inputs = (torch.ones(1, 4, 8, 16), torch.ones(1, 26, 2, 4), [""], seeded())
        if kind == "sample":
            assert loss_of(*inputs).isfinite()
        else:
            with pytest.raises(ValueError, match="must be epsilon, v_prediction or sample, got 'flow'"):
                loss_of(*inputs)


def test_a_caption_for_each_picture():
    loss_of = DecoderLoss(decoder("unet"))
    for latents, features, captions in ((2, 2, 1), (2, 2, 3), (1, 2, 2), (3, 2, 2)):
        with pytest.raises(ValueError, match=f"of as many pictures, got {latents}, {features} and {captions}"):
            loss_of(torch.ones(latents, 4, 8, 16), torch.ones(features, 26, 2, 4), [""] * captions, seeded())
    assert loss_of.guidance_scale == DecoderTrainingArguments("out").guidance_scale


# What is trained


@pytest.mark.parametrize("family", ["unet", "flux", "qwenimage"])
def test_lora_training_changes_adapters_and_conditioner_only(family, tmp_path):
    pipe = decoder(family, vq_model=copy.deepcopy(tiny_vq_model()))
    before = {name: copy.deepcopy(part.state_dict()) for name, part in modules(pipe).items()}
    train(pipe, Batches(), arguments(tmp_path, rank=2), samples=Batches()[0])
    after = {name: part.state_dict() for name, part in modules(pipe).items()}
    backbone, tested = pipe.backbone, 0
    for name, values in before.items():
        for key, value in values.items():
            if name == "conditioner":
                assert not torch.equal(after[name][key], value) or family == "unet" and "bias" in key, key
                continue
            stored = [other for other in after[name] if other.replace(".base_layer", "") == key]
            assert torch.equal(after[name][stored[0]], value), key
            tested += 1
    adapters = [name for name, value in after[backbone].items() if "lora_B" in name and value.abs().max() > 0]
    assert adapters and any(name.startswith("conv_in") for name in adapters) == (family == "unet") and tested
    drawn = sorted((tmp_path / "samples" / "step-2").iterdir())
    assert len(drawn) == 2 and Image.open(drawn[0]).size == (64, 2 * 32)
    batch, pipe_of = Batches()[0], {"num_inference_steps": 1, "output_type": "pt", "generator": seeded(42)}
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(batch["captions"], batch["codes"], WIDE, **pipe_of).images.detach()
    above_each = torch.cat([batch["pixel_values"] / 2 + 0.5, pictures], dim=-2) * 255
    for path, expected in zip(drawn, above_each.movedim(1, -1).numpy()):
        assert np.abs(np.asarray(Image.open(path)) - expected).max() < 0.6

    fresh = decoder(family, conditioner=NextFlowConditioner.from_pretrained(tmp_path, subfolder="conditioner"))
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(picture(fresh), picture(pipe))


def modules(pipe) -> dict:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def test_full_training_changes_unet_and_conditioner_and_saves_their_average(tmp_path):
    pipe = decoder("unet", vq_model=copy.deepcopy(tiny_vq_model()))
    before = {name: copy.deepcopy(part.state_dict()) for name, part in modules(pipe).items()}
    train(pipe, Batches(), arguments(tmp_path, use_ema=True, ema_decay=0.5, gradient_checkpointing=True))
    trained = load_file(tmp_path / "checkpoint-2" / "trained.safetensors")
    for name, part in modules(pipe).items():
        changed = any(not torch.equal(value, before[name][key]) for key, value in part.state_dict().items())
        assert changed == (name in ("unet", "conditioner"))
    saved = NextFlowDecoderPipeline.from_pretrained(tmp_path)
    first = load_file(tmp_path / "checkpoint-1" / "trained.safetensors")
    key = "conv_in.weight"
    average = 0.1 * before["unet"][key] + 0.9 * first[f"backbone.{key}"]
    expected = 2 / 11 * average + 9 / 11 * trained[f"backbone.{key}"]  # by (1 + 1) / (10 + 1)
    torch.testing.assert_close(saved.unet.state_dict()[key], expected, rtol=0, atol=1e-6)
    assert torch.equal(pipe.unet.state_dict()[key], trained[f"backbone.{key}"])


def test_killed_training_resumes_as_if_nothing_had_happened_and_loads_in_a_fresh_process(tmp_path):
    """A whole UNet and adapters, killed after a step, and again while it writes a checkpoint."""
    pipe = decoder("flux", vq_model=copy.deepcopy(tiny_vq_model()))
    train(pipe, Batches(), arguments(tmp_path / "flux", rank=2))
    run("-m", "tests.diffusers.tiny_trainings", tmp_path)
    results = {"": "unet/diffusion_pytorch_model.safetensors", "-lora": "pytorch_lora_weights.safetensors"}
    for kind, result in results.items():
        left = json.loads((tmp_path / f"left{kind}.json").read_text())
        assert "checkpoint-2" in left and "checkpoint-4" in left
        losses = json.loads((tmp_path / f"whole{kind}" / "losses.json").read_text())
        assert len(losses) == 6 and len({row["loss"] for row in losses}) == 6
        for name in ("losses.json", "checkpoint-6/trained.safetensors", result):
            whole, resumed = ((tmp_path / (run + kind) / name).read_bytes() for run in ("whole", "killed"))
            assert resumed == whole, name
    assert torch.equal(load_file(tmp_path / "picture.safetensors")["picture"], picture(pipe))


def test_a_checkpoint_of_other_weights_is_not_resumed(tmp_path):
    pipe = decoder("unet", vq_model=copy.deepcopy(tiny_vq_model()))
    train(pipe, Batches(), arguments(tmp_path, max_steps=1))
    stored = tmp_path / "checkpoint-1" / "trained.safetensors"
    tensors = load_file(stored)
    tensors.popitem()
    save_file(tensors, stored)
    with pytest.raises(ValueError, match="checkpoint-1 holds other weights than those that are trained"):
        train(pipe, Batches(), arguments(tmp_path), resume=True)


def test_a_stage_trains_conditioner_and_backbone_and_nothing_else(tmp_path):
    pipe = decoder("unet", vq_model=copy.deepcopy(tiny_vq_model()))
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(True).train()
    NextFlowDecoderTrainer(pipe, arguments(tmp_path), Batches())
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            trains = name in ("conditioner", "unet")
            assert {each.requires_grad for each in component.parameters()} <= {trains}, name
            assert component.training == trains, name


def test_pictures_are_brought_to_the_level_asked_for():
    schedules = [[[1, 1], [2, 2], [3, 3]]]
    processor = NextFlowImageProcessor(patch_size=8, scale_schedules=schedules, levels={"low": 2, "high": 3})
    table = datasets.Dataset.from_list([{"image": Image.new("RGB", (40, 40)), "text": "a box"}])
    table = table.cast_column("image", datasets.Image(decode=False))  # as sources are read
    reader = DocumentReader("text-to-image")
    grids = [source_pictures(table, reader, processor, level)[0].grid for level in ("low", "high", None)]
    assert grids == [(2, 2), (3, 3), (3, 3)]


@pytest.mark.parametrize(("stage", "upscale"), STAGES.items())
def test_pictures_are_read_as_the_model_of_the_codes_reads_them(tmp_path, stage, upscale):
    model = shutil.copytree(TWO_LEVELS, tmp_path / "model")
    values = json.loads((model / "processor_config.json").read_text())
    values["image_processor"] |= {"level": "12", "resample": Image.Resampling.NEAREST}
    (model / "processor_config.json").write_text(json.dumps(values))
    shown = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    shown.save(tmp_path / "0.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "noise", "image": "0.png"}))
    options = DecoderOptions("decoder", str(tmp_path / "rows.jsonl"), str(model), stage)
    batch = make_batches(options, load_vq_model(str(model)), upscale, seed=0)[0]
    assert batch["captions"] == ["noise"] and STAGES == {"base": 1, "x2": 2}
    own = NextFlowProcessor.from_pretrained(model).image_processor
    coded = own.whole(own(shown, return_tensors="pt"))[1]
    assert coded.shape == (1, 3, 12, 12) and torch.equal(batch["coded_pixels"], coded)
    drawn = torch.tensor(np.asarray(shown.resize((12 * upscale, 12 * upscale), Image.Resampling.NEAREST)))
    torch.testing.assert_close(batch["pixel_values"][0], drawn.movedim(-1, 0) / 127.5 - 1)


def test_two_processes_train_as_one(tmp_path):
    """With all that a training may have, over a resume."""
    run("-m", "tests.diffusers.tiny_trainings", tmp_path / "two", 2)
    run_with_everything(tmp_path / "one", gradient_accumulation_steps=2)
    logs = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("one", "two")]
    for name in ("loss", "grad_norm", "eval_loss"):
        expected, got = ([row[name] for row in log if name in row] for log in logs)
        assert len(expected) == 3 and got == pytest.approx(expected, rel=1e-5)
    one, two = (modules(NextFlowDecoderPipeline.from_pretrained(tmp_path / name)) for name in ("one", "two"))
    for name, part in one.items():
        torch.testing.assert_close(part.state_dict(), two[name].state_dict(), rtol=0, atol=1e-6)
    drawn = [np.asarray(Image.open(tmp_path / name / "samples" / "step-3" / "00.png")) for name in ("one", "two")]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1


def test_a_steps_gradient_is_the_mean_of_its_batches(tmp_path, monkeypatch):
    pipe, seen, step = decoder("unet", vq_model=copy.deepcopy(tiny_vq_model())), [], torch.optim.AdamW.step

    def record(optimizer, *args, **kwargs):
        seen.append({p: p.grad.clone() for group in optimizer.param_groups for p in group["params"]})
        return step(optimizer, *args, **kwargs)

    loss_of = DecoderLoss(copy.copy(pipe))
    trainer = NextFlowDecoderTrainer(copy.copy(pipe), arguments(tmp_path, seed=7), Batches())
    for number in list(trainer._get_train_sampler())[:2]:
        batch, draws = Batches()[number], seeded(draw_seed(7, number))
        latents = encode_pixels(pipe, batch["pixel_values"], draws)
        (loss_of(latents, condition_of(pipe.vq_model, batch), batch["captions"], draws) / 2).backward()
    expected = {parameter: parameter.grad.clone() for parameter in loss_of.parameters()}
    loss_of.zero_grad()
    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    settings = {"max_steps": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 1e9, "seed": 7}
    settings |= {"optim": "adamw_torch"}
    train(pipe, Batches(), arguments(tmp_path, **settings))
    assert len(seen) == 1 and seen[0].keys() == expected.keys()
    for parameter, mean in expected.items():
        torch.testing.assert_close(seen[0][parameter], mean, rtol=1e-4, atol=1e-7)


def test_average_and_weights_are_on_one_device(tmp_path):
    """On pretended devices, which refuse tensors of two in one operation."""
    average, model = EMACallback(0.5, warmup=True), torch.nn.Linear(2, 2)
    with PretendedDevices():
        model.to(DEVICES[0])
        average.on_train_begin(None, TrainerState(), None, model=model)
        assert {value.device for value in average.averages.values()} == {DEVICES[0]}
        average.on_optimizer_step(None, TrainerState(), None)


def test_the_average_begins_on_the_device_that_the_model_was_brought_to(tmp_path, monkeypatch):
    """The order that counts where there is a GPU."""
    events, begin = [], EMACallback.on_train_begin
    move = NextFlowDecoderTrainer._move_model_to_device
    monkeypatch.setattr(
        NextFlowDecoderTrainer, "_move_model_to_device", lambda *args: (events.append("moved"), move(*args))[1]
    )
    monkeypatch.setattr(
        EMACallback, "on_train_begin", lambda *args, **kwargs: (events.append("began"), begin(*args, **kwargs))[1]
    )
    train(decoder("unet", vq_model=tiny_vq_model()), Batches(), arguments(tmp_path, use_ema=True, max_steps=1))
    assert events[0] == "moved" and events[-1] == "began"


@pytest.mark.parametrize("bf16", [False, True])
def test_an_evaluation_is_of_all_pictures_and_the_same_each_time(tmp_path, bf16):
    """Under the precision of training, but for the latents and the condition."""
    pipe, evaluated = decoder("unet", vq_model=tiny_vq_model()), []
    trainer = NextFlowDecoderTrainer(pipe, arguments(tmp_path, seed=3, bf16=bf16), eval_dataset=Batches(count=5))
    for count in (1, 1, 2):
        trainer.args.per_device_eval_batch_size = count
        evaluated.append(trainer.evaluate()["eval_loss"])
    losses, loss_of = [], DecoderLoss(pipe).eval()
    for number in range(5):
        batch, draws = Batches()[number], seeded(draw_seed(3, number))
        latents, condition = encode_pixels(pipe, batch["pixel_values"], draws), condition_of(pipe.vq_model, batch)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses.append(loss_of(latents, condition, batch["captions"], draws).item())
    assert evaluated == pytest.approx([np.mean(losses)] * 3, rel=1e-6)


def test_datasets_by_name_are_evaluated_apart(tmp_path):
    """With the noise that each has alone."""
    pipe, kinds = decoder("unet", vq_model=tiny_vq_model()), {"few": Batches(count=1), "many": Batches(count=3)}
    trainer = NextFlowDecoderTrainer(pipe, arguments(tmp_path), eval_dataset=kinds)
    metrics = trainer.evaluate()
    for name, batches in kinds.items():
        loss = metrics[f"eval_{name}_loss"]
        assert loss == trainer.evaluate(batches)["eval_loss"] == trainer.evaluate(name)["eval_loss"]


PUSHED = """
from tests.diffusers.tiny_trainings import Batches, arguments, decoder, tiny_vq_model, train

options = {"max_steps": 1, "push_to_hub": True, "hub_model_id": "someone/decoder"}
train(decoder("unet", vq_model=tiny_vq_model()), Batches(), arguments("decoder", **options))
"""


def test_what_is_pushed_is_the_decoder(tmp_path):
    """Not what a checkpoint has of it."""
    with hub_stand_in() as hub:
        run("-c", PUSHED, folder=tmp_path, **hub.environment)
    saved = {str(path.relative_to(tmp_path / "decoder")) for path in (tmp_path / "decoder").glob("*/*.safetensors")}
    saved = {name for name in saved if not name.startswith("checkpoint-")} | {"model_index.json"}
    assert len(saved) > 4 and saved <= hub.repositories["someone/decoder"].keys()
    assert "trained.safetensors" not in hub.repositories["someone/decoder"]


def test_every_epoch_draws_noise_of_its_own():
    batches, numbers = Numbered(Batches(count=3)), []
    assert batches[2]["number"] == 2
    for epoch in range(3):
        batches.set_epoch(epoch)
        numbers += [batches[place]["number"] for place in range(3)]
    assert numbers == list(range(9))
    assert len({draw_seed(seed, number) for seed in range(3) for number in numbers}) == 27


def test_a_part_of_batches_is_told_the_epoch(source, vq_model):
    table, processor = source.load(), NextFlowImageProcessor.from_vq_config(vq_model.config)
    reader = DocumentReader("text-to-image", root=source.root)
    batches = PictureBatches(table, reader.read, source_pictures(table, reader, processor), processor, 2)
    Numbered(Subset(batches, range(2))).set_epoch(3)
    assert batches.epoch == 3


def test_batches_of_a_forward_count_by_their_pictures(tmp_path):
    trainer = NextFlowDecoderTrainer(decoder("unet", vq_model=tiny_vq_model()), arguments(tmp_path), Batches())
    batches = [Batches()[number] | {"number": number} for number in (0, 1)]
    for name in ("pixel_values", "codes", "captions"):
        batches[1][name] = batches[1][name][:1]
    losses = [trainer.compute_loss(trainer.model, {"batches": [batch]}) for batch in batches]
    filler = trainer.blank(batches[0])  # which evens an evaluation's shares out
    together = trainer.compute_loss(trainer.model, trainer.data_collator([*batches, filler]))
    torch.testing.assert_close(together, (2 * losses[0] + losses[1]) / 3)


def test_what_is_saved_is_pushed_if_asked_and_checkpoints_are_not(tmp_path, monkeypatch):
    trainer, pushed = NextFlowDecoderTrainer(decoder("unet"), arguments(tmp_path), Batches()), []
    monkeypatch.setattr(trainer, "push_to_hub", lambda **kwargs: pushed.append(kwargs["commit_message"]))
    trainer.save_model(str(tmp_path / "new" / "folder"))
    trainer.args.push_to_hub = True
    trainer.save_model(None, _internal_call=True)  # of the library, for the Hub, which it pushes itself
    trainer.save_model(str(tmp_path / "checkpoint"), _internal_call=True)
    assert not pushed and (tmp_path / "model_index.json").is_file()
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["trained.safetensors"]
    trainer.save_model(str(tmp_path / "new" / "folder"))
    assert pushed == ["Model save"] and (tmp_path / "new" / "folder" / "model_index.json").is_file()
    trainer.args.push_to_hub = False
    monkeypatch.setattr(DecoderTrainingArguments, "should_save", False)
    trainer.save_model(str(tmp_path / "of another process"))
    assert not (tmp_path / "of another process").exists()


def test_every_picture_of_a_step_counts_as_much_however_it_is_split(tmp_path):
    class Uneven(Batches):
        def __getitem__(self, number):
            batch, count = super().__getitem__(number), 1 + number % 2
            return batch | {name: batch[name][:count] for name in ("pixel_values", "codes", "captions")}

    logs = []
    for split in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        pipe = decoder("unet", vq_model=tiny_vq_model())
        trainer = train(pipe, Uneven(), arguments(tmp_path, optim="sgd", **{split: 3}))
        logs.append([(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "grad_norm" in row])
    assert len(logs[0]) == 2
    for one, other in zip(*logs):
        assert other == pytest.approx(one, rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_training(tmp_path):
    pipe = decoder("unet", vq_model=copy.deepcopy(tiny_vq_model()))
    with torch.no_grad():
        pipe.conditioner.projection.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan at step 1: lower the learning rate"):
        train(pipe, Batches(), arguments(tmp_path))


def test_xl_is_told_a_good_score_where_it_reads_one():
    pipe = decoder("xl")
    assert pipe.config.force_zeros_for_empty_prompt and not pipe.config.requires_aesthetics_score
    pipe.register_to_config(requires_aesthetics_score=True)
    layer = pipe.unet.add_embedding.linear_1
    pipe.unet.add_embedding.linear_1 = torch.nn.Linear(layer.in_features - 4, layer.out_features)  # 5 numbers, not 6
    text = encode_captions(pipe, CAPTIONS, (32, 64))
    assert text["added_cond_kwargs"]["time_ids"].tolist() == [[32, 64, 0, 0, 6]] * 2


def test_flux_is_told_the_guidance(tmp_path):
    config, told = stock_components("flux")["transformer"].config, []
    transformer = FluxTransformer2DModel.from_config(config, guidance_embeds=True)
    pipe = decoder("flux", vq_model=copy.deepcopy(tiny_vq_model()), transformer=transformer)
    transformer.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs["guidance"]), with_kwargs=True)
    train(pipe, Batches(), arguments(tmp_path, rank=2, guidance_scale=2.5, max_steps=1))
    assert [guidance.tolist() for guidance in told] == [[2.5, 2.5]]


def test_steps_are_the_arguments(tmp_path, monkeypatch):
    """Gradients are clipped, matrices decay, the rate moves, the newest checkpoints stay."""
    norms, rates, step = [], [], torch.optim.AdamW.step

    def record(optimizer, *args, **kwargs):
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([p.grad.norm() for p in weights]).norm().item())
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    values = {"max_steps": 4, "max_grad_norm": 1e-4, "lr_scheduler_type": "linear", "save_total_limit": 2}
    pipe = decoder("unet", vq_model=copy.deepcopy(tiny_vq_model()))
    run = train(pipe, Batches(), arguments(tmp_path, optim="adamw_torch", **values))
    assert norms == pytest.approx([1e-4] * 4, rel=1e-2)
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    decays = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert decays[id(pipe.unet.conv_in.weight)] == 1e-2 and decays[id(pipe.unet.conv_in.bias)] == 0


# Stages and wrong combinations


def test_stages_follow_each_other(tmp_path):
    stock_pipeline("unet", stock_components("unet")).save_pretrained(tmp_path / "stock")
    pipe = load_decoder(str(tmp_path / "stock"), tiny_vq_model())
    assert type(pipe) is NextFlowDecoderPipeline and pipe.conditioner.config.upscale == 1
    with pytest.raises(ValueError, match="holds no vision tokenizer"):
        load_decoder(str(tmp_path / "stock"))
    pipe.save_pretrained(tmp_path / "base")
    large = load_decoder(str(tmp_path / "base"), upscale=2)
    assert picture(large).shape[-2:] == (64, 128)
    assert all(torch.equal(a, b) for a, b in zip(large.unet.parameters(), pipe.unet.parameters()))
    large.save_pretrained(tmp_path / "x2")
    with pytest.raises(ValueError, match="draws at 2 times the coded size, after which a stage at 1 times is none"):
        load_decoder(str(tmp_path / "x2"), upscale=1)


def test_second_stage_of_adapters_starts_from_the_first(tmp_path):
    stock_pipeline("flux", stock_components("flux")).save_pretrained(tmp_path / "stock")
    pipe = load_decoder(str(tmp_path / "stock"), tiny_vq_model())
    assert type(pipe) is NextFlowFluxDecoderPipeline
    train(pipe, Batches(), arguments(tmp_path / "base", rank=2))
    large = load_decoder(str(tmp_path / "stock"), tiny_vq_model(), 2, str(tmp_path / "base"))
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(large.transformer.state_dict()[name], value), name
    with pytest.raises(ValueError, match="the adapters have rank 2, got 4"):
        train(large, Batches(upscale=2), arguments(tmp_path / "x2", rank=4))
    AcceleratorState._reset_state(True)
    train(large, Batches(upscale=2), arguments(tmp_path / "x2", rank=2, bf16=True))
    dtypes = {"lora_" in name: parameter.dtype for name, parameter in large.transformer.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert {part.dtype for name, part in large.components.items() if name.startswith("text_encoder") and part} == {
        torch.bfloat16
    }
    assert NextFlowConditioner.from_pretrained(tmp_path / "x2", subfolder="conditioner").config.upscale == 2


def test_weights_that_devices_share_are_refused(tmp_path):
    class Sharing(NextFlowDecoderTrainer):
        """accelerate turns FSDP on for accelerators alone."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True

    with pytest.raises(ValueError, match="Sharing takes whole weights on every device: use DDP, not FSDP or ZeRO-3"):
        Sharing(decoder("unet"), arguments(tmp_path), Batches())


def test_wrong_combinations(tmp_path):
    with pytest.raises(ValueError, match="leave out use_ema or rank"):
        DecoderTrainingArguments("out", rank=2, use_ema=True)
    with pytest.raises(ValueError, match="rank must be positive, got 0"):
        DecoderTrainingArguments("out", rank=0)
    assert DecoderTrainingArguments("out", rank=1).weight_dtype == torch.float32
    families = zip(("StableDiffusion", "StableDiffusionXL", "Flux", "QwenImage"), FAMILIES.values())
    for stock, (ours, *_) in families:
        for name in (f"{stock}Pipeline", f"{stock}Img2ImgPipeline", ours.__name__):
            assert decoder_class(name) is ours
    with pytest.raises(ValueError, match="label_smoothing_factor is not for this trainer: leave 0.0, got 0.1"):
        DecoderTrainingArguments("out", label_smoothing_factor=0.1)
    unheeded = {"neftune_noise_alpha": 5.0, "remove_unused_columns": True, "fp16_full_eval": True}
    for name, value in (unheeded | {"activation_checkpointing_kwargs": {"use_reentrant": True}}).items():
        with pytest.raises(ValueError, match=f"{name} is not for this trainer: leave (None|False), got {value}"):
            DecoderTrainingArguments("out", **{name: value})
    with pytest.raises(ValueError, match="lr_scheduler_type 'constant' heeds no warmup_steps, got 10"):
        DecoderTrainingArguments("out", lr_scheduler_type="constant", warmup_steps=10)
    with pytest.raises(ValueError, match="the flux transformer is trained by adapters: give their rank"):
        train(decoder("flux"), Batches(), arguments(tmp_path))
    with pytest.raises(ValueError, match="there is no whole checkpoint in"):
        train(decoder("unet"), Batches(), arguments(tmp_path), resume=True)
    with pytest.raises(ValueError, match="multiple of the 8 pixels"):
        train(decoder("flux", vq_model=tiny_vq_model(4)), Batches(), arguments(tmp_path, rank=2))
    with pytest.raises(
        ValueError, match=r"\(2, 4\) are drawn at 64x128 \(upscale 2\), but batch \d+ holds .* of 32x64"
    ):
        pipe = decoder("unet")
        pipe.conditioner.register_to_config(upscale=2)
        train(pipe, Batches(), arguments(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="starts from one of .*FluxPipeline.*got WanPipeline"):
        load_decoder(str(tmp_path))


# Batches


@pytest.fixture(scope="module")
def model_folder(tiny_model, tiny_processor, tmp_path_factory) -> str:
    model, folder = copy.deepcopy(tiny_model), tmp_path_factory.mktemp("model")
    with torch.no_grad():  # so that pictures get different codes
        model.model.vq_model.semantic_to_code[-1].weight.mul_(50)
        model.model.vq_model.pixel_encoder.to_code.weight.mul_(50)
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    """Pictures of 48x48, 32x64 and, too small to be drawn at twice the size, 30x30 pixels."""
    folder, lines = tmp_path_factory.mktemp("pictures"), []
    rng = np.random.default_rng(0)
    for number, size in enumerate([(48, 48), (48, 48), (32, 64), (48, 48), (30, 30)]):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"key": f"key {number}", "text": f"caption {number}", "image": f"{number}.png"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return Source(str(folder / "rows.jsonl"))


@pytest.fixture(scope="module")
def vq_model(model_folder):
    return load_vq_model(model_folder)


def test_every_picture_is_shown_once_in_an_epoch_at_both_sizes(source, vq_model):
    table, reader = source.load(), DocumentReader("text-to-image", root=source.root)
    processor = NextFlowImageProcessor.from_vq_config(vq_model.config)
    for upscale, shown in ((1, 5), (2, 4)):
        pictures = source_pictures(table, reader, processor)
        batches = PictureBatches(table, reader.read, pictures, processor, 2, upscale, seed=3)
        epochs = []
        for epoch in (0, 1):
            batches.set_epoch(epoch)
            epochs.append([batches[place] for place in range(len(batches))])
        orders = [[caption for batch in epoch for caption in batch["captions"]] for epoch in epochs]
        assert sorted(orders[0]) == sorted(orders[1]) == [f"caption {n}" for n in range(shown)]
        assert orders[0] != orders[1]
        for batch in epochs[0]:
            for caption, pixels, coded in zip(batch["captions"], batch["pixel_values"], batch["coded_pixels"]):
                assert pixels.shape[-1] == upscale * coded.shape[-1] and pixels.shape[-2] == upscale * coded.shape[-2]
                stored = np.asarray(Image.open(Path(source.root, f"{caption[-1]}.png"))).astype(np.float32)
                if upscale == 2:
                    assert torch.equal(pixels, torch.from_numpy(stored).movedim(-1, 0) / 127.5 - 1)
                elif caption[-1] != "4":  # shrunk to half
                    assert abs(float(pixels.mean()) - (stored.mean() / 127.5 - 1)) < 0.05
        again = PictureBatches(table, reader.read, pictures, processor, 2, upscale, 1.0, seed=3)[1]
        assert torch.equal(again["pixel_values"], epochs[0][1]["pixel_values"])
        assert set(again["captions"]) == {""}


@pytest.mark.parametrize("packed", [False, True])
def test_codes_of_shards_are_those_of_the_pictures(source, vq_model, model_folder, tmp_path, packed):
    settings = ExtractionSettings("text-to-image", drop_text=0.5, self_correction=None, seed=1, documents_per_shard=2)
    extract(source, model_folder, tmp_path / "documents", settings)
    if packed:
        cost_model = CostModel.from_config(NextFlowConfig.from_pretrained(model_folder))
        pack([tmp_path / "documents"], tmp_path / "packs", ComputeBudget(96), cost_model)
    table = source.load()
    pictures, read = shard_pictures(tmp_path / ("packs" if packed else "documents"), source, table, vq_model)
    processor = NextFlowImageProcessor.from_vq_config(vq_model.config)
    batches = PictureBatches(table, read, pictures, processor, 2)
    captions, blind = [], copy.deepcopy(vq_model)
    blind.semantic_encoder = blind.pixel_encoder = blind.pixel_decoder = None  # no encoder is needed
    for number in range(len(batches)):
        batch = batches[number]
        codes = vq_model.encode(batch["pixel_values"])
        assert torch.equal(batch["codes"], codes)
        expected = torch.cat(vq_model.condition_features(codes, batch["grid"]), dim=1)
        assert torch.equal(condition_of(blind, batch), expected)
        assert torch.equal(condition_of(vq_model, {"coded_pixels": batch["pixel_values"]}), expected)
        captions += batch["captions"]
    assert 0 < captions.count("") < 5 and len(captions) == 5  # dropped as in the transformer's training
    twice = PictureBatches(table, read, pictures, processor, 2, upscale=2)
    assert {picture.key for picture in twice.pictures} == {f"key {number}" for number in range(4)}


def test_batches_of_shards_go_to_workers_that_are_spawned(source, vq_model, model_folder, tmp_path):
    """And hold no codes until they are asked for, of which there may be more than memory has room for."""
    extract(source, model_folder, tmp_path, ExtractionSettings("text-to-image", variants=2))
    table = source.load()
    pictures, read = shard_pictures(tmp_path, source, table, vq_model)
    assert not any(values.flags.owndata for picture in pictures for values in picture.codes)
    batches = PictureBatches(table, read, pictures, NextFlowImageProcessor.from_vq_config(vq_model.config), 2)
    sent = pickle.loads(pickle.dumps(batches))
    assert torch.equal(sent[0]["codes"], batches[0]["codes"]) and sent[0]["captions"] == batches[0]["captions"]


@pytest.mark.parametrize("packed", [False, True])
def test_codes_of_every_kind_of_document_are_those_of_its_answers_pictures(vq_model, model_folder, tmp_path, packed):
    """Of documents with several pictures, some of them only read."""
    rows = datasets.Dataset.from_list([document.to_row() for document in documents()])
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    source = Source(str(tmp_path / "rows.parquet"))
    extract(source, model_folder, tmp_path / "documents", ExtractionSettings(self_correction=None))
    if packed:
        costs = CostModel.from_config(NextFlowConfig.from_pretrained(model_folder))
        pack([tmp_path / "documents"], tmp_path / "packs", ComputeBudget(300), costs)
    table = source.load()
    pictures, read = shard_pictures(tmp_path / ("packs" if packed else "documents"), source, table, vq_model)
    shown = Counter((picture.key, picture.place) for picture in pictures)
    drawn = {"text-to-image": [0], "editing": [2], "interleaved": [0, 1], "video": [0, 1, 2], "reasoning": [0]}
    assert shown == Counter(
        (f"{kind}-{n}", place) for kind, places in drawn.items() for place in places for n in (0, 1)
    )
    batches = PictureBatches(table, read, pictures, NextFlowImageProcessor.from_vq_config(vq_model.config), 3)
    for number in range(len(batches)):
        assert torch.equal(batches[number]["codes"], vq_model.encode(batches[number]["pixel_values"]))


def test_codes_of_self_corrected_shards_sum_up_to_the_picture(source, vq_model, model_folder, tmp_path):
    correction = SelfCorrection(probability=1.0, token_share=0.6, top_k=8)
    extract(source, model_folder, tmp_path, ExtractionSettings("text-to-image", self_correction=correction))
    table = source.load()
    pictures, read = shard_pictures(tmp_path, source, table, vq_model)
    batches = PictureBatches(table, read, pictures, NextFlowImageProcessor.from_vq_config(vq_model.config), 8)
    for number in range(len(batches)):
        batch = batches[number]
        keys = [f"key {caption[-1]}/0/0" for caption in batch["captions"]]
        inputs, targets = vq_model.encode(batch["pixel_values"], correction, 0, keys)
        last = vq_model.schedules.by_grid(batch["grid"]).offsets[-1]
        assert torch.equal(batch["codes"], torch.cat([inputs[:, :last], targets[:, last:]], dim=1))


def test_shards_of_another_tokenizer_or_source(source, vq_model, model_folder, tmp_path):
    extract(source, model_folder, tmp_path, ExtractionSettings("text-to-image"))
    with pytest.raises(ValueError, match="made with another vision tokenizer"):
        shard_pictures(tmp_path, source, source.load(), tiny_vq_model())
    other = copy.deepcopy(vq_model)
    other.config.norm_groups = 1  # which no tensor shows
    with pytest.raises(ValueError, match="made with another encoder"):
        shard_pictures(tmp_path, source, source.load(), other)
    with pytest.raises(ValueError, match="the source has no document key 0"):
        shard_pictures(tmp_path, source, source.load().select([1, 2, 3, 4]), vq_model)


def test_rows_of_one_key_are_not_taken_for_each_other(source, vq_model, model_folder, tmp_path):
    """As those of tars that each count from 0."""
    lines = Path(source.name).read_text().replace("key 3", "key 1")
    same = Source(str(Path(source.name).with_name("same.jsonl")))
    Path(same.name).write_text(lines)
    extract(same, model_folder, tmp_path, ExtractionSettings("text-to-image"))
    with pytest.raises(ValueError, match="2 rows of the source have the key key 1: the shards cannot tell which is"):
        shard_pictures(tmp_path, same, same.load(), vq_model)


@pytest.mark.parametrize("upscale", [1, 2])
def test_a_row_that_lost_pictures_since_they_were_coded_is_named(upscale, vq_model, model_folder, tmp_path):
    """Also one whose further documents are gone, which ends no epoch unsaid."""
    pictures = [Image.new("RGB", (48, 48), (60 * number, 0, 0)) for number in range(3)]
    for name, count in (("rows", 3), ("shorter", 2)):
        row = {"key": ["long"], "texts": [["one", "two", "three"][:count]], "images": [pictures[:count]]}
        datasets.Dataset.from_dict(row).to_parquet(str(tmp_path / f"{name}.parquet"))
    source = Source(str(tmp_path / "rows.parquet"))
    settings = ExtractionSettings("interleaved", max_images=2, self_correction=None)
    extract(source, model_folder, tmp_path / "shards", settings)
    table = Source(str(tmp_path / "shorter.parquet")).load()
    shown, read = shard_pictures(tmp_path / "shards", source, table, vq_model)
    processor = NextFlowImageProcessor.from_vq_config(vq_model.config)
    with pytest.raises(ValueError, match="the shards hold codes of long#1, but the source's row has only long"):
        list(DataLoader(PictureBatches(table, read, shown, processor, 1, upscale), batch_size=None))


def test_packs_of_sources_that_are_read_differently(source, vq_model, model_folder, tmp_path):
    costs = CostModel.from_config(NextFlowConfig.from_pretrained(model_folder))
    shards = [tmp_path / name for name in ("one", "other", "all")]
    for folder, share in zip(shards, (0.0, 0.5)):
        extract(source, model_folder, folder, ExtractionSettings("text-to-image", drop_text=share))
    pack(shards[:2], shards[2], ComputeBudget(96), costs)
    with pytest.raises(ValueError, match="all are of several sources that are read differently; give one of them"):
        shard_pictures(shards[2], source, source.load(), vq_model)


def test_a_picture_of_another_size_than_was_coded(source, vq_model):
    table, reader = source.load(), DocumentReader("text-to-image", root=source.root)
    processor = NextFlowImageProcessor.from_vq_config(vq_model.config)
    pictures = source_pictures(table, reader, processor)
    grids = {each.grid for each in pictures}
    for each in pictures:
        for other in grids - {each.grid}:
            batches = PictureBatches(table, reader.read, [dataclasses.replace(each, grid=other)], processor, 1)
            with pytest.raises(ValueError, match=re.escape(f"a picture of the grid {other} was coded, the source's")):
                batches[0]


@pytest.mark.parametrize("in_training", [True, False])
def test_a_picture_that_cannot_be_read_costs_itself_and_is_named(
    in_training, vq_model, model_folder, tmp_path, caplog
):
    """Torn in the middle, without a byte, without a caption; and one torn after its codes were extracted."""
    lines = []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
        caption = None if number == 2 else f"caption {number}"
        lines.append(json.dumps({"key": f"key {number}", "text": caption, "image": f"{number}.jpg"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "1.jpg").write_bytes(b"")
    source = Source(str(tmp_path / "rows.jsonl"))
    table, processor = source.load(), NextFlowImageProcessor.from_vq_config(vq_model.config)
    if not in_training:
        extract(source, model_folder, tmp_path / "shards", ExtractionSettings("text-to-image"))
    (tmp_path / "0.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:-500])
    if in_training:
        reader = DocumentReader("text-to-image", root=source.root)
        pictures, read = source_pictures(table, reader, processor), reader.read
        assert [f"left out key {n}: " in caplog.text for n in range(6)] == [False, True, True, False, False, False]
    else:
        pictures, read = shard_pictures(tmp_path / "shards", source, table, vq_model)
    batches = PictureBatches(table, read, pictures, processor, 1)
    seen = {caption for place in range(len(batches)) for caption in batches[place]["captions"]}
    assert len(batches) == 4 and seen == {"caption 3", "caption 4", "caption 5"}
    assert "left out key 0, damaged image number 1: cannot decode the picture (JPEG, 48x48 pixels)" in caplog.text


def test_a_row_without_its_picture_is_named_with_the_reason(vq_model, caplog):
    def read(row, index):
        raise Skipped("no image")

    processor = NextFlowImageProcessor.from_vq_config(vq_model.config)
    with pytest.raises(ValueError, match="none of 1 pictures can be read"):
        PictureBatches([{}], read, [Picture(0, "gone", 0, (3, 3))], processor, 1)[0]
    assert "left out gone, damaged image number 1: no image" in caplog.text


def encoded(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(file := BytesIO(), format="PNG")
    return file.getvalue()


def test_what_is_too_small_is_counted_and_what_cannot_be_read_is_named_later(vq_model, caplog):
    def read(row, index):
        if index == 0:
            raise Skipped("no image")
        image = encoded(np.zeros((48, 48 - index % 2), np.uint8))
        chat = (Message("user", ("a",)), Message("assistant", (None,)))
        return [Document(str(index), "text-to-image", chat, (image,))]

    processor = NextFlowImageProcessor.from_vq_config(vq_model.config)
    pictures = [Picture(number, str(number), 0, (3, 3), images=1) for number in range(5)]
    batches = PictureBatches([{}] * 5, read, pictures, processor, 1, upscale=2)
    assert [picture.row for picture in batches.pictures] == [0, 2, 4]
    assert "2 pictures are smaller than 2 times the size they are coded at: left out" in caplog.text
    of_two = [dataclasses.replace(pictures[1], images=2)]
    with pytest.raises(ValueError, match="hold codes of 2 pictures of 1, but the source's row has 1: it is not what"):
        PictureBatches([{}] * 5, read, of_two, processor, 1)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        pictures[0].row = 1


def test_pictures_of_any_mode_are_drawn_as_their_rgb(vq_model):
    """Grey ones of 16 and 8 bits."""
    grey = np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8)
    grey[0, :2] = 0, 255
    processor = NextFlowImageProcessor.from_vq_config(vq_model.config)
    batches = PictureBatches([], None, [Picture(0, "a", 0, (3, 3))], processor, 1)
    batches.upscale = 2
    expected = batches.pixels(encoded(np.repeat(grey[..., None], 3, axis=-1)), (3, 3))
    assert torch.equal(expected[1], torch.tensor(grey).expand(3, 48, 48) / 127.5 - 1)
    for other in (grey, grey.astype(np.uint16) * 257):
        for got, wanted in zip(batches.pixels(encoded(other), (3, 3)), expected):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_no_pictures_and_bad_numbers():
    for values, message in (
        (([0], None, 1, 1, -0.1), r"empty_share must lie in \[0, 1\], got -0.1"),
        (([], None, 2), "no pictures"),
        (([0], None, 0), "batch_size must be positive, got 0"),
        (([0], None, 1, 1, 2.0), r"empty_share must lie in \[0, 1\], got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            PictureBatches([], None, *values)
