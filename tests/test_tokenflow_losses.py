"""The tokenizer's losses, their gradients and weights are those of TokenFlow's own code, which made the fixture."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from tests.tiny_models import tiny_config
from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.quantizer import DualCodebookQuantizer
from transformers_nextflow.scales import ScaleSchedule
from transformers_nextflow.training import NextFlowVQTrainer, NextFlowVQTrainingArguments
from transformers_nextflow.training.vq_losses import (
    adaptive_weight,
    adversarial_loss,
    codebook_losses,
    discriminator_loss,
    distillation_loss,
)

with safe_open(Path(__file__).with_name("fixtures") / "tokenflow_losses.safetensors", "pt") as file:
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}
    ABOUT = json.loads(file.metadata()["about"])
SETTINGS, SCRIPT, START = ABOUT["settings"], ABOUT["script"], ABOUT["start"]
TRAINED = [name for name, setting in SETTINGS.items() if setting["training"]]


def equal(got: torch.Tensor, case: str, name: str) -> None:
    """To 1e-6 of the largest number, in both of the code's precisions."""
    for expected in (TENSORS[f"{case}.{name}"], TENSORS[f"{case}.{name}.float64"]):
        error = (got.detach().double() - expected.double()).abs().max()
        assert error <= 1e-6 * expected.abs().max(), f"{case}, {name}: off by {error:.1e}"


class Case:
    """A setting of the fixture in the real quantizer. Without a semantic half it is a pixel stage's."""

    def __init__(self, name: str):
        self.setting, self.tensors = SETTINGS[name], {}
        semantic, pixel = self.setting["dims"]
        self.pixel_only, hidden = semantic == 0, semantic or 3
        config = dict(semantic_dim=hidden, pixel_dim=pixel, semantic_weight=1.0, pixel_weight=1.0)
        config |= dict(codebook_size=self.setting["entries"], normalize_entries=True)
        self.quantizer = DualCodebookQuantizer(SimpleNamespace(**config))
        features, self.direction = TENSORS[f"{name}.features"], TENSORS[f"{name}.direction"]
        self.channels = slice(hidden if self.pixel_only else 0, None)
        with torch.no_grad():
            self.quantizer.pixel_codebook.copy_(TENSORS[f"{name}.pixel_codebook"])
            if self.pixel_only:
                self.quantizer.semantic_codebook.normal_()
                features = F.pad(features, (0, 0, 0, 0, hidden, 0))
            else:
                self.quantizer.semantic_codebook.copy_(TENSORS[f"{name}.semantic_codebook"])
        self.features = features.requires_grad_()
        self.schedule = ScaleSchedule(tuple((edge, edge) for edge in self.setting["edges"]))

    def run(self, **kwargs):
        keep_scales = self.setting["keep_scales"]
        return self.quantizer.quantize(
            self.features, self.schedule, keep_scales=keep_scales, pixel_only=self.pixel_only, **kwargs
        )

    def losses(self, output):
        return codebook_losses(output, self.channels)


def gradient(value: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_codes_sum_and_straight_through_gradient(name):
    case = Case(name)
    output = case.run()
    codes = [output.target_codes[:, case.schedule.slice(scale)] for scale in range(len(case.schedule))]
    codes = torch.cat([code for code, kept in zip(codes, case.setting["keep_scales"]) if kept], dim=1)
    assert torch.equal(codes, TENSORS[f"{name}.codes"])
    quantized = output.quantized[:, case.channels]
    equal(quantized, name, "quantized")
    halves = (case.quantizer.semantic_codebook, case.quantizer.pixel_codebook)
    of_features, *of_entries = gradient((quantized * case.direction).sum(), case.features, *halves)
    equal(of_features[:, case.channels], name, "quantized_gradient")
    assert of_entries == [None, None]


@pytest.mark.parametrize("name", TRAINED)
def test_codebook_and_commitment_loss(name):
    case = Case(name)
    codebook, commitment = case.losses(case.run())
    commitment = case.setting["beta"] * commitment
    equal(codebook, name, "codebook")
    equal(commitment, name, "commitment")
    halves = (case.quantizer.semantic_codebook, case.quantizer.pixel_codebook)
    of_features, of_semantic, of_pixel = gradient(codebook, case.features, *halves)
    assert of_features is None
    equal(of_pixel, name, "pixel_codebook_gradient")
    if case.pixel_only:
        assert of_semantic is None or not of_semantic.any()
    else:
        equal(of_semantic, name, "semantic_codebook_gradient")
    of_features, *of_entries = gradient(commitment, case.features, *halves)
    equal(of_features[:, case.channels], name, "commitment_gradient")
    assert of_entries == [None, None]


@pytest.mark.parametrize("name", TRAINED)
def test_vars_form_is_another(name):
    """So that the comparison above could have failed."""
    case = Case(name)
    output = case.run(codebook_loss="var")
    equal(output.quantized[:, case.channels], name, "quantized")
    (of_features,) = gradient((output.quantized[:, case.channels] * case.direction).sum(), case.features)
    for form in (*case.losses(output), of_features[:, case.channels]):
        assert form.isfinite().all()
    for got, expected in zip(case.losses(output), ("codebook", "commitment")):
        assert (got - TENSORS[f"{name}.{expected}"]).abs() > 1e-2
    assert (of_features[:, case.channels] - TENSORS[f"{name}.quantized_gradient"]).abs().max() > 1e-2


class Difference(nn.Module):
    """The fixture's perceptual network."""

    def forward(self, one, two):
        return (one - two).abs().flatten(1).mean(1)


@pytest.mark.parametrize("step", [START - 1, START])
@pytest.mark.parametrize("adaptive", [False, True], ids=["constant", "adaptive"])
def test_the_whole_objective(adaptive, step, tmp_path):
    values = {"discriminator_start": START, "adaptive_discriminator_weight": adaptive, "stage": "joint"}
    arguments = NextFlowVQTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **values)
    model = NextFlowVQModel(tiny_config().vq_config)
    trainer = NextFlowVQTrainer(model, arguments, teacher=nn.Identity(), perceptual=Difference())
    given = {name: TENSORS[f"adversarial.{name}"] for name in ("pixel_values", "hidden", "estimate", "last_layer")}
    estimate, last_layer = (given[name].requires_grad_() for name in ("estimate", "last_layer"))
    judge = TENSORS["adversarial.judge"].requires_grad_()
    pictures = F.conv2d(given["hidden"], last_layer, padding=1)
    scores = [
        F.conv2d(each, weight, stride=2, padding=1)
        for each, weight in ((pictures, judge.detach()), (given["pixel_values"], judge), (pictures.detach(), judge))
    ]
    case = Case("dual")
    losses = dict(zip(("codebook", "commitment"), case.losses(case.run())))
    losses["reconstruction"] = trainer.reconstruction_loss(pictures, given["pixel_values"])
    losses["distillation"] = distillation_loss(estimate, TENSORS["adversarial.teacher"])
    losses["adversarial"] = adversarial_loss(scores[0])
    weights = arguments.loss_weights(step)
    name = f"{'adaptive' if adaptive else 'constant'}.{step}"
    weight = (
        adaptive_weight(losses["reconstruction"], losses["adversarial"], last_layer) if adaptive else torch.ones(())
    )
    equal(weight, "adversarial", f"{name}.adaptive_weight")
    weights["adversarial"] *= float(weight)
    tokenizer = sum(weights[name] * loss for name, loss in losses.items())
    equal(tokenizer, "adversarial", f"{name}.tokenizer")
    of_estimate, of_last_layer = gradient(tokenizer, estimate, last_layer)
    equal(of_estimate, "adversarial", f"{name}.estimate_gradient")
    equal(of_last_layer, "adversarial", f"{name}.last_layer_gradient")
    discriminator = weights["discriminator"] * discriminator_loss(*scores[1:])
    equal(discriminator, "adversarial", f"{name}.discriminator")
    equal(*gradient(discriminator, judge), "adversarial", f"{name}.judge_gradient")


def test_defaults_are_the_training_scripts(tmp_path):
    arguments = NextFlowVQTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    for option, name in {
        "codebook-weight": "codebook_weight",
        "commit-loss-beta": "commitment_weight",
        "reconstruction-weight": "l2_weight",
        "perceptual-weight": "perceptual_weight",
        "disc-weight": "discriminator_weight",
        "disc-start": "discriminator_start",
        "adaptive": "adaptive_discriminator_weight",
        "lr": "learning_rate",
        "beta1": "adam_beta1",
        "beta2": "adam_beta2",
        "max-grad-norm": "max_grad_norm",
    }.items():
        assert getattr(arguments, name) == SCRIPT[option], name
    assert arguments.codebook_loss == "tokenflow" and SCRIPT["entropy-loss-ratio"] == 0
    assert arguments.weight_decay == 0.0  # the script's 0.05 never reaches its Adam
    assert arguments.lr_scheduler_type == "constant_with_warmup" and not arguments.warmup_steps
