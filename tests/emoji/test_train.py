"""Stages follow each other, and the last one goes on from any model; processes and devices share the work."""

import sys

import pytest
import torch

from examples.emoji import assemble, train, transformer
from examples.emoji.stages import own_share, settings
from examples.emoji.transformer import TRAININGS, Training
from transformers_nextflow import NextFlowForConditionalGeneration

FEW = Training(8, 848, 1, 1, 1e-3, 1.0, trains="connector_and_head")


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
        assert {path.name for path in (tmp_path / name).iterdir()} == {"covering-64", "covering-64-data"}
        trained, _, parts = assemble.assemble(tmp_path / name)
        assert parts["transformer"] == "covering-64, finished"
        before = NextFlowForConditionalGeneration.from_pretrained(model)
        assert not torch.equal(trained.code_head.weight, before.code_head.weight)
        pixels = torch.rand(2, 3, 64, 64) * 2 - 1
        assert torch.equal(trained.model.vq_model.encode(pixels), before.model.vq_model.encode(pixels))


def test_a_step_is_the_same_in_any_number_of_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert own_share(10) == 10
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert own_share(10) == 5
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="the 10 items of a step cannot be shared by 4 processes evenly"):
        own_share(10)


def test_gpus_are_used_where_there_are_some(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for has_gpu, expected in ((False, (True, "gloo")), (True, (False, None))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        values = settings(100, 1e-3)
        assert (values["use_cpu"], values["ddp_backend"]) == expected
