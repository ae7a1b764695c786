"""Tokenizer training: what each stage moves, its losses by hand, exact resume, what is logged."""

import copy
import json
import re
import sys
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from tests import fresh
from tests.tiny_models import tiny_config
from transformers_nextflow import NextFlowImageProcessor, NextFlowVQModel, cli
from transformers_nextflow.image_processing_nextflow import upright_size
from transformers_nextflow.training import (
    EMACallback,
    ImageBatches,
    NextFlowVQTrainer,
    NextFlowVQTrainingArguments,
    enlarge_decoder,
    load_teacher,
    prepare_vq_stage,
)
from transformers_nextflow.training.metrics import psnr, ssim
from transformers_nextflow.training.order import refuse_shared_weights
from transformers_nextflow.training.vq_losses import PatchDiscriminator, adaptive_weight, codebook_losses
from transformers_nextflow.utils.loading import load_vq_model


@pytest.fixture
def model() -> NextFlowVQModel:
    torch.manual_seed(0)
    model = NextFlowVQModel(tiny_config().vq_config)
    with torch.no_grad():
        model.semantic_to_code[-1].weight.mul_(50)
    return model


@pytest.fixture
def coarse_model() -> NextFlowVQModel:
    """Of patches large enough for a discriminator of three halvings."""
    torch.manual_seed(0)
    semantic = tiny_config().vq_config.semantic_config.to_dict() | {"patch_size": 8}
    vq = {"patch_size": 8, "stem_stride": 4, "semantic_config": semantic, "levels": {"24": 3}}
    return NextFlowVQModel(tiny_config(vq=vq).vq_config)


class Pictures(torch.utils.data.Dataset):
    """Six batches of three random pictures, alternating in size."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        size = (12, 12) if index % 2 else (8, 16)
        return {"pixel_values": torch.rand(3, 3, *size, generator=generator) * 2 - 1}


class OneSize(Pictures):
    """As many batches of one size, of one, two and three pictures."""

    def __getitem__(self, index):
        return {"pixel_values": super().__getitem__(2 * index + 1)["pixel_values"][: 1 + index % 3]}


class Large(torch.utils.data.Dataset):
    """Six pairs of random pictures for the model of large patches."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.rand(2, 3, 24, 24, generator=generator) * 2 - 1}


def trainer(model, output, dataset=None, teacher=None, eval_dataset=None, **arguments) -> NextFlowVQTrainer:
    values = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "save_strategy": "no", "seed": 5}
    values |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "perceptual_weight": 0.0}
    values |= {"discriminator_weight": 0.0}
    arguments = NextFlowVQTrainingArguments(output_dir=str(output), **(values | arguments))
    return NextFlowVQTrainer(model, arguments, dataset or Pictures(), eval_dataset, teacher)


def moved(before: dict, after: dict) -> set[str]:
    """Names of the parts with a tensor that changed."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def state(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_each_stage_moves_what_it_trains(model, tmp_path):
    teacher = copy.deepcopy(model.semantic_encoder)
    for stage, parts in {
        "pixel": {"pixel_encoder", "pixel_decoder", "quantizer"},
        "joint": set(dict(model.named_children())),
        "decoder": {"pixel_decoder"},
    }.items():
        prepared = prepare_vq_stage(copy.deepcopy(model), stage)
        before, taught = state(prepared), state(teacher)
        trainer(prepared, tmp_path, stage=stage, teacher=teacher).train()
        assert moved(before, state(prepared)) == parts, stage
        assert not moved(taught, state(teacher))
        semantic_moved = not torch.equal(before["quantizer.semantic_codebook"], prepared.quantizer.semantic_codebook)
        assert semantic_moved == (stage == "joint")


def test_the_pixel_stage_sees_neither_semantic_features_nor_semantic_entries(model):
    pixels = Pictures()[1]["pixel_values"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.quantizer.semantic_codebook.normal_()
        for parameter in [*other.semantic_encoder.parameters(), *other.semantic_to_code.parameters()]:
            parameter.normal_()
    one, two = (each(pixels, pixel_only=True) for each in (model, other))
    torch.testing.assert_close(one.reconstruction, two.reconstruction, rtol=0, atol=0)
    assert torch.equal(one.quantization.target_codes, two.quantization.target_codes)
    assert not one.features[:, : model.config.semantic_dim].any() and one.semantic_features is None
    with_semantics = model(pixels).quantization.target_codes
    assert not torch.equal(with_semantics, one.quantization.target_codes)


def test_losses_are_the_papers_by_hand(model, tmp_path):
    prepared, teacher = prepare_vq_stage(model, "joint"), copy.deepcopy(model.semantic_encoder)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    run = trainer(prepared, tmp_path, stage="joint", teacher=teacher, scale_drop=0.0)
    pixels = Pictures()[0]["pixel_values"]
    loss = run.compute_loss(run.model, {"pixel_values": pixels})
    output = prepared(pixels)
    pairs = output.quantization.pairs
    distance = sum(((entries - queries) ** 2).mean() for entries, queries in pairs) / len(pairs)
    error = ((output.reconstruction - pixels) ** 2).mean()
    cosine = F.cosine_similarity(output.semantic_features, prepared.semantic_features(pixels, teacher), dim=-1).mean()
    torch.testing.assert_close(loss, error + 1.25 * distance + 1 - cosine)


class Distance(torch.nn.Module):
    """A perceptual network of each picture."""

    def forward(self, one, other):
        return (one - other).abs().flatten(1).sum(1).view(-1, 1, 1, 1)


def test_the_perceptual_loss_counts_by_its_weight(model, tmp_path):
    run = trainer(prepare_vq_stage(model, "decoder"), tmp_path, stage="decoder", scale_drop=0.0, l2_weight=0.5)
    pixels = Pictures()[0]["pixel_values"]
    plain = run.compute_loss(run.model, {"pixel_values": pixels})
    run.args.perceptual_weight, run.perceptual = 0.7, Distance()
    loss = run.compute_loss(run.model, {"pixel_values": pixels})
    rebuilt = run.vq_model(pixels).reconstruction
    torch.testing.assert_close(plain, 0.5 * ((rebuilt - pixels) ** 2).mean())
    torch.testing.assert_close(loss - plain, 0.7 * Distance()(rebuilt, pixels).mean())


def test_the_teacher_and_the_perceptual_network_neither_train_nor_drop_out(model, tmp_path):
    teacher, perceptual = copy.deepcopy(model.semantic_encoder).train(), Distance().train()
    arguments = NextFlowVQTrainingArguments(str(tmp_path), stage="joint", discriminator_weight=0.0, use_cpu=True)
    run = NextFlowVQTrainer(prepare_vq_stage(model, "joint"), arguments, Pictures(), None, teacher, perceptual)
    for network in (run.teacher, run.perceptual):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_pixel_stage_counts_kept_scales_and_pixel_channels_alone(model, tmp_path, monkeypatch):
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path)
    keep = [True, False, True]
    monkeypatch.setattr(run, "_draw_scales", lambda schedule: keep)
    pixels = Pictures()[0]["pixel_values"]
    loss = run.compute_loss(run.model, {"pixel_values": pixels})
    output = model(pixels, keep_scales=keep, pixel_only=True)
    pixel = slice(model.config.semantic_dim, None)
    distances = [((entries - queries)[:, pixel] ** 2).mean() for entries, queries in output.quantization.pairs]
    assert len(distances) == 2
    error = ((output.reconstruction - pixels) ** 2).mean()
    torch.testing.assert_close(loss, error + 1.25 * sum(distances) / 2)


def test_a_step_of_two_batches_moves_by_the_mean_of_their_losses(model, tmp_path):
    values = {"max_steps": 1, "weight_decay": 0.0, "scale_drop": 0.0, "optim": "sgd", "max_grad_norm": 0.0}
    values |= {"lr_scheduler_type": "constant", "learning_rate": 0.1, "gradient_accumulation_steps": 2}
    prepared = prepare_vq_stage(copy.deepcopy(model), "pixel")
    run = trainer(prepared, tmp_path, **values)
    expected = prepare_vq_stage(copy.deepcopy(model), "pixel")
    by_hand = trainer(expected, tmp_path)
    batches = [Pictures()[index]["pixel_values"] for index in list(run._get_train_sampler())[:2]]
    sum(by_hand.compute_loss(by_hand.model, {"pixel_values": pixels}) / 2 for pixels in batches).backward()
    run.train()
    with torch.no_grad():
        for parameter, moved_to in zip(expected.parameters(), prepared.parameters()):
            if parameter.grad is not None:
                torch.testing.assert_close(moved_to, parameter - 0.1 * parameter.grad)


@pytest.mark.parametrize("codebook_loss", ["tokenflow", "var"])
def test_codebook_loss_moves_entries_alone_and_commitment_features_alone(model, codebook_loss):
    output = model(Pictures()[0]["pixel_values"], codebook_loss=codebook_loss)
    output.features.retain_grad()
    codebook, commitment = codebook_losses(output.quantization)
    codebook.backward(retain_graph=True)
    assert output.features.grad is None and model.quantizer.pixel_codebook.grad.any()
    model.zero_grad()
    commitment.backward()
    assert output.features.grad.any() and model.quantizer.pixel_codebook.grad is None


def test_half_of_the_scales_drop_but_never_the_first(model, tmp_path):
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, scale_drop=1.0)
    schedule = model.schedules.by_grid((3, 3))
    drawn = [run._draw_scales(schedule) for _ in range(400)]
    assert all(len(keep) == len(schedule) and keep[0] for keep in drawn)
    for scale in range(1, len(schedule)):
        assert 0.4 < np.mean([keep[scale] for keep in drawn]) < 0.6
    run.args.scale_drop = 0.0
    assert run._draw_scales(schedule) is None


def test_the_adversary_begins_late_and_each_side_moves_by_its_own_loss(coarse_model, tmp_path):
    torch.manual_seed(1)
    prepared = prepare_vq_stage(coarse_model, "pixel")
    arguments = {"discriminator_weight": 0.5, "discriminator_start": 3, "max_steps": 2, "weight_decay": 0.0}
    run = trainer(prepared, tmp_path, Large(), **arguments)
    before = state(run.model.discriminator)
    run.train()
    assert not moved(before, state(run.model.discriminator))
    assert "loss_adversarial" not in run.state.log_history[0]
    run.args.max_steps, run.args.discriminator_start = 3, 0
    run.train()
    assert moved(before, state(run.model.discriminator))
    assert "loss_adversarial" in run.state.log_history[0]
    pixels = Large()[0]["pixel_values"]
    _, judged = run.model(pixels, adversarial=True, pixel_only=True)
    for name, parts in {"adversarial": "vq_model", "discriminator": "discriminator"}.items():
        run.model.zero_grad()
        judged[name].backward(retain_graph=True)
        gradients = {key: value.grad for key, value in run.model.named_parameters() if value.grad is not None}
        assert {key.split(".")[0] for key, gradient in gradients.items() if gradient.any()} == {parts}


def test_a_loss_that_begins_between_two_logs_is_the_mean_of_its_own_batches(coarse_model, tmp_path):
    """One batch again and again, by which nothing is moved."""
    values = {"discriminator_weight": 0.5, "max_steps": 4, "logging_steps": 4, "learning_rate": 0.0, "scale_drop": 0.0}
    logged = []
    for start in (1, 4):
        dataset = torch.utils.data.Subset(Large(), [0])
        torch.manual_seed(1)  # of the discriminator
        model = prepare_vq_stage(copy.deepcopy(coarse_model), "pixel")
        run = trainer(model, tmp_path, dataset, discriminator_start=start, **values)
        run.train()
        logged.append({name: run.state.log_history[0][f"loss_{name}"] for name in ("adversarial", "discriminator")})
    assert logged[0] == pytest.approx(logged[1]) and logged[0]["discriminator"] > 0.1


@pytest.mark.parametrize("adaptive", [False, True], ids=["constant", "adaptive"])
def test_the_adversary_weighs_on_both_sides_from_its_step_on(coarse_model, tmp_path, adaptive):
    arguments = {"discriminator_weight": 0.3, "discriminator_start": 5, "adaptive_discriminator_weight": adaptive}
    run = trainer(prepare_vq_stage(coarse_model, "pixel"), tmp_path, Large(), scale_drop=0.0, **arguments)
    pixels = Large()[0]["pixel_values"]
    output, judged = run.model(pixels, adversarial=True, pixel_only=True)
    error = ((output.reconstruction - pixels) ** 2).mean()
    codebook, commitment = codebook_losses(output.quantization, slice(coarse_model.config.semantic_dim, None))
    before = error + codebook + 0.25 * commitment
    last = coarse_model.pixel_decoder.conv_out.weight
    weight = adaptive_weight(error, judged["adversarial"], last) if adaptive else 1.0
    fake, real = (run.model.discriminator(each) for each in (output.reconstruction, pixels))
    deceived, told = -fake.mean(), (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    for completed, expected in ((3, before), (4, before + 0.3 * (weight * deceived + told))):
        run.state.global_step = completed
        torch.testing.assert_close(run.compute_loss(run.model, {"pixel_values": pixels}), expected)


def test_var_codebook_loss_by_hand(model, tmp_path):
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, codebook_loss="var", scale_drop=0.0)
    pixels = Pictures()[0]["pixel_values"]
    loss = run.compute_loss(run.model, {"pixel_values": pixels})
    output = model(pixels, pixel_only=True)
    codes, schedule = output.quantization.target_codes, model.schedules.by_size(*pixels.shape[-2:])
    pixel, distances = slice(model.config.semantic_dim, None), []
    for scale in range(1, len(schedule) + 1):
        total = model.quantizer.decode(codes[:, : schedule.prefix(scale).num_codes], schedule)
        distances.append(((total - output.features)[:, pixel] ** 2).mean())
    error = ((output.reconstruction - pixels) ** 2).mean()
    torch.testing.assert_close(loss, error + 1.25 * sum(distances) / len(distances))


def test_the_discriminator_halves_thrice_and_sees_70_pixels():
    discriminator = PatchDiscriminator(channels=4)
    pixels = torch.zeros(1, 3, 256, 256, requires_grad=True)
    scores = discriminator.eval()(pixels)
    assert scores.shape == (1, 1, 30, 30)
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, torch.nn.Conv2d)]
    seen = 1
    for layer in reversed(convolutions):
        seen = (seen - 1) * layer.stride[0] + layer.kernel_size[0]
    assert seen == 70 and [layer.out_channels for layer in convolutions] == [4, 8, 16, 32, 1]
    assert [layer.bias is None for layer in convolutions] == [False, True, True, True, False]  # norms have their own
    slopes = [layer.negative_slope for layer in discriminator.layers if isinstance(layer, torch.nn.LeakyReLU)]
    assert slopes == [0.2] * 4
    deeper = PatchDiscriminator(channels=4, layers=5).layers
    widths = [layer.out_channels for layer in deeper if isinstance(layer, torch.nn.Conv2d)]
    assert widths == [4, 8, 16, 32, 32, 32, 1]


def test_the_discriminator_begins_as_pix2pix_does():
    torch.manual_seed(0)
    assert PatchDiscriminator().layers[0].out_channels == 64
    for name, parameter in PatchDiscriminator().named_parameters():
        if parameter.ndim == 4:
            assert abs(parameter.std() - 0.02) < 2e-3 and abs(parameter.mean()) < 2e-3, name
        elif name.endswith("weight"):
            assert abs(parameter.mean() - 1) < 1e-2 and 0.015 < parameter.std() < 0.025, name


def test_adaptive_weight_makes_both_losses_move_the_last_layer_equally():
    layer = torch.nn.Linear(4, 4)
    hidden = layer(torch.randn(3, 4))
    one, two = hidden.square().mean(), 100 * hidden.abs().mean()
    weight = adaptive_weight(one, two, layer.weight)
    norms = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in (one, weight * two)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=0)
    for factor, expected in ((0.5, 5e3), (2.0, 1e4)):  # an adversary that moves nothing
        steady = factor * layer.weight.sum() / layer.weight.numel() ** 0.5  # its gradient has the norm `factor`
        assert adaptive_weight(steady, 0 * layer.weight.sum(), layer.weight).item() == pytest.approx(expected)


def test_enlarged_decoder_is_the_same_function_of_twice_the_blocks(model):
    larger = enlarge_decoder(model)
    assert larger.config.decoder_blocks == 2 * model.config.decoder_blocks
    count = lambda module: sum(p.numel() for p in module.pixel_decoder.parameters())  # noqa: E731
    assert count(larger) >= 1.4 * count(model)  # what stands around the blocks stays
    for size in ((12, 12), (8, 16)):
        pixels = torch.rand(2, 3, *size) * 2 - 1
        torch.testing.assert_close(larger(pixels).reconstruction, model(pixels).reconstruction, rtol=0, atol=0)


def test_a_decoder_is_enlarged_once(model, tmp_path):
    first = prepare_vq_stage(model, "decoder")
    first.save_pretrained(tmp_path)
    loaded = NextFlowVQModel.from_pretrained(tmp_path)
    again = prepare_vq_stage(loaded, "decoder")
    with pytest.raises(ValueError, match="stage must be one of pixel, joint, decoder, got 'text'"):
        prepare_vq_stage(loaded, "text")
    assert again is loaded and again.config.decoder_blocks == 2 * model.config.decoder_blocks
    assert again.config.training_stages == ["decoder"] and model.config.training_stages is None
    assert {name.split(".")[0] for name, p in again.named_parameters() if p.requires_grad} == {"pixel_decoder"}


def test_a_second_joint_stage_has_the_teacher_of_the_first(model, tmp_path):
    model.save_pretrained(tmp_path / "start")
    begun = NextFlowVQModel.from_pretrained(tmp_path / "start")
    teacher = load_teacher(begun, str(tmp_path / "start"))
    before, values = state(begun.semantic_encoder), {"stage": "joint", "save_strategy": "steps", "save_steps": 2}
    run = trainer(prepare_vq_stage(begun, "joint"), tmp_path / "joint", teacher=teacher, **values)
    run.train()
    run.save_model()
    assert moved(before, state(begun.semantic_encoder)) and not moved(before, state(teacher))
    for folder in ("joint", "joint/checkpoint-2"):
        loaded = load_vq_model(str(tmp_path / folder))
        assert loaded.config.training_stages == ["joint"]
        second = load_teacher(loaded, str(tmp_path / folder))
        assert not moved(before, state(second))
        pixels = Pictures()[0]["pixel_values"]
        assert torch.equal(loaded.semantic_features(pixels, second), loaded.semantic_features(pixels, teacher))
    loaded.save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match="moved the semantic encoder of .*copy.*name it by --teacher"):
        load_teacher(loaded, str(tmp_path / "copy"))
    for named in ("start", "joint", "joint/teacher"):  # tokenizers, whose teachers they are, and the encoder itself
        assert not moved(before, state(load_teacher(loaded, str(tmp_path / "copy"), str(tmp_path / named))))


def test_a_joint_stage_that_goes_on_in_its_folder_does_not_lose_its_teacher(model, tmp_path, monkeypatch):
    """Wherever it is killed: there is no other."""
    teacher = load_teacher(model, "")
    first = trainer(prepare_vq_stage(model, "joint"), tmp_path, teacher=teacher, stage="joint")
    first.train()
    first.save_model()
    loaded = load_vq_model(str(tmp_path))
    teacher = load_teacher(loaded, str(tmp_path))
    again = trainer(prepare_vq_stage(loaded, "joint"), tmp_path, teacher=teacher, stage="joint")

    def die(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, suppress(KeyboardInterrupt):
        killed.setattr(teacher, "save_pretrained", die)
        again.train()
    assert not moved(state(teacher), state(load_teacher(loaded, str(tmp_path))))
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    trainer(prepare_vq_stage(loaded, "joint"), tmp_path, teacher=other, stage="joint").train()
    assert not moved(state(other), state(load_teacher(loaded, str(tmp_path))))


def test_a_teacher_fits_the_semantic_encoder(model, coarse_model, tmp_path):
    coarse_model.semantic_encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a teacher of mine has the patch_size 4, .* has 8"):
        load_teacher(model, "mine", str(tmp_path))
    wide = coarse_model.config.semantic_config.hidden_size
    for width in (wide, wide + 1):  # of the teacher, where the tokenizer says that it is another than its own
        coarse_model.config.teacher_dim = width
        coarse_model.config.semantic_config.hidden_size = 7
        refused = pytest.raises(ValueError, match=f"a teacher of mine has the hidden_size {width}, .* has {wide}")
        with nullcontext() if width == wide else refused:
            assert load_teacher(coarse_model, "mine", str(tmp_path)).config.hidden_size == wide


def test_resuming_continues_as_if_nothing_had_happened(coarse_model, tmp_path):
    common = {"max_steps": 8, "discriminator_weight": 0.5, "discriminator_start": 1, "scale_drop": 0.5}
    common |= {"restart_steps": 3}
    whole = trainer(prepare_vq_stage(copy.deepcopy(coarse_model), "pixel"), tmp_path / "whole", Large(), **common)
    whole.train()
    saving = common | {"save_strategy": "steps", "save_steps": 5}
    first = trainer(prepare_vq_stage(copy.deepcopy(coarse_model), "pixel"), tmp_path / "cut", Large(), **saving)
    first.train()
    again = trainer(prepare_vq_stage(copy.deepcopy(coarse_model), "pixel"), tmp_path / "cut", Large(), **common)
    (tmp_path / "cut" / "checkpoint-8" / "trainer_state.json").unlink()  # as a kill while it was written leaves it
    again.train(resume_from_checkpoint=True)
    expected, got = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    kept = [
        [{k: v for k, v in row.items() if k.startswith(("loss", "psnr", "usage"))} for row in run.state.log_history][
            :8
        ]
        for run in (whole, again)
    ]
    assert kept[0] == kept[1]


def test_a_checkpoint_of_another_training_is_not_resumed(model, tmp_path):
    """Of another stage, another size, or without what an option needs."""
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(prepare_vq_stage(copy.deepcopy(model), "pixel"), tmp_path, **saved).train()
    small = NextFlowVQModel(tiny_config(vq={"codebook_size": 8}).vq_config)
    for other, stage, values in (
        (model, "joint", {"teacher": load_teacher(model, "")}),
        (model, "decoder", {}),
        (small, "pixel", {}),
        (model, "pixel", {"restart_steps": 1}),
        (model, "pixel", {"discriminator_weight": 0.5}),
    ):
        run = trainer(prepare_vq_stage(copy.deepcopy(other), stage), tmp_path, stage=stage, **values)
        with pytest.raises(ValueError, match="checkpoint-1 is of another training than this: resume with the model"):
            run.train(resume_from_checkpoint=True)


def test_a_checkpoint_that_counts_as_whole_has_what_restarts_need(model, tmp_path, monkeypatch):
    def die(state, path):
        raise KeyboardInterrupt(path)

    monkeypatch.setattr(TrainerState, "save_to_json", die)
    saving = {"restart_steps": 2, "save_strategy": "steps", "save_steps": 1}
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, **saving)
    with pytest.raises(KeyboardInterrupt, match="trainer_state.json"):
        run.train()
    assert load_file(tmp_path / "checkpoint-1" / "chosen_entries.safetensors")["chosen"].sum() > 0


def test_checkpoints_load_as_models(coarse_model, tmp_path):
    run = trainer(prepare_vq_stage(coarse_model, "pixel"), tmp_path, Large(), discriminator_weight=0.5, max_steps=1)
    run.train()
    run.save_model(tmp_path / "final")
    loaded = NextFlowVQModel.from_pretrained(tmp_path / "final")
    assert not moved(state(loaded), state(coarse_model))
    judged = load_file(tmp_path / "final" / "discriminator.safetensors")
    assert all(torch.equal(judged[name], value) for name, value in run.model.discriminator.state_dict().items())


def test_what_is_logged_of_each_scale(model, tmp_path):
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, max_steps=1, scale_drop=0.0, logging_steps=1)
    run.train()
    row = run.state.log_history[0]
    index = list(run._get_train_sampler())[0]
    pixels = Pictures()[index]["pixel_values"]
    schedule = model.schedules.by_size(*pixels.shape[-2:])
    scales = range(1, len(schedule) + 1)
    assert {f"{name}_scale_{scale}" for name in ("usage", "perplexity", "residual") for scale in scales} <= row.keys()
    assert 0 < row["usage_scale_1"] <= 3 / 24 and 1 <= row["perplexity_scale_1"] <= 3
    assert row["perplexity_scale_3"] <= row["usage_scale_3"] * 24 + 1e-9


def brighten_(model) -> None:
    """Let reconstructions leave the range of pixels, on both sides."""
    with torch.no_grad():
        model.pixel_decoder.conv_out.bias += torch.linspace(-1, 1, 12)


def test_what_is_logged_is_of_all_pictures_since_the_last_log(model, tmp_path):
    brighten_(model)
    values = {"max_steps": 4, "logging_steps": 2, "learning_rate": 0.0, "scale_drop": 0.0}
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, **values)
    run.train()
    order = list(run._get_train_sampler())
    for row, indices in zip(run.state.log_history, (order[:2], order[2:4])):
        errors, values, codes, residuals = [], [], {}, {}
        for index in indices:
            pixels = Pictures()[index]["pixel_values"]
            output = model(pixels, pixel_only=True)
            errors.append(F.mse_loss(output.reconstruction, pixels).item())
            clamped = (output.reconstruction.clamp(-1, 1) - pixels).square().flatten(1).mean(1)
            values.append((-10 * torch.log10(clamped / 4)).mean().item())
            schedule = model.schedules.by_size(*pixels.shape[-2:])
            for scale in range(len(schedule)):
                chosen = output.quantization.target_codes[:, schedule.slice(scale)].flatten()
                codes.setdefault(scale, []).append(chosen)
                residuals.setdefault(scale, []).append(output.quantization.residual_norms[scale].item())
        assert row["loss_reconstruction"] == pytest.approx(np.mean(errors), rel=1e-5)
        assert row["psnr"] == pytest.approx(np.mean(values), rel=1e-5)
        for scale, chosen in codes.items():
            shares = torch.cat(chosen).bincount(minlength=24) / len(torch.cat(chosen))
            assert row[f"usage_scale_{scale + 1}"] == pytest.approx((shares > 0).float().mean().item())
            perplexity = torch.special.entr(shares).sum().exp().item()
            assert row[f"perplexity_scale_{scale + 1}"] == pytest.approx(perplexity, rel=1e-5)
            assert row[f"residual_scale_{scale + 1}"] == pytest.approx(np.mean(residuals[scale]), rel=1e-5)


def test_residuals_are_means_over_pictures(model, tmp_path):
    values = {"max_steps": 2, "logging_steps": 2, "learning_rate": 0.0, "scale_drop": 0.0}
    batches = [{"pixel_values": OneSize()[0]["pixel_values"] * 0.1}, OneSize()[2]]  # of one picture, and of three
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, batches, **values)
    run.train()
    one, three = (model(each["pixel_values"], pixel_only=True).quantization.residual_norms[0] for each in batches)
    row = next(row for row in run.state.log_history if "loss" in row)
    assert row["residual_scale_1"] == pytest.approx(float(one + 3 * three) / 4, rel=1e-5)


def test_what_was_interrupted_between_two_logs_is_not_logged_later(model, tmp_path):
    class Interrupted(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    values = {"max_steps": 2, "logging_steps": 2, "learning_rate": 0.0, "scale_drop": 0.0}
    prepared, interrupted = prepare_vq_stage(model, "pixel"), Interrupted()
    whole, again = (trainer(prepared, tmp_path, **values) for _ in range(2))
    whole.train()
    again.add_callback(interrupted)
    with pytest.raises(KeyboardInterrupt):
        again.train()
    again.remove_callback(interrupted)
    again.train()
    logged = ("loss", "psnr", "usage")
    expected, got = (
        [{name: row[name] for name in row if name.startswith(logged)} for row in run.state.log_history]
        for run in (whole, again)
    )
    assert got == expected


def test_unused_entries_restart_from_what_was_looked_up(model, tmp_path):
    with torch.no_grad():
        model.quantizer.pixel_codebook[7:] = 100.0  # normalised they are all alike, the first of them wins
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, max_steps=2, restart_steps=2, learning_rate=0.0)
    before, semantic = model.quantizer.pixel_codebook.clone(), model.quantizer.semantic_codebook.clone()
    run.train()
    assert torch.equal(model.quantizer.semantic_codebook, semantic)
    changed = (model.quantizer.pixel_codebook != before).any(-1)
    assert changed[8:].all()
    looked_up = torch.cat(run._restarts.queries)[:, model.config.semantic_dim :]
    for row in model.quantizer.pixel_codebook[changed]:
        assert (looked_up == row).all(-1).any()
    for step in (3, 4, 5, 6):  # again and again
        before = model.quantizer.pixel_codebook.clone()
        run._restarts.on_step_end(run.args, TrainerState(global_step=step), None)
        assert torch.equal(model.quantizer.pixel_codebook, before) == (step % 2 == 1)
    run.save_model(tmp_path / "result")
    assert not (tmp_path / "result" / "chosen_entries.safetensors").exists()  # which a checkpoint alone needs


def test_both_halves_restart_in_the_joint_stage(model, tmp_path):
    with torch.no_grad():
        model.quantizer.pixel_codebook[7:] = 100.0
        model.quantizer.semantic_codebook[7:] = 100.0
    teacher = copy.deepcopy(model.semantic_encoder)
    values = {"stage": "joint", "max_steps": 2, "restart_steps": 2, "learning_rate": 0.0}
    run = trainer(prepare_vq_stage(model, "joint"), tmp_path, teacher=teacher, **values)
    run.train()
    looked_up = torch.cat(run._restarts.queries)
    entries = torch.cat([model.quantizer.semantic_codebook, model.quantizer.pixel_codebook], dim=-1)
    assert len(entries) > 8 and all((looked_up == entry).all(-1).any() for entry in entries[8:])


def test_evaluation_measures_whole_pictures_and_draws_a_sheet(model, tmp_path):
    brighten_(model)
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, scale_drop=1.0)
    metrics = run.evaluate(Pictures())
    values, shown = [], []
    for index in range(6):
        pixels = Pictures()[index]["pixel_values"]
        rebuilt = model(pixels, pixel_only=True).reconstruction.clamp(-1, 1)
        error = (rebuilt - pixels).square().flatten(1).mean(1)
        values += (-10 * torch.log10(error / 4)).tolist()
        shown += zip(pixels, rebuilt)
    assert metrics["eval_psnr"] == pytest.approx(np.mean(values), abs=1e-4)
    assert -1 <= metrics["eval_ssim"] <= 1
    with Image.open(tmp_path / "reconstructions" / "step-0.png") as sheet:
        assert sheet.size == (8 * 16, 2 * 12)
        drawn = np.asarray(sheet)
    expected = np.full_like(drawn, 255)
    for column, pair in enumerate(shown[:8]):
        for row, picture in enumerate(pair):
            _, height, width = picture.shape
            levels = (picture.permute(1, 2, 0).detach().numpy() / 2 + 0.5) * 255
            expected[12 * row : 12 * row + height, 16 * column : 16 * column + width] = np.round(levels)
    assert np.abs(drawn.astype(int) - expected).max() <= 1  # of 255, where rounding may go either way
    assert (expected[:12] == drawn[:12]).mean() > 0.99


def test_a_later_stage_is_evaluated_with_semantic_features(model, tmp_path):
    prepared, pixels = prepare_vq_stage(model, "decoder"), Pictures()[1]["pixel_values"]
    run = trainer(prepared, tmp_path, stage="decoder")
    both, pixel = (prepared(pixels, pixel_only=alone).reconstruction.clamp(-1, 1) for alone in (False, True))
    measured = run.evaluate([{"pixel_values": pixels}])["eval_psnr"]
    with_semantics, without = (psnr(rebuilt, pixels).mean().item() for rebuilt in (both, pixel))
    assert measured == pytest.approx(with_semantics) != pytest.approx(without)


def test_a_picture_that_comes_back_equal_has_no_psnr(model, tmp_path):
    """White ones of a decoder that leaves the range of pixels."""
    with torch.no_grad():
        model.pixel_decoder.conv_out.weight.zero_()
        model.pixel_decoder.conv_out.bias.fill_(3.0)
    grey, white = torch.full((1, 3, 12, 12), 0.5), torch.ones(2, 3, 12, 12)
    batches = [{"pixel_values": torch.cat([white, grey])}, {"pixel_values": white}]
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, batches, max_steps=2, logging_steps=2, learning_rate=0.0)
    expected = pytest.approx(10 * np.log10(4 / 0.25))
    assert run.evaluate(batches)["eval_psnr"] == expected
    run.train()
    assert next(row for row in run.state.log_history if "loss" in row)["psnr"] == expected


def test_pictures_of_several_kinds_are_evaluated_apart(model, tmp_path):
    kinds = {name: torch.utils.data.Subset(Pictures(), range(at, 6, 2)) for at, name in enumerate(("square", "wide"))}
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, eval_dataset=kinds)
    metrics = run.evaluate()
    for name, pictures in kinds.items():
        assert metrics[f"eval_{name}_psnr"] == run.evaluate(pictures)["eval_psnr"] == run.evaluate(name)["eval_psnr"]
        assert (tmp_path / "reconstructions" / f"step-0_{name}.png").is_file()


def test_the_best_tokenizer_is_the_one_of_the_highest_psnr(model, tmp_path):
    """Or of the lowest LPIPS; here at a rate that makes it worse."""
    each_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    values = each_step | {"load_best_model_at_end": True, "learning_rate": 0.05}
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, eval_dataset=Pictures(), **values)
    run.train()
    measured = [row["eval_psnr"] for row in run.state.log_history if "eval_psnr" in row]
    assert run.state.best_metric == max(measured) > measured[-1]
    assert run.evaluate()["eval_psnr"] == pytest.approx(max(measured), rel=1e-6)
    arguments = NextFlowVQTrainingArguments(str(tmp_path), metric_for_best_model="lpips", use_cpu=True)
    assert not arguments.greater_is_better


def test_a_rate_falls_where_psnr_does_not_rise(model, tmp_path):
    judged = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau"}
    judged |= {"lr_scheduler_kwargs": {"patience": 0}, "learning_rate": 0.05, "eval_dataset": Pictures()}
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, **judged)
    run.train()
    measured = [row["eval_psnr"] for row in run.state.log_history if "eval_psnr" in row]
    assert run.lr_scheduler.best == max(measured) > min(measured)
    assert (run.optimizer.param_groups[0]["lr"] < 0.05) == (measured != sorted(measured))


def test_a_rate_warms_up_where_asked(model, tmp_path):
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, warmup_steps=2)
    run.train()
    rates = [row["learning_rate"] for row in run.state.log_history if "loss" in row]
    assert rates == pytest.approx([0.0, 0.5e-3, 1e-3])


def test_what_is_not_gathered_is_refused(model, tmp_path):
    arguments = NextFlowVQTrainingArguments(
        str(tmp_path), perceptual_weight=0, discriminator_weight=0, use_cpu=True, report_to="none"
    )
    with pytest.raises(ValueError, match="compute_metrics is of outputs that this trainer never gathers"):
        NextFlowVQTrainer(model, arguments, Pictures(), compute_metrics=lambda prediction: {})
    with pytest.raises(ValueError, match="NextFlowVQTrainer gathers no outputs: measure a dataset by `evaluate`"):
        NextFlowVQTrainer(model, arguments, Pictures()).predict(Pictures())


def test_items_of_a_batch_count_by_their_pictures(model, tmp_path):
    """Joined where their sizes are one, run apart where not; evaluations do not depend on it."""
    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path, scale_drop=0.0, per_device_train_batch_size=3)
    items = [{"pixel_values": Pictures()[index]["pixel_values"][: 1 + index]} for index in (0, 1, 2)]
    sizes = run.data_collator(items)["pixel_values"]
    assert [len(pixels) for pixels in sizes] == [1 + 3, 2]
    alone = [
        run.compute_loss(run.model, {"pixel_values": pixels[None]})
        for item in items
        for pixels in item["pixel_values"]
    ]
    joined = run.compute_loss(run.model, {"pixel_values": sizes})
    torch.testing.assert_close(joined, sum(alone) / 6)
    run.train()
    metrics = []
    for count, drop_last in ((1, False), (4, False), (4, True), (9, True)):
        run.args.per_device_eval_batch_size, run.args.dataloader_drop_last = count, drop_last
        metrics.append(run.evaluate(Pictures()))
    assert all(metrics[0] == pytest.approx(other, rel=1e-5) for other in metrics[1:])


def test_every_picture_of_a_step_counts_as_much_however_it_is_split(model, tmp_path):
    after = []
    for split in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        prepared = prepare_vq_stage(copy.deepcopy(model), "pixel")
        values = {"optim": "sgd", "learning_rate": 0.02, "max_steps": 2, "scale_drop": 0.0, split: 3}
        run = trainer(prepared, tmp_path, OneSize(), **values)
        run.train()
        rows = [row for row in run.state.log_history if "loss" in row]
        after.append(([row["loss"] for row in rows], state(prepared)))
        for row in rows:
            parts = row["loss_reconstruction"] + row["loss_codebook"] + 0.25 * row["loss_commitment"]
            assert row["loss"] == pytest.approx(parts, rel=1e-5)
    (losses, expected), (split_losses, got) = after
    assert split_losses == pytest.approx(losses, rel=1e-5)
    assert moved(state(model), got)
    assert max(float((expected[name] - got[name]).abs().max()) for name in expected) < 1e-5


def test_checkpointing_gives_the_same_gradients(model, tmp_path):
    pixels, gradients = Pictures()[0]["pixel_values"], []
    for checkpointing in (False, True):
        prepared = prepare_vq_stage(copy.deepcopy(model), "pixel")
        run = trainer(prepared, tmp_path, max_steps=1, activation_checkpointing=checkpointing, scale_drop=0.0)
        run.train()
        prepared.zero_grad()
        calls = []
        for module in prepared.pixel_decoder.modules():
            if type(module).__name__ == "ResidualBlock":
                module.conv1.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        blocks = sum(type(module).__name__ == "ResidualBlock" for module in prepared.pixel_decoder.modules())
        run.compute_loss(run.model, {"pixel_values": pixels}).backward()
        assert len(calls) == blocks * (1 + checkpointing)
        gradients.append([p.grad for p in prepared.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_ssim_is_wangs_and_lpips_is_measured_where_a_network_is(model, tmp_path):
    from skimage.metrics import structural_similarity

    pair = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    near = (pair[0] + 0.3 * pair[1]).clamp(-1, 1)
    expected = structural_similarity(
        near.double().numpy() + 1,
        pair[0].double().numpy() + 1,
        channel_axis=0,
        data_range=2.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert float(ssim(near[None], pair[:1])) == pytest.approx(expected, abs=1e-9)
    assert ssim(pair, pair).tolist() == [1.0, 1.0] and float(ssim(pair[:1, :, :8], near[None, :, :8])) < 0.99

    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path)
    run.perceptual = Distance()
    values = []
    for index in range(6):
        pixels = Pictures()[index]["pixel_values"]
        values += (
            (model(pixels, pixel_only=True).reconstruction.clamp(-1, 1) - pixels).abs().flatten(1).sum(1).tolist()
        )
    assert run.evaluate(Pictures())["eval_lpips"] == pytest.approx(np.mean(values), rel=1e-5)


@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (1, 2, 3), (1,)], ids=["one value", "one a picture", "maps"])
def test_a_perceptual_network_says_the_distance_of_pictures_by_its_mean(dims, model, tmp_path):
    class Distance(torch.nn.Module):
        def forward(self, first, second):
            return (first - second).abs().mean(dims)

    run = trainer(prepare_vq_stage(model, "pixel"), tmp_path)
    run.perceptual, values = Distance(), []
    for index in range(6):
        pixels = OneSize()[index]["pixel_values"]
        rebuilt = model(pixels, pixel_only=True).reconstruction.clamp(-1, 1)
        values += (rebuilt - pixels).abs().flatten(1).mean(1).tolist()
    assert run.evaluate(OneSize())["eval_lpips"] == pytest.approx(np.mean(values), rel=1e-5)


def test_ssim_of_small_pictures_has_the_largest_window_that_fits():
    """5 x 6 and 4 x 6 pixels: windows of 5 and 3, wherever they fit whole; twice the pixel range of [0, 1]."""
    one, other = torch.rand(2, 1, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for height, edge in ((5, 5), (4, 3)):
        line = torch.exp(-((torch.arange(edge) - edge // 2).double() ** 2) / (2 * 1.5**2))
        weights, values = torch.outer(line, line) / line.sum() ** 2, []
        for colour in range(3):
            for top in range(height - edge + 1):
                for left in range(6 - edge + 1):
                    a, b = (each[0, colour, top : top + edge, left : left + edge] + 1 for each in (one, other))
                    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                    variances = (weights * (a - mean_a) ** 2).sum() + (weights * (b - mean_b) ** 2).sum()
                    covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
                    luminance = (2 * mean_a * mean_b + 0.02**2) / (mean_a**2 + mean_b**2 + 0.02**2)
                    values.append(luminance * (2 * covariance + 0.06**2) / (variances + 0.06**2))
        got = ssim(one[..., :height, :].float(), other[..., :height, :].float())
        torch.testing.assert_close(got, torch.stack(values).mean()[None], rtol=1e-5, atol=1e-6)


def test_two_processes_train_and_evaluate_as_one(model, tmp_path):
    """Five batches, which do not divide evenly; an average, the best checkpoint, a resume."""
    five = torch.utils.data.Subset(Pictures(), range(5))
    alone = trainer(prepare_vq_stage(model, "pixel"), tmp_path).evaluate(five)
    train_twice(model, tmp_path / "alone", gradient_accumulation_steps=2)
    model.save_pretrained(tmp_path / "model")
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    fresh.run(script, tmp_path)
    together = json.loads((tmp_path / "two.json").read_text())
    for name in ("eval_psnr", "eval_ssim"):
        assert together[name] == pytest.approx(alone[name], rel=1e-6)
    for part in ("", "ema"):
        expected, got = (state(NextFlowVQModel.from_pretrained(tmp_path / run / part)) for run in ("alone", "two"))
        assert moved(state(model), got)
        assert max(float((expected[name] - got[name]).abs().max()) for name in expected) < 1e-5


def train_twice(model, output, **arguments) -> None:
    """Three steps, the last of them after a resume."""
    values = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "optim": "sgd"}
    values |= {"load_best_model_at_end": True, "scale_drop": 0.0, "learning_rate": 0.02} | arguments
    for steps in (2, 3):
        run = trainer(
            prepare_vq_stage(copy.deepcopy(model), "pixel"),
            output,
            OneSize(),
            eval_dataset=Pictures(),
            max_steps=steps,
            **values,
        )
        run.add_callback(EMACallback(0.5))
        run.add_callback(EarlyStoppingCallback(2))
        run.train(resume_from_checkpoint=steps == 3)
    assert run.state.global_step == 3
    run.save_model()


def test_weights_that_devices_share_are_refused(model, tmp_path):
    class Sharing(NextFlowVQTrainer):
        """accelerate turns FSDP on for accelerators alone."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True

    arguments = NextFlowVQTrainingArguments(str(tmp_path), perceptual_weight=0, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="Sharing takes whole weights on every device: use DDP, not FSDP or ZeRO-3"):
        Sharing(prepare_vq_stage(model, "pixel"), arguments, Pictures())
    for stage in (2, 3):  # of DeepSpeed's ZeRO
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
        own = {"is_fsdp_enabled": False, "is_deepspeed_enabled": True, "accelerator": SimpleNamespace(state=state)}
        with pytest.raises(ValueError, match="not FSDP or ZeRO-3") if stage == 3 else nullcontext():
            refuse_shared_weights(SimpleNamespace(**own))


TWO_PROCESSES = """
import json, sys, torch
from pathlib import Path
from tests.ranks import on_ranks
from tests.test_vq_trainer import Pictures, train_twice, trainer
from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.training import prepare_vq_stage


def work():
    folder = Path(sys.argv[1])
    model = prepare_vq_stage(NextFlowVQModel.from_pretrained(folder / "model"), "pixel")
    run = trainer(model, folder)
    metrics = run.evaluate(torch.utils.data.Subset(Pictures(), range(5)))
    if run.is_world_process_zero():
        (folder / "two.json").write_text(json.dumps(metrics))
    train_twice(NextFlowVQModel.from_pretrained(folder / "model"), folder / "two", ddp_find_unused_parameters=True)
    run.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()

on_ranks(work)
"""


def test_image_batches_hold_every_picture_once_at_its_schedule(tmp_path, model):
    rng = np.random.default_rng(0)
    images = []
    for number in range(11):
        size = (40, 40) if number % 3 else (20, 42)
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        path = tmp_path / f"{number}.png"
        image.save(path)
        images.append(path if number % 2 else image)
    processor = NextFlowImageProcessor.from_vq_config(model.config)
    batches = ImageBatches(images, processor, batch_size=3, seed=1)
    members = [sorted(map(int, batch)) for batch in batches._batches]
    assert sorted(sum(members, [])) == list(range(11)) and max(map(len, members)) == 3
    for place, batch in enumerate(batches._batches):
        pixels = batches[place]["pixel_values"]
        assert tuple(pixels.shape[-2:]) in {(12, 12), (8, 16)}
        alone = processor(images[int(batch[0])], level="12", return_tensors="pt")["pixel_values"]
        p = model.config.patch_size
        first = pixels[0, :, :p, :p].permute(1, 2, 0).flatten()
        torch.testing.assert_close(first, alone[0], rtol=0, atol=0)
    batches.set_epoch(1)
    assert [sorted(map(int, batch)) for batch in batches._batches] != members


def test_batches_are_of_the_image_processors_level_unless_another_is_asked_for():
    levels = {"low": 2, "high": 3}
    own = NextFlowImageProcessor(patch_size=8, scale_schedules=[[[1, 1], [2, 2], [3, 3]]], levels=levels, level="low")
    picture = Image.new("RGB", (40, 40))
    sizes = [ImageBatches([picture], own, 1, level)[0]["pixel_values"].shape[-1] for level in (None, "high")]
    assert sizes == [16, 24]


def test_sizes_are_read_from_headers_and_a_damaged_picture_costs_itself(tmp_path, model, monkeypatch):
    """Pictures of either format torn in the middle and in the header, alone in a batch and among others."""
    rng = np.random.default_rng(0)
    for number in range(8):
        suffix = "jpg" if number % 2 else "png"
        path = tmp_path / f"{number}.{suffix}"
        Image.fromarray(rng.integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(path)
        if number < 4:
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2 if number < 2 else 10])
    paths = sorted(tmp_path.iterdir())
    processor = NextFlowImageProcessor.from_vq_config(model.config)
    decode = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    one, all_of_them = (ImageBatches(paths, processor, batch_size) for batch_size in (1, 8))
    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    assert sorted(all_of_them.damaged) == [2, 3] and len(one) == 6 and len(all_of_them) == 1
    whole = {processor(path, level="12", return_tensors="pt")["pixel_values"].sum().item() for path in paths[4:]}
    shown = all_of_them[0]["pixel_values"]
    assert len(shown) == 4 and sorted(all_of_them.damaged) == [0, 1, 2, 3]
    seen = [one[place]["pixel_values"] for place in range(6)]
    assert all(len(pixels) == 1 for pixels in seen) and sorted(one.damaged) == [0, 1, 2, 3]
    for pixels in (shown, torch.cat(seen)):
        sums = {round(picture.sum().item(), 1) for picture in pixels}
        assert sums == {round(value, 1) for value in whole}
    with pytest.raises(ValueError, match="none of 2 pictures can be read, the first: "):
        ImageBatches(paths[2:4], processor, 1)
    with pytest.raises(ValueError, match="none of 2 pictures can be read"):
        ImageBatches(paths[:2], processor, 1)[0]

    class Column(list):
        """Pictures of a file that is damaged at one of them."""

        def __getitem__(self, number):
            if number == 1:
                raise ValueError("no such row")
            return super().__getitem__(number)

    column = ImageBatches(Column(paths[4:]), processor, 8)
    assert column.damaged == {1: "no such row"} and len(column[0]["pixel_values"]) == 3


def test_a_png_lies_on_its_side_wherever_its_file_says_so(tmp_path, model):
    """EXIF before the pixels, as Pillow writes it, and after them; XMP, as other programs do."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 40)).save(tmp_path / "before.png", exif=exif)
    data = (tmp_path / "before.png").read_bytes()
    at = data.index(b"eXIf") - 4
    chunk = data[at : at + 12 + int.from_bytes(data[at : at + 4], "big")]
    end = len(data) - 12
    (tmp_path / "after.png").write_bytes(data[:at] + data[at + len(chunk) : end] + chunk + data[end:])
    Image.new("RGB", (20, 40)).save(tmp_path / "none.png")
    xmp = PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    Image.new("RGB", (20, 40)).save(tmp_path / "xmp.png", pnginfo=xmp)
    sizes = {}
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            sizes[path.stem] = upright_size(image)
            assert image.getexif().get(0x0112) == (None if path.stem == "none" else 6)
            image.load()
    assert sizes == {"before": (20, 40), "after": (20, 40), "xmp": (20, 40), "none": (40, 20)}


def test_a_picture_of_another_size_than_its_header_promised_costs_itself_alone(tmp_path, model):
    """Orientations that mean nothing turn nothing; a file may be replaced by another."""
    exif = Image.Exif()
    for orientation in (0, 9):
        exif[0x0112] = orientation
        Image.new("RGB", (32, 16)).save(tmp_path / f"{orientation}.jpg", exif=exif)
    Image.new("RGB", (32, 16)).save(tmp_path / "replaced.jpg")
    batches = ImageBatches(sorted(tmp_path.iterdir()), NextFlowImageProcessor.from_vq_config(model.config), 3)
    assert batches.grids == dict.fromkeys(range(3), (2, 4))
    Image.new("RGB", (32, 32)).save(tmp_path / "replaced.jpg")
    assert batches[0]["pixel_values"].shape == (2, 3, 8, 16)
    assert batches.damaged == {2: "its header promised the grid (2, 4), it has (3, 3)"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": "both"}, "stage must be one of pixel, joint, decoder, got 'both'"),
        ({"codebook_loss": "vqgan"}, "codebook_loss must be one of tokenflow, var, got 'vqgan'"),
        ({"scale_drop": 1.5}, "scale_drop must lie in \\[0, 1\\], got 1.5"),
        ({"scale_drop": -0.1}, "scale_drop must lie in \\[0, 1\\], got -0.1"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not for this trainer: leave 0.0, got 0.1"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is not for this trainer: leave None, got 5.0"),
        ({"remove_unused_columns": True}, "remove_unused_columns is not for this trainer: leave False, got True"),
        ({"bf16_full_eval": True}, "bf16_full_eval is not for this trainer: leave False, got True"),
        ({"include_num_input_tokens_seen": True}, "include_num_input_tokens_seen is not for this trainer"),
        ({"use_liger_kernel": True}, "use_liger_kernel is not for this trainer: leave False, got True"),
        ({"fp16": True}, "fp16 is for GPUs, this device is cpu: take bf16, or float32"),
        ({"codebook_weight": -1.0}, "codebook_weight must be finite and not negative, got -1.0"),
        ({"l2_weight": float("nan")}, "l2_weight must be finite and not negative, got nan"),
        ({"distillation_weight": float("inf")}, "distillation_weight must be finite and not negative, got inf"),
        ({"restart_steps": -1}, "restart_steps must be at least 0, got -1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"stage": "joint"}, "give `teacher`"),
    ],
)
def test_wrong_settings_are_refused(model, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer(model, tmp_path, **arguments)


def test_a_missing_perceptual_network_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"transformers-nextflow\[lpips\].*perceptual_weight=0"):
        trainer(model, tmp_path, perceptual_weight=1.0)


def test_no_pictures_is_an_error(model):
    processor = NextFlowImageProcessor.from_vq_config(model.config)
    with pytest.raises(ValueError, match="no pictures"):
        ImageBatches([], processor, 2)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        ImageBatches([Image.new("RGB", (8, 8))], processor, 0)


def test_the_command_goes_through_the_stages(model, tmp_path, capsys):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name, size in (("a.png", (12, 12)), ("more/b.JPG", (30, 15))):
        noise = np.random.default_rng(len(name)).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    model.save_pretrained(tmp_path / "tokenizer")

    def run(source: str, stage: str, images: str = "photos", status: int = 0) -> NextFlowVQModel:
        options = {"model": source, "images": images, "eval_images": images, "output_dir": stage}
        options = {name: str(tmp_path / value) for name, value in options.items()} | {"stage": stage, "max_steps": "2"}
        options |= {"perceptual_weight": "0", "discriminator_weight": "0", "learning_rate": "0.01"}
        argv = [part for name, value in options.items() for part in (f"--{name}", value)]
        assert cli.main(["train", "tokenizer", *argv, "--use_cpu", "--report_to", "none"]) == status
        return NextFlowVQModel.from_pretrained(tmp_path / stage)

    stages = [model, run("tokenizer", "pixel"), run("pixel", "joint"), run("joint", "decoder")]
    pixels = torch.rand(1, 3, 12, 12) * 2 - 1
    codes = [stage.eval().encode(pixels) for stage in stages]
    assert moved(state(stages[1]), state(stages[0])) and not torch.equal(codes[1], codes[2])
    assert torch.equal(codes[2], codes[3])
    assert stages[3].config.decoder_blocks == 2 * stages[2].config.decoder_blocks
    assert NextFlowImageProcessor.from_pretrained(tmp_path / "decoder").patch_size == model.config.patch_size
    assert (tmp_path / "decoder" / "reconstructions" / "step-2.png").exists()
    assert "eval_psnr" in capsys.readouterr().out
    options = ["--model", str(tmp_path / "joint"), "--images", str(tmp_path / "photos"), "--teacher"]
    for stage, teacher, said in (
        ("pixel", str(tmp_path / "joint"), "--teacher is for the joint stage, not for pixel"),
        ("joint", "nowhere", "there is no model directory nowhere"),
    ):
        assert cli.main(["train", "tokenizer", *options, teacher, "--stage", stage, "--use_cpu"]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    run("joint", "decoder", "empty", status=2)
    assert re.search("empty must hold images", capsys.readouterr().err)
    files = [tmp_path / "photos" / name for name in ("a.png", "more/b.JPG")]
    rows = [{"image": {"bytes": file.read_bytes(), "path": None}} for file in files]
    datasets.Dataset.from_list(rows, datasets.Features({"image": datasets.Image()})).to_parquet(tmp_path / "a.parquet")
    run("tokenizer", "pixel", "a.parquet")
