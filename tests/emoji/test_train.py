"""Stages follow each other, and the last one goes on from any model."""

import sys

import torch

from examples.emoji import assemble, train, transformer
from examples.emoji.transformer import TRAININGS, Training
from transformers_nextflow import NextFlowForConditionalGeneration

FEW = Training(24, 848, 1, 2, 1e-3, 1.0, trains="connector_and_head")


def test_the_last_stage_goes_on_from_any_model(
    small_world, small_world_folder, emoji_checkpoint, tmp_path, monkeypatch
):
    """From a checkpoint that holds its vision tokenizer, and from the stage before, which refers to it."""
    monkeypatch.setattr(transformer, "TRAININGS", dict.fromkeys(TRAININGS, FEW))
    first = transformer.train_stage(tmp_path / "first", "alignment", emoji_checkpoint, small_world_folder)
    for name, model in (("from first", first), ("from checkpoint", emoji_checkpoint)):
        arguments = ["--output", tmp_path / name, "--data", small_world_folder, "--model", model]
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        train.main()
        assert {path.name for path in (tmp_path / name).iterdir()} == {"continued-64", "continued-64-data"}
        trained, _, parts = assemble.assemble(tmp_path / name)
        assert parts["transformer"] == "continued-64, finished"
        before = NextFlowForConditionalGeneration.from_pretrained(model)
        assert not torch.equal(trained.code_head.weight, before.code_head.weight)
        pixels = torch.rand(2, 3, 64, 64) * 2 - 1
        assert torch.equal(trained.model.vq_model.encode(pixels), before.model.vq_model.encode(pixels))
